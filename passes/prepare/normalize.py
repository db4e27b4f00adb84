"""Normalize: bring the spellings of an addition to one, ``aten.add.Tensor(left, right)`` without side effect.

Matches: in-place additions (``x += f``, ``x.add_(f)``) whose target shares memory with no other live tensor;
``alpha=``; ``torch.addcmul``, ``torch.sub``; ``torch.addmm`` and ``torch.baddbmm`` to a tensor of the result's shape; sums
of a two- or more-element stack; ``0 + x``, with which Python's ``sum`` begins. Replaces with: plain sums of two tensors, the
last with a copy. Everything else, and every in-place addition whose target is shared, stays as it is; detection refuses
those by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from attnres_fx.passes.graph.aliases import has_one_name, is_mutation
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call
from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of
from attnres_fx.passes.graph.vocabulary import ADDITIONS, Addition, addition_of, argument, op_name

ADD = torch.ops.aten.add.Tensor


def normalize(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of nodes replaced."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    replaced = 0
    for node in list(graph.nodes):
        spelled = _SPELLINGS.get(op_name(node))
        if spelled is not None:
            replaced += bool(spelled(node))
            continue
        found = addition_of(node)
        if found is None:
            replaced += _adds_zero(node)
            continue
        if is_mutation(node):
            replaced += _make_functional(node, found, order)
        elif found.alpha != 1:
            _replace_by_sum(node, found.left, _scaled(node, found.right, found.alpha))
            replaced += 1
    return replaced


def _make_functional(node: fx.Node, found: Addition, order: dict[fx.Node, int]) -> int:
    """``x += f`` becomes ``y = x + f`` and later readers of x read y; not done if another name of x's memory lives on."""
    target = found.left
    if not has_one_name(target, node, order):
        return 0
    here = order[node]
    later = [user for user in target.users if user is not node and order.get(user, here) > here]
    right = found.right if found.alpha == 1 else _scaled(node, found.right, found.alpha)
    result = _replace_by_sum(node, target, right, dtype=value_of(target).dtype)
    for user in later:
        user.replace_input_with(target, result)
    return 1


def _adds_zero(node: fx.Node) -> bool:
    """``0 + x`` is a copy of x."""
    if op_name(node) not in ADDITIONS or is_mutation(node):
        return False
    parts = [argument(node, 0, "input", node.kwargs.get("self")), argument(node, 1, "other")]
    whole, tensors = float_tensor(node), [part for part in parts if float_tensor(part) is not None]
    zeros = [part for part in parts if type(part) in (int, float) and part == 0]
    if whole is None or len(tensors) != 1 or len(zeros) != 1 or value_of(tensors[0]).dtype != whole.dtype:
        return False
    with node.graph.inserting_before(node):
        node.replace_all_uses_with(insert_call(node.graph, torch.ops.aten.clone.default, (tensors[0],), like=node))
    node.graph.erase_node(node)
    return True


def _scaled(like: fx.Node, value: fx.Node, factor: object) -> fx.Node:
    with like.graph.inserting_before(like):
        return insert_call(like.graph, torch.ops.aten.mul.Tensor, (value, factor), like=like)


def _replace_by_sum(node: fx.Node, left: fx.Node, right: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
    graph = node.graph
    with graph.inserting_before(node):
        result = insert_call(graph, ADD, (left, right), like=node)
        wanted = dtype if dtype is not None else value_of(node).dtype
        if value_of(result).dtype != wanted:
            result = insert_call(graph, torch.ops.aten.to.dtype, (result, wanted), like=node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result


def _addcmul(node: fx.Node) -> bool:
    """``addcmul(x, a, b, value=c)`` is ``x + c * a * b``."""
    base, first, second = (argument(node, i, n) for i, n in enumerate(("input", "tensor1", "tensor2")))
    if any(float_tensor(part) is None for part in (base, first, second)):
        return False
    factor = argument(node, 3, "value", 1)
    with node.graph.inserting_before(node):
        product = insert_call(node.graph, torch.ops.aten.mul.Tensor, (first, second), like=node)
    _replace_by_sum(node, base, product if factor == 1 else _scaled(node, product, factor))
    return True


def _addmm(node: fx.Node) -> bool:
    """``addmm(x, a, b, beta=c, alpha=k)`` is ``c * x + k * (a @ b)``; not where x is a bias, of another shape."""
    base, first, second = (argument(node, i, n) for i, n in enumerate(("input", "mat1", "mat2")))
    if op_name(node) == "baddbmm":
        first, second = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    whole, added = float_tensor(node), float_tensor(base)
    if whole is None or added is None or is_mutation(node) or not same_size(added.shape, whole.shape):
        return False
    if base.op in ("placeholder", "get_attr") and isinstance(value_of(base), torch.nn.Parameter):
        return False  # a bias of the result's own shape
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    target = torch.ops.aten.bmm.default if op_name(node) == "baddbmm" else torch.ops.aten.mm.default
    with node.graph.inserting_before(node):
        product = insert_call(node.graph, target, (first, second), like=node)
    _replace_by_sum(node, base if beta == 1 else _scaled(node, base, beta),
                    product if alpha == 1 else _scaled(node, product, alpha))
    return True


def _sub(node: fx.Node) -> bool:
    """``x - f`` is ``x + (-1) * f``; not where f is broadcast, as the mean within a norm."""
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    whole, subtracted = float_tensor(node), float_tensor(right)
    if float_tensor(left) is None or subtracted is None or whole is None or whole.dim() < 2:
        return False
    if not same_size(subtracted.shape, whole.shape):
        return False
    _replace_by_sum(node, left, _scaled(node, right, -1 * argument(node, 2, "alpha", 1)))
    return True


def _sum_of_stack(node: fx.Node) -> bool:
    """``torch.stack([x, f, ...]).sum(0)`` is ``x + f + ...``."""
    stacked = argument(node, 0, "input", node.kwargs.get("self"))
    if not isinstance(stacked, fx.Node) or op_name(stacked) != "stack" or len(stacked.users) != 1:
        return False
    parts, over = argument(stacked, 0, "tensors"), argument(node, 1, "dim")
    over = over[0] if isinstance(over, (list, tuple)) and len(over) == 1 else over
    whole, keep = float_tensor(node), argument(node, 2, "keepdim", False)
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or whole is None or keep or whole.dim() < 2:
        return False
    if over is None or over % (whole.dim() + 1) != argument(stacked, 1, "dim", 0) % (whole.dim() + 1):
        return False
    if node.kwargs.get("dtype") is not None or any(value_of(part).dtype != whole.dtype for part in parts):
        return False
    total = parts[0]
    with node.graph.inserting_before(node):
        for part in parts[1:-1]:
            total = insert_call(node.graph, ADD, (total, part), like=node)
    _replace_by_sum(node, total, parts[-1])
    stacked.graph.erase_node(stacked)  # nothing else reads it, and as a reader of its parts it would mislead
    return True


_SPELLINGS: dict[str, Callable[[fx.Node], bool]] = {
    "addcmul": _addcmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "sub": _sub,
    "subtract": _sub,
    "__sub__": _sub,
    "sum": _sum_of_stack,
}
