"""The backend's options: what they accept, what they refuse and how, and that they arrive where they belong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_fx
from attnres_fx import downstream as downstream_module
from attnres_fx.errors import MemoryBudgetError, OptionError
from attnres_fx.options import DOWNSTREAMS, Options
from attnres_fx.passes._compat.dynamo import inner_error


class Tower(nn.Module):
    """Six pre-norm layers."""

    def __init__(self, width: int = 8, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.norms[-1](x)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def parse(mode: str | None = None, /, **options: Any) -> Options:
    return Options.from_arguments(mode, options)


def compiled_error(model: nn.Module, x: Tensor, options: Mapping[str, Any]) -> BaseException:
    """What a user finds inside Dynamo's wrapper."""
    with pytest.raises(Exception) as caught:
        torch.compile(model, backend="attnres", options=dict(options))(x)
    return inner_error(caught.value)


def test_defaults() -> None:
    assert Options.from_arguments(None, None) == Options.from_arguments("default", {}) == Options()
    assert Options().downstream == "inductor" and Options().conversion() == {} and dict(Options().inductor) == {}


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().downstream = "eager"  # type: ignore[misc]


@pytest.mark.parametrize(("wrong", "near"), [
    ("num_block", "num_blocks"), ("blocks", "num_blocks"), ("mixscale", "mix_scale"), ("Inductor", "inductor"),
    ("layer_per_block", "layers_per_block"), ("down_stream", "downstream"),
])
def test_unknown_key_suggests_the_nearest_name(wrong: str, near: str) -> None:
    with pytest.raises(OptionError, match=f"unknown option '{wrong}'") as caught:
        parse(**{wrong: 1})
    assert f"did you mean '{near}'?" in str(caught.value)


def test_unknown_key_far_from_all_lists_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        parse(zzz=1)
    assert "did you mean" not in str(caught.value)
    for name in ("num_blocks", "layers_per_block", "mix_scale", "eps", "downstream", "inductor"):
        assert name in str(caught.value)


@pytest.mark.parametrize("options", [
    {"num_blocks": 0}, {"num_blocks": -1}, {"num_blocks": 2.0}, {"num_blocks": "8"}, {"num_blocks": True},
    {"layers_per_block": 0}, {"layers_per_block": False}, {"mix_scale": "mean"},
    {"mix_scale": 1}, {"eps": 0},
    {"eps": -1e-6}, {"eps": "small"}, {"eps": float("nan")}, {"downstream": "triton"}, {"downstream": None},
    {"inductor": True}, {"inductor": [("max_autotune", True)]},
], ids=str)
def test_wrong_value_names_option_and_value(options: dict[str, Any]) -> None:
    (name, value), = options.items()
    with pytest.raises(OptionError) as caught:
        parse(**options)
    assert name in str(caught.value) and repr(value) in str(caught.value) and "What to do" in str(caught.value)


def test_option_errors_are_value_errors_and_of_the_family() -> None:
    assert issubclass(OptionError, ValueError) and issubclass(OptionError, attnres_fx.AttnResError)


def test_conversion_arguments_are_those_that_were_given() -> None:
    assert parse(num_blocks=3, eps=1e-5).conversion() == {"num_blocks": 3, "eps": 1e-5}
    assert parse(layers_per_block=2, mix_scale="sum").conversion() == {"layers_per_block": 2, "mix_scale": "sum"}


def test_mode_passes_inductor_its_options() -> None:
    assert parse("max-autotune-no-cudagraphs").inductor["max_autotune"] is True
    kept = parse("max-autotune-no-cudagraphs", inductor={"max_autotune": False, "epilogue_fusion": False})
    assert kept.inductor["max_autotune"] is False and kept.inductor["epilogue_fusion"] is False


def test_unknown_mode_is_an_error() -> None:
    with pytest.raises((OptionError, RuntimeError)):
        parse("fastest")


def test_options_reach_the_backend_with_an_error_of_ours(x: Tensor) -> None:
    assert isinstance(compiled_error(Tower(), x, {"num_block": 2}), OptionError)


def test_two_partitions_are_refused(x: Tensor) -> None:
    error = compiled_error(Tower(), x, {"num_blocks": 2, "layers_per_block": 2})
    assert isinstance(error, attnres_fx.errors.PartitionError) and "num_blocks and layers_per_block" in str(error)


@pytest.mark.parametrize("options", [
    {"num_blocks": 3}, {"layers_per_block": 2}, {"mix_scale": "sum"}, {"eps": 1e-5},
], ids=str)
def test_conflict_with_the_plan_of_a_converted_model(x: Tensor, options: dict[str, Any]) -> None:
    model = attnres_fx.convert(Tower(), x, num_blocks=2)
    error = compiled_error(model, x, {**options, "downstream": "eager"})
    assert isinstance(error, OptionError) and next(iter(options)) in str(error) and "[3, 6]" in str(error)


@pytest.mark.parametrize("options", [
    {"num_blocks": 2}, {"layers_per_block": 3}, {"mix_scale": "paper"}, {"eps": 1e-6},
], ids=str)
def test_options_may_repeat_the_plan(x: Tensor, options: dict[str, Any]) -> None:
    model = attnres_fx.convert(Tower(), x, num_blocks=2)
    fast = torch.compile(model, backend="attnres", options={**options, "downstream": "eager"})
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("downstream", DOWNSTREAMS)
def test_downstream_values_compute_the_same(x: Tensor, downstream: str) -> None:
    model = attnres_fx.convert(Tower(), x, num_blocks=3)
    nn.init.normal_(model.attnres.stream.query)
    expected = model(x)
    expected.square().sum().backward()
    grad = model.attnres.stream.query.grad.clone()
    model.zero_grad()
    fast = torch.compile(model, backend="attnres", options={"downstream": downstream})
    got = fast(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.attnres.stream.query.grad, grad, rtol=1e-3, atol=1e-4)
    assert grad[1:].norm() > 0 and grad[0].norm() == 0


def received(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Inductor's patches of every graph that is handed on."""
    seen: list[dict[str, Any]] = []

    def record(gm: Any, inputs: Any, patches: dict[str, Any], *joint: Any) -> Any:
        seen.append(patches)
        return gm.forward

    monkeypatch.setattr(downstream_module, "run_inductor", record)
    return seen


@pytest.mark.parametrize("converted", [True, False])
def test_inductor_patches_are_handed_on(x: Tensor, monkeypatch: pytest.MonkeyPatch, converted: bool) -> None:
    seen = received(monkeypatch)
    model = attnres_fx.convert(Tower(), x, num_blocks=2) if converted else Tower()
    torch.compile(model, backend="attnres", options={"inductor": {"epilogue_fusion": False}})(x)
    assert seen == [{"epilogue_fusion": False}]


def test_inductor_patches_reach_inductor(x: Tensor) -> None:
    """Inductor itself sees them: a pass that it calls while it compiles finds the configuration patched."""
    from torch._inductor import config

    found: list[bool] = []

    def look(graph: Any) -> None:
        found.append(bool(config.epilogue_fusion))

    before = bool(config.epilogue_fusion)
    model = attnres_fx.convert(Tower(), x, num_blocks=2)
    patches = {"epilogue_fusion": not before, "post_grad_custom_post_pass": look, "fx_graph_cache": False}
    with torch.no_grad():
        torch.compile(model, backend="attnres", options={"inductor": patches})(x)
    assert found == [not before] and bool(config.epilogue_fusion) == before


def test_unknown_inductor_key_is_an_error(x: Tensor) -> None:
    error = compiled_error(Tower(), x, {"inductor": {"no_such_setting": 1}})
    assert "no_such_setting" in str(error)


def test_a_graph_without_streams_takes_the_options_too(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = received(monkeypatch)
    fast = torch.compile(lambda value: value * 2, backend="attnres", options={"inductor": {"max_autotune": False}})
    torch.testing.assert_close(fast(x), x * 2)
    assert seen == [{"max_autotune": False}]


def test_a_memory_budget_reaches_the_schedule(x: Tensor) -> None:
    model = attnres_fx.convert(Tower(), x, num_blocks=2)
    options = {"schedule": "two-phase", "downstream": "eager"}
    expected = torch.compile(model, backend="attnres", options=options)(x)
    error = compiled_error(model, x, {**options, "memory_budget": "1B"})
    assert isinstance(error, MemoryBudgetError)
    least = error.args[0].split("least possible is ")[1].split(" bytes")[0].replace(",", "")
    torch._dynamo.reset()
    fitted = torch.compile(model, backend="attnres", options={**options, "memory_budget": f"{least}B"})(x)
    torch.testing.assert_close(fitted, expected)
    assert isinstance(compiled_error(model, x, {"memory_budget": "much"}), OptionError)
