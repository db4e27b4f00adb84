"""Encoder layers: replace torch's fused encoder layer by the operations that it computes.

Matches: ``_transformer_encoder_layer_fwd``, what ``torch.nn.TransformerEncoderLayer`` calls for both of its residual
additions when it is in eval mode and nothing requires a gradient (its fast path). Replaces with: layer norms, linear maps,
attention, activation and two additions, at the place of the layer in the model. The layers of such an encoder can then be
found in inference as in training.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call
from attnres_fx.passes.graph.nodes import float_tensor
from attnres_fx.passes.graph.vocabulary import argument, op_name

aten: Any = torch.ops.aten

# The arguments of the operator from its fourth on, all positional: weights and biases in pairs, and three options.
_NAMES = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first", "eps", "norm_weight_1",
          "norm_bias_1", "norm_weight_2", "norm_bias_2", "ffn_weight_1", "ffn_bias_1", "ffn_weight_2", "ffn_bias_2", "mask",
          "mask_type")


def expand_encoder_layers(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of layers."""
    found = [node for node in graph.nodes if op_name(node) == "_transformer_encoder_layer_fwd"
             and (value := float_tensor(node)) is not None and not value.is_nested]
    for node in found:
        with graph.inserting_before(node):
            node.replace_all_uses_with(_expanded(node))
        graph.erase_node(node)
    return len(found)


def _expanded(node: fx.Node) -> fx.Node:
    """The result of the layer ``node``, by plain operations in front of it."""
    x, width, heads = (argument(node, place, name) for place, name in enumerate(("src", "embed_dim", "num_heads")))
    given = {name: argument(node, place, name) for place, name in enumerate(_NAMES, start=3)}

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(node.graph, target, args, like=node, kwargs=kwargs)

    def norm(which: int, value: fx.Node) -> fx.Node:
        return call(aten.layer_norm.default, value, [width], given[f"norm_weight_{which}"], given[f"norm_bias_{which}"],
                    given["eps"])

    def attention(value: fx.Node) -> fx.Node:
        merged = call(aten.linear.default, value, given["qkv_weight"], given["qkv_bias"])
        parts = call(aten.unbind.int, call(aten.unflatten.int, merged, -1, [3, heads, width // heads]), 2)
        query, key, values = (call(aten.transpose.int, call(operator.getitem, parts, place), 1, 2) for place in range(3))
        mixed = call(aten.scaled_dot_product_attention.default, query, key, values, allowed)
        flat = call(aten.flatten.using_ints, call(aten.transpose.int, mixed, 1, 2), 2, 3)
        return call(aten.linear.default, flat, given["proj_weight"], given["proj_bias"])

    def feed_forward(value: fx.Node) -> fx.Node:
        inner = call(aten.linear.default, value, given["ffn_weight_1"], given["ffn_bias_1"])
        active = call(aten.gelu.default if given["use_gelu"] else aten.relu.default, inner)
        return call(aten.linear.default, active, given["ffn_weight_2"], given["ffn_bias_2"])

    allowed = None if given["mask"] is None else _allowed(call, given["mask"], given["mask_type"])
    for which, branch in ((1, attention), (2, feed_forward)):
        if given["norm_first"]:
            x = call(aten.add.Tensor, x, branch(norm(which, x)))
        else:
            x = norm(which, call(aten.add.Tensor, x, branch(x)))
    return x


def _allowed(call: Any, mask: fx.Node, mask_type: int | None) -> fx.Node:
    """The mask that is true where attention is allowed, [B or 1, H or 1, T or 1, T]. The operator forbids every entry that
    is not zero, and masks of queries (type 0, [T, T]), of keys (1, [B, T]) or of all (2, [B, H, T, T]).
    """
    allowed: fx.Node = call(aten.logical_not.default, mask)
    if mask_type == 1:
        allowed = call(aten.unsqueeze.default, call(aten.unsqueeze.default, allowed, 1), 1)
    return allowed
