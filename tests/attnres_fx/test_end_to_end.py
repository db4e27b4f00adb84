"""One model of real size from end to end: convert, train with checkpointing, generate with a cache, save, load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import models
from torch import Tensor

import attnres_fx

# The shape of a 0.5B Llama but for the vocabulary, which is small: its embedding takes part in no residual addition.
SHAPE = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "intermediate_size": 4864, "vocab_size": 4096, "max_position_embeddings": 128, "tie_word_embeddings": True,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = 8
LAYERS = 2 * 24


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_half_billion_parameters_from_end_to_end(tmp_path: Path) -> None:
    model = models.hugging_face("LlamaForCausalLM", **SHAPE)
    assert sum(p.numel() for p in model.parameters()) > 3.6e8
    ids, plain_keys = models.token_ids(1, 12, high=4000), set(model.state_dict())
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits

    # An exact start, and then a model that the queries make another.
    attnres_fx.convert(model, (ids,), {"use_cache": False}, num_blocks=BLOCKS, mix_scale="sum")
    stream = model.attnres.stream
    assert stream.query.shape == stream.key_gain.shape == (LAYERS + 1, 896)
    with torch.no_grad():
        assert models.relative(model(ids, use_cache=False).logits, plain) <= 1e-4

    # One training step of the compiled model with checkpointed layers.
    model.train().gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="attnres")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.attnres.named_parameters()}
    loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.attnres.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and torch.isfinite(gradient).all(), name
        if name.endswith("query"):
            assert not gradient[0].any() and gradient[1:].norm(dim=-1).min() > 0
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p is not stream.key_gain)
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(before["stream.query"], stream.query)
    with torch.no_grad():  # larger queries than one step gives
        stream.query.add_(0.3 * torch.randn(stream.query.shape, generator=torch.Generator().manual_seed(5)))
    model.eval().gradient_checkpointing_disable()

    # Generation with a cache, with and without a compiler.
    def generate(which: torch.nn.Module) -> Tensor:
        return which.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0,
                              attention_mask=torch.ones_like(ids))

    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        assert models.relative(logits, plain) > 1e-2
        eager, fast = generate(model), generate(compiled)
    assert eager.shape == (1, 18) and torch.equal(eager, fast)

    # Files.
    model.save_pretrained(tmp_path / "model")
    loaded = attnres_fx.load(tmp_path / "model")
    assert set(loaded.state_dict()) - plain_keys == {"attnres.stream.query", "attnres.stream.key_gain"}
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, logits)
        assert torch.equal(generate(loaded), eager)
