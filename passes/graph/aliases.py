"""Which nodes share memory, and which change it: the one place that answers both for a traced graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import fx

from attnres_fx.passes._compat.graphs import OpOverload, OpOverloadPacket, schema_of
from attnres_fx.passes._compat.symbols import hinted
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.vocabulary import PERMUTES, RESHAPES, argument, op_name


def is_mutation(node: fx.Node) -> bool:
    """Whether ``node`` changes its first argument in place."""
    if node.op == "call_function" and isinstance(node.target, OpOverload):
        return bool(schema_of(node.target).is_mutable)
    if node.op == "call_function" and isinstance(node.target, OpOverloadPacket):
        overloads = [getattr(node.target, name) for name in node.target.overloads() if not name.endswith("out")]
        return any(schema_of(overload).is_mutable for overload in overloads)
    if isinstance(node.kwargs.get("out"), fx.Node):
        return True
    name = op_name(node)
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__") and name not in {"requires_grad_", "detach_"}
    if node.op != "call_function":
        return False
    if bool(node.kwargs.get("inplace")):
        return True
    in_place_operators = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "imatmul", "ipow", "iand", "ior",
                          "ixor", "setitem", "delitem"}
    module = getattr(node.target, "__module__", "") or ""
    if name in in_place_operators:
        return True
    return name.endswith("_") and not name.endswith("__") and module.startswith(("torch", "_operator", ""))


def changed_by(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that ``node`` changes in place: by its schema where it has one, else its first argument or ``out``."""
    if not is_mutation(node):
        return ()
    target = node.target
    if isinstance(target, OpOverloadPacket) and len(target.overloads()) == 1:
        target = getattr(target, target.overloads()[0])
    if isinstance(target, OpOverload):
        given = [argument(node, index, declared.name) for index, declared in enumerate(schema_of(target).arguments)
                 if declared.alias_info is not None and declared.alias_info.is_write]
    else:
        given = [node.kwargs.get("out", node.args[0] if node.args else None)]
    parts = [part for value in given for part in (value if isinstance(value, (list, tuple)) else [value])]
    return tuple(part for part in parts if isinstance(part, fx.Node))


VIEWS = RESHAPES | PERMUTES | frozenset({
    "getitem", "expand", "expand_as", "narrow", "select", "slice", "chunk", "split", "unbind", "tensor_split", "detach",
    "alias", "diagonal", "unfold", "as_strided", "split_with_sizes", "T", "getattr", "real", "imag",
    # These give back their own input where there is nothing to do.
    "contiguous", "to", "float", "double", "half", "bfloat16", "type_as", "type", "dropout", "Identity", "Dropout",
})


def viewed(node: fx.Node) -> fx.Node | None:
    """The tensor that ``node`` may share memory with, by viewing it or by changing it in place; None if it has its own."""
    if op_name(node) not in VIEWS and not _returns_alias(op_name(node)) and not is_mutation(node):
        return None
    source = argument(node, 0, "input", node.kwargs.get("self"))
    return source if isinstance(source, fx.Node) else None


@functools.cache
def _returns_alias(name: str) -> bool:
    """Whether torch's own schemas say that an operator of this name may return its input's memory."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        return False
    returns = [value for overload in packet.overloads() for value in schema_of(getattr(packet, overload)).returns]
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def changes_of(value: fx.Node) -> list[fx.Node]:
    """The nodes that change ``value``, or a view of it, in place."""
    found: list[fx.Node] = []
    pending, seen = [value], {value}
    while pending:
        name = pending.pop()
        for user in name.users:
            if name in changed_by(user):
                found.append(user)
            elif viewed(user) is name and user not in seen:
                seen.add(user)
                pending.append(user)
    return found


def mutations_of(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that change memory in place, by the node whose memory it is."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for memory in dict.fromkeys(map(memory_of, changed_by(node))):
            found.setdefault(memory, []).append(node)
    return found


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` may be a view of; itself if it has its own."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def has_one_name(target: fx.Node, mutation: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether all that read ``target``'s memory after ``mutation`` read it as ``target``, so that they can read a copy."""
    root, here = memory_of(target), order[mutation]
    if root.op in ("placeholder", "get_attr"):
        return False
    pending, seen = [root], {root}
    while pending:
        name = pending.pop()
        for user in name.users:
            later = order.get(user, here) > here
            if later and name is not target:
                return False
            if not later and user is not mutation and viewed(user) is name and user not in seen:
                seen.add(user)
                pending.append(user)
    return True


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


# A graph after AOTAutograd is functional except for its last nodes: what changes memory is apart from what views it.


def view_of(node: fx.Node) -> fx.Node | None:
    """The tensor whose memory ``node`` may give under another shape, whole or in part; None if it has its own."""
    if node.target is operator.getitem:  # one of several views, or one of several results
        source = node.args[0]
        return source if isinstance(source, fx.Node) and view_of(source) is not None else None
    return None if is_mutation(node) else viewed(node)


def viewed_through(node: fx.Node) -> list[fx.Node]:
    """``node`` and all that it is a view of, the nearest first."""
    found = [node]
    while (base := view_of(found[-1])) is not None:
        found.append(base)
    return found


def viewed_memory(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` views; itself if it has its own."""
    return viewed_through(node)[-1]


def readers_through_views(tensor: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """(the nodes that read the memory of ``tensor``, the names by which they do: itself and its views)."""
    found: set[fx.Node] = set()
    names = {tensor}
    pending = [tensor]
    while pending:
        name = pending.pop()
        for user in name.users:
            if view_of(user) is name:
                pending.append(user)
                names.add(user)
            else:
                found.add(user)
    return found, names


def whole_memory_of(node: fx.Node) -> fx.Node:
    """The node whose whole memory ``node`` views."""
    while (source := viewed(node)) is not None and is_whole_view(node, source):
        node = source
    return node


def is_whole_view(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node``, a view of ``source``, shows all of its elements, by the traced sizes."""
    value, base = value_of(node), value_of(source)
    return isinstance(base, torch.Tensor) and value.dtype == base.dtype and hinted(value.numel()) == hinted(base.numel())


def whole_readers(owner: fx.Node) -> tuple[list[fx.Node], bool]:
    """The nodes that read the memory of ``owner``, itself or through views, and whether the graph returns it."""
    found: dict[fx.Node, None] = {}
    escapes, pending = False, [owner]
    while pending:
        name = pending.pop()
        for user in name.users:
            if user.op == "output":
                escapes = True
            elif viewed(user) is name and is_whole_view(user, name):
                pending.append(user)
            else:
                found[user] = None
    return list(found), escapes
