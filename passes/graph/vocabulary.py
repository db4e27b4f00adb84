"""One vocabulary for the graphs of Dynamo, ``torch.export`` and ``torch.fx.symbolic_trace``.

The three spell one operation in many ways (``operator.add``, ``torch.add``, ``aten.add.Tensor``, ``x.add(y)``, a leaf
module). Passes learn from this file what a node means and never look at targets themselves. Names are ATen's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat.graphs import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of
from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of

ADDITIONS = frozenset({"add", "iadd", "add_", "__add__", "__iadd__", "__radd__", "radd"})
SUBTRACTIONS = frozenset({"sub", "isub", "sub_", "__sub__", "__isub__", "subtract", "subtract_"})
MULTIPLICATIONS = frozenset({"mul", "imul", "mul_", "__mul__", "__imul__", "__rmul__", "rmul", "multiply", "multiply_"})
DIVISIONS = frozenset({"div", "div_", "truediv", "itruediv", "__truediv__", "__itruediv__", "divide", "divide_",
                       "true_divide", "true_divide_"})

POWERS = frozenset({"pow", "__pow__", "pow_"})
# Products of matrices and vectors, and products with an addition.
PLAIN_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "mm"})
MATRIX_PRODUCTS = PLAIN_PRODUCTS | {"imatmul", "einsum", "tensordot"}
PRODUCTS = MULTIPLICATIONS | PLAIN_PRODUCTS | {"einsum", "tensordot", "mv", "dot", "inner", "addcmul", "baddbmm", "addbmm"}
SCORINGS = PLAIN_PRODUCTS | {"linear", "baddbmm"}  # what the logits of a mix may be made by
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}  # and over how many dimensions
SOFTMAXES = frozenset({"softmax", "_softmax", "_safe_softmax"})
ATTENTION = "scaled_dot_product_attention"
# What makes gates, and weights over depth that are not a softmax.
SIGMOIDS = frozenset({"sigmoid", "hardsigmoid", "Sigmoid"})
GATES = frozenset({"sigmoid", "tanh", "softplus", "relu", "sparsemax", "hardsigmoid", "gumbel_softmax"})

CASTS = frozenset({"to", "_to_copy", "float", "double", "half", "bfloat16", "type_as", "type", "convert_element_type"})
NEW_COPIES = frozenset({"contiguous", "clone", "Identity", "lift_fresh_copy"})  # which may have memory of their own
COPIES = NEW_COPIES | {"alias", "detach_", "with_sharding_constraint"}
ALIASES = frozenset({"alias", "detach"})
LIKE_ANOTHER = frozenset({"expand_as", "view_as", "reshape_as"})  # of whose second tensor only the shape is used
CLAMPS = frozenset({"clamp", "clamp_min", "maximum"})
RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
                      "reshape_as"})
EXPANSIONS = frozenset({"expand", "expand_as", "broadcast_to"})
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
ONE_SLICE = frozenset({"select", "slice", "narrow"})
SLICES = ONE_SLICE | frozenset({"chunk", "split", "tensor_split", "split_with_sizes", "unbind", "getitem"})
SEVERAL_RESULTS = SLICES | {"max", "getattr", "size"}  # which may not be a single tensor
# Slices of a tensor with other values in their place, as new tensors.
SLICE_SCATTERS = frozenset({"select_scatter", "slice_scatter"})
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

RMS_NORMS = frozenset({"rms_norm", "_fused_rms_norm"})
LAYER_NORMS = frozenset({"layer_norm", "native_layer_norm"})
GROUP_NORMS = frozenset({"group_norm", "native_group_norm", "GroupNorm", "instance_norm"})
NORMS = RMS_NORMS | LAYER_NORMS | GROUP_NORMS | frozenset({
    "LayerNorm", "RMSNorm", "normalize", "fused_layer_norm",
})
BATCH_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit", "BatchNorm1d", "BatchNorm2d", "SyncBatchNorm"})
# Norms and maps that treat the last dimension of their first argument as features.
OF_THE_LAST_DIMENSION = LAYER_NORMS | {"rms_norm", "LayerNorm", "RMSNorm", "linear", "Linear"}
# What a norm over the last dimension may be spelled with.
NORM_STEPS = ADDITIONS | SUBTRACTIONS | MULTIPLICATIONS | DIVISIONS | CASTS | COPIES | RMS_NORMS | LAYER_NORMS | frozenset({
    "pow", "__pow__", "square", "mean", "sum", "var", "rsqrt", "sqrt", "reciprocal", "neg", "maximum", "clamp", "clamp_min",
    "getitem",
})
SCALE_FREE = frozenset({"sign", "argmax"})  # the same for c x as for x, c > 0
ROOTS = frozenset({"rsqrt", "std", "var", "sqrt"})
# Values that scale as their input does: f(c x) = c f(x) for c > 0.
HOMOGENEOUS = CASTS | COPIES | RESHAPES | PERMUTES | DROPOUTS | EXPANSIONS | SLICES | {
    "mean", "sum", "neg", "roll", "abs", "detach", "pad", "constant_pad_nd", "relu", "amax", "max", "norm",
    "linalg_vector_norm", "vector_norm", "std", "flip", "repeat", "repeat_interleave", "index_select",
}
# What a hand-written mix may be spelled with, beside products and softmaxes.
MIX_ARITHMETIC = ADDITIONS | SUBTRACTIONS | DIVISIONS | POWERS | RMS_NORMS | frozenset({
    "rsub", "rtruediv", "rpow", "square", "square_", "sqrt", "sqrt_", "rsqrt", "rsqrt_", "reciprocal", "neg", "exp", "exp_",
    "log", "sum", "mean", "amax", "max", "logsumexp", "norm", "vector_norm", "linalg_vector_norm", "maximum", "clamp",
    "clamp_min", "normalize", "log_softmax", "var", "abs", "tanh", "masked_fill", "where",
})
# What may stand between the logits of a mix and their softmax.
LOGIT_STEPS = ADDITIONS | SUBTRACTIONS | MULTIPLICATIONS | DIVISIONS | CASTS | COPIES | {"masked_fill", "where", "squeeze"}
MIX_LAYOUT = CASTS | COPIES | RESHAPES | PERMUTES | EXPANSIONS | CONCATENATIONS | SLICES | SLICE_SCATTERS | frozenset({
    "stack", "roll", "flip", "index_select", "setitem", "copy_", "sum_to_size", "T", "getattr", "detach", "repeat",
})
CREATIONS = frozenset({"zeros", "new_zeros", "empty", "new_empty", "zeros_like", "empty_like", "full", "new_full", "ones",
                       "new_ones", "ones_like", "full_like"})
CONSTANTS = CREATIONS | {"tensor", "scalar_tensor", "arange"}
# Where operations that make a tensor take the number that it is filled with; their other numbers are sizes.
FILLS = {"full": 1, "full_like": 1, "new_full": 2, "tensor": 0, "scalar_tensor": 0}
# Operations that take a shape.
SHAPED = frozenset({"view", "reshape", "expand", "unflatten", "zeros", "new_zeros", "empty", "new_empty", "full", "new_full",
                    "ones", "new_ones", "broadcast_to"})
# Operations that replace a part of a tensor by other values.
WRITES = SLICE_SCATTERS | frozenset({
    "setitem", "index_put", "index_put_", "masked_scatter", "masked_scatter_", "scatter", "scatter_", "index_copy",
    "index_copy_", "copy_"})
INDEXED_WRITES = frozenset({"setitem", "index_put", "index_put_"})
# Operations that add to some rows of a tensor, and where they take the factor.
SCATTERED_ADDITIONS = {"index_add": 4, "index_add_": 4, "scatter_add": 4, "scatter_add_": 4}
# After these functional collectives every process has a part of its own.
SCATTERING_COLLECTIVES = frozenset({"reduce_scatter_tensor", "reduce_scatter_tensor_coalesced", "all_to_all_single"})
# Higher-order operators that do not change their arguments. (What they would change is copied first.)
PURE_OPERATORS = frozenset({
    "cond", "while_loop", "scan", "associative_scan", "map_impl", "invoke_subgraph", "flex_attention",
    "flex_attention_backward", "auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional"})

# Operators that make the next state of a stream themselves: where they take the state and the branch, by place and name.
STATE_UPDATES: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    **dict.fromkeys(("gru_cell", "GRUCell", "rnn_tanh_cell", "rnn_relu_cell", "RNNCell"), ((1, "hx"), (0, "input"))),
    "lerp": ((0, "input"), (1, "end")),
}
# Activation checkpointing, before its body is inlined.
CHECKPOINT = "tag_activation_checkpoint"
# What is made like a tensor, or returns its shape, without reading its values.
LIKENESSES = frozenset({"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
                        "new_ones", "new_full", "new_empty", "size", "sym_size", "dim"})


_ARITHMETIC = ADDITIONS | SUBTRACTIONS | MULTIPLICATIONS | DIVISIONS | CASTS | COPIES | RESHAPES | PERMUTES | DROPOUTS


def op_name(node: fx.Node) -> str:
    """The short ATen name of what ``node`` computes; an empty string for placeholders, attributes and the output."""
    if node.op == "call_function":
        target: Any = node.target
        if isinstance(target, OpOverload):
            return _own_name(str(schema_of(target).name).split("::")[-1], target.namespace)
        if isinstance(target, OpOverloadPacket):
            return _own_name(str(target.__name__), str(target).split(".")[0])
        return _own_name(str(getattr(target, "__name__", target)), str(getattr(target, "__module__", None) or "torch"))
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_module":
        module = node.graph.owning_module
        return type(module.get_submodule(str(node.target))).__name__ if module is not None else str(node.target)
    return ""


def _own_name(name: str, library: str) -> str:
    """``name``, with ``library`` in front of what another library calls like an arithmetic operator of torch."""
    foreign = library.split(".")[0] not in ("aten", "prims", "torch", "_operator", "builtins", "math", "attnres")
    return f"{library}::{name}" if foreign and name in _ARITHMETIC else name


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
    """Whether exactly one node reads the values of ``node``; others may read its shape."""
    readers = (user for user in node.users if len(node.users) == 1 or op_name(user) not in LIKENESSES)
    return next(readers, None) is not None and next(readers, None) is None


def is_active_dropout(node: fx.Node) -> bool:
    """Whether ``node`` is a dropout that changes values in the mode the graph was traced in.

    A leaf module looks at its mode at every call, so it counts as active whatever its mode is now.
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
    """The one tensor that ``node`` hands on, unchanged except in dtype, shape or layout; None if it is not a
    pass-through."""
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
