"""Where a hand-written mix may stand: gathered sources, the closed subgraph between them and a softmax, its outputs.

This half of recognition only proposes. A :class:`Proposal` names sources, the small vectors beside them (query, gain) and
a region of nodes that needs nothing else; whether the region computes a mix is decided by ``recognize_confirm``.
Axes are followed only as far as needed to know *which* tensors are gathered. Everything else about layout (where the
stacked axis stands, how the sum is contracted) is left to the numerical confirmation.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attnres_fx.passes.graph import float_tensor, same_size, value_of
from attnres_fx.passes.vocabulary import (
    CASTS,
    COPIES,
    PERMUTES,
    RESHAPES,
    argument,
    is_active_dropout,
    is_mutation,
    op_name,
    passed_through,
    viewed,
)

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
ATTENTION = "scaled_dot_product_attention"
MAX_SOURCES = 1024
MAX_QUERIES = 16

_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__", "rmul", "imul", "multiply", "matmul", "__matmul__", "bmm", "mm", "mv", "dot",
                       "inner", "einsum", "tensordot", "addcmul", "baddbmm", "addbmm", "mul_"})
_ARITHMETIC = frozenset({
    "add", "__add__", "__radd__", "radd", "iadd", "add_", "sub", "__sub__", "rsub", "isub", "sub_", "div", "truediv",
    "__truediv__", "itruediv", "div_", "rtruediv", "true_divide", "divide", "pow", "__pow__", "pow_", "rpow", "square", "square_", "sqrt",
    "sqrt_", "rsqrt", "rsqrt_", "reciprocal", "neg", "exp", "exp_", "log", "sum", "mean", "amax", "max", "logsumexp", "norm",
    "vector_norm", "linalg_vector_norm", "maximum", "clamp", "clamp_min", "rms_norm", "_fused_rms_norm", "normalize",
    "log_softmax", "var", "abs", "tanh", "masked_fill", "where",
})
_LAYOUT = CASTS | COPIES | RESHAPES | PERMUTES | frozenset({
    "expand", "expand_as", "broadcast_to", "stack", "cat", "concat", "concatenate", "unbind", "getitem", "select", "slice", "narrow", "chunk",
    "split", "tensor_split", "split_with_sizes", "index_select", "select_scatter", "slice_scatter", "setitem", "copy_",
    "sum_to_size", "T", "getattr", "detach", "repeat",
})
_CREATION = frozenset({"zeros", "new_zeros", "empty", "new_empty", "zeros_like", "empty_like", "full", "new_full", "ones",
                       "new_ones", "ones_like", "full_like", "tensor", "scalar_tensor", "arange"})
_ALLOWED = _PRODUCTS | _ARITHMETIC | _LAYOUT | _CREATION | SOFTMAX | {"linear", ATTENTION}
_BANKS = _CREATION - {"tensor", "arange", "scalar_tensor"}


@dataclass(frozen=True)
class Row:
    """One source: the value of ``node``, or its slice ``index`` along ``axis``."""

    node: fx.Node
    axis: int | None = None
    index: int = 0


@dataclass(frozen=True)
class Proposal:
    """A closed region of the graph that may be a mix.

    ``region`` holds the nodes to evaluate in graph order; what they read besides each other are the nodes of ``rows``,
    the ``vectors`` (a query, a gain) and the ``scalars`` (a learned factor). ``outputs`` are the nodes that may be the mixed value.
    """

    anchor: fx.Node
    rows: tuple[Row, ...]
    vectors: tuple[fx.Node, ...]
    scalars: tuple[fx.Node, ...]
    region: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def shape_of(node: fx.Node) -> tuple[object, ...]:
    """The traced shape of a tensor; a symbol that has become a number since it was traced is that number."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(_settled(size) for size in value.shape)


def _settled(size: object) -> object:
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return size if known is None else known
    return size


def row_shape(row: Row) -> tuple[object, ...]:
    shape = shape_of(row.node)
    return shape if row.axis is None else shape[: row.axis] + shape[row.axis + 1:]


def _static_numel(node: fx.Node) -> int | None:
    count = 1
    for size in shape_of(node):
        if not isinstance(size, int):
            return None
        count *= size
    return count


class Facts:
    """What is asked of a graph again and again: the order of nodes, and who changes which memory in place."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.mutations: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op in ("call_function", "call_method") and is_mutation(node):
                target = argument(node, 0, "input", node.kwargs.get("self"))
                if isinstance(target, fx.Node):
                    self.mutations.setdefault(memory_of(target), []).append(node)

    def changes(self, node: fx.Node, after: int, before: int) -> list[fx.Node]:
        """The in-place operations on the memory of ``node`` that stand between two places of the graph."""
        found = self.mutations.get(memory_of(node)) if self.mutations else None
        return [change for change in found or () if after < self.order[change] < before]


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` may share: through views, and through operations that return what they changed."""
    while True:
        source = viewed(node)
        if source is None and op_name(node) != "setitem" and node.op != "placeholder" and is_mutation(node):
            first = argument(node, 0, "input", node.kwargs.get("self"))
            source = first if isinstance(first, fx.Node) else None
        if source is None or not isinstance(value_of(source), (torch.Tensor, list, tuple)):
            return node
        node = source


# ---------------------------------------------------------------------------------------------- which rows are gathered


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
    if name in {"select", "narrow", "slice"}:
        dim = argument(node, 1, "dim", 0)
        if not isinstance(dim, int):
            return None
        axis, size = dim % rank, shape_of(source)[dim % rank]
        if name == "select":
            return _one_axis(source, axis, argument(node, 2, "index"), size)
        start = argument(node, 2, "start", 0) or 0
        stop = argument(node, 3, "end", size) if name == "slice" else start + argument(node, 3, "length")
        if name == "slice" and argument(node, 4, "step", 1) != 1:
            return None
        return _one_axis(source, axis, slice(start, stop), size)
    if name == "getitem":
        index = node.args[1]
        return _getitem(source, index if isinstance(index, tuple) else (index,))
    return None


def _getitem(source: fx.Node, index: tuple[object, ...]) -> _Indexing | None:
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
    if isinstance(entry, slice) and all(isinstance(part, (int, type(None))) for part in (entry.start, entry.stop, entry.step)):
        start, stop, step = entry.indices(size)
        return _Indexing(source, "slice", axis, start, max(start, stop)) if step == 1 else None
    return None


@dataclass(frozen=True)
class _Gather:
    axis: int
    rows: tuple[Row, ...]


def _widens(node: fx.Node) -> bool:
    """Whether ``node`` is a cast that loses nothing, or a copy."""
    name, inner = op_name(node), passed_through(node)
    if inner is None or name not in CASTS | COPIES:
        return False
    before, after = value_of(inner), value_of(node)
    return bool(torch.promote_types(before.dtype, after.dtype) == after.dtype and same_size(before.shape, after.shape))


def _bare(row: Row) -> Row:
    """A row without the widening casts on it: the mix computes in float32 by itself."""
    node = row.node
    while row.axis is None and _widens(node):
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
        """The rows that ``node`` was gathered from, if its history says so. Iterative: banks grow by nesting."""
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
        if name in {"cat", "concat", "concatenate"}:
            parts = argument(node, 0, "tensors")
            return [part for part in parts if isinstance(part, fx.Node)] if isinstance(parts, (list, tuple)) else []
        if name in {"select_scatter", "slice_scatter"} or (name in PERMUTES) or _widens(node):
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
        if self.facts.changes(node, -1, self.at):
            return self._bank(node) if is_bank(node) else None
        if name == "stack":
            parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
            if isinstance(parts, (list, tuple)) and isinstance(dim, int):
                return _Gather(dim % rank, tuple(_bare(Row(part)) for part in parts if isinstance(part, fx.Node)))
            return None
        if name in {"cat", "concat", "concatenate"}:
            return self._cat(node, rank)
        if name == "select_scatter":
            base, source = node.args[:2]
            dim, index = argument(node, 2, "dim"), argument(node, 3, "index")
            if not (isinstance(base, fx.Node) and isinstance(source, fx.Node) and isinstance(dim, int) and isinstance(index, int)):
                return None
            rows = self.along(base, dim % rank)
            if rows is None:
                return None
            index %= len(rows)
            return _Gather(dim % rank, (*rows[:index], _bare(Row(source)), *rows[index + 1:]))
        if _widens(node):
            inner = passed_through(node)
            return self.known.get(inner) if inner is not None else None
        if name in RESHAPES - {"unsqueeze"}:
            return self._split(node, rank)
        if name in PERMUTES:
            return self._permuted(node, rank)
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
        """A concatenation that is viewed with a new axis, one entry a part: a stack as export decomposes it."""
        joined = passed_through(node)
        if joined is None or op_name(joined) not in {"cat", "concat", "concatenate"} or len(shape_of(joined)) != rank - 1:
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

    def _permuted(self, node: fx.Node, rank: int) -> _Gather | None:
        """A permutation that only moves the gathered axis."""
        inner = passed_through(node)
        found = self.known.get(inner) if inner is not None else None
        if inner is None or found is None:
            return None
        probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
        try:
            arguments = [probe if arg is inner else arg for arg in node.args]
            if node.op == "call_method":
                moved = getattr(probe, str(node.target))(*arguments[1:], **node.kwargs)
            else:
                moved = node.target(*arguments, **{k: probe if v is inner else v for k, v in node.kwargs.items()})  # type: ignore[operator]
        except Exception:
            return None
        order = [size - 2 for size in moved.shape]
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
            if written is None or written.kind != "select" or axis not in (-1, written.axis) or not isinstance(value, fx.Node):
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
            if inner is None or (op_name(node) in CASTS and not _widens(node)):
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


# ------------------------------------------------------------------------------------------------- the closed subgraph


class _Closure:
    """The set of nodes that need nothing but the leaves and small vectors; grown from one node at a time."""

    def __init__(self, facts: Facts, leaves: frozenset[fx.Node], width: int, budget: int) -> None:
        self.facts, self.leaves, self.width, self.budget = facts, leaves, width, budget
        self.inside: set[fx.Node] = set()
        self.cuts: set[fx.Node] = set()

    def grow(self, node: fx.Node) -> bool:
        """Add ``node`` and what it needs, in-place changes before it included; False (nothing added) if it is not closed."""
        inside: set[fx.Node] = set()
        cuts: set[fx.Node] = set()
        before = self.facts.order[node]
        pending = [node]
        if self.facts.mutations:
            for known in self.inside:
                pending += self.facts.changes(known, -1, before)
        while pending:
            current = pending.pop()
            if current in self.leaves or current in self.inside or current in inside or current in self.cuts or current in cuts:
                continue
            if not self._allowed(current):
                if not self.small(current):
                    return False
                cuts.add(current)
                continue
            inside.add(current)
            if len(inside) + len(self.inside) > self.budget:
                return False
            pending += [source for source in current.all_input_nodes if not is_symbol(source)]
            if self.facts.mutations:
                pending += self.facts.changes(current, -1, before)
        self.inside |= inside
        self.cuts |= cuts
        return True

    def small(self, node: fx.Node) -> bool:
        """Whether ``node`` is a scalar or a few vectors of the sources' width: a parameter of the mix."""
        count = _static_numel(node) if float_tensor(node) is not None else None
        return count is not None and (count == 1 or (count % self.width == 0 and count <= MAX_QUERIES * self.width))

    def _allowed(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method"):
            return False
        name = op_name(node)
        if name in {"dropout", "native_dropout"}:
            return not is_active_dropout(node)
        if name == "linear":
            weight = argument(node, 1, "weight")
            return isinstance(weight, fx.Node) and self.small(weight)
        return name in _ALLOWED


def is_bank(node: fx.Node) -> bool:
    """Whether ``node`` makes a new tensor whose values come from later writes."""
    return op_name(node) in _BANKS and node.op in ("call_function", "call_method")


def is_symbol(node: fx.Node) -> bool:
    """Whether ``node`` is a size, or several, and no tensor: a constant as far as a mix is concerned."""
    return isinstance(value_of(node), (int, float, torch.SymInt, torch.SymFloat, torch.Size))


def _forward(anchor: fx.Node, facts: Facts, limit: int) -> Iterator[fx.Node]:
    """What depends on ``anchor`` through operations a mix may consist of, in graph order, at most ``limit`` nodes."""
    heap, seen = [(facts.order[anchor], anchor.name, anchor)], {anchor}
    while heap and limit > 0:
        _, _, node = heapq.heappop(heap)
        limit -= 1
        yield node
        for user in node.users:
            name = op_name(user)
            if user in seen or user.op not in ("call_function", "call_method"):
                continue
            if name in _ALLOWED - {"linear", ATTENTION} or (name in {"dropout", "native_dropout"} and not is_active_dropout(user)):
                seen.add(user)
                heapq.heappush(heap, (facts.order[user], user.name, user))


def is_anchor(node: fx.Node) -> bool:
    """Whether the weights of a mix may be made at ``node``: a softmax, its numerator, or an attention over few rows."""
    name = op_name(node)
    if node.op not in ("call_function", "call_method"):
        return False
    if name in SOFTMAX or name == "exp":
        return float_tensor(argument(node, 0, "input", node.kwargs.get("self"))) is not None
    return name == ATTENTION and float_tensor(node) is not None


def _expected_rows(anchor: fx.Node) -> tuple[int, ...] | None:
    """How many sources a mix at ``anchor`` may have (for an exponential: one of its sizes), or None if it cannot be one."""
    if op_name(anchor) == ATTENTION:
        values = argument(anchor, 2, "value")
        sizes: Sequence[object] = shape_of(values)[-2:-1] if isinstance(values, fx.Node) else ()
    elif op_name(anchor) == "exp":
        sizes = shape_of(anchor)
    else:
        dim, shape = argument(anchor, 1, "dim"), shape_of(anchor)
        sizes = [shape[dim]] if isinstance(dim, int) and -len(shape) <= dim < len(shape) else []
    fitting = tuple(size for size in sizes if isinstance(size, int) and 0 < size <= MAX_SOURCES)
    return fitting or None


def _summed(anchor: fx.Node, facts: Facts, sizes: tuple[int, ...]) -> tuple[list[list[tuple[Row, ...]]], list[fx.Node]]:
    """The operands that the weights of ``anchor`` multiply: ways to read them as rows; and all that depends on it."""
    limit = 24 + 8 * max(sizes)
    dependent: list[fx.Node] = []
    values: list[fx.Node] = []
    if op_name(anchor) == ATTENTION:
        value = argument(anchor, 2, "value")
        values = [value] if isinstance(value, fx.Node) else []
    inside: set[fx.Node] = set()
    rows_found = 0
    reader = Gathers(facts, facts.order[anchor])
    for node in _forward(anchor, facts, limit):
        dependent.append(node)
        inside.add(node)
        if node is anchor or op_name(node) not in _PRODUCTS or rows_found in sizes or op_name(anchor) == ATTENTION:
            continue
        for other in _tensor_inputs(node):
            if other in inside or len(shape_of(other)) < 2 or _static_numel(other) == 1:
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


def _single_entries(node: fx.Node, facts: Facts, width: int, limit: int = 24) -> Iterator[fx.Node]:
    """The tensors that ``node`` is made from alone, by operations a norm consists of, nearest first."""
    closure = _Closure(facts, frozenset(), width, limit)
    heap, seen = [(-facts.order[node], node.name, node)], {node}
    while heap and limit > 0:
        limit -= 1
        _, _, current = heapq.heappop(heap)
        if not heap and current is not node:
            yield current
        if not closure._allowed(current) or op_name(current) in {"stack", "cat", "concat"}:
            return
        for source in current.all_input_nodes:
            value = value_of(source)
            if source in seen or not isinstance(value, torch.Tensor) or source.op == "placeholder" and closure.small(source):
                continue
            if closure.small(source) and not closure._allowed(source):
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
            if shape[axis] in sizes and len(shape) > 2:
                yield tuple(Row(flat[0].node, axis, index) for index in range(int(shape[axis])))  # type: ignore[call-overload]


def proposals(anchor: fx.Node, facts: Facts) -> Iterator[Proposal]:
    """What the graph around ``anchor`` may be, likeliest first: raw values, then normalised ones."""
    sizes = _expected_rows(anchor)
    if sizes is None:
        return
    ways, dependent = _summed(anchor, facts, sizes)
    seen: set[tuple[Row, ...]] = set()
    for way in ways:
        for rows in _packed(way, sizes):
            if rows not in seen:
                seen.add(rows)
                yield from _close(anchor, rows, dependent, facts)
    for way in ways:
        for rows in _unnormalised(anchor, way, sizes, facts):
            if rows not in seen:
                seen.add(rows)
                yield from _close(anchor, rows, dependent, facts)


def _unnormalised(
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
        for entry in _single_entries(flat[0].node, facts, width):
            for bare in (True, False):
                yield from _packed([reader.sources_of(entry, bare)], sizes)
        return
    entries = [list(_single_entries(row.node, facts, width))[:3] for row in flat]
    for depth in range(min(map(len, entries))):
        yield from _packed([reader.sources_of(found[depth], False) for found in entries], sizes)


def _close(anchor: fx.Node, rows: tuple[Row, ...], dependent: Sequence[fx.Node], facts: Facts) -> Iterator[Proposal]:
    """The proposals with these sources, if the logits and some output need nothing but them and small vectors.

    Outputs that read the same vectors share a proposal: what follows a mix (the gain of the next norm) starts another.
    """
    shape = row_shape(rows[0])
    if not shape or not isinstance(shape[-1], int) or shape[-1] < 1:
        return
    leaves = frozenset(row.node for row in rows)
    closure = _Closure(facts, leaves, shape[-1], 64 + 48 * len(rows))
    if anchor in leaves or not closure.grow(anchor):
        return
    outputs: list[fx.Node] = []
    for node in dependent:
        cuts, inside = set(closure.cuts), set(closure.inside)
        if node in leaves or not (node in closure.inside or closure.grow(node)):
            continue
        if closure.cuts != cuts:
            if outputs:
                yield from _cut(anchor, rows, inside, outputs, closure, facts)
                outputs = []
            if sum(_static_numel(cut) != 1 for cut in closure.cuts) > 3:
                return
        if _fits(node, shape):
            outputs.append(node)
    if outputs:
        yield from _cut(anchor, rows, closure.inside, outputs, closure, facts)


def _fits(node: fx.Node, shape: tuple[object, ...]) -> bool:
    """Whether ``node`` has the shape of a source, or of several with one further axis."""
    own = shape_of(node)
    if float_tensor(node) is None:
        return False
    return same_size(own, shape) or bool(query_axes(own, shape))


def query_axes(own: tuple[object, ...], shape: tuple[object, ...]) -> list[int]:
    """The axes of ``own`` that can be the queries' where a source has ``shape``."""
    if len(own) != len(shape) + 1:
        return []
    return [axis for axis in range(len(own) - 1)
            if isinstance(own[axis], int) and own[axis] <= MAX_QUERIES  # type: ignore[operator]
            and same_size(own[:axis] + own[axis + 1:], shape)]


def _cut(
    anchor: fx.Node, rows: tuple[Row, ...], inside: set[fx.Node], outputs: Sequence[fx.Node], closure: _Closure, facts: Facts
) -> Iterator[Proposal]:
    """Split a closed set into what depends on the sources and the parameters that enter there."""
    ordered = sorted(inside, key=facts.order.__getitem__)
    dependent: set[fx.Node] = set(closure.leaves)
    for node in ordered:
        if any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
            target = argument(node, 0, "input", node.kwargs.get("self"))
            if isinstance(target, fx.Node) and is_mutation(node):
                dependent.update(name for name in inside if memory_of(name) is memory_of(target))
    region = [node for node in ordered if node in dependent]
    reached, entering = set(region), []
    for node in region:  # grows while it is read
        for source in node.all_input_nodes:
            if source in dependent or source in reached or is_symbol(source):
                continue
            reached.add(source)
            if source in inside and not _is_parameter(source, closure):
                region.append(source)
            else:
                entering.append(source)
    if any(_static_numel(node) is None for node in entering):
        return
    vectors = tuple(node for node in entering if closure.width == 1 or _static_numel(node) != 1)
    scalars = tuple(node for node in entering if node not in vectors)
    if vectors:
        yield Proposal(anchor, rows, vectors, scalars, tuple(sorted(region, key=facts.order.__getitem__)), tuple(outputs))


def _is_parameter(node: fx.Node, closure: _Closure) -> bool:
    """Whether to stop at ``node``, which does not depend on the sources: a vector that is not merely another one's view."""
    if not closure.small(node):
        return False
    inner = passed_through(node)
    if inner is None and op_name(node) in {"expand", "expand_as", "broadcast_to", "getitem"}:
        inner = argument(node, 0, "input", node.kwargs.get("self"))
    if isinstance(inner, fx.Node) and closure.small(inner) and (op_name(node) not in CASTS or _widens(node)):
        return (_static_numel(inner) or 0) > (_static_numel(node) or 0)
    # A value made of constants alone (a factor as a tensor) is computed with the region.
    roots, seen = [node], {node}
    while roots:
        current = roots.pop()
        if current.op in ("placeholder", "get_attr") or current in closure.cuts:
            return True
        roots += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)
    return False
