"""Which tensors stand in a gathered tensor: stacks, concatenations, slices and banks read as lists of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat.symbols import known_int
from attnres_fx.passes.graph.aliases import memory_of, mutations_of
from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of
from attnres_fx.passes.graph.vocabulary import (
    CASTS,
    CONCATENATIONS,
    COPIES,
    CREATIONS,
    ONE_SLICE,
    PERMUTES,
    RESHAPES,
    SLICE_SCATTERS,
    argument,
    op_name,
    passed_through,
    permutation_of,
)

MAX_SOURCES = 1024


@dataclass(frozen=True)
class Row:
    """One source: the value of ``node``, or its slice ``index`` along ``axis``."""

    node: fx.Node
    axis: int | None = None
    index: int = 0


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The traced shape of a tensor; a symbol that has become a number since it was traced is that number."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(_settled(size) for size in value.shape)


def _settled(size: object) -> object:
    if isinstance(size, torch.SymInt):
        known = known_int(size)
        return size if known is None else known
    return size


def row_shape(row: Row) -> tuple[Any, ...]:
    shape = shape_of(row.node)
    return shape if row.axis is None else shape[: row.axis] + shape[row.axis + 1:]


def static_numel(node: fx.Node) -> int | None:
    count = 1
    for size in shape_of(node):
        if not isinstance(size, int):
            return None
        count *= size
    return count


def is_bank(node: fx.Node) -> bool:
    """Whether ``node`` makes a new tensor whose values come from later writes."""
    return op_name(node) in CREATIONS and node.op in ("call_function", "call_method")


def is_symbol(node: fx.Node) -> bool:
    """Whether ``node`` is one or several sizes and not a tensor: a constant as far as a mix is concerned."""
    return isinstance(value_of(node), (int, float, torch.SymInt, torch.SymFloat, torch.Size))


class Facts:
    """Facts about a graph that are needed repeatedly: the order of nodes, and which nodes change which memory in place."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.mutations = mutations_of(graph)

    def changes(self, node: fx.Node, after: int, before: int) -> list[fx.Node]:
        """The in-place operations on the memory of ``node`` that stand between two places of the graph."""
        found = self.mutations.get(memory_of(node)) if self.mutations else None
        return [change for change in found or () if after < self.order[change] < before]


@dataclass(frozen=True)
class _Indexing:
    """An indexing operation that touches one axis: ``kind`` is "select", "slice" or "unsqueeze"."""

    source: fx.Node
    kind: str
    axis: int
    start: int = 0
    stop: int = 0


def _indexing(node: fx.Node) -> _Indexing | None:
    """``node`` as an indexing of one axis by static numbers, or None."""
    name, source = op_name(node), argument(node, 0, "input", node.kwargs.get("self"))
    if not isinstance(source, fx.Node) or not isinstance(value_of(source), torch.Tensor):
        return None
    rank = len(shape_of(source))
    if name == "unsqueeze":
        dim = argument(node, 1, "dim")
        return _Indexing(source, "unsqueeze", dim % (rank + 1)) if isinstance(dim, int) else None
    if name in ONE_SLICE:
        dim = argument(node, 1, "dim", 0)
        if not isinstance(dim, int):
            return None
        axis, size = dim % rank, shape_of(source)[dim % rank]
        if name == "select":
            return _one_axis(source, axis, argument(node, 2, "index"), size)
        start, step = argument(node, 2, "start", 0), argument(node, 4, "step", 1) if name == "slice" else 1
        stop = argument(node, 3, "end", size) if name == "slice" else argument(node, 3, "length")
        start = 0 if start is None else start
        if not isinstance(start, int) or not isinstance(stop, (int, type(None))) or step != 1:
            return None
        stop = start + stop if name == "narrow" and stop is not None else stop
        return _one_axis(source, axis, slice(start, stop), size)
    if name == "getitem":
        index = node.args[1]
        return _getitem(source, index if isinstance(index, tuple) else (index,))
    return None


def _getitem(source: fx.Node, index: tuple[Any, ...]) -> _Indexing | None:
    shape = shape_of(source)
    named = sum(entry is not None and entry is not Ellipsis for entry in index)
    entries: list[object] = []
    for entry in index:
        if entry is Ellipsis:
            entries += [slice(None)] * (len(shape) - named)
        else:
            entries.append(entry)
    found: list[_Indexing] = []
    axis = 0
    for place, entry in enumerate(entries):
        if entry is None:
            found.append(_Indexing(source, "unsqueeze", place))
            continue
        if entry != slice(None):
            one = _one_axis(source, axis, entry, shape[axis])
            if one is None:
                return None
            found.append(one)
        axis += 1
    return found[0] if len(found) == 1 else None


def _one_axis(source: fx.Node, axis: int, entry: object, size: object) -> _Indexing | None:
    if not isinstance(size, int):
        return None
    if isinstance(entry, int) and not isinstance(entry, bool):
        return _Indexing(source, "select", axis, entry % size) if -size <= entry < size else None
    if isinstance(entry, slice):
        if not all(isinstance(part, (int, type(None))) for part in (entry.start, entry.stop, entry.step)):
            return None
        start, stop, step = entry.indices(size)
        return _Indexing(source, "slice", axis, start, max(start, stop)) if step == 1 else None
    return None


@dataclass(frozen=True)
class _Gather:
    axis: int
    rows: tuple[Row, ...]


def widens(node: fx.Node) -> bool:
    """Whether ``node`` is a cast that loses nothing, or a copy."""
    name, inner = op_name(node), passed_through(node)
    if inner is None or name not in CASTS | COPIES:
        return False
    before, after = value_of(inner), value_of(node)
    return bool(torch.promote_types(before.dtype, after.dtype) == after.dtype and same_size(before.shape, after.shape))


def _bare(row: Row) -> Row:
    """A row without the widening casts on it: the mix computes in float32 by itself."""
    node = row.node
    while row.axis is None and widens(node):
        inner = passed_through(node)
        assert inner is not None
        node = inner
    return Row(node, row.axis, row.index)


class Gathers:
    """Reads tensors as lists of rows along an axis, as they stand at a place of the graph."""

    def __init__(self, facts: Facts, at: int) -> None:
        self.facts, self.at = facts, at
        self.known: dict[fx.Node, _Gather | None] = {}

    def of(self, node: fx.Node) -> _Gather | None:
        """The rows that ``node`` was gathered from, if its history shows them. Iterative: banks grow by nesting."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self.known:
                pending.pop()
                continue
            waiting = [part for part in self._parts(current) if part not in self.known]
            if waiting:
                pending += waiting
                continue
            self.known[current] = self._read(current)
            pending.pop()
        return self.known[node]

    def _parts(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose rows must be known before those of ``node``."""
        name = op_name(node)
        if name in CONCATENATIONS:
            parts = argument(node, 0, "tensors")
            return [part for part in parts if isinstance(part, fx.Node)] if isinstance(parts, (list, tuple)) else []
        if name in SLICE_SCATTERS or (name in PERMUTES) or widens(node):
            source = argument(node, 0, "input", node.kwargs.get("self"))
            return [source] if isinstance(source, fx.Node) else []
        indexed = _indexing(node)
        return [indexed.source] if indexed is not None and indexed.kind == "slice" else []

    def along(self, node: fx.Node, axis: int) -> tuple[Row, ...] | None:
        """The rows of ``node`` along ``axis``: those it was gathered from, or else its slices."""
        size = shape_of(node)[axis]
        if not isinstance(size, int) or size > MAX_SOURCES:
            return None
        found = self.known.get(node)
        if found is not None and found.axis == axis and len(found.rows) == size:
            return found.rows
        return tuple(Row(node, axis, index) for index in range(size))

    def _read(self, node: fx.Node) -> _Gather | None:
        name = op_name(node)
        rank = len(shape_of(node))
        if not rank or float_tensor(node) is None:
            return None
        if memory_of(node) is node and self.facts.changes(node, -1, self.at):
            return self._bank(node) if is_bank(node) else None
        if name == "stack":
            parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
            if isinstance(parts, (list, tuple)) and isinstance(dim, int):
                return _Gather(dim % rank, tuple(_bare(Row(part)) for part in parts if isinstance(part, fx.Node)))
            return None
        if name in CONCATENATIONS:
            return self._cat(node, rank)
        if name == "select_scatter":
            base, source = node.args[:2]
            dim, index = argument(node, 2, "dim"), argument(node, 3, "index")
            if not (isinstance(base, fx.Node) and isinstance(source, fx.Node)):
                return None
            rows = self.along(base, dim % rank) if isinstance(dim, int) and isinstance(index, int) else None
            if rows is None:
                return None
            index %= len(rows)
            return _Gather(dim % rank, (*rows[:index], _bare(Row(source)), *rows[index + 1:]))
        if widens(node):
            inner = passed_through(node)
            return self.known.get(inner) if inner is not None else None
        if name in RESHAPES - {"unsqueeze"}:
            return self._split(node, rank)
        if name in PERMUTES:
            return self._permuted(node)
        indexed = _indexing(node)
        if indexed is None or indexed.kind == "select":
            return None
        if indexed.kind == "unsqueeze":
            return _Gather(indexed.axis, (_bare(Row(indexed.source)),))
        rows = self.along(indexed.source, indexed.axis)
        return _Gather(indexed.axis, rows[indexed.start: indexed.stop]) if rows is not None else None

    def _cat(self, node: fx.Node, rank: int) -> _Gather | None:
        parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
            return None
        axis = dim % rank
        if axis == rank - 1:
            return None
        rows: list[Row] = []
        for part in parts:
            if not isinstance(part, fx.Node) or len(shape_of(part)) != rank:
                return None
            found = self.along(part, axis)
            if found is None:
                return None
            rows += found
        return _Gather(axis, tuple(rows)) if len(rows) <= MAX_SOURCES else None

    def _split(self, node: fx.Node, rank: int) -> _Gather | None:
        """A concatenation that is viewed with a new axis, one entry per part: a stack as export decomposes it."""
        joined = passed_through(node)
        if joined is None or op_name(joined) not in CONCATENATIONS or len(shape_of(joined)) != rank - 1:
            return None
        parts, dim = argument(joined, 0, "tensors"), argument(joined, 1, "dim", 0)
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
            return None
        axis, own = dim % (rank - 1), shape_of(node)
        for part in parts:
            shape = shape_of(part) if isinstance(part, fx.Node) else ()
            if len(shape) != rank - 1 or not same_size((*shape[:axis], len(parts), *shape[axis:]), own):
                return None
        return _Gather(axis, tuple(_bare(Row(part)) for part in parts))

    def _permuted(self, node: fx.Node) -> _Gather | None:
        """A permutation that only moves the gathered axis."""
        inner = passed_through(node)
        found = self.known.get(inner) if inner is not None else None
        if inner is None or found is None:
            return None
        order = permutation_of(node)
        others = [place for place in order if place != found.axis]
        return _Gather(order.index(found.axis), found.rows) if others == sorted(others) else None

    def _bank(self, node: fx.Node) -> _Gather | None:
        """A tensor made in the graph whose slices are then written in place: the last value of each slice."""
        rows: tuple[Row, ...] | None = None
        axis = -1
        for change in self.facts.changes(node, -1, self.at):
            if op_name(change) != "setitem" or change.args[0] is not node:
                return None
            index, value = change.args[1], change.args[2]
            written = _getitem(node, index if isinstance(index, tuple) else (index,))
            if written is None or written.kind != "select" or axis not in (-1, written.axis):
                return None
            if not isinstance(value, fx.Node):
                return None
            axis = written.axis
            rows = self.along(node, axis) if rows is None else rows
            shape = shape_of(node)
            if rows is None or not same_size(shape_of(value), shape[:axis] + shape[axis + 1:]):
                return None
            if value_of(value).dtype != value_of(node).dtype:
                return None
            rows = (*rows[: written.start], Row(value), *rows[written.start + 1:])
        return _Gather(axis, rows) if rows is not None else None

    def sources_of(self, value: fx.Node, bare: bool) -> tuple[Row, ...]:
        """The rows behind an operand of the weighted sum; with ``bare`` also through changes of layout."""
        node = value
        while True:
            found = self.of(node)
            if found is not None and found.rows:
                return found.rows
            one = self._selected(node)
            if one is not None:
                return (one,)
            inner = passed_through(node) if bare or op_name(node) in CASTS | COPIES | PERMUTES else None
            if inner is None or (op_name(node) in CASTS and not widens(node)):
                return (_bare(Row(node)),)
            node = inner

    def _selected(self, node: fx.Node) -> Row | None:
        """One slice of a gathered or packed tensor."""
        source = argument(node, 0, "input")
        if op_name(node) == "getitem" and isinstance(source, fx.Node) and isinstance(node.args[1], int):
            if op_name(source) == "unbind" and isinstance(dim := argument(source, 1, "dim", 0), int):
                packed = argument(source, 0, "input", source.kwargs.get("self"))
                if isinstance(packed, fx.Node):
                    self.of(packed)
                    rows = self.along(packed, dim % len(shape_of(packed)))
                    return rows[node.args[1]] if rows is not None else None
        indexed = _indexing(node)
        if indexed is None or indexed.kind != "select":
            return None
        self.of(indexed.source)
        rows = self.along(indexed.source, indexed.axis)
        return rows[indexed.start] if rows is not None else None
