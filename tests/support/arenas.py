"""A small converted model, and what the tests of its arena look at."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

import attnres_fx
from attnres_fx.runtime.arena import ArenaPool

WIDTH = 32
LAYERS = 9


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """Nine layers; ``hidden`` returns the stream before each, too."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.hidden = hidden

    def forward(self, ids: Tensor, context: Tensor | float = 0.0) -> Any:
        x, seen = self.embedding(ids) + context, []
        for layer in self.layers:
            seen.append(x)
            x = x + layer(x)
        result = self.head(self.norm(x))
        return (result, seen) if self.hidden else result


def tower(hidden: bool = False, num_blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = attnres_fx.convert(Tower(hidden), ids(5), num_blocks=num_blocks)
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def ids(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed + length))


def fast(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="attnres", options=options)


def held(pool: weakref.ref[ArenaPool]) -> int:
    """Bytes of the arenas that a pool keeps; none if it is gone."""
    found = pool()
    return 0 if found is None else found.bytes()


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
