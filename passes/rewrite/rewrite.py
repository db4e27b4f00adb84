"""Rewrite: turn a residual stream into Attention Residuals, Eq. 5-6 of the paper.

Matches: a detected stream with its plan. Replaces with: block sums of the layer outputs, and one ``attnres::mix`` per
position, which every reader of that position reads. The additions of the stream are removed.

The outputs of layers are kept in the layout of the embedding b_0: where the stream is reshaped or permuted between
additions, terms are brought back before they are summed, and mixes are brought forward before they are read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat.symbols import hinted
from attnres_fx.passes.find.streams import Layer
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call
from attnres_fx.passes.graph.nodes import is_contiguous, same_size, value_of
from attnres_fx.passes.graph.record import Record
from attnres_fx.passes.graph.vocabulary import (
    CASTS,
    COPIES,
    DROPOUTS,
    PERMUTES,
    addition_of,
    is_mix,
    op_name,
    pass_through_chain,
    passed_through,
    permutation_of,
)
from attnres_fx.passes.rewrite.match import Assignment, markers_of, match
from attnres_fx.passes.rewrite.partition import sources_at
from attnres_fx.runtime.errors import LoweringError
from attnres_fx.runtime.mix import MIX

aten = torch.ops.aten


def rewrite_streams(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place: rewrite the stream of every marker, and consume the markers; returns the number of layers.

    Raises: what :func:`attnres_fx.passes.rewrite.match.match` raises.
    """
    assignments = match(graph)
    rewrite(graph, assignments)
    return sum(assignment.plan.num_layers for assignment in assignments)


def rewrite(graph: fx.Graph, assignments: Sequence[Assignment]) -> None:
    """Rewrite the assigned streams of ``graph`` in place, and consume its markers."""
    for assignment in assignments:
        _Rewriter(graph, assignment).run()
    for marker in markers_of(graph):
        graph.erase_node(marker)


class _Rewriter:
    """The rewrite of one stream: ``blocks`` and ``partial`` are the sources so far, ``layout`` leads from b_0 to here."""

    def __init__(self, graph: fx.Graph, assignment: Assignment) -> None:
        self.graph = graph
        self.stream, self.plan = assignment.stream, assignment.plan
        # An earlier rewrite may have replaced the value this stream starts from.
        self.embedding = self.stream.layers[0].skip
        self.blocks = [self.embedding]
        self.partial: fx.Node | None = None
        self.mixed: fx.Node | None = None
        # Taken before anything moves: the pass-throughs on the stream in front of each addition.
        bases = [self.embedding, *self.stream.values[1:]]
        self.chains = [pass_through_chain(layer.skip, base) for layer, base in zip(self.stream.layers, bases)]
        self.layout: list[fx.Node] = []
        self.queries = self._rows(assignment.query)
        self.key_gains = self._rows(assignment.key_gain) if assignment.key_gain is not None else None

    def run(self) -> None:
        for position, layer in enumerate(self.stream.layers, start=1):
            self.layout += [node for node in self.chains[position - 1] if not _is_layout_free(node)]
            with self.graph.inserting_before(layer.node.next):
                self._add_output(self._term(layer), layer, position)
                mixed = self._mix(layer.node, position)
            self._redirect(layer.node, mixed, position)
            self.mixed = mixed
        for layer in reversed(self.stream.layers):
            for node in (layer.node, *layer.inner):
                if not node.users:
                    self.graph.erase_node(node)

    def _rows(self, stacked: fx.Node) -> fx.Node:
        """One ``unbind`` for all rows: one ``select`` per row would each cost an addition of the whole in the backward."""
        first = self.stream.layers[0].node
        # In front of all layers, the first of which may run without gradients.
        start = next(iter(markers_of(self.graph)), first)
        with self.graph.inserting_before(start):
            return insert_call(self.graph, aten.unbind.int, (stacked, 0), like=first)

    def _row(self, rows: fx.Node, position: int) -> fx.Node:
        like = self.stream.layers[position - 1].node
        return insert_call(self.graph, operator.getitem, (rows, position), like=like, value=value_of(rows)[position])

    def _term(self, layer: Layer) -> fx.Node:
        """The output of the layer: the original sum without its skip, in the dtype and shape of the original result."""
        whole = value_of(layer.node)
        term = self._without_skip(layer.node, layer)
        if term is None:
            raise LoweringError(f"the addition '{layer.node.name}' has no term other than the stream itself")
        if not same_size(value_of(term).shape, whole.shape):
            shaped = self.layout[-1] if self.layout else self.embedding
            term = insert_call(self.graph, aten.expand_as.default, (term, shaped), like=layer.node)
        return term

    def _without_skip(self, node: fx.Node, layer: Layer) -> fx.Node | None:
        if node is layer.skip or node is self.mixed:  # other readers of sums with injections read the mix by now
            return None
        if node is not layer.node and node not in layer.inner and node not in layer.injections:
            return node
        found = addition_of(node)
        if found is None:  # an identity between two sums of one layer
            inner = passed_through(node)
            kept = self._without_skip(inner, layer) if inner is not None else None
            return node if kept is inner else kept
        left, right = self._without_skip(found.left, layer), self._without_skip(found.right, layer)
        if left is found.left and right is found.right:
            return node
        if left is None or right is None:
            return right if left is None else left
        return insert_call(self.graph, aten.add.Tensor, (left, right), like=layer.node)

    def _add_output(self, term: fx.Node, layer: Layer, position: int) -> None:
        """Eq. 5: b_n^i = b_n^{i-1} + f(h); the first term of a block takes the dtype of the original result."""
        term = self._to_embedding_layout(term, layer)
        dtype = value_of(layer.node).dtype
        if self.partial is None:
            if value_of(term).dtype != dtype:
                term = insert_call(self.graph, aten.to.dtype, (term, dtype), like=layer.node)
            self.partial = term
        else:
            record = Record("partial", self.plan.name, position)
            known = self._known(layer.node, [self.partial, term])
            self.partial = insert_call(self.graph, aten.add.Tensor, (self.partial, term), like=layer.node, value=known,
                                       record=record)
        if position in self.plan.boundaries:
            self.blocks.append(self.partial)
            self.partial = None

    def _mix(self, original: fx.Node, position: int) -> fx.Node:
        """Eq. 6: the value every reader of ``position`` reads, in the layout and dtype of the original sum."""
        sources = [*self.blocks, *([self.partial] if self.partial is not None else [])]
        expected = len(sources_at(self.plan.boundaries, position))
        if len(sources) != expected:
            raise LoweringError(f"position {position} of stream '{self.plan.name}' has {len(sources)} sources, "
                                f"but the plan has {expected}")
        query = self._row(self.queries, position)
        key_gain = self._row(self.key_gains, position) if self.key_gains is not None else None
        record = Record("mix", self.plan.name, position, len(sources))
        # A mix is contiguous, and what reads it may depend on the strides that the sum had, as a view does.
        order = memory_order(value_of(original)) if not self.layout else None
        turned = _with_last(order, self.stream.feature_dim) if order is not None else None
        if turned is None and self.stream.feature_dim != -1:
            turned = _with_last(list(range(value_of(self.embedding).dim())), self.stream.feature_dim)
        if turned is not None:
            sources = [insert_call(self.graph, aten.permute.default, (source, turned), like=original) for source in sources]
        mixed = insert_call(
            self.graph, MIX, (sources, query, key_gain, self.plan.eps, 1.0, False, self.plan.output_factor(position)),
            like=original, record=record, value=self._known(original, sources) if turned is None else None)
        if turned is not None:
            mixed = insert_call(self.graph, aten.permute.default, (mixed, _inverse(turned)), like=original)
        for node in self.layout:
            args = (mixed, *node.args[1:])
            with_source: dict[str, object] = {
                key: mixed if key in ("input", "self") else value for key, value in node.kwargs.items()}
            mixed = _call_like(self.graph, node, args if node.args else (), with_source)
        if value_of(mixed).dtype != value_of(original).dtype:
            mixed = insert_call(self.graph, aten.to.dtype, (mixed, value_of(original).dtype), like=original)
        mixed = self._in_memory_as(mixed, original)
        self._move_to_reader(mixed, position)
        return mixed

    def _in_memory_as(self, mixed: fx.Node, original: fx.Node) -> fx.Node:
        """``mixed`` with the strides of the original sum, where they differ: by a copy."""
        order = memory_order(value_of(original))
        if order is None or same_size(value_of(mixed).stride(), value_of(original).stride()):
            return mixed
        steps: list[tuple[Any, list[Any]]] = [(aten.contiguous.default, [])]
        if order != sorted(order):
            steps = [(aten.permute.default, [order]), *steps, (aten.permute.default, [_inverse(order)])]
        for target, args in steps:
            mixed = insert_call(self.graph, target, (mixed, *args), like=original)
        return mixed

    def _known(self, original: fx.Node, parts: list[fx.Node]) -> torch.Tensor | None:
        """The value of the original sum, where a sum or mix of ``parts`` is traced to the very same one."""
        value: torch.Tensor = value_of(original)
        alike = all(value_of(part).dtype == value.dtype and same_size(value_of(part).shape, value.shape) for part in parts)
        return value if alike and self.stream.feature_dim == -1 and is_contiguous(value) else None

    def _move_to_reader(self, mixed: fx.Node, position: int) -> None:
        """A mix is recomputed with the layer that reads it: what a checkpointed layer keeps is the partial sum, p_l."""
        following = self.stream.layers[position].node.meta if position < self.stream.num_layers else {}
        node = mixed
        while node is not self.blocks[-1] and node is not self.partial:
            for tag in ("recompute", "ac_graph_id"):
                node.meta.pop(tag, None)
                if tag in following:
                    node.meta[tag] = following[tag]
            if is_mix(node):
                return
            node = node.all_input_nodes[0]

    def _redirect(self, original: fx.Node, mixed: fx.Node, position: int) -> None:
        """Every reader of the position reads the one mix; the next addition alone keeps the sum, until it is erased."""
        own: set[fx.Node] = set()
        if position < self.stream.num_layers:
            following = self.stream.layers[position]
            own = {following.node, *following.inner}
        for user in list(original.users):
            if user not in own:
                user.replace_input_with(original, mixed)

    def _to_embedding_layout(self, term: fx.Node, layer: Layer) -> fx.Node:
        """Undo the layout changes between b_0 and this layer."""
        for node in reversed(self.layout):
            name = op_name(node)
            before = passed_through(node)
            if before is None:
                raise LoweringError(f"'{node.name}' is not a pass-through")
            if name in PERMUTES:
                forward = permutation_of(node)
                order = [forward.index(dim) for dim in range(len(forward))]
                term = insert_call(self.graph, aten.permute.default, (term, order), like=layer.node)
            else:
                term = insert_call(self.graph, aten.reshape_as.default, (term, before), like=layer.node)
        return term


def memory_order(value: torch.Tensor) -> list[int] | None:
    """The dimensions of a tensor in the order, outermost first, in which they fill its memory without gaps; None if that
    cannot be known. Dimensions of one element, whose strides mean nothing, keep their order.
    """
    dims = list(range(value.dim()))
    if not is_contiguous(value):
        dims.sort(key=lambda dim: -hinted(value.stride(dim)))
    return dims if is_contiguous(value.permute(dims)) else None


def _with_last(order: list[int], dim: int) -> list[int] | None:
    """``order`` with the dimension ``dim``, counted from the end, as its last; None where nothing is moved."""
    own = len(order) + dim
    moved = [*(other for other in order if other != own), own]
    return None if moved == sorted(moved) else moved


def _inverse(order: list[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


def _call_like(graph: fx.Graph, node: fx.Node, args: tuple[object, ...], kwargs: dict[str, object]) -> fx.Node:
    """Apply the pass-through ``node`` to another value."""
    if node.op == "call_function":
        return insert_call(graph, node.target, args, like=node, kwargs=kwargs)  # type: ignore[arg-type]
    method = str(node.target)
    return insert_call(graph, getattr(torch.Tensor, method), args, like=node, kwargs=kwargs)


def _is_layout_free(node: fx.Node) -> bool:
    """Whether a pass-through keeps the shape (a cast, a copy, an inactive dropout, a reshape to the same shape)."""
    name = op_name(node)
    if name in CASTS or name in COPIES or name in DROPOUTS:
        return True
    inner = passed_through(node)
    return name not in PERMUTES and inner is not None and same_size(value_of(inner).shape, value_of(node).shape)
