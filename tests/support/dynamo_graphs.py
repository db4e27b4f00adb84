"""A small module, and the graphs that Dynamo hands to a backend for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def traced(module: nn.Module, *args: Any, backend: Any = None, **settings: Any) -> tuple[list[fx.GraphModule], Tensor]:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward if backend is None else backend(gm, inputs)

    torch._dynamo.reset()
    return graphs, torch.compile(module, backend=keep, **settings)(*args)
