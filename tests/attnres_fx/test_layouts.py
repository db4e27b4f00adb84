"""Every memory layout that a stream can have, through ``torch.compile(model, backend="attnres")`` with its defaults."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.layouts import LAYOUTS, WIDTH, Image, Network, encoder
from torch import Tensor, nn

import attnres_fx
from attnres_fx.passes.memory import place as arena_pass
from attnres_fx.passes.memory import rows as rows_pass
from attnres_fx.passes.memory.place import Arena

pytestmark = pytest.mark.usefixtures("fresh_compiler")
REFERENCE = {"downstream": "eager", "kernels": "reference", "schedule": "one-pass", "fuse": "never"}


def converted(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """Converted, with random queries and gains: every row of every mix counts."""
    attnres_fx.convert(model, args, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.attnres.named_parameters():
            parameter.copy_((name.endswith("key_gain")) + 0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for piece in result for part in flat(piece)]


def inferred(function: Any, *args: Any) -> list[Tensor]:
    with torch.no_grad():
        return flat(function(*args))


def trained(model: nn.Module, function: Any, *args: Any) -> list[Tensor]:
    """The results and all gradients of a step."""
    model.zero_grad(set_to_none=True)
    results = flat(function(*args))
    sum((result.float() * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum() for result in results).backward()
    return [*(result.detach() for result in results), *(p.grad for p in model.parameters() if p.grad is not None)]


def agree(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        deviation = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12)
        assert deviation < 3e-5, f"deviates by {deviation:.1e}"


def check(model: nn.Module, *args: Any, training: bool = True) -> None:
    """Inference, a second call of another length, and a training step, against the eager graph on the reference kernels."""
    fast = torch.compile(model, backend="attnres")
    slow = torch.compile(copy.deepcopy(model), backend="attnres", options=REFERENCE)
    agree(inferred(fast, *args), inferred(slow, *args))
    if training:
        other = copy.deepcopy(model)
        agree(trained(model, fast, *args), trained(other, torch.compile(other, backend="attnres", options=REFERENCE), *args))


def ids(length: int = 8, batch: int = 2) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.slow  # by default they are seen together, below
@pytest.mark.parametrize("start", ["plain", "sequence first"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_layout(layout: str, start: str, planned: list[Arena]) -> None:
    torch.manual_seed(0)
    if layout == "viewed" and start == "sequence first":
        pytest.skip("torch's own view refuses this stream")
    model = converted(Network(layout, start=start), ids(), num_blocks=3)
    check(model, ids(), training=start == "plain")
    assert planned and sum(len(arena.places) for arena in planned) > 6  # nothing is right because nothing was placed


@pytest.mark.parametrize("start", [pytest.param("plain", marks=pytest.mark.slow), "sequence first"])
@pytest.mark.parametrize("blocks", [
    pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(len(LAYOUTS) - 1, marks=pytest.mark.slow)])
def test_all_layouts_in_turn(blocks: int, start: str, planned: list[Arena]) -> None:
    torch.manual_seed(0)
    chosen = [layout for layout in LAYOUTS if layout != "viewed"]  # which refuses what the others leave behind
    model = converted(Network(*chosen, layers=len(chosen), start=start), ids(), num_blocks=blocks)
    check(model, ids(), training=blocks == 4 and start == "plain")
    assert sum(len(arena.places) for arena in planned) > len(chosen)  # nothing is right because nothing was placed


@pytest.mark.parametrize("start", [
    "plain", *(pytest.param(start, marks=pytest.mark.slow) for start in ("sequence first", "sliced"))])
def test_what_is_returned_or_read_late(start: str) -> None:
    torch.manual_seed(0)
    model = converted(Network("swapped_bare", "viewed" if start == "plain" else "sliced", start=start, hidden=True), ids(),
                      num_blocks=2)
    compiled = torch.compile(model, backend="attnres")
    first = inferred(compiled, ids())
    kept = [tensor.clone() for tensor in first]
    inferred(compiled, ids(8).flip(0))  # a later call writes over nothing that an earlier one returned
    agree(first, kept)
    agree(first, inferred(model, ids()))
    check(converted(Network("swapped_bare", "sliced", start=start, late=True), ids(), num_blocks=2), ids(), training=False)


@pytest.mark.parametrize("blocks, batch_first", [
    pytest.param(1, True, marks=pytest.mark.slow), (3, True), pytest.param(6, True, marks=pytest.mark.slow),
    pytest.param(3, False, marks=pytest.mark.slow)])
def test_an_encoder_of_torch(blocks: int, batch_first: bool) -> None:
    torch.manual_seed(0)
    given = torch.randn(2, 12, WIDTH)
    model = converted(encoder(batch_first, bias=blocks != 3), given, num_blocks=blocks)
    check(model, given, training=blocks == 3)
    model.eval()  # now torch calls one fused operator per layer, where it can
    check(model, given, training=False)
    agree(inferred(model, given), flat(model(given)))
    plain = encoder(batch_first).eval()
    with torch.no_grad():
        exact = attnres_fx.convert(copy.deepcopy(plain), (given,), num_blocks=blocks, mix_scale="sum")
    with torch.inference_mode():
        agree([torch.compile(exact, backend="attnres")(given), exact(given)], [plain(given)] * 2)


@pytest.mark.parametrize("memory_format", [
    torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
@pytest.mark.slow
def test_pictures(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    given = torch.randn(2, 3, 5, 4)
    check(converted(Image(memory_format), given, num_blocks=2), given)


@pytest.mark.slow
def test_lengths_that_change() -> None:
    torch.manual_seed(0)
    model = converted(Network("swapped_bare", "attention"), ids(), num_blocks=2)
    compiled = torch.compile(model, backend="attnres", dynamic=True)
    for length, batch in ((8, 2), (5, 3), (13, 2)):
        agree(inferred(compiled, ids(length, batch)), inferred(model, ids(length, batch)))


@pytest.mark.parametrize("layout", ["swapped_bare", "attention"])
def test_a_pass_that_ignores_strides_is_seen(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests would fail if the arena took any layout for its own; and the check of the arena refuses it by itself."""
    torch.manual_seed(0)
    model = converted(Network(layout), ids(), num_blocks=3)
    monkeypatch.setattr(rows_pass, "is_dense", lambda value: True)
    with pytest.raises(Exception, match=r"in another order|is not a row within"):
        inferred(torch.compile(model, backend="attnres"), ids())
    monkeypatch.setattr(arena_pass, "check_arena", lambda graph, memories: None)
    torch._dynamo.reset()
    # The kernels look at what they are given, too.
    with pytest.raises((AssertionError, ValueError), match=r"deviates|overlaps"):
        agree(inferred(torch.compile(model, backend="attnres"), ids()), inferred(model, ids()))
