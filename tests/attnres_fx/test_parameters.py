"""The parameters of a converted model: state_dict, ties, dtypes, mixed precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import models, reference
from torch import Tensor

import attnres_fx
from attnres_fx.passes.findings import find_marked

NEW = ["attnres.stream.query", "attnres.stream.key_gain"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def draw(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameters in model.attnres.streams.values():
            parameters.query.copy_(0.3 * torch.randn(parameters.query.shape, generator=generator))
            parameters.key_gain.copy_(1 + 0.3 * torch.randn(parameters.query.shape, generator=generator))


def test_state_dict_keeps_its_keys_and_round_trips() -> None:
    model, ids = models.nanogpt(5, width=16, heads=2), models.token_ids(2, 5)
    keys, held = list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    attnres_fx.convert(model, ids, layers_per_block=2)
    assert list(model.state_dict()) == [*keys, *NEW]
    shared = {name: id(p) for name, p in model.named_parameters() if name not in NEW}
    assert shared == held, "parameters are shared, never copied"
    stream = model.attnres.stream
    assert stream.query.shape == stream.key_gain.shape == (6, 16)
    assert not stream.query.any() and bool((stream.key_gain == 1).all())
    draw(model)

    other = models.randomize(reference.NanoGPT(5, width=16, heads=2).eval(), seed=7)
    attnres_fx.convert(other, ids, layers_per_block=2)
    assert models.relative(other(ids), model(ids)) > 1e-2
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(other(ids), model(ids))

    plain = reference.NanoGPT(5, width=16, heads=2)
    found = plain.load_state_dict(model.state_dict(), strict=False)
    assert found.unexpected_keys == NEW and not found.missing_keys


def test_tied_weights_stay_tied() -> None:
    model, ids = models.nanogpt(5, width=16, heads=2), models.token_ids(2, 5)
    attnres_fx.convert(model, ids, num_blocks=2)
    assert model.head.weight is model.wte.weight
    assert "head.weight" not in dict(model.named_parameters())
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.wte.weight and copied.head.weight is not model.head.weight
    llama = models.llama(2, tie_word_embeddings=True)
    attnres_fx.convert(llama, ids, {"use_cache": False}, num_blocks=2)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    llama(ids, use_cache=False).logits.square().mean().backward()
    assert llama.lm_head.weight.grad is llama.model.embed_tokens.weight.grad


@pytest.mark.parametrize("model_dtype, param_dtype, expected", [
    (torch.float32, None, torch.float32),
    (torch.float64, None, torch.float64),
    (torch.bfloat16, None, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float64, torch.float64),
])
def test_dtype_of_new_parameters(
    model_dtype: torch.dtype, param_dtype: torch.dtype | None, expected: torch.dtype
) -> None:
    plain = models.nanogpt(5, width=16, heads=2).to(model_dtype)
    model, ids = copy.deepcopy(plain), models.token_ids(2, 5)
    attnres_fx.convert(model, ids, layers_per_block=2, param_dtype=param_dtype)
    stream = model.attnres.stream
    assert stream.query.dtype == stream.key_gain.dtype == expected
    draw(model)
    value = model(ids)
    assert value.dtype == model_dtype
    wanted = reference.nanogpt(plain, ids, stream.query.float(), stream.key_gain.float(), [2, 4, 5])
    assert models.relative(value, wanted) <= {torch.bfloat16: 2e-2}.get(model_dtype, 1e-5)
    value.float().square().mean().backward()
    assert stream.query.grad.dtype == expected and stream.query.grad[1:].norm() > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_model_is_close_to_the_reference(compiled: bool) -> None:
    plain = models.nanogpt(6, width=32).bfloat16()
    model, ids = copy.deepcopy(plain), models.token_ids()
    attnres_fx.convert(model, ids, num_blocks=3)
    draw(model)
    call = torch.compile(model, backend="attnres", options={"downstream": "aot_eager"}) if compiled else model
    stream = model.attnres.stream
    expected = reference.nanogpt(plain, ids, stream.query, stream.key_gain, [2, 4, 6])
    wide = copy.deepcopy(plain).double()
    exact = reference.nanogpt(wide, ids, stream.query.double(), stream.key_gain.double(), [2, 4, 6])
    value = call(ids)
    assert value.dtype == torch.bfloat16
    assert models.relative(value, expected) <= 2e-2
    assert models.relative(value, exact) <= 2 * models.relative(expected, exact) + 1e-3, "no less accurate than bf16 is"
    assert attnres_fx.verify(model, ids).passed


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_close_to_the_reference(compiled: bool) -> None:
    """Under autocast branches are bfloat16 and the stream float32; so are the sources."""
    plain = models.nanogpt(6, width=32)
    model, ids = copy.deepcopy(plain), models.token_ids()
    attnres_fx.convert(model, ids, num_blocks=3)
    draw(model)
    call = torch.compile(model, backend="attnres", options={"downstream": "aot_eager"}) if compiled else model
    stream = model.attnres.stream
    full = reference.nanogpt(plain, ids, stream.query, stream.key_gain, [2, 4, 6])
    assert models.relative(model(ids), full) <= 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference.nanogpt(plain, ids, stream.query, stream.key_gain, [2, 4, 6])
        value = call(ids)
        assert attnres_fx.verify(model, ids).passed
    assert value.dtype == expected.dtype == torch.bfloat16
    assert models.relative(value, expected) <= 5e-3
    assert models.relative(value, full) > 1e-4, "autocast took place"
    value.float().square().mean().backward()
    assert stream.query.grad.dtype == torch.float32 and stream.query.grad[1:].norm() > 0
    assert models.relative(model(ids), full) <= 1e-5, "and ends with its context"


def test_autocast_with_a_low_precision_embedding_keeps_float32_blocks() -> None:
    """A block's first term takes the dtype of the original sum, so that block sums are not rounded to bfloat16."""
    from attnres_fx.passes.graph.capture import capture
    from attnres_fx.passes.graph.vocabulary import is_mix

    model, ids = models.nanogpt(6, width=16, heads=2), models.token_ids(2, 5)
    attnres_fx.convert(model, ids, num_blocks=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gm, _ = capture(model, (ids,), {})
    mixes = [node for node in find_marked(gm).rewritten().graph.nodes if is_mix(node)]
    assert len(mixes) == 6
    dtypes = {source.meta["example_value"].dtype for mix in mixes for source in mix.args[0]}
    assert dtypes == {torch.float32} == {mix.meta["example_value"].dtype for mix in mixes}


def test_moves_with_the_model() -> None:
    """``.double()``, ``requires_grad_``, ``parameters()`` and ``train`` reach the new parameters."""
    model, ids = models.nanogpt(4, width=16, heads=2), models.token_ids(2, 5)
    attnres_fx.convert(model, ids, num_blocks=2)
    assert {id(p) for p in model.attnres.parameters()} <= {id(p) for p in model.parameters()}
    model.double().train()
    stream = model.attnres.stream
    assert stream.query.dtype == torch.float64 and stream.training
    draw(model)
    plain: Any = models.nanogpt(4, width=16, heads=2).double()
    expected: Tensor = reference.nanogpt(plain, ids, stream.query, stream.key_gain, [2, 4])
    assert models.relative(model(ids), expected) <= 1e-10
    model.requires_grad_(False)
    assert not model(ids).requires_grad
