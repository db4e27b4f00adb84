"""Rows: what the operators of attention residuals write in a graph after AOTAutograd, how long, and where it may be placed.

Analysis. Here the kernels are selected and next to nothing is changed in place, so a row is in use from the node that makes
it to the last node that reads it. The rules, which :mod:`attnres_fx.passes.memory.check_places` checks again, in its own
way, on the resulting graph:

1. A row fills its memory in the order of its elements (contiguous strides); no other layout is placed.
2. Everything that shares its memory is a view whose place follows from the row's own (``as_strided`` names a place in the
   memory, regardless of its owner). Some operators become views although their schema does not show it.
3. Readers are known to change nothing and keep nothing: what a graph returns, or may change in place, is not placed.
4. Inductor computes most operators where their result is needed, and there reads their inputs. A row is in use until the
   last place where something that is made of it in this way is needed.
5. A sum takes the memory of the partial sum that it completes only where it reads it in the very order in which it writes.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat.graphs import HigherOrderOperator, OpOverload, schema_of
from attnres_fx.passes._compat.inductor import orders_copies, runs_in_place_order, tunes_products
from attnres_fx.passes._compat.symbols import input_symbols, symbols_of
from attnres_fx.passes.graph.aliases import readers_through_views, viewed_memory, viewed_through
from attnres_fx.passes.graph.nodes import same_size, value_of
from attnres_fx.passes.graph.vocabulary import PURE_OPERATORS, argument, op_name
from attnres_fx.runtime.into import INTO
from attnres_fx.runtime.operators import VARIANTS, operator_of
from attnres_fx.runtime.products import PRODUCTS

_MIX_NORMS = frozenset(operator_of("mix_norm", variant) for variant in VARIANTS)
_PHASE2 = frozenset(operator_of("mix_phase2", variant) for variant in VARIANTS)


@dataclass(frozen=True)
class Row:
    """A tensor that ``maker`` writes, as one of several results with the number ``index``, or as its own (None).

    ``node`` is the tensor in the graph; None for a result that no node takes. ``first`` and ``last`` number nodes.
    ``over`` is the node of the row whose last use is the addition that makes this one, and whose memory may become its own.
    """

    maker: fx.Node
    index: int | None
    node: fx.Node | None
    value: torch.Tensor
    first: int
    last: int
    over: fx.Node | None = None

    @property
    def name(self) -> str:
        return self.node.name if self.node is not None else f"{self.maker.name}[{self.index}]"


def rows_of_call(graph: fx.Graph) -> list[Row]:
    """The rows of a graph without a backward that are not visible after the call, in the order in which they are made."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    found, needed = _rows(graph, order, returns=False)
    own = {row.node for row in found}
    return [_over(row, own, needed) for row in found]


def rows_for_backward(graph: fx.Graph, returned: int) -> list[Row]:
    """The rows of blocks that the forward of a training step keeps for its backward only.

    ``returned``: how many of the graph's outputs come before those that are kept. Partial sums are left out: the backward
    finishes with them one by one, but with the blocks only at its end.
    """
    outputs: Any = graph.output_node().args[0]
    order = {node: index for index, node in enumerate(graph.nodes)}
    seen = {source for output in outputs[:returned] if isinstance(output, fx.Node) for source in viewed_through(output)}
    kept = {viewed_memory(output) for output in outputs[returned:] if isinstance(output, fx.Node)}
    found, _ = _rows(graph, order, returns=True)
    partial = {_earlier(row.maker) for row in found}
    read = _read_by_mixes(graph)
    return [row for row in found if row.node in kept and row.node not in seen | partial
            and (row.node in read or (row.index == 1 and row.maker.target in _MIX_NORMS))]


def _rows(graph: fx.Graph, order: dict[fx.Node, int], returns: bool) -> tuple[list[Row], dict[fx.Node, int]]:
    """The rows that a graph makes, of sizes that follow from its inputs, with ``returns`` also those that it returns; and
    :func:`needed_until`.
    """
    read, known = _read_by_mixes(graph), input_symbols(graph)
    found = []
    for node in graph.nodes:
        for index, tensor, value in _made_by(node, read):
            sized = all(symbols_of(size) <= known for size in value.shape)
            if sized and is_dense(value) and (tensor is None or _may_move(tensor, returns)):
                found.append((node, index, tensor, value))
    needed = needed_until(graph, order, {node for node, *_ in found})
    rows = [Row(node, index, tensor, value, order[node], max([order[node], *(needed[user] for user in users)]))
            for node, index, tensor, value in found for users in [tensor.users if tensor is not None else ()]]
    return rows, needed


def needed_until(graph: fx.Graph, order: dict[fx.Node, int], placed: Collection[fx.Node] = ()) -> dict[fx.Node, int]:
    """For each node the last place at which its inputs may be read.

    ``placed`` are the nodes whose result is stored at once, because it has a place of its own.
    """
    until: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        later = () if node in placed or runs_in_place_order(node.target) else node.users
        until[node] = max([order[node], *(until[user] for user in later)])
    return until


def _may_move(tensor: fx.Node, returns: bool) -> bool:
    """Whether all that reads the memory of ``tensor`` does so wherever that memory is."""
    readers, views = readers_through_views(tensor)
    return not any(_names_its_place(view) for view in views) and all(
        (_only_reads(reader, views) or (returns and reader.op == "output")) for reader in readers)


def _names_its_place(view: fx.Node) -> bool:
    """Whether a view is taken by its place in the memory, which differs in an arena."""
    return op_name(view).startswith("as_strided")


def _only_reads(node: fx.Node, names: Collection[fx.Node]) -> bool:
    """Whether ``node`` is known neither to change its arguments among ``names`` nor to read them later on. An operator with
    an Inductor lowering of its own (a convolution that adds to an input in place) may change them; a collective reads until
    it is waited for; memory that an operator returns again, other than as a known view, may be read at any time.
    """
    target = node.target
    if target is torch.ops.aten.copy_.default:
        return node.args[0] not in names
    if isinstance(target, OpOverload):
        schema = schema_of(target)
        keeps = schema.is_mutable or any(returned.alias_info is not None for returned in schema.returns)
        return not (keeps or _names_its_place(node) or target.namespace == "_c10d_functional")
    if isinstance(target, HigherOrderOperator):
        return target.name() in PURE_OPERATORS
    return target is operator.getitem


def _made_by(node: fx.Node, read: set[fx.Node]) -> list[tuple[int | None, fx.Node | None, torch.Tensor]]:
    """(number among the results or None, the tensor in the graph, its value) of each row that ``node`` makes."""
    value = value_of(node)
    if node.target in INTO:
        if isinstance(value, torch.Tensor):
            return [(None, node, value)]
        taken = {user.args[1]: user for user in node.users}
        return [(index, taken.get(index), each) for index, each in enumerate(value)]
    if node not in read or not isinstance(value, torch.Tensor):
        return []
    # What one loop over elements makes can be written anywhere, and so can a product that is not to be tuned.
    loop = torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target is torch.ops.aten.embedding.default
    product = node.target in PRODUCTS and not tunes_products()
    return [(None, node, value)] if (loop and orders_copies(value.device)) or product else []


def _over(row: Row, own: Collection[fx.Node | None], needed: dict[fx.Node, int]) -> Row:
    """The row, over the partial sum that its addition is the last to read; ``own`` are the nodes of all rows."""
    completed = _completed(row.maker) if row.index in (None, 1) else None
    earlier = None if completed is None else viewed_memory(completed)
    if earlier is None or earlier not in own:
        return row
    read = value_of(completed)
    # Element by element in the order of the memory: a view in another order would be read after it was written.
    alike = (value_of(earlier).dtype == read.dtype == row.value.dtype and same_size(read.shape, row.value.shape)
             and same_size([value_of(earlier).numel()], [read.numel()]) and is_dense(read))
    once = sum(viewed_memory(node) is earlier for node in _given(row.maker)) == 1
    # Anything else made of it, even within the loop that adds, may read it in another order.
    others = readers_through_views(earlier)[0] - {row.maker}
    ends = all(needed[reader] < row.first for reader in others)
    return replace(row, over=earlier) if alike and once and ends else row


def _completed(node: fx.Node) -> fx.Node | None:
    """The partial sum that ``node`` adds to, as it reads it."""
    if node.target in _MIX_NORMS:
        return _sources(node)[-1] if argument(node, 3, "delta") is not None else None
    left = node.args[0] if node.target is torch.ops.aten.add.Tensor else None
    return left if isinstance(left, fx.Node) else None


def _earlier(node: fx.Node) -> fx.Node | None:
    """The node that owns the memory of the partial sum that ``node`` adds to."""
    completed = _completed(node)
    return None if completed is None else viewed_memory(completed)


def _given(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of ``node``, each as often as it stands there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    return list(argument(node, 2 if node.target in _PHASE2 else 0, "sources"))


def _read_by_mixes(graph: fx.Graph) -> set[fx.Node]:
    """The sources of all mixes, by the nodes that own their memory."""
    return {viewed_memory(source) for node in graph.nodes if node.target in INTO for source in _sources(node)}


def is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor is known to be non-empty and to fill its memory without gaps, in the order of its elements."""
    strides: list[Any] = [1]
    for size in reversed(value.shape[1:]):
        strides.insert(0, strides[0] * size)
    return same_size(value.stride(), strides) and not any(isinstance(size, int) and size == 0 for size in value.shape)
