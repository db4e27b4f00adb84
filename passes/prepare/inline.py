"""Inline: bring the bodies of higher-order operators that hide layers into the graph, keeping their meaning.

Matches: ``tag_activation_checkpoint`` (activation checkpointing) and ``invoke_subgraph`` (nested compile regions). Replaces
with: the nodes of the body. A node that came out of a checkpointed body is tagged for recomputation, as the operator itself
would tag it, so that AOTAutograd's partitioner recomputes it in the backward.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from attnres_fx.passes._compat.graphs import HigherOrderOperator
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.nodes import module_of
from attnres_fx.passes.graph.vocabulary import CHECKPOINT, op_name

_REGIONS = {CHECKPOINT, "invoke_subgraph", "wrap"}


def inline(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of bodies inlined."""
    gm, count = module_of(graph), 0
    pending = [node for node in graph.nodes if _is_region(node)]
    while pending:
        node = pending.pop(0)
        count += 1
        pending = [new for new in _inline_one(gm, node, count) if _is_region(new)] + pending
    return count


def _is_region(node: fx.Node) -> bool:
    return (node.op == "call_function" and isinstance(node.target, HigherOrderOperator)
            and op_name(node) in _REGIONS and _body_node(node) is not None)


def _body_node(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) and first.op == "get_attr" else None


def _inline_one(gm: fx.GraphModule, node: fx.Node, count: int) -> list[fx.Node]:
    body_node = _body_node(node)
    assert body_node is not None
    body = getattr(gm, str(body_node.target))
    # invoke_subgraph(body, identifier, *operands), the others (body, *operands)
    operands = list(node.args[2:] if op_name(node) == "invoke_subgraph" else node.args[1:])
    if op_name(node) == CHECKPOINT and "_checkpoint_context_fn" in body.meta:
        warnings.warn("attnres_fx recomputes whole checkpointed layers: the selective policy (context_fn) of "
                      "torch.utils.checkpoint is not kept", stacklevel=2)
    inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    made: list[fx.Node] = []
    result: Any = None
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = fx.map_arg(inner.args[0], mapping.__getitem__)
                break
            copied = gm.graph.node_copy(inner, mapping.__getitem__)
            if inner.op == "get_attr":
                copied.target = _carry_attribute(gm, body, str(inner.target), count)
            if op_name(node) == CHECKPOINT:
                copied.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                copied.meta["ac_graph_id"] = count
            if op_name(node) == "invoke_subgraph":
                # One body may serve several calls, and records the modules of the first: only the call knows its own.
                copied.meta["nn_module_stack"] = node.meta.get("nn_module_stack") or {}
            if op_name(node) != CHECKPOINT and "ac_graph_id" in node.meta:
                copied.meta["recompute"], copied.meta["ac_graph_id"] = node.meta["recompute"], node.meta["ac_graph_id"]
            mapping[inner] = copied
            made.append(copied)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(result[user.args[1]])
            gm.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(result[0] if isinstance(result, (tuple, list)) else result)
    gm.graph.erase_node(node)
    if not body_node.users:
        gm.graph.erase_node(body_node)
    return made


def _carry_attribute(gm: fx.GraphModule, body: fx.GraphModule, name: str, count: int) -> str:
    """Put an attribute of the body on the outer module under a name of its own."""
    own = f"inlined_{count}_{name.replace('.', '_')}"
    value: Any = body
    for part in name.split("."):
        value = getattr(value, part)
    setattr(gm, own, value)
    return own
