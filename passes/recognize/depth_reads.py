"""Depth reads: where a graph weights several tensors by functions of themselves, whether it is a mix or only similar to one.

Recognition changes what it can prove. Detection needs to know more: a chain of additions whose values are weighted
against other tensors is a hand-written AttnRes or a variant of it, and not a residual stream, whether recognised or not.
This pass only looks, but looks wider: any gate instead of a softmax, any norm, biases, dropout on the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnres_fx.passes.graph.nodes import float_tensor, same_size
from attnres_fx.passes.graph.vocabulary import ATTENTION, GATES, argument, base_of, is_contraction, is_mix, op_name
from attnres_fx.passes.recognize.closure import logits_of
from attnres_fx.passes.recognize.gather import Facts, Gathers, Row, row_shape, shape_of, static_numel
from attnres_fx.passes.recognize.propose import expected_rows, is_anchor, single_entries, summed


@dataclass(frozen=True)
class DepthRead:
    """A node that weights ``sources``: a mix, or the operation that makes the weights."""

    node: fx.Node
    sources: tuple[fx.Node, ...]


def depth_reads(graph: fx.Graph) -> list[DepthRead]:
    """Every place of ``graph`` where at least two tensors of one shape are summed with weights that depend on all of them.

    Mixes are included. Sources are given without pass-throughs. Changes nothing; linear in the graph.
    """
    facts: Facts | None = None
    found = []
    for node in graph.nodes:
        if is_mix(node):
            found.append(DepthRead(node, tuple(base_of(source) for source in argument(node, 0, "sources"))))
        elif is_anchor(node) or _is_gate(node):
            facts = facts or Facts(graph)
            sources = _sources(node, facts)
            if sources:
                found.append(DepthRead(node, sources))
    return found


def _is_gate(node: fx.Node) -> bool:
    return (node.op in ("call_function", "call_method") and op_name(node) in GATES
            and float_tensor(argument(node, 0, "input", node.kwargs.get("self"))) is not None)


def _sources(anchor: fx.Node, facts: Facts) -> tuple[fx.Node, ...]:
    """The distinct tensors that ``anchor`` weights against each other, if its weights depend on them."""
    sizes = expected_rows(anchor)
    if sizes is None:
        return ()
    ways, _ = summed(anchor, facts, sizes, dropout=True)
    readings = [tuple(row for part in way for row in part) for way in ways]
    readings += _normalised(readings, facts, facts.order[anchor])
    for rows in readings:
        nodes = tuple(dict.fromkeys(row.node for row in rows))
        if len(nodes) < 2 or (op_name(anchor) != ATTENTION and len(rows) > max(sizes)) or not _alike(rows):
            continue
        if _depends(anchor, frozenset(nodes), facts):
            return tuple(base_of(node) for node in nodes)
    return ()


def _normalised(readings: list[tuple[Row, ...]], facts: Facts, at: int) -> list[tuple[Row, ...]]:
    """The gathered tensors behind operands that are their norms."""
    found: list[tuple[Row, ...]] = []
    reader = Gathers(facts, at)
    for node in dict.fromkeys(rows[0].node for rows in readings if len(rows) == 1 and rows[0].axis is None):
        width = shape_of(node)[-1] if shape_of(node) else None
        for entry in single_entries(node, facts, width) if isinstance(width, int) and width else ():
            gathered = reader.of(entry)
            if gathered is not None and len(gathered.rows) > 1:
                found.append(gathered.rows)
    return found


def _alike(rows: tuple[Row, ...]) -> bool:
    first = row_shape(rows[0])
    return len(first) > 1 and all(same_size(row_shape(row), first) for row in rows)


def _depends(anchor: fx.Node, sources: frozenset[fx.Node], facts: Facts) -> bool:
    """Whether every source reaches the logits without a contraction with a matrix; one with a vector makes scores."""
    missing = set(sources)
    pending, seen = logits_of(anchor), set(logits_of(anchor))
    limit = 64 + 48 * len(sources)
    while pending and missing and limit > 0:
        limit -= 1
        node = pending.pop()
        if node in sources:
            missing.discard(node)
            continue
        if is_contraction(node) and not _scores(node):
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
        for change in facts.changes(node, -1, facts.order[anchor]) if facts.mutations else ():
            pending += [source for source in change.all_input_nodes if source not in seen]
            seen.update(change.all_input_nodes)
    return not missing


def _scores(node: fx.Node) -> bool:
    """Whether a contraction makes at most a few numbers of each row."""
    widths = [shape_of(source)[-1] for source in node.all_input_nodes if shape_of(source)]
    widest = max((width for width in widths if isinstance(width, int)), default=1)
    counts = [static_numel(source) for source in node.all_input_nodes]
    return any(count is not None and count <= 16 * widest for count in counts)
