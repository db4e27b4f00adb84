"""Sizes that are known only in a call: routing by counts, and a stream of the tokens that a mask selects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.arenas import close
from support.checkpoint_models import disturb
from torch import Tensor, nn

import attnres_fx


@pytest.fixture(autouse=True)
def _sizes_are_captured() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


class Routed(nn.Module):
    """Experts run on the pieces of a split by counts; their gates are a softmax over the two picks of each token."""

    def __init__(self, width: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(64, width), nn.RMSNorm(width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.routers = nn.ModuleList(nn.Linear(width, experts) for _ in range(3))
        self.experts = nn.ParameterList(nn.Parameter(0.2 * torch.randn(experts, width, width)) for _ in range(3))

    def mixture(self, h: Tensor, weights: Tensor, router: nn.Module) -> Tensor:
        x = h.flatten(0, -2)
        scores, picks = router(x).topk(2, 1)
        gates = torch.softmax(scores, 1).flatten()
        counts = (picks.flatten()[:, None] == torch.arange(len(weights))).long().sum(0).tolist()
        order = picks.flatten().sort(0)[1]
        rows = order.div(2, rounding_mode="trunc")
        pieces = [torch.nn.functional.linear(piece, weights[at]) for at, piece in enumerate(x[rows].split(counts, 0))]
        return torch.zeros_like(x).index_add(0, rows, torch.cat(pieces) * gates[order][:, None]).view_as(h)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for norm, weights, router in zip(self.norms, self.experts, self.routers):
            x = x + self.mixture(norm(x), weights, router)
        return self.norm(x)


class Selected(nn.Module):
    """The stream holds the tokens that a mask selects, one after the other."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(64, width), nn.RMSNorm(width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(4))
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)[ids > 20]
        for norm, linear in zip(self.norms, self.maps):
            x = x + torch.tanh(linear(norm(x)))
        return self.norm(x)


def ids(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(batch + length))


@pytest.mark.parametrize("kind", [pytest.param(Routed, marks=pytest.mark.slow), Selected])
def test_a_size_that_only_the_call_tells(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        plain = [model(ids()), model(ids(3, 7))]
    attnres_fx.convert(model, (ids(),), num_blocks=2, mix_scale="sum")
    fast = torch.compile(model, backend="attnres")
    with torch.no_grad():
        for call in (model, fast):
            close([call(ids()), call(ids(3, 7))], plain)
    assert attnres_fx.verify(model, (ids(),)).passed
    disturb(model)
    with torch.no_grad():
        close([fast(ids()), fast(ids(3, 7))], [model(ids()), model(ids(3, 7))])
    gradients = []
    for call in (model, fast):
        model.zero_grad(set_to_none=True)
        call(ids()).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    close(gradients[1], gradients[0])
