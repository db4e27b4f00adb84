"""Finish: what every transformation of a module ends with. Remove dead nodes, check the graph, generate its code once.

``Graph.eliminate_dead_code`` is not used: it takes for dead what changes a tensor in place where nobody reads the result of
the call, what counts the levels of functorch, and any other call that is made for its effect. What nobody read when the
graph came may be such a call, whatever it gives: only what a transformation left unread is dead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnres_fx.passes.graph import value_of
from attnres_fx.passes.vocabulary import BATCH_NORMS, is_mutation, op_name

_UNREAD = "attnres_unread"  # in the meta of a node that nobody read when its graph came


def keep_unread(graph: fx.Graph) -> None:
    """Remember what nobody reads in a graph that just came, so that :func:`remove_dead` leaves it."""
    for node in graph.nodes:
        if not node.users:
            node.meta[_UNREAD] = True


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes, check the graph, generate its code."""
    remove_dead(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def remove_dead(graph: fx.Graph) -> None:
    """Remove the nodes that nobody reads and that do nothing but make a value."""
    for node in reversed(graph.nodes):
        if not node.users and only_makes_a_value(node):
            graph.erase_node(node)


def only_makes_a_value(node: fx.Node) -> bool:
    """Whether ``node`` may go where nobody reads it."""
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
