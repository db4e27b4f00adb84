"""The rewritten graph of a small model, and what it computes, for the tests of the passes that come after the rewrite."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

import attnres_fx
from attnres_fx.passes.findings import find_marked
from attnres_fx.passes.graph.capture import capture
from support import models


@functools.cache
def rewritten(
    num_layers: int, num_blocks: int, *, mix_scale: str = "paper", shape: tuple[int, int] = (2, 32),
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, ...]:
    """The rewritten graph of a small Llama in ``dtype`` with random queries, its inputs, and those that take gradients."""
    model = models.llama(num_layers).to(dtype)
    ids = models.token_ids(*shape)
    attnres_fx.convert(model, ids, num_blocks=num_blocks, mix_scale=mix_scale)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    captured, inputs = capture(model, (ids,), {})
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    return find_marked(captured).rewritten(), inputs, leaves


def values_and_gradients(gm: fx.GraphModule, inputs: list[Any], leaves: list[Tensor]) -> list[Tensor]:
    """The outputs of a graph, and the gradients of a random sum of them; None where there is none."""
    outputs = [value for value in gm(*inputs) if isinstance(value, Tensor) and value.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum() for value in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)]
