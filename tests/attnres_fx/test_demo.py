"""The demonstration's losses, held to a Llama with Attention Residuals written here from Eq. 5-6 in plain PyTorch.

The reference shares nothing with the project or with transformers but the initial weights: its norms, rotary embedding,
attention, gated MLP, blocks and mixes are spelled out below, and autograd differentiates them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.scripts import load_script
from torch import Tensor, nn

import attnres_fx

HEADS = 4


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of [batch, heads, tokens, size], halves rotated against each other."""
    tokens, size = x.shape[-2:]
    angles = torch.outer(torch.arange(tokens).float(), base ** (-torch.arange(0, size, 2).float() / size))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class ReferenceLlama(nn.Module):
    """Llama with Block Attention Residuals, by the letter: 1-based layers l, blocks of S, sources V as in Eq. 6."""

    def __init__(self, plain: nn.Module, num_blocks: int, eps: float) -> None:
        super().__init__()
        config: Any = plain.config
        self.w = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(value.detach().clone())
                                   for name, value in plain.named_parameters()})
        self.count, self.norm_eps, self.eps = config.num_hidden_layers, config.rms_norm_eps, eps
        self.rope_base = float(config.rope_parameters["rope_theta"])
        self.layers_per_block = math.ceil(2 * self.count / num_blocks)
        positions, width = 2 * self.count + 1, config.hidden_size
        self.query, self.gain = nn.Parameter(torch.zeros(positions, width)), nn.Parameter(torch.ones(positions, width))

    def weight(self, name: str) -> Tensor:
        return self.w[name.replace(".", "/")]

    def attention(self, layer: int, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.self_attn."
        q, k, v = ((x @ self.weight(f"{name}{kind}_proj.weight").T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for kind in "qkv")
        q, k = rotate(q, self.rope_base), rotate(k, self.rope_base)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(2) @ self.weight(f"{name}o_proj.weight").T

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.mlp."
        gate, up = x @ self.weight(f"{name}gate_proj.weight").T, x @ self.weight(f"{name}up_proj.weight").T
        return (F.silu(gate) * up) @ self.weight(f"{name}down_proj.weight").T

    def mix(self, values: Sequence[Tensor], position: int) -> Tensor:
        stacked = torch.stack(list(values))
        keys = rms_norm(stacked, self.gain[position], self.eps)
        weights = torch.einsum("d,nbtd->nbt", self.query[position], keys).softmax(0)
        return torch.einsum("nbt,nbtd->btd", weights, stacked)

    def forward(self, ids: Tensor) -> Tensor:
        embedding = self.weight("model.embed_tokens.weight")[ids]
        outputs: list[Tensor] = []  # f_1 .. of every layer so far

        def block_sums() -> list[Tensor]:
            size = self.layers_per_block
            return [torch.stack(outputs[start : start + size]).sum(0) for start in range(0, len(outputs), size)]

        for number in range(2 * self.count):  # sources: b_0, the complete blocks, and the partial sum if there is one
            hidden = self.mix([embedding, *block_sums()], number) if number else embedding
            layer, kind = divmod(number, 2)
            norm = "input_layernorm" if kind == 0 else "post_attention_layernorm"
            normed = rms_norm(hidden, self.weight(f"model.layers.{layer}.{norm}.weight"), self.norm_eps)
            outputs.append(self.attention(layer, normed) if kind == 0 else self.mlp(layer, normed))
        last = self.mix([embedding, *block_sums()], 2 * self.count)
        return rms_norm(last, self.weight("model.norm.weight"), self.norm_eps) @ self.weight("lm_head.weight").T


def reference_losses(model: ReferenceLlama, data: Sequence[Tensor], lr: float) -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses, norms = [], []
    for tokens in data:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        norms.append(model.query.detach().norm().item())
    return losses, norms


def compare(layers: int, width: int, batch: int, length: int, num_blocks: int, lr: float) -> None:
    torch._dynamo.reset()
    demo = load_script("examples/demo.py")
    data = demo.batches(demo.standard_library(), 10, batch=batch, length=length, seed=0)
    model = demo.build_model(layers, width, seed=0)
    reference = ReferenceLlama(model, num_blocks, eps=1e-6)
    attnres_fx.convert(model, data[0][:, :-1], num_blocks=num_blocks)
    history = demo.train(model, data, lr)
    losses, norms = reference_losses(reference, data, lr)
    assert [step.loss for step in history] == pytest.approx(losses, rel=1e-4)
    assert [step.query_norm for step in history] == pytest.approx(norms, rel=1e-2)
    assert norms[-1] > norms[0] > 0 and losses[-1] < losses[0]


@pytest.mark.slow
def test_ten_losses_are_those_of_an_independent_reference() -> None:
    compare(layers=2, width=32, batch=4, length=32, num_blocks=3, lr=3e-3)


@pytest.mark.slow
def test_ten_losses_at_the_size_of_the_demo() -> None:
    compare(layers=8, width=256, batch=4, length=128, num_blocks=8, lr=1e-3)


def test_the_demo_runs_from_beginning_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    small = ["--layers", "1", "--width", "32", "--blocks", "2", "--steps", "3", "--rounds", "3"]
    load_script("examples/demo.py").main(small)
    printed = capsys.readouterr().out
    for expected in ("function-preserving", "b_2", "output", "passed", "norm of the queries", "min ratio"):
        assert expected in printed
