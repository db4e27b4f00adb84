"""The first oracle: with zero queries a converted model computes what the plain model did, on every architecture.

Under "paper" every mix is the stream divided by its number of sources: exact as norm eps goes to 0. Under "sum" it is
the stream itself, to rounding, with the models' own eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import models

import attnres_fx

PARTITIONS: dict[str, dict[str, int]] = {
    "one block": {"num_blocks": 1},
    "three blocks": {"num_blocks": 3},
    "eight blocks": {"num_blocks": 8},
    "full": {"layers_per_block": 1},
}


# By default, all of the first model and one row of each other; the whole matrix with the slow tests.
QUICK = {
    "llama": ("three blocks", "paper"), "gpt2": ("one block", "sum"), "gpt_neox": ("three blocks", "paper"),
    "t5": ("three blocks", "paper"), "vit": ("eight blocks", "sum"), "mixtral": ("full", "paper"),
    "mamba2": ("one block", "sum"),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def _matrix() -> list[Any]:
    """Every model in every partition under both scales."""
    rows = []
    for name in models.CASES:
        for partition in PARTITIONS:
            for scale in ("paper", "sum"):
                quick = name == "nanogpt" or (partition, scale) == QUICK[name]
                rows.append(pytest.param(name, partition, scale, marks=[] if quick else [pytest.mark.slow],
                                         id=f"{name}-{partition}-{scale}"))
    return rows


@pytest.mark.parametrize("name", [
    name if name in ("nanogpt", "gpt_neox", "t5") else pytest.param(name, marks=pytest.mark.slow)
    for name in models.CASES])
def test_streams_are_found_as_the_source_says(name: str) -> None:
    case = models.CASES[name]
    model, args, kwargs = case.build()
    report = attnres_fx.analyze(model, args, kwargs)
    assert [stream.num_layers for stream in report.streams] == list(case.layers)
    assert [stream.name for stream in report.streams] == list(case.streams)
    for stream in report.streams:
        assert stream.norm_placement == case.placement
        assert stream.convertible and stream.reason is None and stream.function_preserving
        assert stream.width == 32 and len(stream.layers) == stream.num_layers
        assert all(layer.module and ".py:" in layer.source for layer in stream.layers)
        assert all(layer.form.count("f") == case.terms for layer in stream.layers)
    assert not report.mixes and not hasattr(model, "attnres")


@pytest.mark.parametrize("name, partition, mix_scale", _matrix())
def test_converted_equals_plain(name: str, partition: str, mix_scale: str) -> None:
    dtype, tolerance = (torch.float64, 1e-6) if mix_scale == "paper" else (torch.float32, 1e-5)
    model, args, kwargs = models.to_dtype(models.CASES[name].build(), dtype)
    if mix_scale == "paper":
        models.set_norm_eps(model)
    with torch.no_grad():
        before = model(*args, **kwargs)
        attnres_fx.convert(model, args, kwargs, mix_scale=mix_scale, **PARTITIONS[partition])
        after = model(*args, **kwargs)
    found = models.relative(after, before)
    assert found <= tolerance
    checked = attnres_fx.verify(model, args, kwargs)
    assert checked.passed and checked.exact_start, str(checked)
    assert checked.zero_query <= tolerance and checked.random_query <= tolerance
    # Two measurements of one thing: the same up to rounding.
    assert abs(float(checked) - found) <= tolerance / 2


@pytest.mark.parametrize("partition", ["one block", "full"])
def test_own_eps_under_paper_is_reported(partition: str) -> None:
    """With small activations eps is not nothing; verify says so and passes, and "sum" has none of it."""
    small = 0.2
    deviations = {}
    for mix_scale in ("paper", "sum"):
        model, args, kwargs = models.CASES["nanogpt"].build()
        with torch.no_grad():
            for parameter in (model.wte.weight, model.wpe.weight):
                parameter.mul_(small)
            for block in model.h:
                for layer in (block.attn.out, block.mlp.down):
                    layer.weight.mul_(small)
                    layer.bias.mul_(small)
        attnres_fx.convert(model, args, kwargs, mix_scale=mix_scale, **PARTITIONS[partition])
        checked = attnres_fx.verify(model, args, kwargs)
        assert checked.passed, str(checked)
        deviations[mix_scale] = float(checked)
    assert deviations["sum"] <= 1e-5 < deviations["paper"] <= 1e-2


def test_raw_reader_is_named_and_sum_still_exact() -> None:
    """A model whose head reads the stream without a norm is converted, and the report names the reader."""
    model, args, kwargs = models.CASES["nanogpt"].build()
    model.ln_f = torch.nn.Identity()
    report = attnres_fx.analyze(model, args, kwargs)
    assert report.streams[0].convertible and not report.streams[0].function_preserving
    assert {reader.position for reader in report.streams[0].raw_readers} == {6}
    with torch.no_grad():
        before = model(*args)
    attnres_fx.convert(model, args, kwargs, num_blocks=3, mix_scale="sum")
    assert models.relative(model(*args), before) <= 1e-5
    assert attnres_fx.verify(model, args).passed

    under_paper = attnres_fx.convert(_with_raw_head(), args, num_blocks=3)
    checked = attnres_fx.verify(under_paper, args)
    assert checked.passed and not checked.exact_start and checked.zero_query > 0.1
    assert "mix_scale='sum'" in str(checked)


def _with_raw_head() -> Any:
    model, _, _ = models.CASES["nanogpt"].build()
    model.ln_f = torch.nn.Identity()
    return model
