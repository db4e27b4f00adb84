"""Recomputation: drop the tags of checkpointed layers where they mean nothing.

Matches: nodes of inlined checkpointed bodies, in a graph without a backward. Replaces with: the same nodes without their
tags. A call without a backward recomputes nothing, but AOTAutograd would save the state of every random operator in such a
layer.
"""

from __future__ import annotations

from torch import fx

from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.vocabulary import CHECKPOINT, op_name

TAGS = ("recompute", "ac_graph_id")


def forget_recomputation(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of nodes that had tags."""
    if context.training:
        return 0
    tagged = [node for node in graph.nodes if any(tag in node.meta for tag in TAGS)]
    for node in tagged:
        for tag in TAGS:
            node.meta.pop(tag, None)
    return len(tagged)


def holds_checkpoint(graph: fx.Graph) -> bool:
    """Whether ``graph`` has a checkpointed body, or nodes of an inlined one."""
    return any(op_name(node) == CHECKPOINT or "ac_graph_id" in node.meta for node in graph.nodes)
