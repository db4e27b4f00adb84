"""Transforms of torch.func around a converted model: right where they are followed, and refused where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import models
from support.checkpoint_models import disturb
from torch import Tensor, nn

import attnres_fx
from attnres_fx import errors

AOT = {"downstream": "aot_eager"}
WEIGHTS = torch.linspace(-1, 1, 8, dtype=torch.float64)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.RMSNorm(8) for _ in range(4))
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        for norm, branch in zip(self.norms, self.branches):
            x = x + branch(norm(x))
        return self.norms[3](x)


@pytest.fixture(scope="module")
def model() -> Any:
    return disturb(attnres_fx.convert(Network().double(), torch.zeros(2, 3, 8, dtype=torch.float64), num_blocks=2))


def given() -> Tensor:
    return torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(outputs: Tensor) -> Tensor:
    return (outputs * WEIGHTS).sin().sum()


def gradient(model: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(model(x)), x)[0]


def compiled(function: Any, options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="attnres", options=options)


@pytest.mark.parametrize("options", [AOT, {}], ids=["aot_eager", "default"])
def test_gradients_by_parameters(model: Any, options: Any) -> None:
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = given()

    def by_parameters(given_parameters: dict[str, Tensor]) -> Tensor:
        return loss(torch.func.functional_call(model, given_parameters, (x,)))

    found = compiled(lambda p: torch.func.grad(by_parameters)(p), options)(parameters)
    model.zero_grad()
    loss(model(given())).backward()
    for name, parameter in model.named_parameters():
        assert models.relative(found[name], parameter.grad) < 1e-12, name


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_gradients_by_inputs(model: Any, transform: Any) -> None:
    found = compiled(lambda x: transform(lambda y: loss(model(y)))(x), AOT)(given())
    assert models.relative(found, gradient(model, given())) < 1e-12


@pytest.mark.slow
def test_second_derivatives(model: Any) -> None:
    x, step = given(), 1e-6
    found = compiled(lambda x: torch.func.hessian(lambda y: loss(model(y)))(x), AOT)(x)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    expected = (gradient(model, x + step * direction) - gradient(model, x - step * direction)) / (2 * step)
    assert models.relative(torch.einsum("abcdef,def->abc", found, direction), expected) < 1e-7


@pytest.mark.parametrize("transform, told", [
    (lambda model, x: torch.vmap(torch.func.grad(lambda y: loss(model(y))))(x), "runs under torch.vmap"),
    (lambda model, x: torch.func.jvp(model, (x,), (x,))[1], "forward-mode differentiation"),
], ids=["vmap", "jvp"])
def test_what_cannot_be_rewritten_is_refused(model: Any, transform: Any, told: str) -> None:
    with pytest.raises(Exception, match=told) as caught:
        compiled(lambda x: transform(model, x), AOT)(given())
    assert isinstance(caught.value.inner_exception, errors.StreamRefusedError)
    while torch.autograd.forward_ad._current_level >= 0:  # a graph that fails within leaves its level open
        torch.autograd.forward_ad.exit_dual_level()


def test_an_eager_model_names_the_form_that_works(model: Any) -> None:
    with pytest.raises(errors.GraphBreakError, match=r"torch\.compile\(torch\.func\.grad"):
        torch.func.grad(lambda x: loss(model(x)))(given())


def test_tracing_by_torch_jit_is_refused(model: Any) -> None:
    with pytest.raises(errors.PlainPathError, match=r"torch\.jit"):
        torch.jit.trace(model, given())
