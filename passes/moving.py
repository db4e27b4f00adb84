"""What a pass has to know before it moves a node to another place of the graph: what changes memory, what can follow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from attnres_fx.passes.vocabulary import changes_of, is_mix, is_mutation, memory_of

# What is made by more operations than these is left where it is.
_MOST_MOVED = 16


def changes_near(
    parts: Sequence[fx.Node | None], order: dict[fx.Node, int], known: dict[fx.Node, list[int]]
) -> list[int]:
    """Where one of ``parts``, or what it is computed from directly, is changed in place; ``known`` keeps what was found."""
    found: list[int] = []
    for root in {memory_of(near) for part in parts if part is not None for near in (part, *part.all_input_nodes)}:
        if root not in known:
            known[root] = [order[change] for change in changes_of(root)]
        found += known[root]
    return found


def movable_calls(parts: Sequence[fx.Node | None]) -> list[fx.Node] | None:
    """The few calls that ``parts`` are made by, back to the inputs of the graph, in no order; None if they must stay."""
    pending = [part for part in parts if part is not None]
    found: list[fx.Node] = []
    while pending:
        node = pending.pop()
        if node.op in ("placeholder", "get_attr") or node in found:
            continue
        stays = node.op not in ("call_function", "call_method") or node.is_impure() or is_mutation(node) or is_mix(node)
        if stays or len(found) == _MOST_MOVED:
            return None
        found.append(node)
        pending += node.all_input_nodes
    return found


def move_before(place: fx.Node, calls: Sequence[fx.Node]) -> None:
    """Move those of ``calls`` that stand behind ``place`` in front of it; with their inputs, which are among them."""
    late = [node for node in calls if node > place]
    for node in sorted(late):
        place.prepend(node)


def keep_tags(source: fx.Node, made: fx.Node) -> None:
    """Let ``made`` be recomputed where ``source`` was, and nowhere else."""
    for tag in ("recompute", "ac_graph_id"):
        if tag in source.meta:
            made.meta[tag] = source.meta[tag]
