"""The two phases of Algorithm 1 on the Triton kernels in Triton's interpreter: against the reference phases and against the
mix of all sources at once. Run by test_triton.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from support import kernel_traffic as traffic
from torch import Tensor

from attnres_fx.errors import KernelError
from attnres_fx.runtime import phases, reference
from attnres_fx.runtime.mix import mix
from attnres_fx.runtime.norm import Norm
from attnres_fx.runtime.triton import configs, launch
from attnres_fx.runtime.triton import phases as kernels
from attnres_fx.runtime.triton import traffic as costs
from attnres_fx.runtime.triton.problem import Early, Options, Problem

PHASE1, PHASE2 = phases.PHASE1_TRITON, phases.PHASE2_TRITON
DOUBLE = torch.float64
OPTIONS = (1e-5, 0.7, False)
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(12)
        yield


@pytest.fixture(params=["held", "split"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the backward, whatever the table would choose."""
    if request.param == "split":
        monkeypatch.setattr(configs, "backward_tile", lambda *_, **__: None)


def normal(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).to(dtype)


def rows(count: int, *shape: int, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    return [normal(*shape, dtype=dtype) for _ in range(count)]


def parameters(queries: int, width: int, gain: int = 0, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor | None]:
    """Queries [M, d], and a gain of this many dimensions."""
    shape = {0: None, 1: (width,), 2: (queries, width)}[gain]
    return normal(queries, width, dtype=dtype) / width**0.5, None if shape is None else 1 + normal(*shape, dtype=dtype) / 3


def own(gain: Tensor | None, m: int) -> Tensor | None:
    """The gain of one query."""
    return gain[m] if gain is not None and gain.ndim == 2 else gain


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def same(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, largest(b)))


def two_phases(early: list[Tensor], late: list[list[Tensor]], query: Tensor, gain: Tensor | None,
               options: tuple[Any, ...], factor: float) -> list[Tensor]:
    """The mixes of M queries over ``early`` and ``late[m]`` (one list for each query)."""
    parts, count = PHASE1(early, query, gain, *options), len(query)
    return [PHASE2(parts[m], parts[count + m], late[m], query[m], own(gain, m), *options, factor) for m in range(count)]


def check(early: list[Tensor], late: list[list[Tensor]], query: Tensor, gain: Tensor | None = None,
          options: tuple[Any, ...] = OPTIONS, factor: float = 3.0) -> None:
    """Float64: both operators and their gradients against the reference, then together against the mix of all sources."""
    count = len(query)
    parts = phases.phase1_composite(early, query, gain, *options)
    same(PHASE1(early, query, gain, *options), parts)
    grads = [normal(*part.shape) for part in parts]
    same(torch.ops.attnres.mix_phase1_backward_triton(grads, early, query, gain, *options),
         phases.phase1_backward_composite(grads, early, query, gain, *options))
    last = (parts[0], parts[count], late[0], query[0], own(gain, 0), *options, factor)
    same([PHASE2(*last)], [phases.phase2_composite(*last)])
    same(torch.ops.attnres.mix_phase2_backward_triton(grads[0], *last),
         phases.phase2_backward_composite(grads[0], *last))

    tails = [source for tail in late for source in tail]
    leaves = [leaf.detach().requires_grad_() for leaf in (*early, *tails, query, *([] if gain is None else [gain]))]
    early, held = leaves[: len(early)], iter(leaves[len(early) :])
    late = [[next(held) for _ in tail] for tail in late]
    query, gain = next(held), next(held, None)
    eps, scale, normalize = options
    wanted = [mix([*early, *late[m]], query[m], own(gain, m), eps=eps, logit_scale=scale, normalize_values=normalize,
                  output_factor=factor) for m in range(count)]
    got = two_phases(early, late, query, gain, options, factor)
    same(got, wanted)
    weights = grads[:count]
    ours, theirs = (torch.autograd.grad(sum((r * w).sum() for r, w in zip(made, weights)), leaves) for made in (got, wanted))
    same(ours, theirs)


@pytest.mark.parametrize("queries, gain, normalize", [
    (1, 1, False), (2, 0, True), (2, 2, True), (5, 1, False)])
@pytest.mark.usefixtures("path")
def test_family(queries: int, gain: int, normalize: bool) -> None:
    late = [rows(1 + m % 2, 2, 2, 12) for m in range(queries)]
    check(rows(3, 2, 2, 12), late, *parameters(queries, 12, gain), (1e-2, -1.5, normalize), 0.5)


@pytest.mark.parametrize("early, late", [(1, 1), (33, 2), (65, 1)])
def test_number_of_sources(early: int, late: int) -> None:
    check(rows(early, 2, 7), [rows(late, 2, 7)], *parameters(1, 7, 1), (1e-5, 0.7, early == 33))


def test_more_late_sources_than_one_launch_takes() -> None:
    check(rows(1, 2, 7), [rows(25, 2, 7)], *parameters(1, 7, 1), (1e-5, 0.7, True))


@pytest.mark.parametrize("shape", [(3, 1), (7,), (5, 64), (2, 1000), (1, 4100), (70, 8)])
def test_shapes(shape: tuple[int, ...]) -> None:
    check(rows(2, *shape), [rows(1, *shape)], *parameters(1, shape[-1]))


def test_no_tokens() -> None:
    early, (query, _) = rows(2, 0, 4), parameters(2, 4)
    leaves = [leaf.requires_grad_() for leaf in (*early, query)]
    made = two_phases(early, [early, early], query, None, OPTIONS, 1.0)
    assert [rows.shape for rows in made] == [(0, 4)] * 2
    grads = torch.autograd.grad(made[0].sum() + made[1].sum(), leaves)
    assert grads[2].count_nonzero() == 0


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.usefixtures("path")
def test_dtypes(dtype: torch.dtype) -> None:
    """Against float64 on the rounded inputs; twice, bit by bit."""
    early, late = rows(4, 3, 40, dtype=dtype), rows(2, 3, 40, dtype=dtype)
    query, gain = parameters(2, 40, 2, torch.float32)
    assert gain is not None
    exact = [s.double() for s in early], query.double(), gain.double()
    parts, wanted = PHASE1(early, query, gain, *OPTIONS), phases.phase1_composite(*exact, *OPTIONS)
    assert [p.dtype for p in parts] == [dtype] * 2 + [torch.float32] * 2
    grads = [normal(*p.shape, dtype=p.dtype) for p in parts]
    first = (grads, early, query, gain, *OPTIONS)
    ours = torch.ops.attnres.mix_phase1_backward_triton(*first)
    theirs = phases.phase1_backward_composite([g.double() for g in grads], *exact, *OPTIONS)
    second = (parts[0], parts[2], late, query[0], gain[0], *OPTIONS, 3.0)
    exact_second = tuple([t.double() for t in a] if isinstance(a, list) else a.double() if isinstance(a, Tensor) else a
                         for a in second)
    row = PHASE2(*second)
    got = [*parts, row, *ours, *torch.ops.attnres.mix_phase2_backward_triton(grads[0], *second)]
    wanted = [*wanted, phases.phase2_composite(*exact_second), *theirs,
              *phases.phase2_backward_composite(grads[0].double(), *exact_second)]
    kinds = [*parts, row, *early, query, gain, *second[:2], *late, query[0], gain[0]]
    for a, b, like in zip(got, wanted, kinds, strict=True):
        assert (a.dtype, a.shape, a.is_contiguous()) == (like.dtype, like.shape, True)
        torch.testing.assert_close(a.double(), b, rtol=2 * EPSILON[a.dtype], atol=64 * 2.0**-22 * (1 + largest(b)))
    again = [*PHASE1(early, query, gain, *OPTIONS), PHASE2(*second), *torch.ops.attnres.mix_phase1_backward_triton(*first),
             *torch.ops.attnres.mix_phase2_backward_triton(grads[0], *second)]
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_mixed_dtypes() -> None:
    early, late = [normal(3, 8), normal(3, 8, dtype=torch.float32)], [normal(3, 8, dtype=torch.bfloat16)]
    query, _ = parameters(1, 8)
    mixed, lse = PHASE1(early, query, None)
    assert (mixed.dtype, lse.dtype) == (DOUBLE, DOUBLE)
    same([PHASE2(mixed, lse, late, query[0], None)], [mix([*early, *late], query[0])])


@pytest.mark.usefixtures("path")
def test_layouts() -> None:
    """Strided rows of sources, of the early mix, and of every incoming gradient, each with strides of its own."""
    early = [normal(3, 4, 16)[..., ::2], normal(4, 3, 8).transpose(0, 1), normal(1, 1, 8).expand(3, 4, 8)]
    query, gain = parameters(2, 8, 1)
    check(early, [[normal(3, 4, 24)[..., 8:16]], [normal(3, 4, 1).expand(3, 4, 8)]], query, gain)
    grads = [normal(4, 3, 8).transpose(0, 1), normal().expand(3, 4, 8), normal(4, 3).t(), normal().expand(3, 4)]
    same(torch.ops.attnres.mix_phase1_backward_triton(grads, early, query, gain, *OPTIONS),
         phases.phase1_backward_composite(grads, early, query, gain, *OPTIONS))
    arguments = (normal(3, 4, 16)[..., :8], normal(4, 3).t(), early, query[0], gain, *OPTIONS, 2.0)
    same([PHASE2(*arguments)], [phases.phase2_composite(*arguments)])
    for grad in grads[:2]:
        same(torch.ops.attnres.mix_phase2_backward_triton(grad, *arguments),
             phases.phase2_backward_composite(grad, *arguments))


@pytest.mark.usefixtures("path")
def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start poisoned, so that what a kernel leaves out shows."""
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = plain(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    early, late, (query, gain) = rows(3, 5, 10), rows(2, 5, 10), parameters(5, 10, 1)
    monkeypatch.setattr(torch, "empty", poisoned)
    parts = kernels.mix_phase1(early, query, gain, 1e-6, 1.0, True)
    grads = kernels.mix_phase1_backward(parts, early, query, gain, 1e-6, 1.0, True)
    second = (parts[0], parts[5], late, query[0], gain, 1e-6, 1.0, True, 1.0)
    row = kernels.mix_phase2(*second)
    assert all(t.isfinite().all() for t in (*parts, *grads, row, *kernels.mix_phase2_backward(row, *second)))


def test_large_logits() -> None:
    """Logits of several hundred: no exponential of phase 1 or of the merge may overflow."""
    early, late = rows(2, 3, 8), rows(1, 3, 8)
    check(early, [late], *parameters(1, 8), (1e-6, -300.0, False), 1.0)


def test_nan_and_infinity_do_not_vanish() -> None:
    query, _ = parameters(1, 4)
    for value in (math.nan, math.inf):
        early, late = rows(2, 2, 4), rows(1, 2, 4)
        early[1][0, 2] = value
        mixed, lse = PHASE1(early, query, None)
        assert mixed[0].isnan().any()
        assert lse[0].isnan()
        result = PHASE2(mixed, lse, late, query[0], None)
        assert result[0].isnan().any()
        assert result[1].isfinite().all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.usefixtures("path")
def test_partial_sum_and_norm_in_phase_2(kind: str) -> None:
    """What the launcher offers to fused nodes: partial + delta as the last source, and the consumer's norm."""
    early, late, (query, gain) = rows(3, 5, 20), rows(2, 5, 20), parameters(1, 20, 1)
    assert gain is not None
    delta, weight, bias = normal(5, 20), normal(20), normal(20)
    partial = late[-1] + delta

    def normed(mixed: Tensor) -> Tensor:
        return (torch.nn.functional.rms_norm(mixed, (20,), weight, 1e-5) if kind == "rms"
                else torch.nn.functional.layer_norm(mixed, (20,), weight, bias, 1e-5))

    options = Options(1e-6, 1.0, True, 1.0)
    mixed, lse = kernels.mix_phase1(early, query, gain, 1e-6, 1.0, True)
    norm = Norm(kind == "layer", weight, bias if kind == "layer" else None, 1e-5)
    problem = Problem.of(late, query[0], gain, options, [delta], phase=2, early=Early(mixed, lse))
    output, formed = torch.empty(2, 5, 20, dtype=DOUBLE)
    launch.forward(problem, [output], delta=delta, partial_out=formed, norm=norm)
    assert torch.equal(formed, partial)
    same([output], [normed(mix([*early, late[0], partial], query[0], gain, normalize_values=True))])

    leaves = [leaf.detach().requires_grad_() for leaf in (mixed, lse, late[0], partial, query, gain)]
    row = reference.phase2(*leaves[:2], leaves[2:4], leaves[4][0], leaves[5], 1e-6, 1.0, True, 1.0)
    cotangent = normal(5, 20)
    (normed(row) * cotangent).sum().backward()
    grads = [torch.empty_like(leaf) for leaf in leaves]
    problem = Problem.of([late[0], partial], query[0], gain, options, phase=2, early=Early(mixed, lse))
    launch.backward(problem, [cotangent], grads[2:4], grads[4], grads[5], early_grads=Early(*grads[:2]), norm=norm)
    same(grads, [leaf.grad for leaf in leaves])


def test_the_operators() -> None:
    sources, query, gain = ([leaf.requires_grad_() for leaf in rows(count, 2, 6)] for count in (2, 1, 1))
    torch.library.opcheck(PHASE1, (sources, query[0], gain[0], 1e-5))
    with torch.no_grad():
        parts = PHASE1(sources, query[0], gain[0], 1e-5)
    torch.library.opcheck(PHASE2, (parts[0], parts[2], sources[:1], query[0][0], gain[0][0], 1e-5))


def test_arguments_without_a_meaning_are_errors() -> None:
    source, query = normal(3, 4), normal(4)
    with pytest.raises(ValueError, match=r"query must be \[M, d\]"):
        PHASE1([source], query, None)
    with pytest.raises(ValueError, match="lse has the shape"):
        PHASE2(source, normal(4), [source], query, None)
    with pytest.raises(KernelError, match="at most 8192"):
        PHASE1([torch.zeros(1, 8193)], torch.zeros(1, 8193), None)


# Traffic


@pytest.mark.parametrize("early, queries, late, width", [
    (4, 1, 1, 1024), (4, 4, 2, 64), (25, 1, 8, 64), (2, 5, 25, 16), (2, 1, 1, 8192)])
def test_the_cost_model_is_what_the_kernels_move(
    early: int, queries: int, late: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One program walks over all tokens, so that parameters and partial rows cost the same whatever their number.
    monkeypatch.setattr(configs, "PARTIAL_ROWS", 1)
    query = parameters(queries, width, dtype=torch.float32)[0]
    first, second = costs.Mix(early, width, queries, phase=1), costs.Mix(late, width, phase=2)

    def moved(tokens: int) -> list[costs.Traffic]:
        """By the two phases, forward and backward, but for the query."""
        sources, tail = rows(early, tokens, width, dtype=torch.bfloat16), rows(late, tokens, width, dtype=torch.bfloat16)
        counted = []

        def count(kernel: Callable[..., Any], *arguments: Any) -> Any:
            with traffic.counting({"query": query}) as counter:
                result = kernel(*arguments)
            counted.append(costs.Traffic(counter.loaded.total() - counter.loaded["query"], counter.stored.total()))
            return result

        parts = count(kernels.mix_phase1, sources, query, None, *OPTIONS)
        arguments = (parts[0], parts[queries], tail, query[0], None, *OPTIONS, 1.0)
        row = count(kernels.mix_phase2, *arguments)
        count(kernels.mix_phase1_backward, parts, sources, query, None, *OPTIONS)
        count(kernels.mix_phase2_backward, row, *arguments)
        return counted

    wanted = [costs.forward(first), costs.forward(second), costs.backward(first), costs.backward(second)]
    if queries > configs.backward_queries(width):
        # Torch rounds the sums of several groups of queries, uncounted.
        wanted[2] += costs.Traffic(early * width * first.accumulate, early * first.row) * -1
    few, many = moved(1), moved(2)
    assert few[:2] == wanted[:2]
    assert [more + less * -1 for more, less in zip(many, few)] == wanted
