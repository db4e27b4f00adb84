"""One vocabulary for the graphs of Dynamo, ``torch.export`` and ``torch.fx.symbolic_trace``.

The three spell one operation in many ways (``operator.add``, ``torch.add``, ``aten.add.Tensor``, ``x.add(y)``, a leaf
module). Passes ask this file what a node means and never look at targets themselves. Names are those of ATen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of
from attnres_fx.passes.graph import float_tensor, same_size, value_of

ADDITIONS = frozenset({"add", "iadd", "add_", "__add__", "__iadd__", "__radd__", "radd"})
SUBTRACTIONS = frozenset({"sub", "isub", "sub_", "__sub__", "__isub__", "subtract", "subtract_"})
MULTIPLICATIONS = frozenset({"mul", "imul", "mul_", "__mul__", "__imul__", "__rmul__", "rmul", "multiply", "multiply_"})
DIVISIONS = frozenset({"div", "div_", "truediv", "itruediv", "__truediv__", "__itruediv__", "divide", "divide_",
                       "true_divide", "true_divide_"})

CASTS = frozenset({"to", "_to_copy", "float", "double", "half", "bfloat16", "type_as", "type", "convert_element_type"})
COPIES = frozenset({"contiguous", "clone", "alias", "detach_", "Identity", "lift_fresh_copy", "with_sharding_constraint"})
RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
                      "reshape_as"})
PERMUTES = frozenset({"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "mT"})
DROPOUTS = frozenset({"dropout", "native_dropout", "feature_dropout", "alpha_dropout", "Dropout", "dropout_", "dropout1d",
                      "dropout2d", "dropout3d", "feature_alpha_dropout"})

# Operations that mix the values of a row or of rows with weights: evidence that a branch is a sublayer.
CONTRACTIONS = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "tensordot", "mv", "dot", "inner",
    "imatmul", "__matmul__", "_grouped_mm", "grouped_mm", "bilinear", "addmv", "chain_matmul", "multi_dot",
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "Linear", "Conv1d", "Conv2d", "Conv3d", "Bilinear", "MultiheadAttention",
    "scaled_dot_product_attention", "multi_head_attention_forward", "_scaled_mm", "flex_attention", "lstm", "gru",
    "rnn_tanh", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "flex_attention_hop",
    "fft_fft", "fft_fft2", "fft_fftn", "fft_rfft", "fft_rfft2", "fft_rfftn", "_fft_c2c",
    "_fft_r2c", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d",
    "_transformer_encoder_layer_fwd", "_native_multi_head_attention",
})

NORMS = frozenset({
    "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "LayerNorm", "RMSNorm", "normalize",
    "fused_layer_norm", "group_norm", "native_group_norm", "instance_norm", "GroupNorm",
})
BATCH_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit", "BatchNorm1d", "BatchNorm2d", "SyncBatchNorm"})


# Operators that make the next state of a stream themselves: where they take the state and the branch, by place and name.
STATE_UPDATES: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    **dict.fromkeys(("gru_cell", "GRUCell", "rnn_tanh_cell", "rnn_relu_cell", "RNNCell"), ((1, "hx"), (0, "input"))),
    "lerp": ((0, "input"), (1, "end")),
}
# What is made in the likeness of a tensor, or tells its shape, without reading its values.
LIKENESSES = frozenset({"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
                        "new_ones", "new_full", "new_empty", "size", "sym_size", "dim"})


def op_name(node: fx.Node) -> str:
    """The short ATen name of what ``node`` computes; an empty string for placeholders, attributes and the output."""
    if node.op == "call_function":
        target: Any = node.target
        if isinstance(target, OpOverload):
            return str(schema_of(target).name).split("::")[-1]
        if isinstance(target, OpOverloadPacket):
            return str(target.__name__)
        return str(getattr(target, "__name__", target))
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_module":
        module = node.graph.owning_module
        return type(module.get_submodule(str(node.target))).__name__ if module is not None else str(node.target)
    return ""


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A positional or keyword argument of a call."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


@dataclass(frozen=True)
class Addition:
    """``left + alpha * right``."""

    left: fx.Node
    right: fx.Node
    alpha: Any


def addition_of(node: fx.Node) -> Addition | None:
    """``node`` as a sum of two floating-point tensors of rank two or more, or None."""
    if op_name(node) not in ADDITIONS:
        return None
    left = argument(node, 0, "input", node.kwargs.get("self"))
    right = argument(node, 1, "other")
    whole, first, second = float_tensor(node), float_tensor(left), float_tensor(right)
    if whole is None or first is None or second is None or whole.dim() < 2:
        return None
    return Addition(left, right, argument(node, 2, "alpha", 1))


def is_contraction(node: fx.Node) -> bool:
    """Whether ``node`` contracts a dimension with weights or with another tensor, itself or in a body that it runs."""
    return op_name(node) in CONTRACTIONS or any(
        is_contraction(inner) for body in bodies_of(node) for inner in body.graph.nodes)


def bodies_of(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that ``node``, a higher-order operator, runs: the branches of ``cond``, the body of ``while_loop``."""
    owner = node.graph.owning_module
    if owner is None or not isinstance(node.target, HigherOrderOperator):
        return []
    found = [getattr(owner, str(source.target), None) for source in node.all_input_nodes if source.op == "get_attr"]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def has_one_reader(node: fx.Node) -> bool:
    """Whether exactly one node reads the values of ``node``, others at most its shape."""
    readers = (user for user in node.users if len(node.users) == 1 or op_name(user) not in LIKENESSES)
    return next(readers, None) is not None and next(readers, None) is None


def is_active_dropout(node: fx.Node) -> bool:
    """Whether ``node`` is a dropout that changes values in the mode the graph was traced in.

    A leaf module that a graph calls looks at its mode at every call, so that it is active whatever its mode is now.
    """
    if op_name(node) not in DROPOUTS:
        return False
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
        return float(getattr(module, "p", 0.0)) > 0
    probability = argument(node, 1, "p", 0.5)
    training = argument(node, 2, "training", argument(node, 2, "train", True))
    return bool(training) and probability != 0


def passed_through(node: Any) -> fx.Node | None:
    """The one tensor that ``node`` hands on unchanged but for dtype, shape or layout; None if it is no pass-through."""
    if not isinstance(node, fx.Node):
        return None
    name = op_name(node)
    through = name in CASTS or name in COPIES or name in RESHAPES or name in PERMUTES
    if not through and name in DROPOUTS:
        through = not is_active_dropout(node)
    if not through:
        return None
    source = argument(node, 0, "input", node.kwargs.get("self"))
    if float_tensor(source) is None or float_tensor(node) is None:
        return None
    return source if isinstance(source, fx.Node) else None


def base_of(node: fx.Node) -> fx.Node:
    """``node`` with all pass-throughs taken off."""
    while (inner := passed_through(node)) is not None:
        node = inner
    return node


def pass_through_chain(node: fx.Node, base: fx.Node) -> list[fx.Node]:
    """The pass-throughs that lead from ``base`` (excluded) to ``node`` (included), in order of application."""
    chain: list[fx.Node] = []
    while node is not base:
        chain.append(node)
        inner = passed_through(node)
        if inner is None:
            raise ValueError(f"'{node.name}' is not reached from '{base.name}' by pass-throughs")
        node = inner
    return chain[::-1]


def keeps_identity(node: fx.Node) -> bool:
    """Whether ``node`` is a pass-through that changes neither shape nor dtype (a copy, a cast to the same dtype)."""
    inner = passed_through(node)
    if inner is None or op_name(node) in PERMUTES:
        return False
    before, after = value_of(inner), value_of(node)
    return before.dtype == after.dtype and same_size(before.shape, after.shape)


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


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` may be a view of; itself if it has its own."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def has_one_name(target: fx.Node, mutation: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether whatever reads ``target``'s memory after ``mutation`` reads it as ``target``, so that it can read a copy."""
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


def is_mix(node: fx.Node) -> bool:
    """Whether ``node`` is an ``attnres::mix``."""
    target = node.target
    return isinstance(target, OpOverload) and target.namespace == "attnres" and op_name(node) == "mix"


def permutation_of(node: fx.Node) -> list[int]:
    """For each dimension of ``node``, a transpose, permute or movedim, the dimension of its input that it was."""
    source = passed_through(node)
    rank = value_of(source).dim()
    name = op_name(node)
    forward = list(range(rank))
    if name == "permute":
        given = argument(node, 1, "dims")
        dims = given if isinstance(given, (list, tuple)) else node.args[1:]
        return [dim % rank for dim in dims if isinstance(dim, int)]
    if name in {"movedim", "moveaxis"}:
        probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
        moved = torch.movedim(probe, argument(node, 1, "source"), argument(node, 2, "destination"))
        return [size - 2 for size in moved.shape]
    if name in {"t", "mT", "T"}:
        forward[-1], forward[-2] = forward[-2], forward[-1]
        return forward
    first = argument(node, 1, "dim0", node.kwargs.get("axis0")) % rank
    second = argument(node, 2, "dim1", node.kwargs.get("axis1")) % rank
    forward[first], forward[second] = forward[second], forward[first]
    return forward
