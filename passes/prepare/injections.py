"""Injections: features that are written into some rows of a sum become a term that is added to it.

Matches, where the target is a sum of two tensors: ``h[m] = h[m] + e`` for Boolean masks m and whole dimensions (also by
``index`` and ``index_put``), ``index_add``, ``scatter_add``, accumulating ``index_put``, ``where(m, h + e, h)``; in place
where the target has no other name. Replaces with: ``h + t``, t being e in those rows and zero in the others. A write that
does not add, or that is visible under another name, stays as it is; detection refuses it by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnres_fx.passes.graph.aliases import changes_of, has_one_name, is_mutation
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call, replace_uses
from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of
from attnres_fx.passes.graph.vocabulary import (
    INDEXED_WRITES,
    SCATTERED_ADDITIONS,
    addition_of,
    argument,
    base_of,
    keeps_identity,
    op_name,
    passed_through,
)

aten = torch.ops.aten

_READS = {"getitem", "index"}


def add_injections(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of writes replaced."""
    order: dict[fx.Node, int] = {}
    replaced = 0
    for node in list(graph.nodes):
        name = op_name(node)
        if name not in INDEXED_WRITES and name not in SCATTERED_ADDITIONS and name != "where":
            continue
        order = order or {each: index for index, each in enumerate(graph.nodes)}
        place, key = (2, "other") if name == "where" else (0, "input")
        target = argument(node, place, key, node.kwargs.get("self"))
        if not isinstance(target, fx.Node) or not _is_sum(target):
            continue
        if is_mutation(node) and not has_one_name(target, node, order):
            continue
        term = _term(node, name, target, order)
        if term is not None:
            _replace(node, target, term, order)
            replaced += 1
    return replaced


def _is_sum(target: fx.Node) -> bool:
    """Whether ``target`` is a sum, or one passed on: only then can it be the value of a stream after its first layer."""
    return float_tensor(target) is not None and addition_of(base_of(target)) is not None


def _term(node: fx.Node, name: str, target: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """What ``node`` adds to ``target``, in its shape, made in front of ``node``; None if it does not add."""
    graph = node.graph
    with graph.inserting_before(node):
        if name == "where":
            condition, written = argument(node, 0, "condition"), argument(node, 1, "input", node.kwargs.get("self"))
            features = _added(written, lambda part: part is target)
            if features is None or not isinstance(condition, fx.Node) or written is target:
                return None
            return insert_call(graph, aten.where.ScalarOther, (condition, features, 0.0), like=node)
        if name in SCATTERED_ADDITIONS:
            rest = [argument(node, index, key) for index, key in ((1, "dim"), (2, "index"), (3, _source_key(name)))]
            kwargs = {} if "scatter" in name else {"alpha": argument(node, 4, "alpha", 1)}
            if any(part is None for part in rest) or node.kwargs.get("reduce") is not None:
                return None
            call = aten.scatter_add.default if "scatter" in name else aten.index_add.default
            empty = insert_call(graph, aten.zeros_like.default, (_like(target),), like=node)
            return insert_call(graph, call, (empty, *rest), kwargs=kwargs, like=node)
        indices, features = argument(node, 1, "indices"), argument(node, 2, "values")
        accumulates = name != "setitem" and bool(argument(node, 3, "accumulate", False))
        if not accumulates:
            features = _added(features, lambda part: _reads(part, target, indices, node, order))
        rows = _rows(indices, any_tensor=accumulates)
        if not isinstance(features, fx.Node) or rows is None:
            return None
        if value_of(features).dtype != value_of(target).dtype:
            features = insert_call(graph, aten.to.dtype, (features, value_of(target).dtype), like=node)
        empty = insert_call(graph, aten.zeros_like.default, (_like(target),), like=node)
        return insert_call(graph, aten.index_put.default, (empty, rows, features, accumulates), like=node,
                           value=value_of(empty))


def _source_key(name: str) -> str:
    return "src" if "scatter" in name else "source"


def _added(written: Any, is_kept: Any) -> fx.Node | None:
    """e of ``kept + e``."""
    if not isinstance(written, fx.Node):
        return None
    while keeps_identity(written) and len(written.users) == 1:
        written = passed_through(written) or written
    found = addition_of(written)
    if found is None or found.alpha != 1 or (is_mutation(written) and len(written.users) != 1):
        return None
    if is_kept(found.left):
        return found.right
    return found.left if is_kept(found.right) and not is_mutation(written) else None


def _reads(part: fx.Node, target: fx.Node, indices: Any, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether ``part`` is what ``target`` holds at ``indices`` just before ``write``."""
    while keeps_identity(part):
        part = passed_through(part) or part
    if op_name(part) not in _READS or _listed(argument(part, 1, "indices")) != _listed(indices):
        return False
    source = part.args[0]
    masks = [index for index in _listed(indices) if isinstance(index, fx.Node)]
    changed = [change for mask in masks for change in changes_of(mask)]
    if source is target:
        changed += [change for change in changes_of(target) if order[part] < order.get(change, -1) < order[write]]
        # An addition in place to what was read changes the read copy, or the very rows that are written back.
        changed = [change for change in changed if addition_of(change) is None or change.args[0] is not part]
    else:
        same = isinstance(source, fx.Node) and base_of(source) is base_of(target)
        changed += changes_of(source) if isinstance(source, fx.Node) else []
        changed += [change for change in changes_of(target) if change is not write]
        if not same or not all(keeps_identity(each) for each in _copies(source, target)):
            return False
    return not changed


def _listed(indices: Any) -> list[Any]:
    return list(indices) if isinstance(indices, (list, tuple)) else [indices]


def _copies(*nodes: Any) -> list[fx.Node]:
    """The pass-throughs between ``nodes`` and what they are copies of."""
    found: list[fx.Node] = []
    for node in nodes:
        while (inner := passed_through(node)) is not None:
            found.append(node)
            node = inner
    return found


def _rows(indices: Any, any_tensor: bool) -> list[fx.Node | None] | None:
    """``indices`` for ``index_put``: tensors and whole dimensions alone, Boolean ones unless rows may repeat."""
    rows: list[fx.Node | None] = []
    listed = _listed(indices)
    for index in listed:
        if isinstance(index, fx.Node) and isinstance(value_of(index), torch.Tensor):
            if value_of(index).dtype != torch.bool and not any_tensor:
                return None
            rows.append(index)
        elif index is None or index == slice(None):
            rows.append(None)
        elif index is not Ellipsis or index is not listed[-1]:
            return None
    while rows and rows[-1] is None:
        rows.pop()
    return rows if any(row is not None for row in rows) else None


def _replace(node: fx.Node, target: fx.Node, term: fx.Node, order: dict[fx.Node, int]) -> None:
    graph, here = node.graph, order[node]
    with graph.inserting_before(node):
        result = insert_call(graph, aten.add.Tensor, (target, term), like=node)
        if value_of(result).dtype != value_of(target).dtype:
            result = insert_call(graph, aten.to.dtype, (result, value_of(target).dtype), like=node)
    later = [user for user in target.users if order.get(user, -1) > here]
    written = [part for part in node.all_input_nodes if part is not target]
    node.replace_all_uses_with(result)
    if is_mutation(node):
        replace_uses(target, result, later)
    graph.erase_node(node)
    for part in written:
        _erase_unread(part)


def _like(target: fx.Node) -> fx.Node:
    """A tensor of the shape and dtype of ``target``: a part of its sum, so that nothing seems to read the sum itself."""
    found, whole = addition_of(base_of(target)), value_of(target)
    for part in (found.right, found.left) if found is not None else ():
        if value_of(part).dtype == whole.dtype and same_size(value_of(part).shape, whole.shape):
            return part
    return target


def _erase_unread(node: fx.Node) -> None:
    """Remove what only the replaced write read: an unread sum of rows would look like an addition."""
    if node.users or addition_of(node) is None:
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for part in inputs:
        if op_name(part) not in _READS:
            continue
        if not part.users:
            part.graph.erase_node(part)
        elif all(not isinstance(value_of(user), torch.Tensor) for user in part.users):
            # The tracer still asks how many rows there are: let it ask a tensor that is not a value of the stream.
            source = part.args[0]
            assert isinstance(source, fx.Node)
            with part.graph.inserting_before(part):
                empty = insert_call(part.graph, aten.zeros_like.default, (_like(source),), like=part)
            part.replace_input_with(source, empty)
