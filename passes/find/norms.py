"""Describe the norms of a stream: where they stand, and which readers see the raw value.

A reader is scale-invariant when its result does not change if the stream is multiplied by c > 0. That is decided by
following the degree of homogeneity k (the value scales as c^k) from the stream through the reader: a norm, spelled as an
operator or by hand, ends at degree 0. A small constant added inside a norm (its eps) is taken as zero.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.nodes import float_tensor
from attnres_fx.passes.graph.vocabulary import (
    ADDITIONS,
    CASTS,
    CLAMPS,
    CONCATENATIONS,
    CONVOLUTIONS,
    DIVISIONS,
    HOMOGENEOUS,
    LIKE_ANOTHER,
    LIKENESSES,
    MULTIPLICATIONS,
    NORMS,
    PLAIN_PRODUCTS,
    POWERS,
    SCALE_FREE,
    SEVERAL_RESULTS,
    SUBTRACTIONS,
    addition_of,
    argument,
    is_contraction,
    op_name,
)

_LARGEST_EPS = 2e-3

# Of the second tensor of these only the dtype or shape is used.
_SAME_AS_FIRST = CASTS | LIKE_ANOTHER

# How far a reader is followed before it counts as raw, in nodes.
_REACH = 400


class _NotHomogeneous(Exception):
    """Internal: the degree of a value cannot be determined."""


def with_norms(stream: Stream, order: dict[fx.Node, int]) -> Stream:
    """``stream`` with its ``raw_readers`` and its ``norm_placement``; ``order`` numbers the nodes of the graph.

    Position 0 has one source, and its mix is the identity: a raw reader of it sees what it always saw.
    """
    uses = [raw_uses(stream, position, order) for position in range(stream.num_layers + 1)]
    raw = tuple((p, culprit) for p, culprits in enumerate(uses) if p > 0 for culprit in culprits)
    return replace(stream, raw_readers=raw, norm_placement=_placement(stream, uses, order))


def raw_uses(stream: Stream, position: int, order: dict[fx.Node, int]) -> list[fx.Node]:
    """The nodes at which position ``position`` is used in a way that is not scale-invariant.

    All readers of the position are followed together: a hand-written norm is several of them.
    """
    return _culprits(stream.values[position], stream.readers[position], _own(stream, position), order)


def _own(stream: Stream, position: int) -> set[fx.Node]:
    """The next addition of the stream, which does not count as a reader of ``position``."""
    if position == stream.num_layers:
        return set()
    return {stream.layers[position].node, *stream.layers[position].inner}


def _culprits(value: fx.Node, readers: Iterable[fx.Node], ignore: set[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    degrees: dict[fx.Node, Fraction] = {value: Fraction(1)}
    waiting = [(order[reader], reader) for reader in readers]
    heapq.heapify(waiting)
    culprits: list[fx.Node] = []
    while waiting:
        _, node = heapq.heappop(waiting)
        if node in ignore or node in degrees or node in culprits:
            continue
        if node.op == "output" or len(degrees) > _REACH:
            culprits.append(node)
            continue
        try:
            degrees[node] = _degree(node, degrees)
        except _NotHomogeneous:
            culprits.append(node)
            continue
        if degrees[node] != 0:
            for user in node.users:
                heapq.heappush(waiting, (order[user], user))
    return culprits


def _degree(node: fx.Node, degrees: dict[fx.Node, Fraction]) -> Fraction:
    """The degree of homogeneity of ``node``; values not followed count as constants."""
    name = op_name(node)

    def of(part: Any) -> Fraction:
        return degrees.get(part, Fraction(0)) if isinstance(part, fx.Node) else Fraction(0)

    inputs = [degrees[i] for i in node.all_input_nodes if degrees.get(i, 0) != 0]
    if not inputs or (float_tensor(node) is None and name not in SEVERAL_RESULTS):
        return Fraction(0)
    first, second = argument(node, 0, "input", node.kwargs.get("self")), argument(node, 1, "other")
    if name in NORMS:
        return Fraction(0) if of(first) != 0 and len(inputs) == 1 else _fail()
    if name in _SAME_AS_FIRST:
        return of(first)
    if name in HOMOGENEOUS:
        return of(first) if len(inputs) == 1 and of(first) != 0 else _fail()
    if name in LIKENESSES or name in SCALE_FREE:
        return Fraction(0)
    if name in MULTIPLICATIONS or name in PLAIN_PRODUCTS:
        return of(first) + of(second)
    if name in DIVISIONS:
        return of(first) - of(second)
    if name in ADDITIONS or name in SUBTRACTIONS:
        if isinstance(first, fx.Node) and isinstance(second, fx.Node):
            return of(first) if of(first) == of(second) else _fail()
        constant = second if isinstance(first, fx.Node) else first
        return inputs[0] if isinstance(constant, (int, float)) and abs(constant) <= _LARGEST_EPS else _fail()
    if name in POWERS:
        return of(first) * Fraction(second).limit_denominator(64) if isinstance(second, (int, float)) else _fail()
    if name == "square":
        return 2 * of(first)
    if name == "var":
        return 2 * of(first)
    if name == "rsqrt":
        return -of(first) / 2
    if name == "sqrt":
        return of(first) / 2
    if name == "reciprocal":
        return -of(first)
    if name in CLAMPS:
        floor = second if second is not None else node.kwargs.get("min")
        small = isinstance(floor, (int, float)) and abs(floor) <= _LARGEST_EPS
        return of(first) if small and node.kwargs.get("max") is None else _fail()
    if name == "linear" or name in CONVOLUTIONS:
        return of(first) if argument(node, 2, "bias") is None and len(inputs) == 1 else _fail()
    if name == "stack" or name in CONCATENATIONS:
        parts = {of(part) for part in node.all_input_nodes}
        return parts.pop() if len(parts) == 1 else _fail()
    return _fail()


def _fail() -> Fraction:
    raise _NotHomogeneous


def _placement(stream: Stream, uses: list[list[fx.Node]], order: dict[fx.Node, int]) -> str:
    """The placement in one word, from the raw uses of every position and from the ends of branches."""
    kinds = {obstacle.kind for obstacle in stream.obstacles}
    if "lanes" in kinds:
        return "hyper"
    if "norm" in kinds:
        return "post"
    if kinds & {"gate", "cell"}:
        return "gated"
    branches_normed = [all(_ends_in_norm(term) for term in layer.terms) for layer in stream.layers]
    # Position 0 may be a normalised embedding; it says something about the layers only if there is no other position.
    inputs = list(enumerate(uses))[1:-1] or [(0, uses[0])]
    raw = [any(culprit.op != "output" and not _normed_after(culprit, _own(stream, position), order) for culprit in culprits)
           for position, culprits in inputs]
    if all(raw):
        return "branch" if all(branches_normed) else "none"
    if any(raw) or (any(branches_normed) and not all(branches_normed)):
        return "mixed"
    if all(branches_normed):
        return "sandwich"
    if sum(layer.branches > 1 for layer in stream.layers) * 2 > stream.num_layers:
        return "parallel"
    return "pre"


def _normed_after(culprit: fx.Node, own: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether ``culprit`` adds something to the value for a reader that norms the sum."""
    return addition_of(culprit) is not None and not any(
        second.op != "output" for second in _culprits(culprit, culprit.users, own, order))


def _ends_in_norm(term: fx.Node) -> bool:
    """Whether the last thing a branch does, before dropout, casts and scaling, is a norm."""
    pending, steps = [term], 0
    seen = {term}
    while pending and steps < 16:
        node = pending.pop(0)
        steps += 1
        name = op_name(node)
        if name in NORMS or name == "rsqrt":
            return True
        if is_contraction(node) or addition_of(node) is not None or node.op in ("placeholder", "get_attr"):
            continue
        for source in node.all_input_nodes:
            if source not in seen and isinstance(float_tensor(source), torch.Tensor):
                seen.add(source)
                pending.append(source)
    return False
