"""Edits of graphs: copies, new nodes with their values, what is moved, what is dead.

``Graph.eliminate_dead_code`` is not used: it removes unread calls that change a tensor in place, that count the levels of
functorch, or that are made for any other effect. A node that was unread when the graph came may be such a call, whatever it
returns: only what a pass left unread is dead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat.graphs import carry_dynamo_metadata, copy_codegen, fake_mode_of, late_module, tracer_of
from attnres_fx.passes.graph.aliases import is_mutation
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.record import Record, note
from attnres_fx.passes.graph.vocabulary import BATCH_NORMS, is_mix, op_name

_STRUCTURE = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id")


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` with its own graph, sharing parameters and submodules, with all metadata that Dynamo needs. Its code
    is generated when it is needed.
    """
    return copy_with_nodes(gm)[0]


def copy_with_nodes(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """:func:`copy_graph_module`, with the copy of each node."""
    graph = fx.Graph(tracer_cls=tracer_of(gm.graph))
    mapping: dict[fx.Node, fx.Node] = {}
    copied = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    old_output = gm.graph.output_node()
    value = copied[0] if isinstance(copied, tuple) else copied
    output = graph.output(value)
    output.meta = dict(old_output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    copy_codegen(gm.graph, graph)
    result = late_module(gm, graph)
    result.meta = dict(gm.meta)
    carry_dynamo_metadata(gm, result, mapping)
    mapping[old_output] = output
    return result, mapping


def insert_call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    like: fx.Node,
    kwargs: dict[str, Any] | None = None,
    record: Record | None = None,
    value: Any = None,
) -> fx.Node:
    """Add ``target(*args)`` at the graph's insert point with a traced value and the provenance of ``like``.

    ``value`` is the traced value where the caller knows it; otherwise it is computed on the arguments' fake values.
    Passes make new computations here, so that none is left without a value or a module stack. (What they copy from another
    graph keeps its own; `memory.place` makes nodes that write memory, whose values are known to it alone.)
    """
    kwargs = kwargs or {}
    node = graph.call_function(target, args, kwargs)
    made = _traced_value(node) if value is None else value
    node.meta["val" if "val" in like.meta and "example_value" not in like.meta else "example_value"] = made
    for name in _STRUCTURE:
        if name in like.meta:
            node.meta[name] = like.meta[name]
    note(node, record)
    return node


def _traced_value(node: fx.Node) -> Any:
    mode = fake_mode_of(value_of(n) for n in node.all_input_nodes)
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with mode if mode is not None else contextlib.nullcontext(), torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def sort_topologically(graph: fx.Graph) -> None:
    """Put the nodes of ``graph`` in an order in which each comes after its inputs; others keep their order."""
    import networkx

    order = {node: index for index, node in enumerate(graph.nodes)}
    flow = networkx.DiGraph()
    flow.add_nodes_from(order)
    flow.add_edges_from((source, node) for node in order for source in node.all_input_nodes)
    output = graph.output_node()
    for node in networkx.lexicographical_topological_sort(flow, key=order.__getitem__):
        if node is not output:
            output.prepend(node)


def replace_uses(old: fx.Node, new: fx.Node, users: Iterable[fx.Node]) -> None:
    """Make each of ``users`` read ``new`` where it read ``old``."""
    for user in users:
        user.replace_input_with(old, new)


_UNREAD = "attnres_unread"  # in the meta of a node that was unread when its graph came


def keep_unread(graph: fx.Graph) -> None:
    """Remember what is unread in a graph that just came, so that :func:`remove_dead` leaves it."""
    for node in graph.nodes:
        if not node.users:
            node.meta[_UNREAD] = True


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes, check the graph, generate its code."""
    remove_dead(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def remove_dead(graph: fx.Graph) -> int:
    """Remove the unread nodes that only make a value; returns how many."""
    before = len(graph.nodes)
    for node in reversed(graph.nodes):
        if not node.users and only_makes_a_value(node):
            graph.erase_node(node)
    return before - len(graph.nodes)


def only_makes_a_value(node: fx.Node) -> bool:
    """Whether ``node`` may be removed if it is unread."""
    if node.op == "get_attr":
        return True
    if node.meta.get(_UNREAD, False):
        return False
    if node.op not in ("call_function", "call_method") or node.is_impure() or is_mutation(node):
        return False
    return _is_value(value_of(node)) and op_name(node) not in BATCH_NORMS  # which update running statistics


def _is_value(value: Any) -> bool:
    """Whether a call gave tensors or symbolic sizes; one that gave nothing, or a plain number, was made for its effect."""
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return len(value) > 0 and all(_is_value(part) for part in value)
    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))


# A value that takes more operations than this is left where it is.
_MOST_MOVED = 16


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
