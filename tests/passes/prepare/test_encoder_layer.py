"""torch's fused encoder layer, taken apart: the same numbers as the operator, for every mask, activation and placement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.layouts import WIDTH
from support.passes import in_place
from torch import nn

from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.vocabulary import op_name
from attnres_fx.passes.prepare.encoder_layer import expand_encoder_layers

LENGTH, HEADS = 6, 4
FORBIDDEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.arange(LENGTH).expand(2, -1) >= torch.tensor([[LENGTH], [4]])
INFINITE = float("-inf")
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "queries": {"src_mask": FORBIDDEN},
    "keys": {"src_key_padding_mask": PADDING},
    "both": {"src_mask": FORBIDDEN, "src_key_padding_mask": PADDING},
    "floats": {"src_mask": torch.zeros(LENGTH, LENGTH).masked_fill(FORBIDDEN, INFINITE)},
    "a query that may see nothing": {"src_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-4)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_same_numbers(norm_first: bool, mask: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, "gelu" if mask == "both" else "relu", batch_first=True,
                                       norm_first=norm_first, dtype=torch.float64).eval()
    given = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    options = {name: value.double() if value.is_floating_point() else value for name, value in MASKS[mask].items()}
    with torch.no_grad():
        gm, inputs = capture(layer, (given,), options)
        (fused,) = (node for node in gm.graph.nodes if op_name(node) == "_transformer_encoder_layer_fwd")
        path = fused.meta["nn_module_stack"]
        (wanted,) = gm(*inputs)
        in_place(expand_encoder_layers, gm)
        (got,) = gm(*inputs)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got, layer(given, **options), rtol=1e-12, atol=1e-12)
    gm.graph.lint()
    made = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert not any("fwd" in op_name(node) for node in made) and all(value_of(node) is not None for node in made)
    sums = [node for node in made if op_name(node) == "add" and value_of(node).shape == given.shape]
    assert [node.meta["nn_module_stack"] for node in sums] == [path, path]
    code = gm.code
    assert in_place(expand_encoder_layers, gm).code == code  # a second run changes nothing


def test_its_layers_are_found() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False).eval()
    with torch.no_grad():
        gm, _ = capture(model, (torch.randn(2, LENGTH, WIDTH),), {})
    assert not detect(gm.graph)
    (stream,) = detect(in_place(expand_encoder_layers, gm).graph)
    assert stream.num_layers == 6 and not stream.obstacles
