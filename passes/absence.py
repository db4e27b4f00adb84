"""Absence: what a graph without residual streams holds instead, in one sentence. Changes nothing."""

from __future__ import annotations

from torch import fx

from attnres_fx.passes._compat import HigherOrderOperator, OpOverload, OpOverloadPacket
from attnres_fx.passes.graph import float_tensor, place_of, same_size
from attnres_fx.passes.vocabulary import addition_of, op_name

_NAMED = 3


def absence(graph: fx.Graph) -> str:
    """Why no stream was found in ``graph``: its additions of tensors of one shape, and what cannot be looked into."""
    sums = whole_sums(graph)
    if sums:
        said = (f"{len(sums)} additions of tensors of one shape were seen, and none adds to a value what a branch with a "
                f"contraction makes of that value; the first is at {place_of(sums[0])}")
    else:
        said = "no addition of two tensors of one shape was seen"
    opaque = sorted({op_name(node) for node in graph.nodes if _is_opaque(node)})
    if opaque:
        listed = ", ".join(opaque[:_NAMED]) + (" ..." if len(opaque) > _NAMED else "")
        said += f"; operators that cannot be looked into were seen: {listed}"
    return said


def whole_sums(graph: fx.Graph) -> list[fx.Node]:
    """The additions of two tensors of one shape, as residual additions are."""
    return [node for node in graph.nodes if _is_whole_sum(node)]


def _is_whole_sum(node: fx.Node) -> bool:
    found, whole = addition_of(node), float_tensor(node)
    if found is None or whole is None:
        return False
    return all((value := float_tensor(part)) is not None and same_size(value.shape, whole.shape)
               for part in (found.left, found.right))


def _is_opaque(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return op_name(node) not in {"flex_attention", "flex_attention_hop"}
    return isinstance(target, (OpOverload, OpOverloadPacket)) and not str(target).startswith(
        ("aten.", "prims.", "prim.", "attnres."))
