"""Where a hand-written mix may stand: around a softmax, sources that its weights multiply and that its logits read.

This half of recognition only proposes; whether a proposal computes a mix is decided by ``recognize_confirm``. Axes are
followed only as far as needed to know *which* tensors are gathered. Everything else about layout (where the stacked axis
stands, how the sum is contracted) is left to the numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of
from attnres_fx.passes.graph.vocabulary import (
    ATTENTION,
    CONCATENATIONS,
    DROPOUTS,
    LOGIT_STEPS,
    PRODUCTS,
    SCORINGS,
    SOFTMAXES,
    argument,
    is_active_dropout,
    op_name,
)
from attnres_fx.passes.recognize.closure import ALLOWED, Closure, Proposal, close_over, logits_of
from attnres_fx.passes.recognize.gather import MAX_SOURCES, Facts, Gathers, Row, row_shape, shape_of, static_numel


def _forward(anchor: fx.Node, facts: Facts, limit: int, dropout: bool) -> Iterator[fx.Node]:
    """What depends on ``anchor`` through operations a mix may consist of, in graph order, at most ``limit`` nodes."""
    walked = ALLOWED - {"linear", ATTENTION}
    heap, seen = [(facts.order[anchor], anchor.name, anchor)], {anchor}
    while heap and limit > 0:
        _, _, node = heapq.heappop(heap)
        limit -= 1
        yield node
        for user in node.users:
            name = op_name(user)
            if user in seen or user.op not in ("call_function", "call_method"):
                continue
            if name in walked or (name in DROPOUTS and (dropout or not is_active_dropout(user))):
                seen.add(user)
                heapq.heappush(heap, (facts.order[user], user.name, user))


def is_anchor(node: fx.Node) -> bool:
    """Whether the weights of a mix may be made at ``node``: a softmax, its numerator, or an attention over few rows."""
    name = op_name(node)
    if node.op not in ("call_function", "call_method"):
        return False
    if name in SOFTMAXES or name == "exp":
        return float_tensor(argument(node, 0, "input", node.kwargs.get("self"))) is not None
    return name == ATTENTION and float_tensor(node) is not None


def expected_rows(anchor: fx.Node) -> tuple[int, ...] | None:
    """How many sources a mix at ``anchor`` may have (without a softmax: one of its sizes), or None if it cannot be one."""
    if op_name(anchor) == ATTENTION:
        values = argument(anchor, 2, "value")
        sizes: Sequence[Any] = shape_of(values)[-2:-1] if isinstance(values, fx.Node) else ()
    elif op_name(anchor) not in SOFTMAXES:
        sizes = shape_of(anchor)
    else:
        dim, shape = argument(anchor, 1, "dim"), shape_of(anchor)
        sizes = [shape[dim]] if isinstance(dim, int) and -len(shape) <= dim < len(shape) else []
    fitting = tuple(size for size in sizes if isinstance(size, int) and 0 < size <= MAX_SOURCES)
    return fitting or None


def summed(
    anchor: fx.Node, facts: Facts, sizes: tuple[int, ...], dropout: bool = False
) -> tuple[list[list[tuple[Row, ...]]], list[fx.Node]]:
    """The operands that the weights of ``anchor`` multiply: ways to read them as rows; and everything that depends on it."""
    limit = 24 + 8 * max(sizes)
    dependent: list[fx.Node] = []
    values: list[fx.Node] = []
    if op_name(anchor) == ATTENTION:
        value = argument(anchor, 2, "value")
        values = [value] if isinstance(value, fx.Node) else []
    inside: set[fx.Node] = set()
    rows_found = 0
    reader = Gathers(facts, facts.order[anchor])
    for node in _forward(anchor, facts, limit, dropout):
        dependent.append(node)
        inside.add(node)
        if node is anchor or op_name(node) not in PRODUCTS or rows_found in sizes or op_name(anchor) == ATTENTION:
            continue
        for other in _tensor_inputs(node):
            if other in inside or len(shape_of(other)) < 2 or static_numel(other) == 1:
                continue
            values.append(other)
            rows_found += len(reader.sources_of(other, bare=True))
    ways: list[list[tuple[Row, ...]]] = []
    for operands in (values, values[:1]):
        for bare in (True, False):
            way = [reader.sources_of(value, bare=bare) for value in operands]
            if way and way not in ways:
                ways.append(way)
    return ways, dependent


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []

    def note(value: fx.Node) -> fx.Node:
        if float_tensor(value) is not None:
            found.append(value)
        return value

    fx.map_arg((node.args, node.kwargs), note)
    return found


def single_entries(node: fx.Node, facts: Facts, width: int, limit: int = 24) -> Iterator[fx.Node]:
    """The tensors that ``node`` is made from alone, by operations a norm consists of, nearest first."""
    closure = Closure(facts, frozenset(), width, limit)
    heap, seen = [(-facts.order[node], node.name, node)], {node}
    while heap and limit > 0:
        limit -= 1
        _, _, current = heapq.heappop(heap)
        if not heap and current is not node:
            yield current
        if not closure.allows(current) or op_name(current) in CONCATENATIONS | {"stack"}:
            return
        for source in current.all_input_nodes:
            value = value_of(source)
            if source in seen or not isinstance(value, torch.Tensor) :
                continue
            if closure.small(source) and not closure.allows(source):
                continue
            seen.add(source)
            heapq.heappush(heap, (-facts.order[source], source.name, source))


def _packed(rows: Sequence[tuple[Row, ...]], sizes: tuple[int, ...]) -> Iterator[tuple[Row, ...]]:
    """The source lists that operands stand for: their rows, or the slices of a single packed tensor along some axis."""
    flat = tuple(row for part in rows for row in part)
    if len(flat) in sizes and all(same_size(row_shape(row), row_shape(flat[0])) for row in flat):
        yield flat
    if len(flat) == 1 and flat[0].axis is None:
        shape = shape_of(flat[0].node)
        for axis in range(len(shape) - 1):
            count = shape[axis]
            if isinstance(count, int) and count in sizes and len(shape) > 2:  # testing a symbol would fix it
                yield tuple(Row(flat[0].node, axis, index) for index in range(count))


def _plausible(anchor: fx.Node, facts: Facts) -> bool:
    """Whether the scores may come from parameters: a first look that lets ordinary attention and routers go at once."""
    if op_name(anchor) == ATTENTION:
        query = argument(anchor, 0, "query")
        return isinstance(query, fx.Node) and _from_parameters(query, facts)
    pending, seen = logits_of(anchor), set(logits_of(anchor))
    while pending and len(seen) < 24:
        node = pending.pop()
        name = op_name(node)
        if name in SCORINGS:
            operands = _tensor_inputs(node)[-1:] if name == "linear" else _tensor_inputs(node)
            return any(_from_parameters(operand, facts) for operand in operands)
        if name not in LOGIT_STEPS:
            continue
        fresh = [source for source in _tensor_inputs(node) if source not in seen]
        seen.update(fresh)
        pending += fresh
    return True


def _from_parameters(node: fx.Node, facts: Facts) -> bool:
    width = shape_of(node)[-1] if shape_of(node) else None
    widest = max((size for size in shape_of(node)[-2:] if isinstance(size, int)), default=0)
    return isinstance(width, int) and Closure(facts, frozenset(), max(widest, 1), 24).grow(node)


def proposals(anchor: fx.Node, facts: Facts) -> Iterator[Proposal]:
    """What the graph around ``anchor`` may be, likeliest first: raw values, then normalised ones."""
    sizes = expected_rows(anchor)
    if sizes is None or not _plausible(anchor, facts):
        return
    ways, dependent = summed(anchor, facts, sizes)
    seen: set[tuple[Row, ...]] = set()
    for way in ways:
        for rows in _packed(way, sizes):
            if rows not in seen:
                seen.add(rows)
                yield from close_over(anchor, rows, dependent, facts)
    for way in ways:
        for rows in unnormalised(anchor, way, sizes, facts):
            if rows not in seen:
                seen.add(rows)
                yield from close_over(anchor, rows, dependent, facts)


def unnormalised(
    anchor: fx.Node, way: Sequence[tuple[Row, ...]], sizes: tuple[int, ...], facts: Facts
) -> Iterator[tuple[Row, ...]]:
    """Source lists whose norms are the operands of the sum."""
    reader = Gathers(facts, facts.order[anchor])
    flat = [row for part in way for row in part]
    if any(row.axis is not None for row in flat) or not flat:
        return
    width = shape_of(flat[0].node)[-1] if shape_of(flat[0].node) else None
    if not isinstance(width, int) or width < 1:
        return
    if len(flat) == 1:
        for entry in single_entries(flat[0].node, facts, width):
            for bare in (True, False):
                yield from _packed([reader.sources_of(entry, bare)], sizes)
        return
    entries = [list(single_entries(row.node, facts, width))[:3] for row in flat]
    for depth in range(min(map(len, entries))):
        yield from _packed([reader.sources_of(found[depth], False) for found in entries], sizes)
