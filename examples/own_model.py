"""A model of your own: a small GPT in plain PyTorch, unchanged, analysed and converted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnres_fx


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 128, width: int = 64, layers: int = 3, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> nn.Module:
    torch.manual_seed(0)
    model, ids = GPT(), torch.randint(128, (2, 32))

    report = attnres_fx.analyze(model, ids)  # changes nothing
    print(report)
    for layer in report.streams[0].layers:
        print(f"  {layer.module:10} {layer.form}")

    attnres_fx.convert(model, ids, layers_per_block=2)  # in place: model(ids) is the rewritten network from here on
    print(model.attnres)
    print(attnres_fx.verify(model, ids))
    return model


if __name__ == "__main__":
    main()
