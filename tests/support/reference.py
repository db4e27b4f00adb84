"""Attention Residuals in plain PyTorch, written from Eq. 2-6 of the paper: the independent reference of the tests.

Nothing here uses an operator, a pass or a class of the project. A network is given as the embedding and a list of
functions, one per layer (its norm included); the reference calls them in turn on the mixes. :class:`NanoGPT` is a plain
pre-norm model to convert; :func:`nanogpt` and :func:`llama` run the very modules of a plain model as an
Attention-Residuals network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LayerFunction = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
                   for part in self.qkv(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).reshape(batch, length, width)))


class MLP(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    """A pre-norm transformer layer: x = x + attn(ln_1(x)); x = x + mlp(ln_2(x)). The second half may be missing."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, has_mlp: bool = True) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.has_mlp = has_mlp
        if has_mlp:
            self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        if self.has_mlp:
            x = x + self.mlp(self.ln_2(x))
        return x


class NanoGPT(nn.Module):
    """A decoder like nanoGPT with ``num_sublayers`` residual additions; an odd number ends in an attention."""

    block: type[nn.Module] = Block

    def __init__(self, num_sublayers: int = 6, width: int = 32, heads: int = 4, vocabulary: int = 64,
                 positions: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(self.block(width, heads, dropout, 2 * i + 1 < num_sublayers)
                               for i in range(-(-num_sublayers // 2)))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def closing_positions(num_layers: int, num_blocks: int) -> list[int]:
    """The layer counts after which a block closes: S = ceil(L / N) layers per block, the last block perhaps short."""
    size = (num_layers + num_blocks - 1) // num_blocks
    closing = [position for position in range(1, num_layers + 1) if position % size == 0]
    return closing if closing and closing[-1] == num_layers else [*closing, num_layers]


def depth_weights(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """Eq. 2-3: the softmax over depth of <query, RMSNorm(source)>, one row per source."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    values = torch.stack([source.to(wide) for source in sources])
    keys = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    if gain is not None:
        keys = keys * gain.to(wide)
    return torch.softmax(torch.einsum("d,n...d->n...", query.to(wide), keys), dim=0)


def depth_mix(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, mix_scale: str) -> Tensor:
    """Eq. 4: the weighted sum of the raw sources; under "sum" times their number."""
    weights = depth_weights(sources, query, gain, eps)
    values = torch.stack([source.to(weights.dtype) for source in sources])
    mixed = torch.einsum("n...,n...d->...d", weights, values)
    factor = len(sources) if mix_scale == "sum" else 1
    return (mixed * factor).to(sources[0].dtype)


def attention_residuals(
    embedding: Tensor,
    layers: Sequence[LayerFunction],
    query: Tensor,
    gain: Tensor | None,
    boundaries: Sequence[int],
    eps: float = 1e-6,
    mix_scale: str = "paper",
) -> list[Tensor]:
    """Eq. 5-6: the inputs of all layers, and last the output mix. Row p of ``query`` belongs to the mix after p layers.

    ``boundaries`` are the layer counts after which a block closes, the last one the number of layers.
    """
    blocks: list[Tensor] = [embedding]  # b_0 stays a separate source at every position
    partial: Tensor | None = None
    inputs: list[Tensor] = []
    for done in range(len(layers) + 1):
        sources = [*blocks] if partial is None else [*blocks, partial]
        if len(sources) == 1:
            mixed = sources[0]
        else:
            with torch.autocast("cpu", enabled=False):
                mixed = depth_mix(sources, query[done], None if gain is None else gain[done], eps, mix_scale)
        inputs.append(mixed)
        if done == len(layers):
            break
        output = layers[done](mixed).to(embedding.dtype)
        partial = output if partial is None else partial + output
        if done + 1 in boundaries:
            blocks.append(partial)
            partial = None
    return inputs


def nanogpt_layers(model: Any) -> list[LayerFunction]:
    """The layers of a :class:`NanoGPT`, each with its norm."""
    layers: list[LayerFunction] = []
    for block in model.h:
        layers.append(lambda x, b=block: b.attn(b.ln_1(x)))
        if block.has_mlp:
            layers.append(lambda x, b=block: b.mlp(b.ln_2(x)))
    return layers


def nanogpt(model: Any, ids: Tensor, query: Tensor, gain: Tensor | None, boundaries: Sequence[int],
            **options: Any) -> Tensor:
    """The logits of a :class:`NanoGPT`'s modules run as an Attention-Residuals network."""
    mixes = attention_residuals(model.embed(ids), nanogpt_layers(model), query, gain, boundaries, **options)
    return model.head(model.ln_f(mixes[-1]))


def llama_mixes(model: Any, ids: Tensor, query: Tensor, gain: Tensor | None, boundaries: Sequence[int],
                **options: Any) -> list[Tensor]:
    """The inputs of all layers, and last the output mix, of a Hugging Face Llama's modules run on mixes."""
    decoder = model.model
    embedding = decoder.embed_tokens(ids)
    length = ids.shape[1]
    rotary = decoder.rotary_emb(embedding, torch.arange(length)[None])
    mask = torch.full((length, length), float("-inf"), dtype=embedding.dtype).triu(1)[None, None]
    layers: list[LayerFunction] = []
    for block in decoder.layers:
        layers.append(lambda x, b=block: b.self_attn(hidden_states=b.input_layernorm(x), position_embeddings=rotary,
                                                     attention_mask=mask)[0])
        layers.append(lambda x, b=block: b.mlp(b.post_attention_layernorm(x)))
    return attention_residuals(embedding, layers, query, gain, boundaries, **options)


def llama(model: Any, ids: Tensor, query: Tensor, gain: Tensor | None, boundaries: Sequence[int],
          **options: Any) -> Tensor:
    """The logits of a Hugging Face Llama's modules run as an Attention-Residuals network."""
    return model.lm_head(model.model.norm(llama_mixes(model, ids, query, gain, boundaries, **options)[-1]))
