"""What the Triton kernels move: bytes per token, under the choices of the launcher.

Counted is what has to come from and go to memory for a token: rows, and the scalars that one launch leaves for the next.
Parameters and partial rows are left out; they are the same for any number of tokens, stay in the cache, and are counted by
:func:`fixed_bytes`. A test checks all of it against the loads and stores of the kernels in the interpreter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from . import configs


@dataclass(frozen=True)
class Traffic:
    """Bytes read from memory, written, and read once more from a cache."""

    read: float
    written: float
    again: float = 0

    @property
    def loaded(self) -> float:
        """Bytes that kernels load, wherever they come from."""
        return self.read + self.again

    @property
    def total(self) -> float:
        return self.read + self.written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written, self.again + other.again)

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(self.read * factor, self.written * factor, self.again * factor)


@dataclass(frozen=True)
class Mix:
    """One mix: number of sources, width, queries, bytes of a stored element and of an accumulated one.

    ``add``: the last source is formed by the launch, as partial + delta, and in the backward the gradient of this sum from
    its other readers is added. ``norm``: the mix is handed on through a norm, which the backward returns again.
    ``phase``: 1 for a mix of the early sources that keeps the log-sum-exp of every query; 2 for one that goes on from it, by
    ``count`` more sources; None for all at once. ``normalize``: the values are normalised.
    """

    count: int
    width: int
    queries: int = 1
    element: int = 2
    accumulate: int = 4
    add: bool = False
    norm: bool = False
    phase: int | None = None
    normalize: bool = False

    @property
    def row(self) -> int:
        """Bytes of a stored row."""
        return self.width * self.element

    @property
    def early(self) -> int:
        """1 where the row and the log-sum-exp of phase 1 are read, and get gradients; else 0."""
        return int(self.phase == 2)


def _runs(items: int, most: int) -> int:
    return math.ceil(items / most)


def forward(mix: Mix) -> Traffic:
    """Bytes per token of the forward: every source once for each group of queries, the mixes written once."""
    groups = _runs(mix.queries, configs.forward_queries(mix.width, mix.element, mix.normalize))
    launches = _runs(mix.count, configs.forward_sources(mix.phase))
    state = (launches - 1) * mix.queries * (mix.width + 2) * mix.accumulate
    added = groups if mix.add else 0
    lses = mix.queries * mix.accumulate if mix.phase == 1 else 0
    return Traffic((groups * mix.count + added + mix.early) * mix.row + mix.early * mix.accumulate + state,
                   (mix.queries + added) * mix.row + lses + state)


def backward(mix: Mix) -> Traffic:
    """Bytes per token of the backward: gradients of the sources, and sums for those of the parameters."""
    groups = _runs(mix.queries, configs.backward_queries(mix.width))
    total = Traffic(0, 0)
    for group in range(groups):
        queries = (group + 1) * mix.queries // groups - group * mix.queries // groups
        # Several groups add up in the dtype of the statistics, and the sum is rounded by one more copy.
        grad_row = mix.row if groups == 1 else mix.width * mix.accumulate
        prior = mix.count * grad_row if group > 0 else 0
        total += _backward_group(mix, queries, grad_row) + Traffic(prior + mix.add * mix.row, 0)
    if groups > 1:
        total += Traffic(mix.count * mix.width * mix.accumulate, mix.count * mix.row)
    return total


def _is_held(mix: Mix, queries: int, norm: bool) -> bool:
    """Whether one launch of the backward holds all rows of a token."""
    tile = configs.backward_tile(mix.width, mix.count, queries, norm=norm, phase=mix.phase, normalize=mix.normalize)
    return tile is not None


def _is_read_again(mix: Mix, queries: int, norm: bool) -> bool:
    """Whether one launch of the backward reads the rows of a token several times, all but once from the cache."""
    plain = mix.phase is None and not mix.normalize
    shape = configs.Shape("backward", mix.width, mix.count, 1, mix.element, queries, norm, plain)
    return not _is_held(mix, queries, norm) and configs.again_plan(shape) is not None


def _backward_group(mix: Mix, queries: int, grad_row: int) -> Traffic:
    if _is_read_again(mix, queries, mix.norm):
        written = mix.count * grad_row + mix.norm * mix.row
        return Traffic((mix.count + 1) * mix.row, written, (3 if mix.norm else 1) * mix.count * mix.row)
    held = _is_held(mix, queries, mix.norm)
    before_norm, incoming_row = Traffic(0, 0), mix.row
    if mix.norm and held:
        before_norm = Traffic(0, mix.row)
    elif mix.norm:
        # The mix comes first, unrounded; its gradient takes its place, and is what the others read.
        incoming_row = mix.width * mix.accumulate
        mixed = forward(replace(mix, add=False)) + Traffic(0, incoming_row - mix.row)
        before_norm = mixed + Traffic(incoming_row + mix.row, incoming_row + mix.row)
        held = _is_held(mix, queries, norm=False)
    written = mix.count * grad_row + mix.early * mix.row
    if held:
        lses = (queries if mix.phase == 1 else mix.early) * mix.accumulate
        rows = (mix.count + mix.early) * mix.row + queries * incoming_row
        return before_norm + Traffic(rows + lses, written + mix.early * mix.accumulate)
    score_launches = _runs(mix.count, configs.score_sources(mix.width))
    grad_launches = _runs(mix.count, configs.split_sources(mix.width, queries, mix.element, mix.phase, mix.normalize))
    rows = (2 * mix.count + mix.early) * mix.row + (score_launches + grad_launches) * queries * incoming_row
    # The softmax over depth between the launches reads and writes the same scalars a few times more, and the log-sum-exp
    # and its gradient once; torch does it.
    scalars = (mix.count * (2 * queries + 1) + mix.early) * mix.accumulate
    return before_norm + Traffic(rows + scalars, written + scalars)


def one_pass_network(layers: int, per_block: int, width: int, element: int = 2) -> float:
    """Average elements / d moved per token and layer if every mix is one-pass with the addition inside, inference.

    One more mix reads the blocks at the output. What the layers themselves read and write is left out, as in the paper.
    """
    total = 0.0
    for position in range(1, layers + 1):
        # The output of layer `position` is added first (none is read back where it opens a block).
        blocks = 1 + (position - 1) // per_block
        opens = (position - 1) % per_block == 0
        mix = Mix(blocks + 1, width, element=element, add=not opens)
        total += forward(mix).total / mix.row
    return total / layers


def two_phase_network(layers: int, per_block: int) -> float:
    """The paper's own count for Block AttnRes, in d per token and layer: N / S + 5 (Table 1)."""
    return layers / per_block / per_block + 5


def fixed_bytes(mix: Mix, tokens: int) -> dict[str, Traffic]:
    """Parameters and partial rows of one forward and one backward at ``tokens`` tokens (float32 query, no gain)."""
    programs = math.ceil(tokens / configs.forward_tile(mix.width, mix.queries).block_t)
    vector = mix.width * mix.accumulate
    launches = _runs(mix.count, configs.forward_sources(mix.phase))
    result = {"forward": Traffic(programs * launches * mix.queries * vector, 0)}
    held = configs.backward_tile(mix.width, mix.count, mix.queries, phase=mix.phase, normalize=mix.normalize)
    if held is not None:
        partial = configs.programs(tokens, held) * mix.queries * vector
        result["backward"] = Traffic(partial, partial)
        result["reduction"] = Traffic(partial, mix.queries * vector)
    return result
