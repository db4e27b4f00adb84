"""The closed subgraph: what a candidate for a mix computes from its sources and a few small vectors alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_fx.passes.graph.aliases import is_mutation, memory_of
from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of
from attnres_fx.passes.graph.vocabulary import (
    ATTENTION,
    CASTS,
    CONSTANTS,
    DROPOUTS,
    EXPANSIONS,
    FILLS,
    MIX_ARITHMETIC,
    MIX_LAYOUT,
    PRODUCTS,
    SOFTMAXES,
    argument,
    is_active_dropout,
    op_name,
    passed_through,
)
from attnres_fx.passes.recognize.gather import Facts, Row, is_symbol, row_shape, shape_of, static_numel, widens

MAX_QUERIES = 16
ALLOWED = PRODUCTS | MIX_ARITHMETIC | MIX_LAYOUT | CONSTANTS | SOFTMAXES | {"linear", ATTENTION}


def free_numbers(node: fx.Node) -> list[fx.Node]:
    """The symbolic numbers that ``node`` computes with; sizes in changes of shape do not count."""
    name = op_name(node)
    if name in MIX_LAYOUT or (name in CONSTANTS and name not in FILLS):
        return []
    sources = [argument(node, FILLS[name], "fill_value")] if name in FILLS else node.all_input_nodes
    return [source for source in sources if isinstance(value_of(source), (torch.SymInt, torch.SymFloat))]


@dataclass(frozen=True)
class Proposal:
    """A closed region of the graph that may be a mix.

    ``region`` holds the nodes to evaluate in graph order; what they read besides each other are the nodes of ``rows``,
    the ``vectors`` (a query, a gain) and the ``scalars`` (a learned factor). ``aliases`` are nodes that compute again what
    a vector or scalar is. ``outputs`` are the nodes that may be the mixed value.
    """

    anchor: fx.Node
    rows: tuple[Row, ...]
    vectors: tuple[fx.Node, ...]
    scalars: tuple[fx.Node, ...]
    aliases: tuple[tuple[fx.Node, fx.Node], ...]
    region: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


class Closure:
    """The set of nodes that need only the leaves and small vectors; grown from one node at a time."""

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
            if any(current in known for known in (self.leaves, inside, cuts, self.inside, self.cuts)):
                continue
            if not self.allows(current):
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
        count = static_numel(node) if float_tensor(node) is not None else None
        return count is not None and (count == 1 or (count % self.width == 0 and count <= MAX_QUERIES * self.width))

    def allows(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method"):
            return False
        name = op_name(node)
        if name in DROPOUTS:
            return not is_active_dropout(node)
        if name == "linear":
            weight = argument(node, 1, "weight")
            return isinstance(weight, fx.Node) and self.small(weight)
        return name in ALLOWED


def close_over(anchor: fx.Node, rows: tuple[Row, ...], dependent: Sequence[fx.Node], facts: Facts) -> Iterator[Proposal]:
    """The proposals with these sources, if the logits and some output need nothing but them and small vectors.

    Outputs that read the same vectors share a proposal: what follows a mix (the gain of the next norm) starts another.
    """
    shape = row_shape(rows[0])
    if not shape or not isinstance(shape[-1], int) or shape[-1] < 1:
        return
    leaves = frozenset(row.node for row in rows)
    closure = Closure(facts, leaves, shape[-1], 64 + 48 * len(rows))
    if anchor in leaves or not closure.grow(anchor) or not _scored(anchor, closure):
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
            if sum(static_numel(cut) != 1 for cut in closure.cuts) > 3 + len(rows):
                return
        if _fits(node, shape):
            outputs.append(node)
    if outputs:
        yield from _cut(anchor, rows, closure.inside, outputs, closure, facts)


def logits_of(anchor: fx.Node) -> list[fx.Node]:
    """The scores that ``anchor`` turns into weights."""
    if op_name(anchor) == ATTENTION:
        given = [argument(anchor, 0, "query"), argument(anchor, 1, "key")]
    else:
        given = [argument(anchor, 0, "input", anchor.kwargs.get("self"))]
    return [node for node in given if isinstance(node, fx.Node)]


def _scored(anchor: fx.Node, closure: Closure) -> bool:
    """Whether the weights depend on every source: in attention and in routers they depend on other tensors."""
    missing = set(closure.leaves)
    pending, seen = logits_of(anchor), set(logits_of(anchor))
    while pending and missing:
        node = pending.pop()
        missing.discard(node)
        if node not in closure.inside:
            continue
        sources = list(node.all_input_nodes)
        if closure.facts.mutations:
            for change in closure.facts.changes(node, -1, closure.facts.order[anchor]):
                sources += change.all_input_nodes
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return not missing


def _fits(node: fx.Node, shape: tuple[Any, ...]) -> bool:
    """Whether ``node`` has the shape of a source, or of several with one further axis."""
    own = shape_of(node)
    if float_tensor(node) is None:
        return False
    return same_size(own, shape) or bool(query_axes(own, shape))


def query_axes(own: tuple[Any, ...], shape: tuple[Any, ...]) -> list[int]:
    """The axes of ``own`` that can be the queries' where a source has ``shape``."""
    if len(own) != len(shape) + 1:
        return []
    return [axis for axis in range(len(own) - 1)
            if isinstance(own[axis], int) and own[axis] <= MAX_QUERIES
            and same_size(own[:axis] + own[axis + 1:], shape)]


def _cut(
    anchor: fx.Node, rows: tuple[Row, ...], inside: set[fx.Node], outputs: Sequence[fx.Node], closure: Closure, facts: Facts
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
    if any(static_numel(node) is None for node in entering):
        return
    first: dict[Any, fx.Node] = {}
    aliases = [(node, known) for node in entering if (known := first.setdefault(_expression(node, facts), node)) is not node]
    entering = list(first.values())
    vectors = tuple(node for node in entering if closure.width == 1 or static_numel(node) != 1)
    scalars = tuple(node for node in entering if node not in vectors)
    if vectors:
        ordered = sorted(region, key=facts.order.__getitem__)
        yield Proposal(anchor, rows, vectors, scalars, tuple(aliases), tuple(ordered), tuple(outputs))


def _expression(node: fx.Node, facts: Facts, depth: int = 8) -> Any:
    """Equal for nodes that compute the same of the same inputs: a row of a parameter that each source selects again."""
    if node.op not in ("call_function", "call_method") or depth == 0 or facts.mutations.get(memory_of(node)):
        return node
    if op_name(node) not in ALLOWED:
        return node

    def part(source: fx.Node) -> Any:
        return _Part(_expression(source, facts, depth - 1))

    parts = fx.map_arg((node.args, dict(node.kwargs)), part)
    return repr((node.op, str(node.target), parts))


class _Part:
    """Prints an expression within another one."""

    def __init__(self, expression: Any) -> None:
        self.text = expression if isinstance(expression, str) else f"%{expression.name}"

    def __repr__(self) -> str:
        return self.text


def _is_parameter(node: fx.Node, closure: Closure) -> bool:
    """Whether to stop at ``node``, which does not depend on the sources: a vector that is not merely another one's view."""
    if not closure.small(node):
        return False
    inner = passed_through(node)
    if inner is None and op_name(node) in EXPANSIONS | {"getitem"}:
        inner = argument(node, 0, "input", node.kwargs.get("self"))
    if isinstance(inner, fx.Node) and closure.small(inner) and (op_name(node) not in CASTS or widens(node)):
        return (static_numel(inner) or 0) > (static_numel(node) or 0)
    # A value made of constants alone (a factor as a tensor) is computed with the region.
    roots, seen = [node], {node}
    while roots:
        current = roots.pop()
        if current.op in ("placeholder", "get_attr") or current in closure.cuts:
            return True
        roots += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)
    return False
