"""What cannot be rewritten safely is refused with class, place and remedy; and the model is left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import models, reference
from support import opaque_norms as fused
from support.ways import untried
from torch import Tensor, nn

import attnres_fx
from attnres_fx import by_value, errors
from attnres_fx.runtime.stream import BY_VALUE


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


# Attributes that torch and transformers themselves leave on a module when it is traced.
_FOREIGN = {"_output_capturing_hooks_installed", "_is_torch_compile"}


class Snapshot:
    """What a failed conversion must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.classes = [type(module) for module in model.modules()]
        self.held = [set(module.__dict__) - _FOREIGN for module in model.modules()]
        self.hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        self.identities = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}

    def assert_unchanged(self) -> None:
        model = self.model
        assert not hasattr(model, "attnres")
        assert [type(module) for module in model.modules()] == self.classes
        assert [set(m.__dict__) - _FOREIGN for m in model.modules()] == self.held
        assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == self.hooks
        assert list(model.state_dict()) == list(self.state)
        assert all(torch.equal(value, self.state[key]) for key, value in model.state_dict().items())
        assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == self.identities


def one_line_error(model: nn.Module, *args: Any, **kwargs: Any) -> BaseException:
    """The project's error behind what ``torch.compile(model, backend="attnres")`` raises at its first call."""
    with pytest.raises(Exception) as caught:
        torch.compile(model, backend="attnres")(*args, **kwargs)
    error: BaseException = caught.value
    while not isinstance(error, errors.AttnResError):
        inner = getattr(error, "inner_exception", None) or error.__cause__
        assert inner is not None, f"not an error of the project: {error!r}"
        error = inner
    return error


def line_of(function: Callable[..., Any], text: str) -> str:
    """``file:line`` of the one line of ``function`` that holds ``text``."""
    lines, first = inspect.getsourcelines(function)
    numbers = [first + offset for offset, line in enumerate(lines) if text in line]
    assert len(numbers) == 1
    return f"{inspect.getsourcefile(function)}:{numbers[0]}"


def assert_names_place(error: errors.AttnResError, module: str, source: str) -> None:
    text = str(error)
    assert error.place is not None and error.place.node and error.place.node in text
    assert error.place.module == module and f"module '{module}'" in text
    assert source in error.place.source and error.place.source in text
    assert error.remedy and "What to do:" in text


def test_bert_is_refused_with_place_and_reason() -> None:
    model, args, kwargs = models.bert()
    before = Snapshot(model)
    report = attnres_fx.analyze(model, args, kwargs)
    assert [(s.num_layers, s.norm_placement, s.convertible) for s in report.streams] == [(6, "post", False)]
    assert "post-norm" in str(report.streams[0].reason) and "post-norm" in str(report)
    with pytest.raises(errors.PostNormError, match="post-norm") as caught:
        attnres_fx.convert(model, args, kwargs)
    assert_names_place(caught.value, "encoder.layer.0.attention.output.LayerNorm", "modeling_bert.py:")
    before.assert_unchanged()
    refused = one_line_error(model, *args, **kwargs)
    assert isinstance(refused, errors.PostNormError)
    before.assert_unchanged()


class Breaks(reference.Block):
    """A block with a graph break in its middle."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        torch._dynamo.graph_break()
        return x + self.mlp(self.ln_2(x))


class Decides(reference.Block):
    """A block that decides on a value while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        if x.sum() > 1e9:  # a decision on data
            x = x * 2
        return x + self.mlp(self.ln_2(x))


class Unrolled(reference.NanoGPT):
    """Layers called one by one: the tracer can break between them, where it gives up a loop as a whole."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.h[0](x)
        x = self.h[1](x)
        x = self.h[2](x)
        return self.head(self.ln_f(x))


def _with_block(block: type[nn.Module], index: int, model_class: type[nn.Module] = reference.NanoGPT) -> Any:
    model: Any = models.randomize(model_class(6, width=16, heads=2)).eval()
    model.h[index] = models.randomize(block(16, 2)).eval()
    return model


@pytest.mark.parametrize("block, text, model_class, index", [
    (Breaks, "graph_break()", reference.NanoGPT, 0),
    (Breaks, "graph_break()", reference.NanoGPT, 1),
    (Decides, "a decision on data", reference.NanoGPT, 2),
    (Breaks, "graph_break()", Unrolled, 1),
    (Decides, "a decision on data", Unrolled, 2),
])
def test_graph_break_names_its_line(
    block: type[nn.Module], text: str, model_class: type[nn.Module], index: int
) -> None:
    model, ids = _with_block(block, index, model_class), models.token_ids(2, 5)
    before = Snapshot(model)
    where = line_of(block.forward, text)
    with pytest.raises(errors.GraphBreakError) as caught:
        attnres_fx.convert(model, ids)
    assert caught.value.place is not None and caught.value.place.source == where and where in str(caught.value)
    before.assert_unchanged()
    with pytest.raises(errors.GraphBreakError, match="graph break"):
        attnres_fx.analyze(model, ids)

    refused = one_line_error(model, ids)
    if model_class is reference.NanoGPT and index > 0:
        # A break in a later round of a loop: Dynamo gives the whole frame up and hands us its first layer alone. The error
        # names the loop, the reason, and the way to the line, which then holds.
        assert isinstance(refused, errors.GraphBreakError)
        assert "fullgraph=True" in str(refused)
        forward = model_class.forward.__code__
        assert f"{forward.co_filename}:{forward.co_firstlineno}" in str(refused)
        assert ("graph_break()" if block is Breaks else "ata-dependent") in str(refused)
        torch._dynamo.reset()  # it remembers the frames that it gave up
        with pytest.raises(torch._dynamo.exc.Unsupported) as whole:
            torch.compile(model, backend="attnres", fullgraph=True)(ids)
        assert where.replace(":", '", line ') in str(whole.value)
    else:
        assert isinstance(refused, errors.GraphBreakError)
        assert where in str(refused)
    before.assert_unchanged()


def test_graph_break_after_conversion_names_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that breaks only in another mode is converted, and runs by value from there on; the log names the line."""

    class BreaksInTraining(reference.Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            if self.training:
                torch._dynamo.graph_break()
            return x + self.mlp(self.ln_2(x))

    model, ids = _with_block(BreaksInTraining, 1), models.token_ids(2, 5)
    attnres_fx.convert(model, ids, num_blocks=3)
    untried(model)(ids)
    where, said = line_of(BreaksInTraining.forward, "graph_break()"), []
    monkeypatch.setattr(by_value.log, "warning", lambda text, *args: said.append(text % args))
    for call in (model, torch.compile(model, backend="attnres", options={"downstream": "eager"})):
        expected = call(ids)
        model.train()
        torch.testing.assert_close(call(ids), expected)
        model.eval()
        assert where in said.pop()
        for part in model.modules():
            part.__dict__.pop(BY_VALUE, None)


class DeepNorm(reference.Block):
    """The skip is scaled, the branch is pre-normed."""

    def forward(self, x: Tensor) -> Tensor:
        x = 1.5 * x + self.attn(self.ln_1(x))
        return 1.5 * x + self.mlp(self.ln_2(x))


class Highway(reference.Block):
    """Skip and branch are gated by a value computed from the input."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.mlp.down(self.mlp.up(self.ln_1(x))))
        x = (1 - gate) * x + gate * self.attn(self.ln_1(x))
        gate = torch.sigmoid(self.attn.out(self.ln_2(x)))
        return (1 - gate) * x + gate * self.mlp(self.ln_2(x))


class NormGated(reference.Block):
    """The gate is a norm of the input and no projection of it."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.ln_1(x))
        x = (1 - gate) * x + gate * self.attn(self.ln_1(x))
        gate = torch.sigmoid(self.ln_2(x))
        return (1 - gate) * x + gate * self.mlp(self.ln_2(x))


class PostNorm(reference.Block):
    """The norm of the sum is the new stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class Squashed(reference.Block):
    """Something else lies on the stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x + self.attn(self.ln_1(x)))
        return torch.tanh(x + self.mlp(self.ln_2(x)))


@pytest.mark.parametrize("block, expected, placement", [
    (DeepNorm, errors.ScaledStreamError, "pre"),
    (Highway, errors.GatedStreamError, "gated"),
    (NormGated, errors.GatedStreamError, "gated"),
    (PostNorm, errors.PostNormError, "post"),
    (Squashed, errors.StreamOperationError, "none"),
])
def test_operation_on_the_stream_is_refused(block: type[nn.Module], expected: type[Exception], placement: str) -> None:
    model, ids = models.nanogpt(6, width=16, heads=2), models.token_ids(2, 5)
    model.h = nn.ModuleList(models.randomize(block(16, 2)).eval() for _ in range(3))
    before = Snapshot(model)
    report = attnres_fx.analyze(model, ids)
    assert [(s.num_layers, s.convertible, s.norm_placement) for s in report.streams] == [(6, False, placement)]
    with pytest.raises(expected) as caught:
        attnres_fx.convert(model, ids)
    assert type(caught.value) is expected
    assert __file__.rsplit("/", 1)[-1] in str(caught.value) and "h.0" in str(caught.value)
    before.assert_unchanged()
    assert type(one_line_error(model, ids)) is expected
    before.assert_unchanged()


def test_one_bad_layer_in_the_middle_is_refused() -> None:
    model, ids = _with_block(DeepNorm, 1), models.token_ids(2, 5)
    before = Snapshot(model)
    with pytest.raises(errors.ScaledStreamError, match=r"module 'h\.1'"):
        attnres_fx.convert(model, ids)
    before.assert_unchanged()


def test_converting_twice_says_so() -> None:
    model, ids = models.nanogpt(6, width=16, heads=2), models.token_ids(2, 5)
    attnres_fx.convert(model, ids, num_blocks=2)
    held = dict(model.state_dict())
    value = model(ids)
    for again in (model, torch.compile(model, backend="attnres"), nn.Sequential(model)):
        with pytest.raises(errors.AlreadyConvertedError, match="converted already"):
            attnres_fx.convert(again, ids, num_blocks=3)
    assert list(model.state_dict()) == list(held)
    assert torch.equal(model(ids), value)


class TwoTowers(nn.Module):
    """A post-norm encoder beside a pre-norm decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = models.nanogpt(4, width=16, heads=2)
        self.encoder.h = nn.ModuleList(models.randomize(PostNorm(16, 2)).eval() for _ in range(2))
        self.decoder = models.nanogpt(6, width=16, heads=2)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(source), self.decoder(target)


def test_one_good_and_one_bad_stream() -> None:
    model, args = TwoTowers(), (models.token_ids(2, 5), models.token_ids(2, 4, seed=2))
    before = Snapshot(model)
    report = attnres_fx.analyze(model, args)
    found = [(s.name, s.num_layers, s.convertible) for s in report.streams]
    assert found == [("encoder", 4, False), ("decoder", 6, True)]
    with pytest.raises(errors.PostNormError) as caught:
        attnres_fx.convert(model, args)
    text = str(caught.value)
    assert "of 2 streams 1 cannot be rewritten" in text and "'encoder'" in text and "convertible: decoder" in text
    assert "streams=['decoder']" in text
    before.assert_unchanged()
    with pytest.raises(errors.PostNormError, match="encoder"):
        attnres_fx.convert(model, args, streams=["encoder"])
    with pytest.raises(errors.OptionError, match="encoder, decoder"):
        attnres_fx.convert(model, args, streams=["middle"])
    before.assert_unchanged()

    with torch.no_grad():
        encoded, decoded = model(*args)
        attnres_fx.convert(model, args, streams="decoder", num_blocks=3, mix_scale="sum")
        assert [name for name, _ in model.attnres.named_parameters()] == ["decoder.query", "decoder.key_gain"]
        again_encoded, again_decoded = model(*args)
        assert torch.equal(again_encoded, encoded) and models.relative(again_decoded, decoded) <= 1e-5
        model.attnres.decoder.query.normal_()
        assert models.relative(model(*args)[1], decoded) > 1e-2
        assert torch.equal(model(*args)[0], encoded)
    assert attnres_fx.verify(model, args).passed


@pytest.mark.parametrize("options, expected, word", [
    ({"num_blocks": 2, "layers_per_block": 2}, errors.PartitionError, "together"),
    ({"num_blocks": 0}, errors.PartitionError, "num_blocks"),
    ({"boundaries": [4, 2]}, errors.PartitionError, "increas"),
    ({"boundaries": [2, 9]}, errors.PartitionError, "boundaries"),
    ({"mix_scale": "mean"}, errors.OptionError, "mix_scale"),
    ({"boundaries": {"other": [2]}}, errors.OptionError, "stream"),
])
def test_arguments_that_do_not_fit(options: dict[str, Any], expected: type[Exception], word: str) -> None:
    model, ids = models.nanogpt(6, width=16, heads=2), models.token_ids(2, 5)
    before = Snapshot(model)
    with pytest.raises(expected, match=word):
        attnres_fx.convert(model, ids, **options)
    before.assert_unchanged()


def test_a_model_without_a_stream() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    before = Snapshot(model)
    with pytest.raises(errors.NoStreamError, match="no addition of two tensors of one shape was seen"):
        attnres_fx.convert(model, torch.randn(2, 8))
    with pytest.raises(errors.NotConvertedError):
        attnres_fx.verify(model, torch.randn(2, 8))
    before.assert_unchanged()
    assert str(attnres_fx.analyze(model, torch.randn(2, 8))) == (
        "no residual stream found: no addition of two tensors of one shape was seen")


def test_a_model_without_a_stream_says_what_it_has() -> None:
    """Sums that are not residual additions are counted and placed; opaque operators are named."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return fused.not_on_cpu(self.a(x) + self.b(x), self.a(x), self.a.bias, 1e-6)

    report = attnres_fx.analyze(Sums(), torch.randn(2, 3, 8))
    assert not report.streams
    assert report.seen.startswith("1 additions of tensors of one shape were seen")
    assert "test_refusals.py" in report.seen and report.seen.endswith("cannot be looked into were seen: elsewhere")
