"""Forms of the residual stream beside the plain one: injected features are terms; other constructs are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models
from support.graphs import WIDTH, Step, Toy, assert_sound, run, toy_input, trace
from support.passes import in_place
from torch import Tensor, nn

import attnres_fx
from attnres_fx import errors
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.prepare.injections import add_injections
from attnres_fx.reports.streams import ResidualStream


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


class Injected(Toy):
    """Features are injected after the first two of four layers; ``watched`` gives the values before that to the output."""

    def __init__(self, inject: Callable[[Any, Tensor, Tensor, Tensor], Tensor], watched: bool = False) -> None:
        super().__init__(lambda m, x, i: x, 4)
        self.inject, self.watched = inject, watched
        self.double()

    def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Any:  # type: ignore[override]
        x, seen = self.embed(x), []
        for i in range(4):
            x = x + self.branch(x, i)
            x = x + self.other(x, i)
            if i < 2:
                seen += [x] if self.watched else []
                x = self.inject(self, x, mask, features * (i + 1))
        return [self.head(self.norm(x)), *seen]

    @staticmethod
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        mask = torch.zeros(2, 4, dtype=torch.bool)
        mask[0, 1:3] = mask[1, 3] = True
        return toy_input().double(), mask, torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2)).double()


def _deepstack(m: Any, x: Tensor, mask: Tensor, e: Tensor) -> Tensor:
    x = x.clone()
    rows = x[mask, :] + e
    x[mask, :] = rows
    return x


def _in_place(m: Any, x: Tensor, mask: Tensor, e: Tensor) -> Tensor:
    x[mask] += e
    return x


def _other_order(m: Any, x: Tensor, mask: Tensor, e: Tensor) -> Tensor:
    y = x.clone()
    y[mask] = e + x[mask]
    return y


def _spread(x: Tensor, mask: Tensor, e: Tensor) -> Tensor:
    return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), e)


def _flat(x: Tensor) -> Tensor:
    return torch.arange(3, device=x.device)


INJECTIONS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "deepstack": _deepstack,
    "in place": _in_place,
    "other order": _other_order,
    "plain sum": lambda m, x, mask, e: x + _spread(x, mask, e),
    "scaled features": lambda m, x, mask, e: x + m.scale * _spread(x, mask, e),
    "one row": lambda m, x, mask, e: x + e[:1],
    "index_put": lambda m, x, mask, e: x.index_put((mask,), x[mask] + e),
    "accumulate": lambda m, x, mask, e: x.index_put((_flat(x)[:2], _flat(x)[1:]), e[:2], accumulate=True),
    "index_add": lambda m, x, mask, e: x.index_add(1, _flat(x), e.expand(2, 3, WIDTH)),
    "index_add_": lambda m, x, mask, e: x.index_add_(1, _flat(x), e.expand(2, 3, WIDTH), alpha=0.5),
    "where": lambda m, x, mask, e: torch.where(mask.unsqueeze(-1), x + e[0], x),
}


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize("name", INJECTIONS)
def test_injections_become_sums(name: str, tracer: str) -> None:
    model, inputs = Injected(INJECTIONS[name]).eval(), Injected.inputs()
    with torch.no_grad():
        (expected,) = model(*inputs)
    gm, values = trace(model, *inputs, tracer=tracer)
    in_place(add_injections, gm)
    torch.testing.assert_close(run(gm, values), expected, rtol=1e-12, atol=1e-12)
    assert_sound(gm, values)
    once = str(gm.graph)
    assert add_injections(gm.graph, Context()) == 0 and str(gm.graph) == once


@pytest.mark.parametrize("watched", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", INJECTIONS)
def test_injections_are_terms_and_no_layers(name: str, watched: bool) -> None:
    if watched and name in ("in place", "index_add_"):
        pytest.skip("the value that is watched would be the changed one")
    model, inputs = Injected(INJECTIONS[name], watched).eval(), Injected.inputs()
    (stream,) = attnres_fx.analyze(model, inputs).streams
    assert (stream.num_layers, stream.convertible, stream.norm_placement) == (8, True, "pre"), stream.reason
    assert stream.function_preserving is not watched
    before = values_and_gradients(model, inputs)
    for blocks in (1, 3, 8):
        torch._dynamo.reset()
        model = Injected(INJECTIONS[name], watched).eval()
        attnres_fx.convert(model, inputs, num_blocks=blocks, mix_scale="sum")
        for ours, theirs in zip(values_and_gradients(model, inputs), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert attnres_fx.verify(model, inputs).passed
        with torch.no_grad():
            model.attnres.stream.query.normal_()
            assert models.relative(model(*inputs)[0], before[0]) > 1e-3


def values_and_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    x, mask, features = inputs
    features = features.clone().requires_grad_()
    made = model(x, mask, features)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("attnres") and "scale" not in name]
    loss = sum((value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum() for value in made)
    return [*made, *torch.autograd.grad(loss, [features, *parameters])]


def _overwritten(m: Any, x: Tensor, mask: Tensor, e: Tensor) -> Tensor:
    x = x.clone()
    x[mask] = e
    return x


def _seen_by_another_name(m: Any, x: Tensor, mask: Tensor, e: Tensor) -> Tensor:
    before = x.view(-1, WIDTH)
    x[mask] += e
    return x + 0 * before.view_as(x)


def _read_changed(m: Any, x: Tensor, mask: Tensor, e: Tensor) -> Tensor:
    y = x.clone()
    rows = y[mask]
    y[mask] = 2 * rows + e
    return y


@pytest.mark.parametrize("inject, expected", [
    (_overwritten, errors.MutatedStreamError),
    (_read_changed, errors.MutatedStreamError),
    (lambda m, x, mask, e: x.masked_scatter(mask.unsqueeze(-1), e), errors.StreamOperationError),
])
def test_features_that_replace_values_are_refused_by_name(inject: Any, expected: type[Exception]) -> None:
    model, inputs = Injected(inject).eval(), Injected.inputs()
    report = attnres_fx.analyze(model, inputs)
    assert any("injected features" in str(stream.reason) for stream in report.streams)
    with pytest.raises(expected, match="injected features") as caught:
        attnres_fx.convert(model, inputs)
    assert "add the features" in str(caught.value) and "test_forms.py" in str(caught.value)


def test_features_written_under_another_name_are_never_converted() -> None:
    model, inputs = Injected(_seen_by_another_name).eval(), Injected.inputs()
    with pytest.raises(errors.StreamRefusedError):
        attnres_fx.convert(model, inputs)


class First(Toy):
    """A stack whose layers may look back at the values of all layers before, the embedding first."""

    def forward(self, x: Tensor) -> Tensor:
        values = [self.embed(x)]
        for i in range(self.num_layers):
            values.append(self.step(self, values, i))  # type: ignore[arg-type]
        return self.head(self.norm(values[-1]))


def _gru(m: Any, x: Tensor, i: int) -> Tensor:
    return torch.gru_cell(m.branch(x, i).view(-1, WIDTH), x.view(-1, WIDTH), m.cells[0], m.cells[1]).view_as(x)


class Cells(Toy):
    def __init__(self) -> None:
        super().__init__(_gru, 4)
        self.cells = nn.ParameterList(torch.randn(3 * WIDTH, WIDTH) for _ in range(2))


class Lanes(nn.Module):
    """Hyper-connections: ``count`` lanes, mixed by a matrix; ``how`` spells the mixing."""

    def __init__(self, how: str, count: int = 4, num_layers: int = 4) -> None:
        super().__init__()
        self.how, self.count = how, count
        self.embed, self.head, self.norm = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))
        self.weights = nn.ModuleList(nn.Linear(WIDTH, count * count) for _ in range(num_layers))
        self.static = nn.ParameterList(torch.eye(count) + 0.1 * torch.randn(count, count) for _ in range(num_layers))
        self.spread = nn.ParameterList(torch.randn(count, 1) for _ in range(num_layers))

    def mixed(self, lanes: Tensor, i: int) -> Tensor:
        dynamic = torch.tanh(self.weights[i](lanes.mean(-2))).unflatten(-1, (self.count, self.count))
        match self.how:
            case "static":
                return self.static[i] @ lanes
            case "matmul":
                return dynamic @ lanes
            case "einsum":
                return torch.einsum("...st,...td->...sd", dynamic.softmax(-1), lanes)
            case "sum":
                return (dynamic.unsqueeze(-1) * lanes.unsqueeze(-3)).sum(-2)
            case _:  # on top of the identity
                return lanes + torch.matmul(dynamic, lanes)

    def forward(self, x: Tensor) -> Tensor:
        lanes = self.embed(x).unsqueeze(-2).expand(-1, -1, self.count, -1).contiguous()
        for i, layer in enumerate(self.layers):
            f = torch.tanh(layer(self.norm(lanes.sum(-2))))
            lanes = self.mixed(lanes, i) + self.spread[i] * f.unsqueeze(-2)
        return self.head(self.norm(lanes.sum(-2)))


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize("how", ["static", "matmul", "einsum", "sum", "identity"])
def test_hyper_connections_are_named(how: str, tracer: str) -> None:
    refused(Lanes(how, 2 if how == "static" else 4), errors.GatedStreamError, "hyper-connections", 4, "hyper")


def test_gated_cells_are_named() -> None:
    refused(Cells(), errors.GatedStreamError, "a gated recurrent cell", 4, "gated")


def _x0(m: Any, values: list[Tensor], i: int) -> Tensor:
    x = (0.9 + m.scale[0]) * values[-1] + m.scale[1] * values[0]
    return x + m.branch(x, i)


CONSTRUCTS: dict[str, tuple[Step, type[Exception], str]] = {
    "x0-lambda": (_x0, errors.ScaledStreamError, "its first value mixed back in"),
    "x0-lambda, one sum": (lambda m, v, i: m.scale[0] * v[-1] + m.scale[1] * v[0] + m.branch(v[-1], i),
                           errors.ScaledStreamError, "its first value mixed back in"),
    "DeepNorm": (lambda m, v, i: m.norms[i](1.7 * v[-1] + m.first[i](v[-1])), errors.ScaledStreamError, "DeepNorm"),
    "KEEL": (lambda m, v, i: m.norm(1.7 * v[-1] + m.branch(v[-1], i)), errors.ScaledStreamError, "KEEL"),
    "highway by lerp": (lambda m, v, i: torch.lerp(v[-1], m.branch(v[-1], i), torch.sigmoid(m.second[i](v[-1]))),
                        errors.GatedStreamError, "gated by a computed value"),
    "U-Net, added": (lambda m, v, i: v[-1] + m.branch(v[-1], i) + (m.scale * v[-3] if i > 3 else 0 * v[-1]),
                     errors.StreamOperationError, "long skip from an earlier layer"),
    "U-Net, before the layer": (lambda m, v, i: _unet(m, v, i), errors.StreamOperationError,
                                "long skip from an earlier layer"),
    "U-Net, joined": (lambda m, v, i: _joined(m, v, i), errors.StreamOperationError, "long skip from an earlier layer"),
}


def _unet(m: Any, values: list[Tensor], i: int) -> Tensor:
    x = values[-1] + m.scale * values[2 * 3 - i] if i > 3 else values[-1]
    return x + m.branch(x, i)


def _joined(m: Any, values: list[Tensor], i: int) -> Tensor:
    x = values[-1]
    if i == 3:
        x = torch.cat([x, values[1]], -1) @ torch.cat([m.first[0].weight, m.second[0].weight])
    return x + m.branch(x, i)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_other_constructs_are_named(name: str) -> None:
    step, expected, words = CONSTRUCTS[name]
    refused(First(step, 6), expected, words)


def refused(model: nn.Module, expected: type[Exception], words: str, layers: int = 0, placement: str = "") -> None:
    """The construct is in the report and in the error, with a place."""
    model, x = models.randomize(model).eval(), toy_input()
    report = attnres_fx.analyze(model, x)
    bad: list[ResidualStream] = [stream for stream in report.streams if not stream.convertible]
    assert bad and words in str(bad[0].reason), str(report)
    if layers:
        assert [(s.num_layers, s.norm_placement) for s in report.streams] == [(layers, placement)]
    with pytest.raises(expected, match=words) as caught:
        attnres_fx.convert(model, x)
    assert "test_forms.py" in str(caught.value) or "graphs.py" in str(caught.value)


def test_a_first_value_added_again_is_a_term() -> None:
    """Without a factor on the stream the embedding may join as often as it likes: position 0 is its own source."""
    def step(m: Any, values: list[Tensor], i: int) -> Tensor:
        x = values[-1] + m.branch(values[-1], i)
        return x + values[0] if i else x

    model, x = First(step, 4).double(), toy_input().double()
    (stream,) = attnres_fx.analyze(model, x).streams
    assert (stream.num_layers, stream.convertible, stream.function_preserving) == (4, True, True)
    with torch.no_grad():
        plain = model(x)
        attnres_fx.convert(model, x, num_blocks=2, mix_scale="sum")
        torch.testing.assert_close(model(x), plain, rtol=1e-9, atol=1e-9)


def test_a_sublayer_around_other_layers_is_a_term() -> None:
    """The output of a sublayer that reads an earlier position joins two layers later: a shortcut, not a long skip."""

    def step(m: Any, values: list[Tensor], i: int) -> Tensor:
        x = values[-1] + m.branch(values[-1], i)
        return x + m.second[i](m.norms[i](values[-2])) if i > 1 else x

    model, x = First(step, 5).double(), toy_input().double()
    (stream,) = attnres_fx.analyze(model, x).streams
    assert (stream.num_layers, stream.convertible, stream.function_preserving) == (5, True, True)
    with torch.no_grad():
        plain = model(x)
        attnres_fx.convert(model, x, num_blocks=2, mix_scale="sum")
        torch.testing.assert_close(model(x), plain, rtol=1e-9, atol=1e-9)
        assert attnres_fx.verify(model, x).passed


def test_input_added_within_every_branch() -> None:
    """What a branch adds to its own input does not change the stream: all layers are found, and the raw read is reported."""
    model = First(lambda m, v, i: v[-1] + torch.tanh(m.first[i](m.norms[i](v[-1] + m.second[0](v[0])))), 4).double()
    x = toy_input().double()
    (stream,) = attnres_fx.analyze(model, x).streams
    assert (stream.num_layers, stream.convertible, stream.function_preserving) == (4, True, False)
    assert stream.norm_placement == "pre"
    with torch.no_grad():
        plain = model(x)
        attnres_fx.convert(model, x, num_blocks=2, mix_scale="sum")
        torch.testing.assert_close(model(x), plain, rtol=1e-9, atol=1e-9)


def test_functional_mixing_of_tokens_is_no_lane() -> None:
    """Attention over raw values mixes tokens, and its sum with the stream is a layer."""
    def step(m: Any, x: Tensor, i: int) -> Tensor:
        weights = F.softmax(m.norms[i](x) @ m.first[i](m.norms[i](x)).transpose(1, 2), -1)
        return x + weights @ x

    (stream,) = attnres_fx.analyze(Toy(step, 4), toy_input()).streams
    assert (stream.num_layers, stream.convertible) == (4, True)
