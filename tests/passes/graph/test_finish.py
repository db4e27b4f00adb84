"""Dead nodes go; what is done for its effect stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.edit import finish
from attnres_fx.passes.graph.vocabulary import op_name


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _dead(x: Tensor) -> Tensor:
    torch.sigmoid(x + 1)
    return x * 2


def _changed_in_place(x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(3)
    return y * 2


def _changed_through_a_view(x: Tensor) -> Tensor:
    y = x + 1
    torch.hsplit(y, 2)[1].mul_(3)
    y[0] += 1
    return y


def _written_by_out(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    torch.add(x, 1, out=y)
    return y


def _vectorized(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row * row.sum())(x)


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.T
    return y.float()


@pytest.mark.parametrize("function", [_dead, _changed_in_place, _changed_through_a_view, _written_by_out, _vectorized,
                                      _autocast])
def test_the_value_stays(function: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 4)
    gm, inputs = capture(Calls(function), (x,), {})
    (value,) = finish(gm)(*inputs)
    assert torch.equal(value, function(x))


def test_dead_nodes_go() -> None:
    gm, _ = capture(Calls(_dead), (torch.randn(4, 4),), {})
    assert {op_name(node) for node in finish(gm).graph.nodes if node.op == "call_function"} == {"mul"}


def test_running_statistics_are_still_updated() -> None:
    norm = nn.BatchNorm1d(4)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
            return x + 1

    torch._dynamo.reset()
    gm, inputs = capture(Model(), (torch.randn(4, 4) + 5,), {})
    finish(gm)(*inputs)
    assert norm.running_mean is not None
    assert norm.running_mean.abs().sum() > 0
