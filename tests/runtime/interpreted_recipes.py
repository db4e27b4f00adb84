"""Calls that are made by recipes, in Triton's interpreter. Run by test_triton.py, see interpreted_triton.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_fx.runtime import mix_norm, phases, triton
from attnres_fx.runtime.into import INTO
from attnres_fx.runtime.mix import MIX_BACKWARD_TRITON, MIX_TRITON
from attnres_fx.runtime.triton.problem import Problem

DEFAULTS = (1e-6, 1.0, False, 1.0)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        yield


def operator_calls(rows: list[Tensor], query: Tensor, gain: Tensor, weight: Tensor) -> dict[str, Any]:
    """One call of each operator; every row but the last two is a source."""
    *sources, delta, grad = rows
    single, norm = (*DEFAULTS,), (*DEFAULTS, False, 1e-5)
    mixed, lse = torch.ones_like(delta), torch.zeros(delta.shape[:-1])
    out, partial = torch.empty_like(delta, memory_format=torch.contiguous_format), torch.empty(delta.shape)

    def into() -> list[Tensor]:
        INTO[mix_norm.MIX_NORM_TRITON](sources, query[0], gain[0], delta, None, None, weight, None, *norm,
                                       normed_out=out, partial_out=partial)
        return [out.clone(), partial.clone()]

    return {
        "mix": lambda: [MIX_TRITON(sources, query[0], gain[0], *single)],
        "mixes": lambda: [MIX_TRITON(sources, query, gain[0], *single)],
        "mix backward": lambda: MIX_BACKWARD_TRITON(grad, sources, query[0], gain[0], *single),
        "mixes backward": lambda: MIX_BACKWARD_TRITON(torch.stack([grad, delta]), sources, query, gain, *single),
        "phase 1": lambda: phases.PHASE1_TRITON(sources, query, gain, *DEFAULTS[:3]),
        "phase 2": lambda: [phases.PHASE2_TRITON(mixed, lse, sources, query[0], None, *single)],
        "norm": lambda: mix_norm.MIX_NORM_TRITON(sources, query[0], None, delta, None, None, weight, None, *norm),
        "norm, phase 2": lambda: mix_norm.MIX_NORM_TRITON(sources, query[0], None, None, mixed, lse, weight, None, *norm),
        "norm backward": lambda: mix_norm.MIX_NORM_BACKWARD_TRITON(
            grad, delta, sources, query[0], gain[0], None, None, weight, None, *norm),
        "norm backward, phase 2": lambda: mix_norm.MIX_NORM_BACKWARD_TRITON(
            grad, None, sources[:1], query[0], None, mixed, lse, weight, None, *norm),
        "norm into": into}


ROWS = {"contiguous": lambda: torch.randn(2, 3, 12), "a slice": lambda: torch.randn(2, 3, 16)[..., 2:14],
        "expanded": lambda: torch.randn(1, 1, 12).expand(2, 3, 12), "turned": lambda: torch.randn(3, 2, 12).transpose(0, 1)}


@pytest.mark.parametrize("layout", list(ROWS))
@torch.no_grad()
def test_like_calls_are_made_by_recipes(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice with other values: bit by bit what a call without recipes gives, and nothing is planned the second time."""
    triton.recipes.cache_clear()
    planned: list[str] = []
    whole = Problem.of
    monkeypatch.setattr(Problem, "of", lambda *args, **named: planned.append("") or whole(*args, **named))
    for turn in range(3):
        rows = [ROWS[layout]() for _ in range(5)]
        parameters = torch.randn(2, 12), torch.randn(2, 12), torch.randn(12)
        for name, call in operator_calls(rows, *parameters).items():
            planned.clear()
            got = call()
            copied = layout == "turned" or (layout != "contiguous" and name == "norm backward")  # there "delta" is a prior
            assert bool(planned) is (turn == 0 or copied), (name, turn)
            with monkeypatch.context() as without:
                without.setattr(triton, "recipes", lambda like: [])
                assert all(torch.equal(a, b) for a, b in zip(got, call(), strict=True)), name


@torch.no_grad()
def test_another_signature_is_checked() -> None:
    """What differs from a known call only where it has no meaning is refused as ever."""
    rows, query = [torch.randn(2, 3, 12) for _ in range(3)], torch.randn(12)
    MIX_TRITON(rows, query, None)
    for bad in ([*rows[:2], torch.randn(3, 2, 12)], [*rows[:2], torch.randn(2, 3, 12).int()]):
        with pytest.raises((ValueError, TypeError)):
            MIX_TRITON(bad, query, None)
    out = torch.empty(2, 3, 12)
    for _ in range(2):
        INTO[MIX_TRITON](rows, query, None, *DEFAULTS, mixed_out=out)
        with pytest.raises(ValueError, match="contiguous"):
            INTO[MIX_TRITON](rows, query, None, *DEFAULTS, mixed_out=torch.empty(3, 2, 12).transpose(0, 1))
