"""Check an arena against the graph that uses it: every read finds the row that it was meant to find. Analysis; pure.

Written independently of :mod:`attnres_fx.passes.memory.rows`, which decides what is placed, and of the planner: it follows
the graph as it runs, and knows for each byte which row was written there last. Inductor computes what it does not store
where the result is needed, so whatever is made of a row, views and values alike, counts as a read of it there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from attnres_fx.passes._compat.graphs import OpOverload, schema_of
from attnres_fx.passes._compat.inductor import runs_in_place_order
from attnres_fx.passes._compat.symbols import hinted
from attnres_fx.passes.graph.aliases import changed_by, is_mutation
from attnres_fx.passes.graph.nodes import is_contiguous, same_size, value_of
from attnres_fx.passes.graph.vocabulary import RESHAPES, op_name
from attnres_fx.runtime.errors import LayoutError

_REMEDY = "compile with options={'arena': 'never'}, and report the model: this is a fault of attnres_fx"


@dataclass(frozen=True)
class _Place:
    """The elements of a memory that a row takes."""

    memory: fx.Node
    start: int
    stop: int

    def overlaps(self, other: _Place) -> bool:
        return self.memory is other.memory and self.start < other.stop and other.start < self.stop


def check_arena(graph: fx.Graph, memories: Collection[fx.Node]) -> None:
    """Raise LayoutError, naming the node and the row, unless ``graph`` reads every row of ``memories`` before another takes
    its place, and writes it in the order of its elements, within its memory.

    Symbolic sizes count as they were traced.
    """
    places = {view: _place(view, memory) for memory in memories for view in memory.users}
    written: dict[fx.Node, fx.Node] = {}  # the rows that are whole, and what wrote each
    needs: dict[fx.Node, set[fx.Node]] = {}  # the rows that a value which is not stored is made of
    for node in graph.nodes:
        if node in places or node in memories:
            needs[node] = {node} & places.keys()
            continue
        outputs = [target for target in changed_by(node) if needs.get(target)]
        read = set().union(*(needs.get(source, ()) for source in node.all_input_nodes if source not in outputs))
        if node.op != "output" and not runs_in_place_order(node.target) and not is_mutation(node):
            needs[node] = read
            continue
        for row in read:
            if row not in written:
                raise LayoutError(f"'{node.name}' reads '{row.name}', whose memory holds another row by then",
                                  remedy=_REMEDY)
        for output in outputs:
            _write(node, output, read, places, written)
        for output in outputs:
            if output not in written:
                raise LayoutError(f"'{node.name}' writes two rows to one memory", remedy=_REMEDY)
        if not is_mutation(node) and _returns_memory(node):
            needs[node] = read


def _place(view: fx.Node, memory: fx.Node) -> _Place:
    value, whole = value_of(view), value_of(memory)
    place = _Place(memory, int(hinted(value.storage_offset())), int(hinted(value.storage_offset() + value.numel())))
    if view.target is not torch.ops.aten.as_strided.default or not is_contiguous(value) or value.dtype != whole.dtype or (
            place.stop > int(hinted(whole.numel()))):
        raise LayoutError(f"'{view.name}' is not a row within '{memory.name}'", remedy=_REMEDY)
    return place


def _write(node: fx.Node, output: fx.Node, read: set[fx.Node], places: dict[fx.Node, _Place],
           written: dict[fx.Node, fx.Node]) -> None:
    """``node`` writes ``output``: what lay there is gone, and ``node`` may have read it only in the same order."""
    if output not in places:
        raise LayoutError(f"'{node.name}' writes a row through the view '{output.name}'", remedy=_REMEDY)
    for row in [row for row in (*written, *read) if row is not output and places[row].overlaps(places[output])]:
        if row in read and not (places[row] == places[output] and _in_order(node, row)):
            raise LayoutError(f"'{node.name}' reads '{row.name}' while it writes '{output.name}' over it, in another order",
                              remedy=_REMEDY)
        written.pop(row, None)
    written[output] = node


def _in_order(node: fx.Node, row: fx.Node) -> bool:
    """Whether ``node`` reads ``row`` once, and each element where it writes the one in its place: the last source of a mix
    with its norm, or an operand of the loop that is copied.
    """
    copied = node.args[1] if node.target is torch.ops.aten.copy_.default else None
    loop = copied if isinstance(copied, fx.Node) else node
    if loop is not node and torch.Tag.pointwise not in getattr(loop.target, "tags", ()):
        return False
    candidates = [source for source in _flat(loop.args) if isinstance(source, fx.Node) and row in set(_made_of(source))]
    if len(candidates) != 1:
        return False
    (source,) = candidates
    if loop is node and (not op_name(node).startswith("mix_norm_into") or node.args[0][-1] is not source):  # type: ignore
        return False
    like = value_of(loop if loop is not node else source)
    while source is not row:
        if op_name(source) not in RESHAPES or not is_contiguous(value_of(source)) or not same_size(
                value_of(source).shape, like.shape):
            return False
        source = source.all_input_nodes[0]
        like = value_of(source)
    return is_contiguous(value_of(row))


def _flat(arguments: object) -> Iterator[object]:
    for argument in arguments if isinstance(arguments, (tuple, list)) else (arguments,):
        if isinstance(argument, (tuple, list)):
            yield from _flat(argument)
        else:
            yield argument


def _made_of(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and everything that it is made of, as far as that is not stored."""
    pending, seen = [node], {node}
    while pending:
        found = pending.pop()
        yield found
        if not runs_in_place_order(found.target):
            pending += [source for source in found.all_input_nodes if source not in seen]
            seen.update(found.all_input_nodes)


def _returns_memory(node: fx.Node) -> bool:
    """Whether the result of an operator may share memory with its arguments."""
    return isinstance(node.target, OpOverload) and any(
        returned.alias_info is not None for returned in schema_of(node.target).returns)
