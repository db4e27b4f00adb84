"""Whether a proposed region computes a mix, decided by running it beside the operator's reference.

The region is run on the CPU in float64, every cast and dtype argument in it neutralised: what is compared is the
mathematics, and a region that casts to float32 differs from the mix by its own roundings only. The free numbers of the
mix are never estimated. The eps and the logit scale are tried from the constants that stand in the region (an eps of a
sum of squares divided by the width, a scale as a product of constants and powers of the width), and a combination counts when
values and all gradients agree at several magnitudes, at a magnitude where the eps dominates, and with a zero row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnres_fx.passes.graph import value_of
from attnres_fx.passes.recognize_structure import Proposal, Row, is_symbol, query_axes, row_shape, shape_of
from attnres_fx.passes.vocabulary import argument, op_name
from attnres_fx.runtime import reference

_CLOSE = 1e-9
_MAGNITUDES = (1e-3, 1.0, 1e3)
_PROBE_MAGNITUDES = (1e-4, 1.0, 1e-2, 1e-3, 1e-6, 10.0)
# Above so many source elements the positions are made fewer, and above the second number nothing is confirmed.
_MANY, _TOO_MANY = 2**19, 2**26
_RESIZED = frozenset({"view", "reshape", "expand", "unflatten", "zeros", "new_zeros", "empty", "new_empty", "full", "new_full",
                      "ones", "new_ones", "broadcast_to"})


@dataclass(frozen=True)
class Meaning:
    """The parameters of ``attnres::mix`` under which a proposal is one.

    ``output`` indexes the proposal's outputs, ``query`` and ``gain`` its vectors; ``query_axis`` is where the output has
    the axis of several queries, and ``scaled`` whether the query is to be multiplied by the proposal's scalars.
    """

    output: int
    query: int
    gain: int | None
    num_queries: int
    transposed: bool
    query_axis: int
    scaled: bool
    eps: float
    logit_scale: float
    normalize_values: bool


@dataclass
class _Inputs:
    """Random values of everything that a region reads: distinct rows, vectors, scalars."""

    rows: dict[Row, Tensor]
    vectors: list[Tensor]
    scalars: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [*self.rows.values(), *self.vectors, *self.scalars]


# ------------------------------------------------------------------------------------------------ running the region


def _hint(size: Any) -> int:
    """The traced number behind a size, without a guard on it."""
    if isinstance(size, torch.SymInt):
        node: Any = size.node
        hint = node.hint if node.hint is not None else 8
        return int(hint)
    return int(size)


def _default_eps(dtype: torch.dtype) -> float:
    """What ``rms_norm`` uses for ``eps=None``: the machine eps of the type it computes in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _neutral(value: Any, sizes: dict[int, int]) -> Any:
    """An argument without dtype and device: everything is float64 on the CPU."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.Size):
        return tuple(sizes.get(_hint(size), _hint(size)) for size in value)
    if isinstance(value, torch.SymInt):
        return sizes.get(_hint(value), _hint(value))
    if isinstance(value, torch.SymFloat):
        return float(value.node.hint)
    return value


class _Region:
    """Evaluates a proposal's region; ``sizes`` replaces traced sizes of positions by smaller ones."""

    def __init__(self, proposal: Proposal, sizes: dict[int, int]) -> None:
        self.proposal, self.sizes = proposal, sizes
        self.leaf_nodes = list(dict.fromkeys(row.node for row in proposal.rows))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(_hint(size) for size in shape_of(node))

    def source_shape(self) -> tuple[int, ...]:
        shape = tuple(_hint(size) for size in row_shape(self.proposal.rows[0]))
        return (*(self.sizes.get(size, size) for size in shape[:-1]), shape[-1])

    def run(self, inputs: _Inputs, until: fx.Node) -> dict[fx.Node, Any]:
        """The values of the region's nodes up to ``until``."""
        env: dict[fx.Node, Any] = {}
        for node in self.leaf_nodes:
            env[node] = self._leaf(node, inputs)
        for node, value in zip([*self.proposal.vectors, *self.proposal.scalars], [*inputs.vectors, *inputs.scalars]):
            env[node] = value.clone()
        for node in self.proposal.region:
            env[node] = self._call(node, env)
            if node is until:
                break
        return env

    def _leaf(self, node: fx.Node, inputs: _Inputs) -> Tensor:
        """The tensor that holds the rows of ``node``: a row itself, or a packed tensor with all its slices."""
        whole = inputs.rows.get(Row(node))
        if whole is not None:
            return whole.clone()
        axis = next(row.axis for row in self.proposal.rows if row.node is node)
        assert axis is not None
        size = self.shape(node)[axis]
        slices = [inputs.rows.get(Row(node, axis, index)) for index in range(size)]
        shape = self.source_shape()
        return torch.stack([torch.ones(shape, dtype=torch.float64) if s is None else s for s in slices], axis)

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        name = op_name(node)

        def argument_of(source: fx.Node) -> Any:
            return env[source] if source in env else value_of(source)

        args, kwargs = fx.map_arg((node.args, node.kwargs), argument_of)
        args, kwargs = torch.utils._pytree.tree_map(lambda value: _neutral(value, self.sizes), (args, kwargs))
        if name in _RESIZED and self.sizes:
            args, kwargs = torch.utils._pytree.tree_map(
                lambda value: self.sizes.get(value, value) if type(value) is int else value, (args, kwargs))
        first = args[0] if args else None
        if name in {"float", "half", "bfloat16", "double"} or (name == "type" and isinstance(first, Tensor)):
            return first.to(torch.float64) if isinstance(first, Tensor) else first
        if name in {"cuda", "cpu"}:
            return first
        if name in {"rms_norm", "_fused_rms_norm"} and argument(node, 3, "eps") is None:
            source = argument(node, 0, "input")
            kwargs = {key: value for key, value in kwargs.items() if key != "eps"}
            return _function(node)(*args[:3], *([None] * (3 - len(args)) if "weight" not in kwargs else []),
                                   eps=_default_eps(value_of(source).dtype), **kwargs)
        if node.op == "call_method":
            return getattr(first, str(node.target))(*args[1:], **kwargs)
        return _function(node)(*args, **kwargs)


def _function(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


# --------------------------------------------------------------------------------------------------- the two sides


def _random_inputs(region: _Region, seed: int, magnitude: Tensor | float, zero_row: bool = False) -> _Inputs:
    """Rows of the given magnitude, a query whose logits are of order one, everything by a generator of our own."""
    generator = torch.Generator().manual_seed(seed)
    proposal = region.proposal
    shape = region.source_shape()

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    rows = {row: draw(*shape) * magnitude for row in dict.fromkeys(proposal.rows)}
    if zero_row:
        for number, value in enumerate(rows.values()):
            if number in (0, len(rows) - 1):
                value.reshape(-1, shape[-1])[number % max(1, math.prod(shape[:-1]))] = 0.0
    size = (2.0 / shape[-1] ** 0.5) ** (1 / len(proposal.vectors))
    vectors = [draw(*region.shape(node)) * size for node in proposal.vectors]
    scalars = [draw(*region.shape(node)).abs() + 0.5 for node in proposal.scalars]
    return _Inputs(rows, vectors, scalars)


def _roles(proposal: Proposal, inputs: _Inputs, meaning: Meaning) -> tuple[Tensor, Tensor | None]:
    """The query and the gain as the operator takes them."""
    width = row_shape(proposal.rows[0])[-1]
    query = inputs.vectors[meaning.query]
    query = query.reshape(width, -1).t() if meaning.transposed else query.reshape(-1, width)
    if meaning.num_queries == 1 and meaning.query_axis < 0:
        query = query.reshape(width)
    if meaning.scaled:
        for scalar in inputs.scalars:
            query = query * scalar.reshape(())
    gain = None if meaning.gain is None else inputs.vectors[meaning.gain].reshape(width)
    return query, gain


def _mixed(proposal: Proposal, inputs: _Inputs, meaning: Meaning) -> Tensor:
    """What ``attnres::mix`` makes of the inputs, in the layout of the proposal's output."""
    query, gain = _roles(proposal, inputs, meaning)
    mixed = reference.mix_forward([inputs.rows[row] for row in proposal.rows], query, gain, meaning.eps, meaning.logit_scale,
                                  meaning.normalize_values, 1.0)
    return mixed.movedim(0, meaning.query_axis) if meaning.query_axis >= 0 else mixed


def _agree(found: Tensor, wanted: Tensor, tolerance: float = _CLOSE) -> bool:
    """Equal relative to the largest element, and undefined at the same places."""
    if found.shape != wanted.shape or not torch.equal(found.isfinite(), wanted.isfinite()):
        return False
    found, wanted = found.nan_to_num(0.0, 0.0, 0.0), wanted.nan_to_num(0.0, 0.0, 0.0)
    if not wanted.numel():
        return True
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) <= tolerance * scale + 1e-14


# ------------------------------------------------------------------------------------------------ the free numbers


def _constants(proposal: Proposal) -> list[float]:
    """The numbers that stand in the region, in order, each once."""
    found: dict[float, None] = {}

    def note(value: Any) -> None:
        if isinstance(value, torch.SymFloat):
            found.setdefault(float(value.node.hint))
        elif isinstance(value, float) and math.isfinite(value):
            found.setdefault(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            found.setdefault(float(value))

    for node in proposal.region:
        name = op_name(node)
        if name in {"rms_norm", "_fused_rms_norm"} and argument(node, 3, "eps") is None:
            note(_default_eps(value_of(argument(node, 0, "input")).dtype))
        torch.utils._pytree.tree_map(note, (node.args, node.kwargs))
        for source in node.all_input_nodes:
            if is_symbol(source) and isinstance(value_of(source), (float, torch.SymFloat)):
                note(value_of(source))
    return list(found)


def _epsilons(constants: Sequence[float], width: int) -> list[float]:
    small = [value for value in constants if 0 < value <= 0.5]
    return [*small, 0.0, *(value / width for value in small)]


def _scales(constants: Sequence[float], width: int) -> Iterator[float]:
    """Factors of the logits: the plain one, the usual one, those that stand in the graph and their products."""
    yielded: set[float] = set()
    useful = [value for value in constants if value not in (0.0, 1.0) and 1e-4 < abs(value) < 1e5][:8]
    useful = [value for value in useful if not (value == int(value) and abs(value) <= 4)] or useful
    factors = [1.0, *useful, *(1.0 / value for value in useful)]
    pairs = [a * b for a, b in itertools.combinations(factors[1:], 2)]
    for power in (1.0, width**-0.5, float(width) ** 0.5):
        for factor in (*factors, *pairs[:40]):
            scale = factor * power
            if scale not in yielded:
                yielded.add(scale)
                yield scale


def _query_forms(proposal: Proposal) -> Iterator[tuple[int, int | None, int, bool]]:
    """(query, gain, number of queries, whether the query is stored as columns): the roles that vectors can play."""
    width = row_shape(proposal.rows[0])[-1]
    count = len(proposal.vectors)
    pairs = [(0, None)] if count == 1 else [(1, 0), (0, 1)] if count == 2 else []
    assert isinstance(width, int)
    for query, gain in pairs:
        sizes = [math.prod(int(size) for size in shape_of(node)) for node in proposal.vectors]  # type: ignore[call-overload]
        if sizes[query] % width or (gain is not None and sizes[gain] != width):
            continue
        queries = sizes[query] // width
        yield query, gain, queries, False
        if queries > 1 and shape_of(proposal.vectors[query])[0] == width:
            yield query, gain, queries, True


def _meanings(proposal: Proposal, region: _Region) -> Iterator[Meaning]:
    """All meanings that agree with the region on one probe, whose positions have very different magnitudes."""
    shape = region.source_shape()
    positions = max(1, math.prod(shape[:-1]))
    magnitude = torch.tensor([_PROBE_MAGNITUDES[i % len(_PROBE_MAGNITUDES)] for i in range(positions)], dtype=torch.float64)
    inputs = _random_inputs(region, 0, magnitude.reshape(*shape[:-1], 1))
    values = region.run(inputs, proposal.outputs[-1])
    width = shape[-1]
    constants = _constants(proposal)
    # The first positions are enough to find the numbers.
    few = _Inputs({row: value.reshape(-1, width)[:12] for row, value in inputs.rows.items()}, inputs.vectors, inputs.scalars)
    for query, gain, queries, transposed in _query_forms(proposal):
        scaled = bool(proposal.scalars)
        for (index, axis, target), normalised in itertools.product(_targets(proposal, values, shape, queries), (False, True)):
            first = Meaning(index, query, gain, queries, transposed, axis, scaled, 0.0, 1.0, normalised)
            for eps, scale in _fitting_numbers(proposal, few, first, target, constants):
                meaning = replace(first, eps=eps, logit_scale=scale)
                if _close_rows(target, _mixed(proposal, few, replace(meaning, query_axis=min(axis, 0)))):
                    yield meaning


def _fitting_numbers(
    proposal: Proposal, inputs: _Inputs, meaning: Meaning, target: Tensor, constants: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """The candidates for (eps, logit scale) that one position does not rule out.

    The weights of that position follow from its value by linear algebra, and from them the scale. It only selects among
    the candidates; a position whose weights are no softmax of the scores selects none.
    """
    rows = torch.stack(list(inputs.rows.values()))
    count, positions, width = rows.shape
    epsilons, scales = _epsilons(constants, width), list(_scales(constants, width))
    if count > width:
        yield from itertools.product(epsilons, scales[:12])
        return
    times = torch.tensor([proposal.rows.count(row) for row in inputs.rows], dtype=torch.float64)
    place = min(1, positions - 1)
    query, gain = _roles(proposal, inputs, meaning)
    query = query.reshape(-1, width)[0]
    here = rows[:, place]
    value = target.reshape(-1, positions, width)[0, place]
    value = value if gain is None or not meaning.normalize_values else value / gain
    parts = torch.linalg.lstsq(here.t(), value.unsqueeze(-1)).solution.squeeze(-1)
    if float((parts @ here - value).abs().max()) > 1e-6 * float(value.abs().max()):
        return
    for eps in epsilons:
        inverse = torch.rsqrt(here.square().mean(-1) + eps)
        weights = parts / inverse if meaning.normalize_values else parts
        if bool((weights < -1e-6).any()) or abs(float(weights.sum()) - 1) > 1e-5:
            continue
        keyed = query if gain is None else query * gain
        seen = weights > 1e-7
        logs, scores = (weights / times)[seen].log(), ((here @ keyed) * inverse)[seen]
        logs, scores = logs - logs.mean(), scores - scores.mean()
        if float(scores.square().sum()) == 0:
            yield eps, scales[0]
            continue
        measured = float((logs * scores).sum() / scores.square().sum())
        yield from ((eps, scale) for scale in scales if abs(scale - measured) <= 1e-4 * abs(measured))


def _targets(
    proposal: Proposal, values: dict[fx.Node, Any], shape: tuple[int, ...], queries: int
) -> list[tuple[int, int, Tensor]]:
    """(output, its query axis, its first positions) for every output of the right shape."""
    found = []
    for index, node in enumerate(proposal.outputs):
        value = values[node]
        if not isinstance(value, Tensor):
            continue
        if queries == 1 and tuple(value.shape) == shape:
            found.append((index, -1, value.reshape(-1, shape[-1])[:12]))
        for axis in query_axes(tuple(value.shape), shape) if queries > 1 else []:
            if value.shape[axis] == queries:
                found.append((index, axis, value.movedim(axis, 0).reshape(queries, -1, shape[-1])[:, :12]))
    return found


def _close_rows(found: Tensor, wanted: Tensor) -> bool:
    """Equality row by row, each relative to its own magnitude."""
    if found.shape != wanted.shape:
        return False
    difference = (found - wanted).abs().amax(-1)
    return bool((difference <= 1e-8 * wanted.abs().amax(-1)).all())


# --------------------------------------------------------------------------------------------------- the confirmation


def _confirmed(proposal: Proposal, region: _Region, meaning: Meaning) -> bool:
    """Values and all gradients at several magnitudes, one near the root of the eps, and with zero rows."""
    root = (math.sqrt(meaning.eps),) if meaning.eps > 0 else ()
    for seed, magnitude in enumerate((*_MAGNITUDES, *root), start=1):
        if not _same(proposal, region, meaning, _random_inputs(region, seed, magnitude)):
            return False
    return _same(proposal, region, meaning, _random_inputs(region, 9, 1.0, zero_row=True))


def _same(proposal: Proposal, region: _Region, meaning: Meaning, inputs: _Inputs) -> bool:
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves()]
    output = proposal.outputs[meaning.output]
    found = region.run(inputs, output)[output]
    wanted = _mixed(proposal, inputs, meaning)
    if not _agree(found.detach(), wanted.detach()):
        return False
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(77), dtype=torch.float64, device="cpu")
    weights = weights.nan_to_num()
    ours = torch.autograd.grad(found, leaves, weights, allow_unused=True)
    theirs = torch.autograd.grad(wanted, leaves, weights, allow_unused=True)
    # A gradient that is missing on one side only would be seen by an optimizer, unless the operator makes it zero anyway.
    alone = len(proposal.rows) == 1
    for a, b, leaf in zip(ours, theirs, leaves):
        a = torch.zeros_like(leaf) if a is None else a
        if b is None and not alone:
            return False
        if not _agree(a, torch.zeros_like(leaf) if b is None else b):
            return False
    return True


def meaning_of(proposal: Proposal) -> Meaning | None:
    """The mix that ``proposal`` computes, confirmed, or None. Leaves no trace: no random state, no gradient, no mode."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.enable_grad(), \
            torch.autocast("cpu", enabled=False), torch._C.DisableTorchFunction():
        for sizes in _size_maps(proposal):
            try:
                region = _Region(proposal, sizes)
                with torch.no_grad():
                    fitting = list(itertools.islice(_meanings(proposal, region), 16))
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError):
                continue  # the region cannot be run at these sizes
            for meaning in _earliest_first(fitting):
                if _confirmed(proposal, region, meaning):
                    return meaning
            return None
    return None


def _earliest_first(meanings: Sequence[Meaning]) -> list[Meaning]:
    return sorted(meanings, key=lambda meaning: meaning.output)


def _size_maps(proposal: Proposal) -> list[dict[int, int]]:
    """Replacements for the traced sizes of positions to try: none, unless the tensors are large."""
    shape = [_hint(size) for size in row_shape(proposal.rows[0])]
    count = len(proposal.rows) * math.prod(shape)
    if count <= _MANY:
        return [{}]
    leading, width = shape[:-1], shape[-1]
    taken = {width, len(proposal.rows), *range(9)}
    small = {size: 2 + index for index, size in enumerate(sorted(set(leading) - taken))}
    whole = math.prod(leading)
    if whole not in taken and whole not in small:
        small[whole] = math.prod(small.get(size, size) for size in leading)
    return [small, {}] if count <= _TOO_MANY else [small]
