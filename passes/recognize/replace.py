"""Recognize: find attention-residual mixes that a model spells out by hand, and make each one ``attnres::mix`` node.

Matches: any closed subgraph from a list of tensors and small vectors to one tensor that computes the mix of the family
(values raw or normalised, key gain or none, a logit scale, one query or several), however it is spelled: stacked,
concatenated, packed, in a bank with a valid count, or source by source. Replaces with: the operator; what else reads the
weights or keys keeps them. Candidates are proposed around softmaxes by structure and confirmed by numbers; what is not
confirmed is not touched.

Rounding: the operator computes in float32 (float64 for float64 sources) and rounds once. A region that rounds to a narrower
dtype on its way, by its own casts or under autocast, differs from it by those roundings.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat.graphs import OpOverload
from attnres_fx.passes.graph.aliases import memory_of
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call, only_makes_a_value
from attnres_fx.passes.graph.nodes import module_path, same_size, source_line, value_of
from attnres_fx.passes.graph.record import Record, record_of
from attnres_fx.passes.graph.vocabulary import CASTS, argument, is_mix, op_name
from attnres_fx.passes.recognize.closure import Proposal, free_numbers
from attnres_fx.passes.recognize.confirm import Meaning, meaning_of
from attnres_fx.passes.recognize.gather import Facts, Row, is_bank, row_shape, shape_of
from attnres_fx.passes.recognize.propose import is_anchor, proposals
from attnres_fx.runtime.mix import MIX

aten = torch.ops.aten


BY_HAND = Record("mix")  # the note on a mix that was spelled out by hand


@dataclass(frozen=True)
class Recognized:
    """A hand-written mix that was found: where it stands, how many sources it reads, and its node."""

    module: str
    source: str
    num_sources: int
    node: fx.Node


def recognize(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of mixes.

    Nodes have traced values. Symbolic sizes stay symbolic: candidates are confirmed at the traced sizes. Symbolic numbers
    that a mix computes with (an eps, a scale) are guarded.
    """
    anchors = [node for node in graph.nodes if is_anchor(node)]
    if not anchors:
        return 0
    facts = Facts(graph)
    confirmed: dict[Any, Meaning | None] = {}
    replaced: set[fx.Node] = set()
    rewriter = _Rewriter(graph, facts)
    found = 0
    for anchor in anchors:
        for proposal in proposals(anchor, facts):
            key = _signature(proposal)
            if key not in confirmed:
                confirmed[key] = meaning_of(proposal)
            meaning = confirmed[key]
            if meaning is None or not _stable(proposal, meaning, facts):
                continue
            output = proposal.outputs[meaning.output]
            if output not in replaced:
                replaced.add(output)
                _settle_numbers(proposal)
                rewriter.replace(proposal, meaning)
                found += 1
            break
    if found:
        _remove_dead_writes(graph)
    return found


def recognized(graph: fx.Graph) -> list[Recognized]:
    """The mixes that the pass has put into ``graph``, in graph order."""
    return [Recognized(module_path(node), source_line(node), len(argument(node, 0, "sources")), node)
            for node in graph.nodes if is_mix(node) and record_of(node) == BY_HAND]


def _signature(proposal: Proposal) -> Any:
    """Equal for proposals that compute the same function of inputs of the same shapes, so that each is confirmed once."""
    local: dict[fx.Node, int] = {}
    for node in (*(row.node for row in proposal.rows), *proposal.vectors, *proposal.scalars, *proposal.region):
        local.setdefault(node, len(local))
    local.update((node, local[known]) for node, known in proposal.aliases)

    def named(node: fx.Node) -> Any:
        return _Local(local[node]) if node in local else str(value_of(node))

    calls = tuple(repr((node.op, str(node.target), fx.map_arg((node.args, dict(node.kwargs)), named), _dtype(node)))
                  for node in proposal.region)
    rows = tuple((local[row.node], row.axis, row.index, str(shape_of(row.node))) for row in proposal.rows)
    vectors = tuple((local[node], str(shape_of(node))) for node in (*proposal.vectors, *proposal.scalars))
    return calls, rows, vectors, len(proposal.vectors), tuple(local[node] for node in proposal.outputs)


class _Local(str):
    """A node's number within its region, printed apart from any number in the graph."""

    def __new__(cls, number: int) -> _Local:
        return super().__new__(cls, f"<{number}>")


def _dtype(node: fx.Node) -> str:
    return str(getattr(value_of(node), "dtype", None))


def _settle_numbers(proposal: Proposal) -> None:
    """Guard the numbers that the region computes with, so that a call with another eps or scale is compiled again.

    Dynamo turns a number that has changed into an input, but the operator's numbers are constants of the graph.
    """
    for node in proposal.region:
        for source in free_numbers(node):
            float(value_of(source))


def _stable(proposal: Proposal, meaning: Meaning, facts: Facts) -> bool:
    """Whether nothing changes what the mix reads between the first read of the original and the place of the mix."""
    if not facts.mutations:
        return True
    output = facts.order[proposal.outputs[meaning.output]]
    own = set(proposal.region)
    for node in {*(row.node for row in proposal.rows), *proposal.vectors, *proposal.scalars}:
        reads = [facts.order[user] for user in node.users if user in own]
        if any(change not in own or memory_of(change) is memory_of(node)
               for change in facts.changes(node, min(reads, default=output), output)):
            return False
    return True


class _Rewriter:
    """Makes the nodes; one unbind for each packed tensor."""

    def __init__(self, graph: fx.Graph, facts: Facts) -> None:
        self.graph, self.facts = graph, facts
        self.slices: dict[tuple[fx.Node, int, fx.Node | None], tuple[fx.Node, ...]] = {}

    def replace(self, proposal: Proposal, meaning: Meaning) -> None:
        output, factor = self._extended(proposal.outputs[meaning.output])
        with self.graph.inserting_before(output):
            sources = [self._source(row, output) for row in proposal.rows]
            query, gain = self._vectors(proposal, meaning, output)
            wanted = value_of(output).dtype
            promoted = value_of(sources[0]).dtype
            for source in sources[1:]:
                promoted = torch.promote_types(promoted, value_of(source).dtype)
            if wanted != promoted and torch.promote_types(wanted, promoted) == wanted:
                # The result must be wider than the sources: one wide source makes it so, without an intermediate rounding.
                sources[-1] = self._make(aten.to.dtype, (sources[-1], wanted), output)
            mixed = self._make(
                MIX,
                (sources, query, gain, meaning.eps, meaning.logit_scale, meaning.normalize_values, factor),
                output, record=BY_HAND)
            result = mixed
            if meaning.query_axis > 0:
                result = self._make(aten.movedim.int, (result, 0, meaning.query_axis), output)
            if value_of(result).dtype != wanted:
                result = self._make(aten.to.dtype, (result, wanted), output)
        output.replace_all_uses_with(result)

    def _extended(self, output: fx.Node) -> tuple[fx.Node, float]:
        """Take in what follows and belongs to the mix: a narrowing cast, a constant factor, each the only reader."""
        factor = 1.0
        while len(output.users) == 1 and not self.facts.mutations:
            user = next(iter(output.users))
            value, own = value_of(user), value_of(output)
            if not isinstance(value, torch.Tensor) or not same_size(value.shape, own.shape) or user.args[:1] != (output,):
                break
            number: Any = user.args[1] if len(user.args) == 2 else None
            name = op_name(user)
            if name in CASTS and torch.promote_types(value.dtype, own.dtype) == own.dtype and factor == 1.0:
                output = user
            elif name in {"mul", "__mul__"} and type(number) in (int, float) and value.dtype == own.dtype:
                output, factor = user, factor * float(number)
            else:
                break
        return output, factor

    def _source(self, row: Row, output: fx.Node) -> fx.Node:
        """The tensor of a row. Slices of memory that is never changed are shared by all mixes, others belong to one."""
        changed_later = bool(self.facts.changes(row.node, self.facts.order[output], len(self.facts.order)))
        shared = memory_of(row.node) not in self.facts.mutations
        if row.axis is None:
            return self._copy(row.node, output) if changed_later else row.node
        key = (row.node, row.axis, None if shared else output)
        if key not in self.slices:
            packed = self._copy(row.node, output) if changed_later else row.node
            like, place = (row.node, row.node.next) if shared else (output, output)
            while place.op == "placeholder":
                place = place.next
            with self.graph.inserting_before(place):
                parts = self._make(aten.unbind.int, (packed, row.axis), like)
                self.slices[key] = tuple(
                    self._make(operator.getitem, (parts, index), like) for index in range(len(value_of(parts))))
        return self.slices[key][row.index]

    def _copy(self, node: fx.Node, output: fx.Node) -> fx.Node:
        """The operator keeps its sources for the backward; the original kept a gathered copy if they are changed later."""
        return self._make(aten.clone.default, (node,), output)

    def _vectors(self, proposal: Proposal, meaning: Meaning, output: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        width = row_shape(proposal.rows[0])[-1]
        query = proposal.vectors[meaning.query]
        if meaning.transposed:
            query = self._make(aten.reshape.default, (query, [width, meaning.num_queries]), output)
            query = self._make(aten.t.default, (query,), output)
        else:
            query = self._shaped(query, [width] if meaning.num_queries == 1 else [meaning.num_queries, width], output)
        if meaning.scaled:
            for scalar in proposal.scalars:
                query = self._make(aten.mul.Tensor, (query, self._shaped(scalar, [], output)), output)
        if meaning.gain is None:
            return query, None
        return query, self._shaped(proposal.vectors[meaning.gain], [width], output)

    def _shaped(self, node: fx.Node, shape: list[Any], output: fx.Node) -> fx.Node:
        if same_size(shape_of(node), shape):
            return node
        return self._make(aten.reshape.default, (node, shape), output)

    def _make(
        self, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node, record: Record | None = None
    ) -> fx.Node:
        node = insert_call(self.graph, target, args, like=like, record=record)
        self.facts.order[node] = self.facts.order[like]
        return node


def _writes_its_first_argument(node: fx.Node) -> bool:
    """Whether all that an in-place operation changes is its first argument; unknown of custom operators."""
    return not isinstance(node.target, OpOverload) or node.target.namespace == "aten"


def _remove_dead_writes(graph: fx.Graph) -> None:
    """Remove what nothing needs any more, writes into new tensors that nothing reads included (``finish`` keeps them)."""
    facts = Facts(graph)
    local = {change for memory, changes in facts.mutations.items() if is_bank(memory)
             for change in changes if _writes_its_first_argument(change)}
    pending = [node for node in graph.nodes if node not in local and not only_makes_a_value(node)]
    live = set(pending)
    while pending:
        node = pending.pop()
        needed = [*node.all_input_nodes, *facts.mutations.get(memory_of(node), ())]
        pending += [other for other in dict.fromkeys(needed) if other not in live]
        live.update(needed)
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)
