"""Unfuse: opaque operators that add and norm are taken apart where their numbers say so, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import models
from support import opaque_norms as fused
from support.graphs import Toy, assert_sound, run, toy_input, trace
from support.opaque_norms import FUSED, IN_PLACE, LEFT_ALONE, FusedStack
from support.passes import in_place
from torch import Tensor, fx, nn

import attnres_fx
from attnres_fx import errors
from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.prepare.unfuse import unfuse


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def opaque(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function" and "kernels_" in str(n.target)]


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    value = model(ids)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("attnres")]
    loss = (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize("name", [*FUSED, *IN_PLACE])
def test_fused_additions_are_taken_apart(name: str, tracer: str) -> None:
    model, ids = FusedStack({**FUSED, **IN_PLACE}[name]).double().eval(), models.token_ids(2, 5, high=30)
    with torch.no_grad():
        expected = model(ids)
        gm, inputs = trace(model, ids, tracer=tracer)
    assert opaque(gm)
    in_place(unfuse, gm)
    assert not opaque(gm)
    torch.testing.assert_close(run(gm, inputs), expected, rtol=1e-9, atol=1e-9)
    assert_sound(gm, inputs)
    once = str(gm.graph)
    assert unfuse(gm.graph, Context()) == 0 and str(gm.graph) == once
    (stream,) = detect(gm.graph)
    assert (stream.num_layers, stream.refusal(), stream.norm_placement) == (4, None, "pre")
    assert stream.function_preserving


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*FUSED, *IN_PLACE])
def test_conversion_keeps_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    model, ids = FusedStack({**FUSED, **IN_PLACE}[name]).to(dtype).eval(), models.token_ids(2, 5, high=30)
    with torch.no_grad():
        value = model(ids)
    trains = name not in IN_PLACE and dtype == torch.float64
    before = gradients(model, ids) if trains else []
    attnres_fx.convert(model, ids, num_blocks=2, mix_scale="sum")
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), value, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(model, ids) if trains else [], before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    if dtype == torch.float64:
        assert attnres_fx.verify(model, ids).passed
        with torch.no_grad():
            model.attnres.stream.query.normal_()
            assert models.relative(model(ids), value) > 1e-3


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_confirmed_is_left_alone(name: str) -> None:
    model, ids = FusedStack(LEFT_ALONE[name]).double().eval(), models.token_ids(2, 5, high=30)
    with torch.no_grad():
        expected = model(ids)
        gm, inputs = trace(model, ids)
    before = str(gm.graph)
    assert unfuse(gm.graph, Context()) == 0 and str(gm.graph) == before
    torch.testing.assert_close(run(gm, inputs), expected)
    with pytest.raises((errors.NoStreamError, errors.StreamRefusedError)):
        attnres_fx.convert(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected)


def test_an_operator_without_a_cpu_kernel_is_left_alone() -> None:
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.weight = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Any:
            return fused.not_on_cpu(x, self.f(x), self.weight, 1e-6)

    gm, _ = trace(Elsewhere(), torch.randn(2, 3, 8))
    before = str(gm.graph)
    assert opaque(gm) and unfuse(gm.graph, Context()) == 0 and str(gm.graph) == before


@pytest.mark.parametrize("name", ["rms", "in place on a copy"])
def test_a_result_that_nobody_reads_is_not_made(name: str) -> None:
    """A norm without a reader would be one more reader of the sum."""

    class OnlySum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.weights = nn.Linear(8, 8), [torch.ones(8)]

        def forward(self, x: Tensor) -> Tensor:
            return {**FUSED, **IN_PLACE}[name](self, self.f(x), x, 0)[1]

    gm, _ = trace(OnlySum(), torch.randn(2, 3, 8))
    assert unfuse(gm.graph, Context()) == 1
    assert not [node for node in gm.graph.nodes if "norm" in str(node.target)]


def test_a_stream_that_an_opaque_operator_changes_is_refused() -> None:
    """What an operator writes is in its schema, whichever argument it is."""

    def step(m: Any, x: Tensor, i: int) -> Tensor:
        x = x + m.branch(x, i)
        fused.damp(m.scale, x)
        return x

    model, x = Toy(step), toy_input()
    (stream,) = attnres_fx.analyze(model, x).streams
    assert not stream.convertible and "changed in place by 'damp'" in str(stream.reason)
    with pytest.raises(errors.MutatedStreamError):
        attnres_fx.convert(model, x)


def test_one_confirmation_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnres_fx.passes.prepare import unfuse as module

    asked = []
    original = module._meaning_of
    monkeypatch.setattr(module, "_meaning_of", lambda call: asked.append(call) or original(call))
    with torch.no_grad():
        gm, _ = trace(FusedStack(FUSED["rms"], num_layers=8), models.token_ids(2, 5, high=30))
    assert unfuse(gm.graph, Context()) == 8 and len(asked) == 1


@pytest.mark.parametrize("residual", [torch.float32, torch.float64])
def test_dtypes_of_the_results_are_kept(residual: torch.dtype) -> None:
    """A stream in a wider dtype than the branches: the results have the operator's own dtypes."""

    class Mixed(nn.Module):
        def forward(self, x: Tensor, stream: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            total, normed = fused.sum_with_layer_norm(stream, x, weight, weight)
            return normed, total

    args = torch.randn(2, 3, 8), torch.randn(2, 3, 8, dtype=residual), torch.randn(8, dtype=residual)
    gm, inputs = trace(Mixed(), *args)
    expected = Mixed()(*args)
    assert unfuse(gm.graph, Context()) == 1
    gm.recompile()
    for ours, theirs in zip(run(gm, inputs), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    assert_sound(gm, inputs)
