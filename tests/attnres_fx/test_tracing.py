"""The table of ways to call a model: each is analysed, converted exactly, and compiled to what runs without a compiler.

``test_calls`` holds the ways to call, copy and wrap a model that was converted on one plain call. Here the model is
converted on the call itself, and every call of the way must find its layers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import models, reference
from torch import Tensor, nn

import attnres_fx

IDS = models.token_ids(2, 6)
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
PLAIN = {"use_cache": False}
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@dataclass(frozen=True)
class Way:
    """How to build a model, the inputs to convert it on, and all calls of the way; the model has 4 layers."""

    inputs: Callable[[Any], Inputs] = lambda model: ((IDS,), PLAIN)
    calls: Callable[[Any, Any], list[Any]] | None = None  # (what to call, the converted model itself)
    build: Callable[[], Any] = lambda: models.llama(2)
    modules: tuple[str, ...] = ("model.layers.0", "model.layers.0", "model.layers.1", "model.layers.1")
    context: Callable[[], Any] = contextlib.nullcontext
    tolerance: float = 1e-5
    check: Callable[[list[Any]], None] = field(default=lambda outputs: None)

    def run(self, call: Any, model: Any) -> list[Tensor]:
        """The floating-point tensors of all outputs."""
        with torch.no_grad(), self.context():
            if self.calls is not None:
                outputs = self.calls(call, model)
            else:
                args, kwargs = self.inputs(model)
                outputs = [call(*args, **kwargs)]
        self.check(outputs)
        return [tensor for output in outputs for tensor in models.tensors_of(_without_cache(output))]


def _without_cache(output: Any) -> Any:
    if isinstance(output, dict):
        return {key: value for key, value in output.items() if key != "past_key_values"}
    if isinstance(output, tuple):
        return tuple(part for part in output if isinstance(part, (Tensor, tuple)))
    return output


def _static(model: Any) -> Any:
    import transformers

    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    parameter = next(model.parameters())
    cache.early_initialization(2, model.config.num_key_value_heads, 8, parameter.dtype, parameter.device)
    return cache


def _dynamic(model: Any) -> Any:
    import transformers

    return transformers.DynamicCache(config=model.config)


def _prefill_and_decode(make: Callable[[Any], Any]) -> Callable[[Any, Any], list[Any]]:
    def calls(call: Any, model: Any) -> list[Any]:
        cache = make(model)
        steps = [(IDS[:, :4], torch.arange(4)), (IDS[:, 4:5], torch.arange(4, 5)), (IDS[:, 5:], torch.arange(5, 6))]
        return [call(ids, past_key_values=cache, use_cache=True, position_ids=positions[None]) for ids, positions in steps]

    return calls


def _with_cache(make: Callable[[Any], Any]) -> Callable[[Any], Inputs]:
    return lambda model: ((IDS[:, :4],), {"past_key_values": make(model), "use_cache": True,
                                          "position_ids": torch.arange(4)[None]})


class TakesADict(nn.Module):
    """Its forward takes one dictionary, and gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.llama(2)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        output = self.inner(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False)
        return {"logits": output.logits, "length": batch["ids"].shape[1]}


class KeywordsOnly(reference.NanoGPT):
    def forward(self, *, ids: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        value = super().forward(ids) * scale
        return value, {"mean": value.mean(-1)}


def _lengths(call: Any, model: Any) -> list[Any]:
    return [call(models.token_ids(2, length), **PLAIN) for length in (5, 7, 9, 1)]


def _is(kind: Callable[[Any], bool]) -> Callable[[list[Any]], None]:
    def check(outputs: list[Any]) -> None:
        assert all(kind(output) for output in outputs)

    return check


NANO = ("h.0", "h.0", "h.1", "h.1")
WAYS: dict[str, Way] = {
    "evaluation": Way(),
    "training": Way(build=lambda: models.llama(2).train()),
    "autocast": Way(context=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=0.1,
                    check=_is(lambda output: output.logits.dtype == torch.bfloat16)),
    "DynamicCache": Way(_with_cache(_dynamic), _prefill_and_decode(_dynamic)),
    "StaticCache": Way(_with_cache(_static), _prefill_and_decode(_static)),
    "lengths": Way(calls=_lengths),
    "keywords": Way(lambda model: ((), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **PLAIN})),
    "keyword-only": Way(lambda model: ((), {"ids": IDS, "scale": 0.5}), modules=NANO,
                        build=lambda: models.randomize(KeywordsOnly(4, width=16, heads=2)).eval()),
    "dict": Way(lambda model: (({"ids": IDS, "mask": PADDED},), {}), build=TakesADict,
                modules=tuple(f"inner.{name}" for name in ("model.layers.0",) * 2 + ("model.layers.1",) * 2),
                check=_is(lambda output: set(output) == {"logits", "length"} and output["length"] == 6)),
    "tuple": Way(lambda model: ((IDS,), {**PLAIN, "return_dict": False}), check=_is(lambda output: type(output) is tuple)),
    "embeddings": Way(lambda model: ((), {"inputs_embeds": model.model.embed_tokens(IDS).detach(), **PLAIN})),
    "mask": Way(lambda model: ((IDS,), {"attention_mask": PADDED, **PLAIN})),
    "labels": Way(lambda model: ((IDS,), {"labels": IDS, **PLAIN}), check=_is(lambda output: output.loss.dim() == 0)),
    "hidden states": Way(lambda model: ((IDS,), {"output_hidden_states": True, **PLAIN}),
                         check=_is(lambda output: len(output.hidden_states) == 3)),
}


def disturb(model: Any) -> None:
    """Queries and gains that make the mixes count."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameters in model.attnres.streams.values():
            parameters.query.copy_(0.7 * torch.randn(parameters.query.shape, generator=generator))
            parameters.key_gain.add_(0.2 * torch.randn(parameters.query.shape, generator=generator))


QUICK = {"DynamicCache", "autocast", "dict", "keyword-only"}  # the rest takes minutes in all


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WAYS])
def test_way(name: str) -> None:
    way = WAYS[name]
    model = way.build()
    with way.context():
        report = attnres_fx.analyze(model, *way.inputs(model))
    assert [tuple(layer.module for layer in stream.layers) for stream in report.streams] == [way.modules]
    assert report.streams[0].norm_placement == "pre" and report.streams[0].convertible

    plain = way.run(model, model)
    with way.context():
        attnres_fx.convert(model, *way.inputs(model), num_blocks=2, mix_scale="sum")
    assert models.relative(way.run(model, model), plain) <= way.tolerance
    disturb(model)
    eager = way.run(model, model)
    assert models.relative(eager, plain) > 0.1
    compiled = torch.compile(model, backend="attnres", options={"downstream": "aot_eager"})
    assert models.relative(way.run(compiled, model), eager) <= way.tolerance
    with way.context():
        assert attnres_fx.verify(model, *way.inputs(model)).passed


@pytest.mark.slow
def test_one_conversion_serves_every_way() -> None:
    """A model converted on the plain call gives in every way what it gives when it is converted on that way."""
    model = attnres_fx.convert(models.llama(2), (IDS,), PLAIN, num_blocks=2, mix_scale="sum")
    disturb(model)
    with torch.no_grad():
        whole = model(IDS, **PLAIN).logits
        for name in ("DynamicCache", "StaticCache"):
            cached = torch.cat([output.logits for output in WAYS[name].calls(model, model)], 1)  # type: ignore[misc]
            assert models.relative(cached, whole) <= 1e-5, name
        for name in ("keywords", "tuple", "embeddings", "labels", "hidden states"):
            args, kwargs = WAYS[name].inputs(model)
            output = model(*args, **kwargs)
            logits = output[0] if isinstance(output, tuple) else output.logits
            assert models.relative(logits, whole) <= 1e-5, name


class Counting:
    """A backend that counts how often it is called."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner, self.count = inner, 0

    def __call__(self, gm: Any, inputs: Any, **_: Any) -> Any:
        self.count += 1
        return self.inner(gm, inputs)


@pytest.mark.slow
def test_lengths_compile_as_seldom_as_plain() -> None:
    from attnres_fx.backend import attnres

    plain = models.llama(2)
    model = attnres_fx.convert(copy.deepcopy(plain), (IDS,), PLAIN, num_blocks=2)
    theirs = Counting(lambda gm, inputs: gm.forward)
    ours = Counting(lambda gm, inputs: attnres(gm, inputs, options={"downstream": "eager"}))
    for _ in range(2):
        _lengths(torch.compile(plain, backend=theirs), plain)
        _lengths(torch.compile(model, backend=ours), model)
    assert theirs.count > 0 and 0 < ours.count <= theirs.count + 1


def test_a_sequential_root() -> None:
    """``nn.Sequential`` calls all its children in turn, the one with the new parameters too."""
    plain = models.randomize(nn.Sequential(nn.Embedding(64, 16), *[reference.Block(16, 2) for _ in range(2)],
                                           nn.LayerNorm(16), nn.Linear(16, 64))).double().eval()
    model, one_line = copy.deepcopy(plain), copy.deepcopy(plain)
    attnres_fx.convert(model, IDS, num_blocks=2, mix_scale="sum")
    assert models.relative(model(IDS), plain(IDS)) <= 1e-12
    disturb(model)
    options = {"downstream": "aot_eager", "num_blocks": 2, "mix_scale": "sum"}
    compiled = torch.compile(one_line, backend="attnres", options=options)
    compiled(IDS)
    one_line.load_state_dict(model.state_dict())
    stream = model.attnres.stream
    layers: list[reference.LayerFunction] = []
    for block in plain[1:3]:
        layers += [lambda x, b=block: b.attn(b.ln_1(x)), lambda x, b=block: b.mlp(b.ln_2(x))]
    mixes = reference.attention_residuals(plain[0](IDS), layers, stream.query, stream.key_gain, [2, 4], mix_scale="sum")
    expected = plain[4](plain[3](mixes[-1]))
    for call in (model, one_line, compiled, torch.compile(model, backend="attnres", options=options)):
        assert models.relative(call(IDS), expected) <= 1e-12
