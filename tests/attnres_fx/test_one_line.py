"""The one-line form on models that it cannot convert: an error or a warning in plain words, and never silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.arenas import Tower, ids
from torch import Tensor, nn

import attnres_fx
from attnres_fx import errors

EAGER = {"downstream": "eager"}
ASKED = {**EAGER, "num_blocks": 3}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, options: dict[str, Any] = EAGER) -> Any:
    return torch.compile(model, backend="attnres", options=options)


def cause(error: BaseException) -> BaseException:
    return getattr(error, "inner_exception", error)


class Broken(nn.Module):
    """A pre-norm network that breaks the graph in every layer, in a loop or written out."""

    def __init__(self, layers: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.embedding, self.norm = nn.Embedding(64, 16), nn.RMSNorm(16)
        self.norms = nn.ModuleList(nn.RMSNorm(16) for _ in range(layers))
        self.maps = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def branch(self, at: int, x: Tensor) -> Tensor:
        y = torch.tanh(self.maps[at](self.norms[at](x)))
        if self.how == "item":
            return y * (1 + 0 * float(y.sum().item() > 1e9))
        torch._dynamo.graph_break()
        return y

    def forward(self, given: Tensor) -> Tensor:
        x = self.embedding(given)
        if self.how == "written out":
            x = x + torch.tanh(self.maps[0](self.norms[0](x)))
            torch._dynamo.graph_break()
            y = torch.tanh(self.maps[-1](self.norms[-1](x)))
            torch._dynamo.graph_break()
            return self.norm(x + y)
        for at in range(len(self.maps)):
            x = x + self.branch(at, x)
        return self.norm(x)


@pytest.mark.parametrize("how", ["item", "call", "written out"])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_model_that_breaks_in_every_layer(layers: int, how: str) -> None:
    model, given = Broken(layers, how), torch.randint(0, 64, (2, 5))
    with pytest.raises(Exception) as caught:
        compiled(model, ASKED)(given)
    assert isinstance(cause(caught.value), errors.GraphBreakError) and "attnres_fx.convert(model" in str(caught.value)
    torch._dynamo.reset()
    fast = compiled(model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        try:
            for _ in range(3):
                fast(given)
        except Exception as error:  # a piece with an addition is refused whatever the options are
            assert isinstance(cause(error), errors.GraphBreakError)
        else:
            (said,) = [str(each.message) for each in heard if "attnres_fx.convert(model" in str(each.message)]
            assert "without attention residuals" in said and __file__ in said
    assert not hasattr(model, "attnres")


def test_a_model_without_streams_is_compiled_and_said_so_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    fast = compiled(model)
    with pytest.warns(UserWarning, match=r"no residual stream was found in Sequential, .*\.py") as heard:
        result = fast(torch.ones(2, 8))
    ours = [each for each in heard if "attnres_fx" in str(each.message)]  # torch and Python 3.13 have warnings of their own
    assert torch.equal(result, model(torch.ones(2, 8))) and len(ours) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(torch.ones(2, 8))
    torch._dynamo.reset()
    with pytest.raises(Exception) as caught:
        compiled(model, ASKED)(torch.ones(2, 8))
    assert isinstance(cause(caught.value), errors.NoStreamError)


class Outer(nn.Module):
    """A converted model within frames that have no streams and break."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, given: Tensor) -> Tensor:
        total = torch.zeros(())
        for _ in range(2):
            result = self.inner(given)
            total = total + result.sum() * self.scale
            torch._dynamo.graph_break()
        return total + total


def test_frames_around_a_converted_model_are_compiled_without_a_word() -> None:
    torch.manual_seed(0)
    model = attnres_fx.convert(Tower(), ids(5), num_blocks=3)
    outer = Outer(model)
    with torch.no_grad():
        expected = outer(ids(5))
        model.attnres.stream.query.add_(1)
        changed = outer(ids(5))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            assert torch.allclose(compiled(outer)(ids(5)), changed, atol=1e-5)
        assert not [each for each in heard if "attention residuals" in str(each.message)]
    assert not torch.allclose(expected, changed, atol=1e-3)


def test_a_function_around_a_plain_model_is_converted() -> None:
    """A loop that breaks is not a model; what it calls is compiled by itself, and is converted."""
    torch.manual_seed(0)
    model = Tower()

    def steps(given: list[Tensor]) -> Tensor:
        total = torch.zeros(())
        for each in given:
            total = total + model(each).sum()
            torch._dynamo.graph_break()
        return total

    compiled(steps, ASKED)([ids(5), ids(5)])
    assert hasattr(model, "attnres")


def test_given_up_frames_of_other_backends_are_theirs() -> None:
    compiled(nn.Sequential(nn.Linear(2, 2)))  # the watch is on
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.compile(Broken(2, "call"), backend="eager")(torch.randint(0, 64, (2, 5)))
    assert not [each for each in heard if "attention residuals" in str(each.message)]
    torch._dynamo.reset()  # nothing is pending, as Dynamo asserts here
