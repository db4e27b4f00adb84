"""Arena: give the rows of attention residuals places in planned memory, and have their makers write them there.

Works on a graph after AOTAutograd, in place. Matches: mixes, their phases and mixes with their norms; also matrix products
and loops over elements that make a source of a mix. :mod:`attnres_fx.passes.memory.rows` decides which of their rows may be
placed. Replaces with: one piece of memory per dtype, views of it at the planned offsets, and the operators that write into
them. In a call without a backward this memory is the arena that a pool lends; in a training step autograd frees it with what
it keeps. Nothing is copied: readers read the views. Inductor keeps the order of what writes and what reads the same memory,
so the plan holds in whatever order it runs the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat.graphs import fake_mode_of, schema_of
from attnres_fx.passes._compat.symbols import hinted, numbers_as_nodes
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.record import Record, note, record_of
from attnres_fx.passes.memory.check_layout import check_layout
from attnres_fx.passes.memory.check_places import check_arena
from attnres_fx.passes.memory.layout import ALIGNMENT, Layout, Placement, plan_layout
from attnres_fx.passes.memory.lifetimes import Buffer, live_bytes
from attnres_fx.passes.memory.rows import Row, rows_for_backward, rows_of_call
from attnres_fx.runtime.arena import ARENA
from attnres_fx.runtime.into import INTO
from attnres_fx.runtime.products import PRODUCTS

log = logging.getLogger(__name__)

MEMORY = Record("memory")  # the note on the memory that rows share
_WRITES: dict[Any, Any] = {**INTO, **PRODUCTS}

Number = Any  # int or torch.SymInt
Numbers = Callable[[Number], Any]  # a number as an argument of a node: itself, or the node that computes it


@dataclass(frozen=True)
class PlacedRow:
    """Where a row begins in the memory of its dtype, in elements."""

    row: Row
    offset: Number


@dataclass(frozen=True)
class Arena:
    """The rows of one dtype and device, where each begins, and how many elements they need together."""

    places: tuple[PlacedRow, ...]
    numel: Number


def place_rows(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of rows that have a place.

    In a call without a backward rows share the bytes of one arena, which a pool may lend for it. In the forward of a
    training step, the blocks that are kept for its backward share one piece of memory.
    """
    if any(record_of(node) == MEMORY for node in graph.nodes):
        return 0  # its rows have their places
    if context.returned is None:
        return _place(graph, rows_of_call(graph), _leased)
    return _place(graph, rows_for_backward(graph, context.returned), _owned)


def plan_arenas(rows: Sequence[Row]) -> list[Arena]:
    """A place for each row: those of one dtype and device share memory, at offsets that suit any size the shapes can take.

    Rows whose numbers of elements are known are planned together. Where a call decides the sizes, rows of one size share
    slots of this size, and rows of a smaller size that live at other times than all of a larger one share its memory.

    Raises: LayoutError if two rows that live at the same time would share a byte.
    """
    kinds: dict[Any, list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.value.dtype, row.value.device), []).append(row)
    return [_plan_arena(members) for members in kinds.values()]


def _plan_arena(rows: Sequence[Row]) -> Arena:
    unit = max(ALIGNMENT // rows[0].value.element_size(), 1)
    if all(isinstance(row.value.numel(), int) for row in rows):
        layout = _layout(rows, [row.value.numel() * row.value.element_size() for row in rows])
        element = rows[0].value.element_size()
        placed = zip(rows, layout.placements, strict=True)
        return Arena(tuple(PlacedRow(row, place.offset // element) for row, place in placed), layout.arena // element)
    sizes: dict[str, list[Row]] = {}
    for row in rows:
        sizes.setdefault(str(row.value.numel()), []).append(row)
    bottom: Number = 0
    places = []
    for floor in _floors(list(sizes.values())):
        height: Number = 0
        for members in floor:
            slot = (members[0].value.numel() + unit - 1) // unit * unit
            layout = _layout(members, [ALIGNMENT] * len(members))
            places += [PlacedRow(row, bottom + place.offset // ALIGNMENT * slot)
                       for row, place in zip(members, layout.placements, strict=True)]
            needed = layout.arena // ALIGNMENT * slot
            height = needed if len(floor) == 1 else torch.sym_max(height, needed)
        bottom = bottom + height
    arena = Arena(tuple(places), bottom)
    check_layout(_as_traced(arena))
    return arena


def _as_traced(arena: Arena) -> Layout:
    """The layout of an arena at the sizes that its graph was traced with, in bytes."""
    rows = [place.row for place in arena.places]
    element = rows[0].value.element_size()
    buffers = _buffers(rows, [int(hinted(row.value.numel())) * element for row in rows])
    placements = tuple(Placement(buffer, int(hinted(place.offset)) * element, buffer.bytes(1), 0)
                       for buffer, place in zip(buffers, arena.places, strict=True))
    naive = sum(placement.size for placement in placements)
    return Layout(placements, int(hinted(arena.numel)) * element, naive, max(live_bytes(buffers, 1)))


def _floors(groups: Sequence[list[Row]]) -> list[list[list[Row]]]:
    """The groups one above the other; on one level, what lives at different times, even if it is only part of a group."""
    floors: list[list[list[Row]]] = []
    for group in sorted(groups, key=lambda rows: -int(hinted(rows[0].value.numel()))):
        rest = _chains(group)
        for floor in floors:
            apart: list[list[Row]] = []
            kept: list[list[Row]] = []
            for chain in rest:
                (kept if any(_overlap(chain, other) for other in floor) else apart).append(chain)
            if apart:
                floor.append([row for chain in apart for row in chain])
            rest = kept
        if rest:
            floors.append([[row for chain in rest for row in chain]])
    return floors


def _chains(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that take over each other's memory, in the order in which they are made."""
    chains: dict[fx.Node | None, list[Row]] = {}
    found: list[list[Row]] = []
    for row in rows:
        chain = chains.get(row.over, []) if row.over is not None else []
        if not chain:
            found.append(chain)
        chain.append(row)
        if row.node is not None:
            chains[row.node] = chain
    return found


def _overlap(some: Sequence[Row], others: Sequence[Row]) -> bool:
    """Whether the spans of time overlap in which any of the rows are in use."""
    return (min(row.first for row in some) <= max(row.last for row in others)
            and min(row.first for row in others) <= max(row.last for row in some))


def _layout(rows: Sequence[Row], sizes: Sequence[int]) -> Layout:
    """A checked layout of rows of these sizes in bytes."""
    layout = plan_layout(_buffers(rows, sizes), 1)
    check_layout(layout)
    return layout


def _buffers(rows: Sequence[Row], sizes: Sequence[int]) -> list[Buffer]:
    """Rows of these sizes in bytes, in the form the planner takes. What a row is completed over ends at the step before."""
    ends = {row.over: row.first - 1 for row in rows if row.over is not None}
    names = {row.node: row.name for row in rows}
    return [
        Buffer(row.name, "", "row", size, "", row.first, ends.get(row.node, row.last) if row.node else row.last,
               names.get(row.over) if row.over else None) for row, size in zip(rows, sizes, strict=True)]


def _place(graph: fx.Graph, rows: Sequence[Row], memory_for: Callable[[fx.Graph, Arena, fx.Node, Numbers], fx.Node]) -> int:
    if not rows:
        return 0
    number = numbers_as_nodes(graph)
    outputs: dict[fx.Node, dict[int | None, tuple[fx.Node, PlacedRow]]] = {}
    memories = []
    for arena in plan_arenas(rows):
        value = arena.places[0].row.value
        log.info("placed %d rows of %s in %s elements of one arena", len(arena.places), value.dtype, arena.numel)
        begin = min(place.row.maker for place in arena.places)
        with graph.inserting_before(begin):
            memory = memory_for(graph, arena, begin, number)
        note(memory, MEMORY)
        memories.append(memory)
        for place in arena.places:
            outputs.setdefault(place.row.maker, {})[place.row.index] = memory, place
    for maker, places in outputs.items():
        with graph.inserting_before(maker):
            views = {index: _view(graph, memory, place, number) for index, (memory, place) in places.items()}
            if maker.target in _WRITES:
                _write_into(graph, maker, views, number)
        if maker.target not in _WRITES:
            with graph.inserting_after(maker):
                _move(graph, maker, views[None])
    check_arena(graph, memories)
    return len(rows)


def _leased(graph: fx.Graph, arena: Arena, begin: fx.Node, number: Numbers) -> fx.Node:
    """Memory of a call for ``arena``, which a pool may lend: on the device of a tensor that ``begin`` reads."""
    like = arena.places[0].row.value
    near = next((node for node in begin.all_input_nodes if getattr(value_of(node), "device", None) == like.device), None)
    if near is None:
        return _owned(graph, arena, begin, number)
    node = graph.call_function(ARENA, (near, number(arena.numel), like.dtype))
    return _valued(node, like, lambda: like.new_empty(arena.numel))


def _owned(graph: fx.Graph, arena: Arena, begin: fx.Node, number: Numbers) -> fx.Node:
    """Memory for ``arena`` that nothing else uses."""
    return _empty(graph, [arena.numel], arena.places[0].row.value, number)


def _empty(graph: fx.Graph, shape: Sequence[Number], like: torch.Tensor, number: Numbers) -> fx.Node:
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
    node = graph.call_function(torch.ops.aten.empty.memory_format, ([number(size) for size in shape],), options)
    return _valued(node, like, lambda: like.new_empty(shape))


def _view(graph: fx.Graph, memory: fx.Node, place: PlacedRow, number: Numbers) -> fx.Node:
    value = place.row.value
    shape, strides = list(value.shape), list(value.stride())
    sizes = ([number(size) for size in shape], [number(stride) for stride in strides], number(place.offset))
    node = graph.call_function(torch.ops.aten.as_strided.default, (memory, *sizes))
    return _valued(node, value, lambda: torch.as_strided(value_of(memory), shape, strides, place.offset))


def _valued(node: fx.Node, like: torch.Tensor, compute: Callable[[], torch.Tensor]) -> fx.Node:
    mode = fake_mode_of([like])
    with mode if mode is not None else contextlib.nullcontext(), torch.no_grad():
        node.meta["val"] = compute()
    return node


def _write_into(graph: fx.Graph, maker: fx.Node, views: dict[int | None, fx.Node], number: Numbers) -> None:
    """Replace ``maker`` by an operator that writes into ``views``; other results get memory of their own."""
    value = value_of(maker)
    if isinstance(value, torch.Tensor):
        results = [views[None]]
    else:
        results = [views[index] if index in views else _empty(graph, each.shape, each, number)
                   for index, each in enumerate(value)]
    operator: Any = maker.target
    given = schema_of(operator).arguments[len(maker.args):]
    defaults = {argument.name: argument.default_value for argument in given if argument.has_default_value()}
    written = _outputs(_WRITES[operator], results)
    call = graph.call_function(_WRITES[operator], maker.args, {**defaults, **maker.kwargs, **written})
    call.meta = {**maker.meta, "val": None}
    # The strides that Inductor must keep: only our operators require them, torch's own do not.
    args, kwargs = maker.meta.get("eager_input_vals", fx.map_arg((maker.args, dict(maker.kwargs)), value_of))
    call.meta["eager_input_vals"] = args, {**defaults, **kwargs, **fx.map_arg(written, value_of)}
    if isinstance(value, torch.Tensor):
        maker.replace_all_uses_with(results[0])
    else:
        for user in list(maker.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            graph.erase_node(user)
    graph.erase_node(maker)


def _outputs(operator: Any, results: Sequence[fx.Node]) -> dict[str, Any]:
    """The results as the arguments that ``operator`` writes: one each, or evenly divided where it takes lists."""
    given = [argument for argument in schema_of(operator).arguments if argument.alias_info is not None]
    if isinstance(given[0].type, torch.ListType):
        count = len(results) // len(given)
        return {argument.name: list(results[index * count:(index + 1) * count]) for index, argument in enumerate(given)}
    return {argument.name: result for argument, result in itertools.zip_longest(given, results)}


def _move(graph: fx.Graph, maker: fx.Node, view: fx.Node) -> None:
    """Let the loop that makes a row store it into ``view``: Inductor writes there at once what nothing else reads."""
    copied = graph.call_function(torch.ops.aten.copy_.default, (view, maker))
    copied.meta = {**maker.meta, "val": value_of(view)}
    maker.replace_all_uses_with(view, delete_user_cb=lambda user: user is not copied)
