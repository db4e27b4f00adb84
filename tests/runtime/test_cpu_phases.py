"""The native CPU kernels of the two phases of Algorithm 1: against the reference, in every shape and dtype they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.files_entered import files_entered
from torch import Tensor

from attnres_fx.conformance import HALF, ROUNDING
from attnres_fx.runtime.cpu import build, native
from attnres_fx.runtime.phases import PHASE1, PHASE1_REFERENCE, PHASE2, PHASE2_REFERENCE

pytestmark = pytest.mark.skipif(build.compiler() is None and not build.is_built(),
                                reason="no C++ compiler here, and no library built before")
PHASE1_BACKWARD = torch.ops.attnres.mix_phase1_backward.default
PHASE2_BACKWARD = torch.ops.attnres.mix_phase2_backward.default
PHASE1_BACKWARD_REFERENCE = torch.ops.attnres.mix_phase1_backward_reference.default
PHASE2_BACKWARD_REFERENCE = torch.ops.attnres.mix_phase2_backward_reference.default
DTYPES = tuple(ROUNDING)
READ = (1e-5, 0.7, False)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    assert native.ensure(), native.state().reason
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


def statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def call1(count: int, queries: int, shape: tuple[int, ...], dtype: torch.dtype, gain: int | None = None) -> tuple[Any, ...]:
    """Sources, query, gain, and gradients for phase 1."""
    sources = [torch.randn(shape).to(dtype) * (0.5 + i % 3) for i in range(count)]
    query = torch.randn(queries, shape[-1]) / shape[-1] ** 0.5
    gains = None if gain is None else torch.rand((queries, shape[-1])[2 - gain:]) + 0.5
    grads = [torch.randn(shape).to(dtype) for _ in range(queries)]
    grads += [torch.randn(shape[:-1]).to(statistics(dtype)) for _ in range(queries)]
    return sources, query, gains, grads


def call2(count: int, shape: tuple[int, ...], dtype: torch.dtype, gain: bool = False) -> tuple[Any, ...]:
    """Mixed, lse, sources, query, gain, and the gradient for phase 2."""
    sources, query, gains, grads = call1(count, 1, shape, dtype, 2 if gain else None)
    mixed, lse = torch.randn(shape).to(dtype), torch.randn(shape[:-1]).to(statistics(dtype))
    return mixed, lse, sources, query[0], None if gains is None else gains[0], grads[0]


def double(value: Any) -> Any:
    if isinstance(value, list):
        return [double(item) for item in value]
    return value.double() if isinstance(value, Tensor) else value


def run1(sources: list[Tensor], query: Tensor, gain: Tensor | None, grads: list[Tensor], *options: Any) -> list[Tensor]:
    return [*PHASE1(sources, query, gain, *options), *PHASE1_BACKWARD(grads, sources, query, gain, *options)]


def run2(mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, gain: Tensor | None, grad: Tensor,
         *options: Any) -> list[Tensor]:
    return [PHASE2(mixed, lse, sources, query, gain, *options),
            *PHASE2_BACKWARD(grad, mixed, lse, sources, query, gain, *options)]


def reference1(sources: list[Tensor], query: Tensor, gain: Tensor | None, grads: list[Tensor],
               *options: Any) -> list[Tensor]:
    return [*PHASE1_REFERENCE(sources, query, gain, *options),
            *PHASE1_BACKWARD_REFERENCE(grads, sources, query, gain, *options)]


def reference2(mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, gain: Tensor | None, grad: Tensor,
               *options: Any) -> list[Tensor]:
    return [PHASE2_REFERENCE(mixed, lse, sources, query, gain, *options),
            *PHASE2_BACKWARD_REFERENCE(grad, mixed, lse, sources, query, gain, *options)]


def check(run: Any, reference: Any, call: tuple[Any, ...], options: tuple[Any, ...] = READ, equal_nan: bool = False) -> None:
    """Metadata as the reference has them; numbers as the reference finds them in float64, to the rounding of each dtype."""
    got, like, exact = run(*call, *options), reference(*call, *options), reference(*map(double, call), *options)
    for a, b, want in zip(got, like, exact, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        rtol = 2 * ROUNDING[a.dtype] if a.dtype in HALF else 1e-9 if a.dtype == torch.float64 else 2e-5
        scale = max(1.0, want.nan_to_num(0).abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(a.double(), want, rtol=rtol, atol=rtol * scale, equal_nan=equal_nan)


@pytest.mark.parametrize("name", ["mix_phase1", "mix_phase1_backward", "mix_phase2", "mix_phase2_backward"])
def test_the_kernels_are_native(name: str) -> None:
    for key in ("CPU", "AutogradCPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attnres::{name}", key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 768, 1000])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)])
@pytest.mark.parametrize("normalize", [False, True])
def test_widths_and_dtypes(dtype: torch.dtype, width: int, leading: tuple[int, ...], normalize: bool) -> None:
    check(run1, reference1, call1(3, 2, (*leading, width), dtype, 1), (1e-5, 0.7, normalize))
    check(run2, reference2, call2(2, (*leading, width), dtype, True), (1e-5, 0.7, normalize, 1.5))


@pytest.mark.parametrize("count", [1, 2, 8, 33, 70])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("gain", [None, 1, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_numbers_of_sources_and_queries(count: int, queries: int, gain: int | None, normalize: bool) -> None:
    check(run1, reference1, call1(count, queries, (5, 72), torch.float32, gain), (1e-5, 0.7, normalize))
    if queries == 1:
        check(run2, reference2, call2(count, (5, 72), torch.float32, gain is not None), (1e-5, 0.7, normalize, 2.0))


def test_rows_beyond_the_groups() -> None:
    check(run1, reference1, call1(9, 3, (2, 5000), torch.float32, 2), (1e-6, 1.0, True))
    check(run2, reference2, call2(9, (2, 5000), torch.float32, True), (1e-6, 1.0, True, 2.0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call_agrees_with_the_reference(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    leading = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    width = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([127, 513])))
    dtype, count = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 20))

    def laid_out(value: Any) -> Any:
        """The same numbers, their dimensions in another order in memory; now and then with gaps, or none in the last."""
        if isinstance(value, list):
            return [laid_out(item) for item in value]
        if value is None or value.ndim == 0:
            return value
        order = data.draw(st.permutations(range(value.ndim)))
        inverse = sorted(range(value.ndim), key=order.__getitem__)
        moved = value.permute(*order).contiguous().permute(*inverse)
        return torch.stack([moved, moved], dim=-1)[..., 1] if data.draw(st.booleans()) else moved

    options = (data.draw(st.sampled_from([1e-6, 1e-2])), data.draw(st.floats(-2, 2, width=16)), data.draw(st.booleans()))
    gain = data.draw(st.sampled_from([None, 1, 2]))
    first = call1(count, data.draw(st.integers(1, 5)), (*leading, width), dtype, gain)
    check(run1, reference1, tuple(map(laid_out, first)), options)
    second = call2(count, (*leading, width), dtype, gain is not None)
    check(run2, reference2, tuple(map(laid_out, second)), (*options, data.draw(st.floats(-2, 2, width=16))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads_and_twice(dtype: torch.dtype) -> None:
    """The pieces of the reduction depend on the input alone."""
    first, second = call1(5, 3, (700, 64), dtype, 2), call2(3, (700, 64), dtype, True)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append([*run1(*first, 1e-6, 1.0, True), *run2(*second, 1e-6, 1.0, True, 1.0)])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_results_are_rounded_to_the_nearest_even() -> None:
    """Numbers in the middle between two of bfloat16, which have to come out as torch rounds them."""
    grad = (torch.arange(1, 129) * torch.tensor([1, -1]).repeat(64)).bfloat16()[None]
    known = torch.zeros(1, 128).bfloat16(), torch.full((1,), 200.0)  # of which the weight is 1
    for factor in (1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-7):
        got = PHASE2_BACKWARD(grad, *known, [torch.ones(1, 128).bfloat16()], torch.zeros(128), None, *READ, factor)[0]
        assert torch.equal(got, (grad.float() * factor).bfloat16())


def test_expanded_rows_and_gradients() -> None:
    """What autograd hands in: gradients of sums, without memory of their own."""
    sources, query, gain, grads = call1(3, 2, (4, 24), torch.float32)
    ones = [torch.ones(()).expand(grad.shape) for grad in grads]
    check(run1, reference1, (sources, query, gain, ones))
    mixed, lse, late, row, gain, _ = call2(1, (4, 24), torch.float32)
    check(run2, reference2, (mixed[:1].expand(4, 24), lse[:1].expand(4), late, row, gain, torch.ones(()).expand(4, 24)),
          (*READ, 1.0))


@pytest.mark.parametrize("empty", [(0, 24), (2, 0, 24)])
def test_no_positions(empty: tuple[int, ...]) -> None:
    check(run1, reference1, call1(3, 2, empty, torch.float32, 1))
    check(run2, reference2, call2(3, empty, torch.float32, True), (*READ, 1.0))


@pytest.mark.parametrize("place", ["sources", "mixed", "lse", "query"])
def test_a_nan_stays_at_its_position(place: str) -> None:
    first, second = call1(3, 2, (4, 24), torch.float32), call2(2, (4, 24), torch.float32)
    if place == "query":
        first[1][0, 3] = second[3][3] = float("nan")
    elif place == "sources":
        first[0][1][2, 5] = second[2][1][2, 5] = float("nan")
    else:
        second[0 if place == "mixed" else 1][2] = float("nan")
    check(run1, reference1, first, equal_nan=True)
    check(run2, reference2, second, (*READ, 1.0), equal_nan=True)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 1e30, -1e30])
def test_logits_beyond_all_bounds(value: float) -> None:
    big, query = torch.full((2, 16), 1e38), torch.full((1, 16), value)
    sources = [big, -big, torch.ones(2, 16)] * 9
    for got, want in zip(PHASE1(sources, query, None), PHASE1_REFERENCE(sources, query, None), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    mixed, lse, late, row, gain, _ = call2(1, (2, 16), torch.float32)
    for known in (lse, torch.full_like(lse, value)):
        for query in (row, torch.full((16,), value)):
            got, want = (call(mixed, known, late, query, gain) for call in (PHASE2, PHASE2_REFERENCE))
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("width", [7, 64, 72])
def test_nothing_is_read_that_was_not_given(width: int) -> None:
    """NaN around every row of the arguments, and in the memory that the results and buffers are made in."""
    first, second = call1(4, 3, (5, width), torch.bfloat16, 2), call2(2, (5, width), torch.float32, True)
    expected = [*run1(*first, *READ), *run2(*second, *READ, 1.0)]

    def among_nans(value: Any) -> Any:
        if isinstance(value, list):
            return [among_nans(item) for item in value]
        room = torch.full([size + 2 for size in value.shape], float("nan"), dtype=value.dtype)
        return room[tuple(slice(1, -1) for _ in value.shape)].copy_(value)

    first, second = tuple(map(among_nans, first)), tuple(map(among_nans, second))
    for _ in range(3):
        freed = [torch.full((size,), float("nan")) for size in range(1, 6 * width)]
        del freed
        got = [*run1(*first, *READ), *run2(*second, *READ, 1.0)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_what_the_kernels_do_not_take_runs_on_the_reference(dtypes: tuple[torch.dtype, ...]) -> None:
    first, second = call1(2, 2, (4, 24), torch.float32), call2(2, (4, 24), torch.float32)
    mixed = [torch.randn(4, 24).to(dtype) for dtype in dtypes]
    calls = [(run1, reference1, (mixed, *first[1:]), READ),
             (run2, reference2, (*second[:2], mixed, *second[3:]), (*READ, 2.0)),
             (run2, reference2, (second[0].bfloat16(), *second[1:]), (*READ, 2.0)),
             (run2, reference2, (second[0], second[1].double(), *second[2:]), (*READ, 2.0))]
    for run, reference, call, options in calls:
        assert all(torch.equal(a, b) for a, b in zip(run(*call, *options), reference(*call, *options), strict=True))


def test_arguments_without_a_meaning_are_errors() -> None:
    sources, query, gain, grads = call1(2, 2, (4, 24), torch.float32)
    with pytest.raises(ValueError, match="4 gradients, got 3"):
        PHASE1_BACKWARD(grads[:3], sources, query, gain, *READ)
    with pytest.raises(ValueError, match="lse_grad has the shape"):
        PHASE1_BACKWARD([*grads[:2], *grads[:2]], sources, query, gain, *READ)
    with pytest.raises(ValueError, match="eps must not be negative"):
        PHASE1(sources, query, gain, -1.0)
    with pytest.raises(ValueError, match="at least one source"):
        PHASE1([], query, gain)
    mixed, lse, late, row, gain, grad = call2(2, (4, 24), torch.float32)
    with pytest.raises(ValueError, match="lse has the shape"):
        PHASE2(mixed, lse[:2], late, row, gain)
    with pytest.raises(ValueError, match="grad has the shape"):
        PHASE2_BACKWARD(grad[:2], mixed, lse, late, row, gain, *READ, 1.0)


def test_gradients_are_not_differentiated_again() -> None:
    sources, query, gain, _ = call1(2, 2, (4, 24), torch.float32)
    query.requires_grad_()
    for result in (PHASE1(sources, query, gain)[0], PHASE2(*call2(2, (4, 24), torch.float32)[:3], query[0], gain)):
        made, = torch.autograd.grad(result.square().sum(), query, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiated only once"):
            made.sum().backward()


def test_a_call_with_nothing_to_record_runs_no_python() -> None:
    first, second = call1(3, 2, (2, 8), torch.float32), call2(2, (2, 8), torch.float32)
    for tensor in (*first[0], first[1], *second[2], second[3]):
        tensor.requires_grad_()
    with torch.no_grad():
        entered = files_entered(lambda: (run1(*first, *READ), run2(*second, *READ, 1.0)))
    assert not {"phases.py", "operators.py", "reference.py"} & entered
