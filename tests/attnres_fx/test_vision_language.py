"""Models of several towers: each stream alone or all of them, called eagerly, compiled and generating with a cache."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from support import models
from support.checkpoint_models import disturb
from torch import Tensor, nn

import attnres_fx

transformers = pytest.importorskip("transformers")
AOT = {"backend": "attnres", "options": {"downstream": "aot_eager"}}
IMAGE = 90
GREEDY = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


@functools.cache
def llava() -> tuple[Any, dict[str, Any]]:
    """Reads the hidden states of a layer within the vision tower, through hooks."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**TOWER, num_hidden_layers=3, image_size=16, patch_size=8, projection_dim=32)
    text = transformers.LlamaConfig(**TOWER, vocab_size=97, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4, vision_feature_layer=-2)).eval()
    ids = torch.tensor([[5, *[IMAGE] * 4, 7, 8], [6, *[IMAGE] * 4, 9, 1]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16)}


@functools.cache
def qwen2_vl() -> tuple[Any, dict[str, Any]]:
    """Cuts its images apart by sizes that depend on the data."""
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 97, "num_hidden_layers": 2, "num_key_value_heads": 2, "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2}
    model = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=91, video_token_id=92,
        vision_end_token_id=93)).eval()
    ids = torch.tensor([[5, 91, *[IMAGE] * 4, 93, 7, 8]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(16, 96),
                   "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).long()}


def logits(model: Any, call: dict[str, Any]) -> Tensor:
    return model(**call, use_cache=False).logits


def gradients(model: Any, call: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    logits(model, call).square().mean().backward()
    return {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model: Any, call: dict[str, Any], plain: Tensor) -> None:
    """The plain values at zero queries; with others, compiled as eager, and with a cache as without."""
    assert models.relative(logits(model, call), plain) < 1e-5
    disturb(model)
    expected = gradients(model, call)
    assert sum("query" in name for name in expected) == len(model.attnres.streams)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no residual stream")
        found = gradients(torch.compile(model, **AOT), call)
    # For a tower's last layer, which nothing reads, a compiled piece gives zeros.
    assert not any(gradient.any() for name, gradient in found.items() if name not in expected)
    # Nothing depends on a bias of keys, whose gradients are rounding.
    far = {name: models.relative(found[name], expected[name]) for name in expected if not name.endswith("k_proj.bias")}
    assert max(far.values()) < 1e-4, far
    with_cache, without = (model.generate(**call, **GREEDY, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("streams", [
    ["encoder"], pytest.param(["language_model"], marks=pytest.mark.slow),
    pytest.param(["encoder", "language_model"], marks=pytest.mark.slow)], ids=len)
def test_streams_of_two_towers(streams: list[str]) -> None:
    original, call = llava()
    model = copy.deepcopy(original)
    assert [(s.name, s.convertible) for s in attnres_fx.analyze(model, (), {**call, "use_cache": False}).streams] == [
        ("encoder", True), ("language_model", True)]
    attnres_fx.convert(model, (), {**call, "use_cache": False}, num_blocks=2, mix_scale="sum", streams=streams)
    with torch.no_grad():
        plain = logits(original, call)
    check(model, call, plain)


@pytest.mark.slow
def test_a_tower_that_cannot_be_traced_is_left_as_it_is() -> None:
    original, call = qwen2_vl()
    model = copy.deepcopy(original)
    with pytest.raises(attnres_fx.errors.GraphBreakError, match="text alone"):
        attnres_fx.convert(model, (), {**call, "use_cache": False}, num_blocks=2, mix_scale="sum")
    text = torch.tensor([[5, 7, 8, 1, 2, 3]])
    attnres_fx.convert(model, (), {"input_ids": text, "attention_mask": torch.ones_like(text), "use_cache": False},
                       num_blocks=2, mix_scale="sum")
    with torch.no_grad():
        plain = logits(original, call)
    check(model, call, plain)


class Distilled(nn.Module):
    """A converted teacher, and a plain student that is not part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = attnres_fx.convert(models.nanogpt(2), models.token_ids(), num_blocks=2)
        self.student = models.nanogpt(2)

    def forward(self, ids: Tensor) -> Tensor:
        self.student(ids)
        torch._dynamo.graph_break()
        return self.teacher(ids)


def test_a_plain_model_beside_a_converted_one_is_not_passed_over() -> None:
    with pytest.raises(Exception, match=r"graph break cuts|attnres_fx\.convert"):
        torch.compile(Distilled(), **AOT)(models.token_ids())
