"""Algorithm 1: the two phases together are the mix, values and gradients; and each is an operator in good order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnres_fx.runtime.mix import mix
from attnres_fx.runtime.phases import PHASE1, PHASE1_REFERENCE, PHASE2, PHASE2_REFERENCE

PAIRS = {"chosen": (PHASE1, PHASE2), "reference": (PHASE1_REFERENCE, PHASE2_REFERENCE)}


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def two_phases(pair: tuple[Any, Any], early: list[Tensor], late: list[list[Tensor]], query: Tensor, gain: Tensor | None,
               options: tuple[Any, ...] = (1e-6, 1.0, False), factor: float = 1.0) -> list[Tensor]:
    """The mixes of M queries over ``early`` and ``late[m]``."""
    first, second = pair
    parts = first(early, query, gain, *options)
    count = len(query)
    rows = [None] * count if gain is None else gain if gain.ndim == 2 else [gain] * count
    return [second(parts[m], parts[count + m], late[m], query[m], rows[m], *options, factor) if late[m]
            else parts[m] * factor for m in range(count)]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("early, late", [(1, (0, 1)), (3, (0, 1, 1)), (33, (1, 2)), (2, (5,)), (64, (1, 1))])
@pytest.mark.parametrize("gain_dim", [None, 1, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_two_phases_are_one_pass(
    pair: str, early: int, late: tuple[int, ...], gain_dim: int | None, normalize: bool
) -> None:
    width, count = 10, len(late)
    sources = [made(2, 3, width, seed=i) for i in range(early)]
    tails = [[made(2, 3, width, seed=100 + 10 * m + i) for i in range(n)] for m, n in enumerate(late)]
    query = made(count, width, seed=7)
    gain = None if gain_dim is None else made(*((count, width) if gain_dim == 2 else (width,)), seed=8)
    scale, factor = 0.7, 3.0
    rows = [None] * count if gain is None else gain if gain.ndim == 2 else [gain] * count
    expected = [mix([*sources, *tails[m]], query[m], rows[m], eps=1e-5, logit_scale=scale, normalize_values=normalize,
                    output_factor=factor) for m in range(count)]
    got = two_phases(PAIRS[pair], sources, tails, query, gain, (1e-5, scale, normalize), factor)
    leaves = [*sources, *itertools.chain(*tails), query, *([] if gain is None else [gain])]
    weights = [made(2, 3, width, seed=50 + m, grad=False) for m in range(count)]
    theirs = torch.autograd.grad(sum((e * w).sum() for e, w in zip(expected, weights)), leaves)
    ours = torch.autograd.grad(sum((g * w).sum() for g, w in zip(got, weights)), leaves)
    for a, b in zip([*got, *ours], [*expected, *theirs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.detach().abs().max()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("shape", [(1, 1000), (5, 64), (0, 8), (7,)])
def test_storage_dtypes_and_odd_shapes(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    width = shape[-1]
    early = [made(*shape, seed=i, dtype=dtype, grad=False) for i in range(4)]
    late = [[], [made(*shape, seed=9, dtype=dtype, grad=False)]]
    query = made(2, width, seed=7, dtype=torch.float32, grad=False) / width**0.5
    got = two_phases(PAIRS["chosen"], early, late, query, None)
    for m in range(2):
        expected = mix([s.double() for s in [*early, *late[m]]], query[m].double())
        assert got[m].dtype == dtype
        assert got[m].shape == shape
        torch.testing.assert_close(got[m].double(), expected, rtol=tolerance, atol=tolerance)


def test_any_strides() -> None:
    early = [made(6, 4, seed=i, grad=False).t() for i in range(3)]
    late = [[made(1, 6, seed=9, grad=False).expand(4, 6)]]
    query = made(6, 2, seed=7, grad=False).t()[:1]
    got = two_phases(PAIRS["chosen"], early, late, query, None)[0]
    torch.testing.assert_close(got, mix([*early, *late[0]], query[0]), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 4),
       st.booleans(), st.integers(0, 999))
def test_random_sizes(early: int, late: list[int], width: int, tokens: int, normalize: bool, seed: int) -> None:
    sources = [made(tokens, width, seed=seed + i, grad=False) for i in range(early)]
    tails = [[made(tokens, width, seed=seed + 99 + 9 * m + i, grad=False) for i in range(n)] for m, n in enumerate(late)]
    query = made(len(late), width, seed=seed + 50, grad=False)
    got = two_phases(PAIRS["chosen"], sources, tails, query, None, (1e-6, 1.0, normalize))
    for m, tail in enumerate(tails):
        expected = mix([*sources, *tail], query[m], normalize_values=normalize)
        torch.testing.assert_close(got[m], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("gain", [False, True])
def test_opcheck(pair: str, gain: bool) -> None:
    first, second = PAIRS[pair]
    sources, query = [made(2, 6, seed=i) for i in range(3)], made(2, 6, seed=5)
    gains = made(2, 6, seed=6) if gain else None
    torch.library.opcheck(first, (sources, query, gains, 1e-5))
    with torch.no_grad():
        parts = first(sources, query, gains, 1e-5)
    torch.library.opcheck(second, (parts[0], parts[2], sources[:1], query[0], None if gains is None else gains[0], 1e-5))


@pytest.mark.parametrize("pair", PAIRS)
def test_gradcheck(pair: str) -> None:
    first, second = PAIRS[pair]
    sources = [made(2, 5, seed=i) for i in range(2)]
    query, gain = made(2, 5, seed=5), made(2, 5, seed=6)
    assert torch.autograd.gradcheck(lambda q, g, *s: tuple(first(list(s), q, g, 1e-3, 0.5)), (query, gain, *sources))
    mixed, lse = made(2, 5, seed=8), made(2, seed=9)
    assert torch.autograd.gradcheck(
        lambda m, z, q, g, *s: second(m, z, list(s), q, g, 1e-3, 0.5, False, 2.0),
        (mixed, lse, query[0].detach().requires_grad_(), gain[0].detach().requires_grad_(), *sources))


def test_transforms_of_torch_func_see_through() -> None:
    sources, query = torch.stack([made(3, 4, seed=i, grad=False) for i in range(3)]), made(2, 4, seed=5, grad=False)

    def function(query: Tensor, sources: Tensor) -> Tensor:
        return two_phases(PAIRS["chosen"], list(sources[:2]), [[], [sources[2]]], query, None)[1].square().sum()

    def direct(query: Tensor, sources: Tensor) -> Tensor:
        return mix(list(sources), query[1]).square().sum()

    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.vmap(f, in_dims=(None, 1))):
        torch.testing.assert_close(transform(function)(query, sources), transform(direct)(query, sources))


def test_arguments_without_a_meaning_are_errors() -> None:
    source, query = made(3, 4), made(4)
    with pytest.raises(ValueError, match=r"query must be \[M, d\]"):
        PHASE1([source], query, None)
    with pytest.raises(ValueError, match="at least one source"):
        PHASE2(source, made(3), [], query, None)
    with pytest.raises(ValueError, match="lse has the shape"):
        PHASE2(source, made(4), [source], query, None)
    with pytest.raises(ValueError, match=r"query must be \[d\]"):
        PHASE2(source, made(3), [source], made(1, 4), None)
