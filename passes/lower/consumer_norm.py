"""Consumer norms: find the RMSNorm or LayerNorm that is the only reader of a mix.

Norms are called, or spelled out in a dozen ways. The region between the mix and what leaves it is taken as a whole: it is a
norm when it computes one, in float64, on rows of very different magnitudes. Analysis only.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnres_fx.passes._compat.graphs import plain_torch, pytree
from attnres_fx.passes.graph.aliases import is_mutation
from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of
from attnres_fx.passes.graph.vocabulary import (
    CASTS,
    LIKENESSES,
    NORM_STEPS,
    RMS_NORMS,
    argument,
    op_name,
)
from attnres_fx.passes.recognize.evaluate import call_neutral, default_eps
from attnres_fx.runtime.norm import Norm

_MOST_STEPS = 24
_LARGEST_EPS = 0.5
_CLOSE = 1e-9


@dataclass(frozen=True)
class ConsumerNorm:
    """A norm as a region of the graph: ``node`` is what leaves it, ``region`` all of its nodes in graph order.

    weight and bias are nodes [d], or None.
    """

    node: fx.Node
    region: tuple[fx.Node, ...]
    centered: bool
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float


def consumer_norm(mix: fx.Node, order: dict[fx.Node, int]) -> ConsumerNorm | None:
    """The norm that alone reads the values of ``mix``, in the dtype of the mix; None if there is none.

    ``order`` numbers the nodes of the graph.
    """
    value = float_tensor(mix)
    if value is None or value.dim() < 2 or not isinstance(value.shape[-1], int):
        return None
    reached = _reached(mix, order)
    for count in range(len(reached), 0, -1):
        region = reached[:count]
        if not _closed(mix, region) or not _same_kind(region[-1], value):
            continue
        found = _confirmed(mix, region)
        if found is not None:
            return found
    return None


def _reached(mix: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """What is computed from the mix by steps that a norm may consist of, in graph order."""
    width = value_of(mix).shape[-1]
    reached: list[fx.Node] = []
    inside = {mix}
    waiting = [(order[user], user) for user in mix.users]
    heapq.heapify(waiting)
    while waiting and len(reached) < _MOST_STEPS:
        _, node = heapq.heappop(waiting)
        if node in inside or not _is_step(node, inside, width):
            continue
        inside.add(node)
        reached.append(node)
        for user in node.users:
            heapq.heappush(waiting, (order[user], user))
    return reached


def _is_step(node: fx.Node, inside: set[fx.Node], width: int) -> bool:
    if node.op not in ("call_function", "call_method") or op_name(node) not in NORM_STEPS or is_mutation(node):
        return False
    # A number that a call decides (an eps that changes) must not be fixed in the operator.
    return all(source in inside or _is_vector(source, width) for source in node.all_input_nodes)


def _is_vector(node: fx.Node, width: int) -> bool:
    value = float_tensor(node)
    return value is not None and same_size(value.shape, [width])


def _closed(mix: fx.Node, region: Sequence[fx.Node]) -> bool:
    """Whether nothing but the last node of ``region`` is read from outside of it."""
    inside = set(region)
    return all(user in inside or (node is mix and op_name(user) in LIKENESSES)
               for node in (mix, *region[:-1]) for user in node.users)


def _same_kind(node: fx.Node, value: Tensor) -> bool:
    made = float_tensor(node)
    return made is not None and made.dtype == value.dtype and same_size(made.shape, value.shape)


def _confirmed(mix: fx.Node, region: Sequence[fx.Node]) -> ConsumerNorm | None:
    """The norm that ``region`` computes, found by running it beside one."""
    inside = {mix, *region}
    width = int(value_of(mix).shape[-1])
    vectors = list(dict.fromkeys(source for node in region for source in node.all_input_nodes
                                 if source not in inside and _is_vector(source, width)))
    if len(vectors) > 2 or (value_of(mix).dtype == torch.float64 and any(op_name(node) in CASTS for node in region)):
        # A float64 model that norms in float32 must not be computed any other way.
        return None
    with plain_torch(), torch.no_grad():
        rows, values = _probe(value_of(mix).dim(), width, len(vectors))
        try:
            env: dict[fx.Node, Any] = {mix: rows, **dict(zip(vectors, values))}
            for node in region:
                env[node] = call_neutral(node, env, {})
        except (RuntimeError, TypeError, ValueError):
            return None  # not a norm: it does not run on rows of this kind
        made = env[region[-1]]
        if not isinstance(made, Tensor) or made.shape != rows.shape:
            return None
        for eps, centered in itertools.product(_epsilons(region), (False, True)):
            standard = Norm(centered, None, None, eps).standard(rows)[0]
            for weight, bias in itertools.product((None, *range(len(vectors))), repeat=2):
                if {weight, bias} - {None} != set(range(len(vectors))):
                    continue
                pick = [None if index is None else values[index] for index in (weight, bias)]
                expected = Norm(centered, pick[0], pick[1], eps).affine(standard)
                if torch.allclose(made, expected, rtol=_CLOSE, atol=_CLOSE):
                    roles = [None if index is None else vectors[index] for index in (weight, bias)]
                    return ConsumerNorm(region[-1], tuple(region), centered, roles[0], roles[1], eps)
    return None


def _probe(rank: int, width: int, vectors: int) -> tuple[Tensor, list[Tensor]]:
    """Rows at which every usual eps shows, a row of zeros among them, and vectors."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.tensor([1.0, 1e-1, 1e-3, 1e-6, 30.0, 0.0], dtype=torch.float64)
    leading = (*(2 for _ in range(rank - 2)), len(magnitudes))
    rows = torch.randn(*leading, width, generator=generator, dtype=torch.float64) + 0.5
    drawn = [torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(vectors)]
    return rows * magnitudes.unsqueeze(-1), drawn


def _epsilons(region: Sequence[fx.Node]) -> list[float]:
    found: dict[float, None] = {}
    for node in region:
        if op_name(node) in RMS_NORMS and argument(node, 3, "eps") is None:
            found.setdefault(default_eps(value_of(argument(node, 0, "input")).dtype))
        for number in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(number, float) and 0 < number <= _LARGEST_EPS:
                found.setdefault(number)
    return [*found, 0.0]
