"""Share: compute once what several readers of one position would each compute.

Matches: mixes of the same sources with the same query, key gain and options, with nothing changed in place between them, and
the rows that only they take from their parameters. Replaces with: the first of them. A piece of a model that runs by value
has a mix for each reader; in a rewritten graph each position has one already.
"""

from __future__ import annotations

from torch import fx

from attnres_fx.passes.graph.aliases import is_mutation
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.vocabulary import is_mix, op_name
from attnres_fx.passes.lower.recomputation import TAGS


def share_mixes(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of nodes that were taken away."""
    first: dict[tuple[object, ...], fx.Node] = {}
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if is_mutation(node):
            first.clear()
        elif is_mix(node) or _is_row_of_mixes(node):
            key = (node.target, str(node.args), str(node.kwargs), *(node.meta.get(tag) for tag in TAGS))
            same = first.setdefault(key, node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
    return before - len(graph.nodes)


def _is_row_of_mixes(node: fx.Node) -> bool:
    return op_name(node) in ("getitem", "select") and bool(node.users) and all(is_mix(user) for user in node.users)
