"""Residual networks whose stream passes through every kind of memory layout, for the tests of the default backend.

Each entry of :data:`LAYOUTS` is a branch: what is added to the stream comes out of transposing views, slices, padding, other
memory formats, or is read and returned in ways that depend on where and how it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32
Branch = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """One residual addition of ``branch``; its products are plain, so that a block's first row is one."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch
        self.norm, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Linear(WIDTH, WIDTH + 8)
        self.bare = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self, x)


def _swapped(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.down(torch.tanh(layer.norm(x).transpose(0, 1))).transpose(0, 1)


def _swapped_bare(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.bare(torch.tanh(layer.norm(x).transpose(0, 1).contiguous())).transpose(0, 1)


def _swapped_first(layer: Layer, x: Tensor) -> Tensor:
    return layer.bare(torch.tanh(layer.norm(x).transpose(0, 1).contiguous())).transpose(0, 1) + x


def _attention(layer: Layer, x: Tensor) -> Tensor:
    h = layer.norm(x)
    return x + layer.attention(h, h, h, need_weights=False)[0]


def _sliced(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.wide(layer.norm(x))[..., 4:-4]


def _padded(layer: Layer, x: Tensor) -> Tensor:
    return x + F.pad(layer.down(layer.norm(x)), (0, 3))[..., :WIDTH]


def _shifted(layer: Layer, x: Tensor) -> Tensor:
    return x + F.pad(layer.down(layer.norm(x)), (0, 0, 1, 0))[:, :-1]


def _channels(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.convolution(layer.norm(x).transpose(1, 2)).transpose(1, 2)


def _transposed_weight(layer: Layer, x: Tensor) -> Tensor:
    """The product is made as its transpose: W h^T."""
    h = layer.norm(x)
    return x + (layer.bare.weight @ h.reshape(-1, WIDTH).t()).t().view(x.shape)


def _expanded(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.down(layer.norm(x).mean(1, keepdim=True)).expand_as(x)


def _repeated(layer: Layer, x: Tensor) -> Tensor:
    half = layer.norm(x)[:, ::2]
    return x + layer.down(half).repeat_interleave(2, 1)[:, : x.shape[1]]


def _viewed(layer: Layer, x: Tensor) -> Tensor:
    """``view`` raises where the strides of the stream are not those that it had."""
    flat = x.view(x.shape[0] * x.shape[1], WIDTH)
    return x + layer.down(layer.norm(flat)).view(x.shape)


def _flipped(layer: Layer, x: Tensor) -> Tensor:
    """The loop that adds reads the stream in another order, too."""
    return x + (layer.down(layer.norm(x)) + 0.3 * torch.tanh(layer.norm(x).flip(1)))


def _strided(layer: Layer, x: Tensor) -> Tensor:
    h = layer.norm(x)
    again = torch.as_strided(h, h.shape, h.stride(), 0)
    return x + layer.down(again)


def _grouped(layer: Layer, x: Tensor) -> Tensor:
    """A batched product whose heads are brought back by a transposing view."""
    heads = layer.norm(x).view(*x.shape[:2], 4, WIDTH // 4).transpose(1, 2)
    weight = layer.bare.weight.view(4, WIDTH // 4, WIDTH)[:, :, : WIDTH // 4]
    return x + (heads @ weight).transpose(1, 2).reshape(x.shape)


LAYOUTS: dict[str, Branch] = {
    "swapped": _swapped, "swapped_bare": _swapped_bare, "swapped_first": _swapped_first, "attention": _attention,
    "sliced": _sliced, "padded": _padded, "shifted": _shifted, "channels": _channels,
    "transposed_weight": _transposed_weight, "expanded": _expanded, "repeated": _repeated, "viewed": _viewed,
    "flipped": _flipped, "strided": _strided, "grouped": _grouped,
}


class Network(nn.Module):
    """``layers`` layers of one or several layouts in turn.

    ``start``: "plain", or the embedding as "sequence first" (a transposed view of it is the stream) or "sliced" (of a wider
    table). ``hidden``: the stream before each layer is returned, too, by itself and as a view. ``late``: what is read of it
    early is needed at the end.
    """

    def __init__(
        self, *layouts: str, layers: int = 6, start: str = "plain", hidden: bool = False, late: bool = False
    ) -> None:
        super().__init__()
        self.start, self.hidden, self.late = start, hidden, late
        self.embedding = nn.Embedding(50, WIDTH + 5 * (start == "sliced"))
        self.layers = nn.ModuleList(Layer(LAYOUTS[layouts[index % len(layouts)]]) for index in range(layers))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedding(ids.t()).transpose(0, 1) if self.start == "sequence first" else self.embedding(ids)[..., :WIDTH]
        seen, kept = [], []
        for layer in self.layers:
            seen += [x, x.transpose(0, 1)]
            kept.append(torch.tanh(x))
            x = layer(x)
        result = self.head(self.norm(x))
        if self.late:
            result = result + sum(weight * row.sum(-1, keepdim=True) for weight, row in enumerate(kept, start=1))
        return (result, seen) if self.hidden else result


class Image(nn.Module):
    """A stream of pictures [b, d, h, w], in either memory format."""

    def __init__(self, memory_format: torch.memory_format, layers: int = 4) -> None:
        super().__init__()
        self.memory_format = memory_format
        self.open = nn.Conv2d(3, WIDTH, 1)
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers + 1))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        def norm(at: int, x: Tensor) -> Tensor:
            return self.norms[at](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        x = self.open(pictures.contiguous(memory_format=self.memory_format))
        for at, layer in enumerate(self.layers):
            x = x + layer(torch.tanh(norm(at, x)))
        return self.head(norm(-1, x).mean((2, 3)))


def encoder(batch_first: bool, bias: bool = True, layers: int = 3) -> nn.Module:
    """torch's own pre-norm encoder."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=batch_first, norm_first=True, bias=bias)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
