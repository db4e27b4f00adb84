"""The Triton kernels in Triton's interpreter, against the reference in float64. Run by test_triton.py in a process with
TRITON_INTERPRET=1, which Triton reads when it is first imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import kernel_traffic as traffic
from support import models
from torch import Tensor

import attnres_fx
from attnres_fx.errors import KernelError
from attnres_fx.runtime import reference, triton
from attnres_fx.runtime.mix import MIX_TRITON
from attnres_fx.runtime.norm import Norm
from attnres_fx.runtime.triton import configs, forward, launch, phases
from attnres_fx.runtime.triton import launch_norm as fused
from attnres_fx.runtime.triton import problem as preparation
from attnres_fx.runtime.triton import traffic as costs

DEFAULTS = (1e-6, 1.0, False, 1.0)
FAMILY = [DEFAULTS, (1e-6, 0.25, False, 3.0), (1e-2, -1.5, True, 0.5)]
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22, torch.float64: 2.0**-48}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        yield


@pytest.fixture(params=["held", "again", "split"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways through the backward, whatever the table would choose."""
    if request.param != "held":
        monkeypatch.setattr(configs, "backward_tile", lambda *_, **__: None)
    if request.param == "split":
        monkeypatch.setattr(configs, "again_plan", lambda _: None)


def make(
    count: int, shape: Sequence[int], dtype: torch.dtype = torch.float64, queries: int | None = None, gain: str = ""
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    width = shape[-1]
    sources = [(torch.randn(*shape, dtype=torch.float64) * (0.5 + i % 3)).to(dtype) for i in range(count)]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    query = torch.randn(*(() if queries is None else (queries,)), width, dtype=exact) * 2 / math.sqrt(width)
    if not gain:
        return sources, query, None
    return sources, query, 1 + 0.3 * torch.randn(query.shape if gain == "same" else (width,), dtype=exact)


def check(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None = None, options: tuple[Any, ...] = DEFAULTS,
    again: bool = False,
) -> None:
    """Values, all gradients, dtypes and strides; twice, bit by bit, if requested."""
    exact = [s.double() for s in sources], query.double(), None if key_gain is None else key_gain.double()
    result = launch.mix(sources, query, key_gain, *options)
    dtype = reference.result_dtype(sources)
    assert result.dtype == dtype
    assert result.is_contiguous()
    expected = reference.mix_forward(*exact, *options)
    assert largest([result.double() - expected]) <= 8 * EPSILON[dtype] * largest([expected])

    cotangent = torch.randn(result.shape, dtype=torch.float64).to(dtype)
    grads = launch.mix_backward(cotangent, sources, query, key_gain, *options)
    wanted = reference.mix_backward(cotangent.double(), *exact, *options)
    tensors = [*sources, query, *([] if key_gain is None else [key_gain])]
    # Rounding is relative to the terms of a gradient, which may cancel, not to their sum.
    computed = torch.float64 if any(s.dtype == torch.float64 for s in sources) else torch.float32
    terms = abs(options[3]) * largest([cotangent]) * (1 + largest(tensors[len(sources):])) ** 2
    inverse_rms = [torch.rsqrt(s.double().square().mean(-1) + 1e-6) for s in sources]
    terms *= (1 + largest(sources)) * (1 + largest(inverse_rms)) * cotangent.numel() ** 0.5
    for tensor, grad, want in zip(tensors, grads, wanted, strict=True):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)
        bound = 4 * EPSILON[computed] * terms + 2 * EPSILON[tensor.dtype] * largest([want])
        assert largest([grad.double() - want]) <= bound
    if again:
        assert torch.equal(result, launch.mix(sources, query, key_gain, *options))
        second = launch.mix_backward(cotangent, sources, query, key_gain, *options)
        assert all(torch.equal(a, b) for a, b in zip(grads, second, strict=True))


def largest(tensors: Sequence[Tensor]) -> float:
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)


@pytest.mark.parametrize("options", FAMILY)
@pytest.mark.parametrize("queries, gain", [(None, ""), (None, "same"), (3, ""), (5, "one"), (3, "same")])
@pytest.mark.usefixtures("path")
def test_family(options: tuple[Any, ...], queries: int | None, gain: str) -> None:
    check(*make(3, (2, 2, 12), queries=queries, gain=gain), options)


@pytest.mark.parametrize("count", [1, 2, 10, 33, 64, 65, 128])
def test_number_of_sources(count: int) -> None:
    check(*make(count, (1, 6)))


def test_one_source_of_normalized_values() -> None:
    check(*make(1, (3, 6), gain="same"), FAMILY[2])


@pytest.mark.parametrize("shape", [(7,), (5, 1), (1, 1000), (70, 8), (1, 2304), (1, 4100), (0, 4), (1, 1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    check(*make(3, shape, torch.float32))


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.usefixtures("path")
def test_dtypes(dtype: torch.dtype) -> None:
    check(*make(4, (3, 40), dtype, gain="same"), again=True)


def test_mixed_dtypes() -> None:
    sources, query, _ = make(4, (3, 8), torch.float32)
    sources[1], sources[2] = sources[1].bfloat16(), sources[2].half()
    check(sources, query.bfloat16())
    check([sources[0].double(), *sources[1:]], query)


@pytest.mark.usefixtures("path")
def test_layouts() -> None:
    sources, query, _ = make(5, (3, 4, 8))
    sources[0] = torch.randn(3, 4, 16, dtype=torch.float64)[..., ::2]
    sources[1] = torch.randn(4, 3, 8, dtype=torch.float64).transpose(0, 1)
    sources[2] = torch.randn(1, 1, 8, dtype=torch.float64).expand(3, 4, 8)
    sources[3] = torch.randn(3, 4, 24, dtype=torch.float64)[..., 8:16]
    sources[4] = torch.randn(3, 4, 1, dtype=torch.float64).expand(3, 4, 8)
    check(sources, query)


def test_an_expanded_gradient() -> None:
    sources, query, _ = make(3, (3, 4, 8))
    grad = torch.ones((), dtype=torch.float64).expand(3, 4, 8)
    got = launch.mix_backward(grad, sources, query, None, *DEFAULTS)
    for a, b in zip(got, reference.mix_backward(grad, sources, query, None, *DEFAULTS), strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=10, deadline=None)
@given(
    count=st.integers(1, 12), tokens=st.integers(1, 5), width=st.integers(1, 80), queries=st.none() | st.integers(1, 4),
    gain=st.sampled_from(["", "same", "one"]), options=st.sampled_from(FAMILY), seed=st.integers(0, 99))
def test_random_sizes(
    count: int, tokens: int, width: int, queries: int | None, gain: str, options: tuple[Any, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    check(*make(count, (tokens, width), queries=queries, gain=gain), options)


def test_offsets_beyond_32_bits() -> None:
    """Three rows, 2^31 elements apart; nothing between them is touched, so nothing but address space is taken."""
    far = torch.empty(2**32 + 8, dtype=torch.bfloat16).as_strided((3, 8), (2**31, 1))
    far.copy_(torch.randn(3, 8))
    check([far, torch.randn(3, 8).bfloat16()], torch.randn(8))


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start poisoned, so that what a kernel leaves out shows."""
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = plain(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    for count, tokens in ((3, 5), (30, 2)):
        sources, query, gain = make(count, (tokens, 10), queries=3, gain="one")
        result = launch.mix(sources, query, gain, *DEFAULTS)
        grads = launch.mix_backward(torch.ones_like(result), sources, query, gain, *DEFAULTS)
        assert all(t.isfinite().all() for t in (result, *grads))


def test_more_tokens_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "PARTIAL_ROWS", 3)
    check(*make(3, (2, 7, 1024), torch.float32, gain="same"), again=True)


def test_nan_and_infinity_do_not_vanish() -> None:
    for value in (math.nan, math.inf):
        sources, query, _ = make(3, (2, 4))
        sources[1][0, 2] = value
        result = launch.mix(sources, query, None, *DEFAULTS)
        assert result[0].isnan().any()
        assert result[1].isfinite().all()


def test_gradients_add_to_earlier_ones() -> None:
    sources, query, _ = make(3, (4, 8))
    problem = launch.Problem.of(sources, query, None, launch.Options(*DEFAULTS))
    grad = torch.randn(4, 8, dtype=torch.float64)
    earlier = [torch.randn(4, 8, dtype=torch.float64) for _ in sources]
    held = [t.clone() for t in earlier]
    launch.backward(problem, [grad], held, torch.empty(1, 8, dtype=torch.float64), None, priors=held)
    wanted = reference.mix_backward(grad, sources, query, None, *DEFAULTS)
    for got, before, own in zip(held, earlier, wanted, strict=False):
        torch.testing.assert_close(got, before + own)


def test_too_wide_is_refused() -> None:
    with pytest.raises(KernelError, match="at most 8192"):
        launch.mix([torch.zeros(1, 8193)] * 2, torch.zeros(8193), None, *DEFAULTS)


def test_the_operator() -> None:
    sources, query, gain = make(3, (2, 5), torch.float32, gain="same")
    leaves = [t.requires_grad_() for t in (*sources, query, gain) if t is not None]
    torch.library.opcheck(MIX_TRITON, (sources, query, gain))
    result = MIX_TRITON(sources, query, gain)
    grads = torch.autograd.grad(result.square().sum(), leaves)
    wanted = torch.autograd.grad(attnres_fx.mix(sources, query, gain).square().sum(), leaves)
    torch.testing.assert_close(grads, wanted)


PLANS = (configs.Plan(configs.Tile(16, 2, 1), 3, 1), configs.Plan(configs.Tile(16, 1, 1), 9, 8),
         configs.Plan(configs.Tile(16, 4, 1), 2, 4, 2), configs.Plan(configs.Tile(16, 1, 1), 4, 2, 3, 2),
         *(dataclasses.replace(line[-1], tile=configs.Tile(16, 1, 1)) for line in configs.MEASURED[9]))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_plans_that_are_measured(plan: configs.Plan, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table may hold: programs that stay, sums taken together. What only NVIDIA's devices know does nothing."""
    monkeypatch.setattr(forward, "settle", lambda tile: tile)
    monkeypatch.setattr(configs, "measured", lambda _: plan)
    check(*make(count, (11, 12), torch.float32, gain="same"), FAMILY[1], again=True)


def test_what_was_measured_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which plan of the table which shape chooses. (On wide rows the interpreter would take minutes for their values.)"""
    monkeypatch.setattr(preparation, "capability", lambda _: (9, 0))
    few, many, backward, few_norm, backward_norm = (line[-1] for line in configs.MEASURED[9])
    for tokens, count, width, forward_plan, norm_plan, again_plan in (
            (128, 5, 7168, few, None, backward), (1024, 9, 7168, few, None, backward), (1025, 9, 7168, many, None, backward),
            (8192, 2, 7168, many, None, backward), (1, 9, 2048, None, few_norm, None), (257, 4, 2048, None, None, None)):
        problem = launch.Problem.of([torch.empty(tokens, width, dtype=torch.bfloat16)] * count, torch.empty(width), None,
                                    launch.Options(*DEFAULTS))
        kinds = (("forward", False), ("forward", True), ("backward", False), ("backward", True))
        found = [configs.measured(problem.shape(*kind)) for kind in kinds]
        assert found == [forward_plan, norm_plan, again_plan, backward_norm if (width, count) == (2048, 9) else None]


# Traffic


@pytest.mark.parametrize("count, width, queries", [(9, 1024, 1), (9, 64, 1), (30, 1024, 1), (4, 1024, 3), (9, 4096, 1)])
def test_the_cost_model_is_what_the_kernels_move(count: int, width: int, queries: int) -> None:
    tokens = 3
    sources, query, _ = make(count, (tokens, width), torch.bfloat16, queries=queries)
    named = {f"source {i}": s for i, s in enumerate(sources)}
    mix = costs.Mix(count, width, queries)
    with traffic.counting({**named, "query": query}) as moved:
        result = launch.mix(sources, query, None, *DEFAULTS)
    # A source is read once by each launch that its group of queries takes.
    groups = math.ceil(queries / configs.forward_queries(width))
    assert all(moved.loaded[name] == groups * tokens * mix.row for name in named)
    assert moved.loaded.total() - moved.loaded["query"] == tokens * costs.forward(mix).read
    assert moved.stored.total() == tokens * costs.forward(mix).written
    assert moved.loaded["query"] == costs.fixed_bytes(mix, tokens)["forward"].read

    grad = torch.randn_like(result)
    with traffic.counting({**named, "query": query, "grad": grad}) as moved:
        launch.mix_backward(grad, sources, query, None, *DEFAULTS)
    fixed = costs.fixed_bytes(mix, tokens)
    if queries == 1:
        rows = costs.backward(mix)
        if "backward" in fixed:
            assert all(moved.loaded[name] == tokens * mix.row for name in (*named, "grad"))
            partial = fixed["backward"] + fixed["reduction"]
            assert moved.loaded.total() == tokens * rows.read + partial.read
            assert moved.stored.total() == tokens * rows.written + partial.written
        else:
            assert all(moved.loaded[name] == 2 * tokens * mix.row for name in named)


@pytest.mark.parametrize("count, queries, normalize", [(2, 3, True), (2, 3, False), (13, 1, False)])
def test_the_cost_model_of_the_widest_rows(count: int, queries: int, normalize: bool) -> None:
    """Fewer queries share a launch there, fewer still where values are normalised, and fewer sources are scored at once."""
    sources, query, _ = make(count, (2, 8192), torch.bfloat16, queries=queries)
    options = launch.Options(1e-6, 1.0, normalize, 1.0)
    mix = costs.Mix(count, 8192, queries, normalize=normalize)
    with traffic.counting({"query": query}) as moved:
        result = launch.mix(sources, query, None, *dataclasses.astuple(options))
    assert moved.loaded.total() - moved.loaded["query"] == 2 * costs.forward(mix).read
    assert moved.stored.total() == 2 * costs.forward(mix).written
    if queries == 1:
        with traffic.counting({"grad": result}) as moved:
            launch.mix_backward(result, sources, query, None, *dataclasses.astuple(options))
        launches = math.ceil(count / configs.score_sources(8192)) + math.ceil(count / configs.split_sources(8192, 1))
        assert moved.loaded["grad"] == launches * 2 * mix.row


def test_the_formed_partial_costs_two_rows() -> None:
    sources, query, _ = make(4, (3, 64), torch.bfloat16)
    delta = torch.randn(3, 64).bfloat16()
    problem = launch.Problem.of(sources, query, None, launch.Options(*DEFAULTS))
    with traffic.counting({"query": query}) as moved:
        launch.forward(problem, [torch.empty(3, 64)], delta=delta, partial_out=torch.empty(3, 64).bfloat16())
    mix = dataclasses.replace(costs.Mix(4, 64), add=True)
    assert moved.loaded.total() - moved.loaded["query"] == 3 * costs.forward(mix).read


def test_against_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """L=128, N=8, S=16: what one pass moves beside the paper's count for two phases."""
    ours = costs.one_pass_network(128, 16, 4096)
    paper = costs.two_phase_network(128, 16)
    assert paper == 5.5
    with capsys.disabled():
        print(f"\nper token and layer, L=128 N=8 S=16: one pass {ours:.2f} d, two phases by the paper's Table 1 {paper} d")
    assert 5.44 + 2 <= ours <= 5.44 + 4


# The parts that fused nodes use


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.usefixtures("path")
def test_partial_sum_and_norm_in_the_forward(kind: str) -> None:
    sources, query, gain = make(4, (5, 20), gain="same")
    delta = torch.randn(5, 20, dtype=torch.float64)
    weight, bias = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    norm = Norm(kind == "layer", weight, bias if kind == "layer" else None, 1e-5)
    output, partial = torch.empty(2, 5, 20, dtype=torch.float64).unbind(0)
    problem = launch.Problem.of(sources, query, gain, launch.Options(*DEFAULTS))
    launch.forward(problem, [output], delta=delta, partial_out=partial, norm=norm)
    assert torch.equal(partial, sources[-1] + delta)
    mixed = reference.mix_forward([*sources[:-1], partial], query, gain, *DEFAULTS)
    if kind == "rms":
        expected = torch.nn.functional.rms_norm(mixed, (20,), weight, 1e-5)
    else:
        expected = torch.nn.functional.layer_norm(mixed, (20,), weight, bias, 1e-5)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)

    assert gain is not None
    leaves = [t.detach().requires_grad_() for t in (*sources[:-1], partial, query, gain, weight, bias)]
    mixed = reference.mix_forward(leaves[:4], leaves[4], leaves[5], *DEFAULTS)
    cotangent, of_partial = torch.randn(2, 5, 20, dtype=torch.float64)
    if kind == "rms":
        normed = torch.nn.functional.rms_norm(mixed, (20,), leaves[6], 1e-5)
    else:
        normed = torch.nn.functional.layer_norm(mixed, (20,), leaves[6], leaves[7], 1e-5)
    (normed * cotangent + leaves[3] * of_partial).sum().backward()
    problem = launch.Problem.of([*sources[:-1], partial], query, gain, launch.Options(*DEFAULTS))
    grads = [torch.empty_like(t) for t in leaves[:4]]
    query_grad, gain_grad = torch.empty(1, 20, dtype=torch.float64), torch.empty(20, dtype=torch.float64)
    of_weight, of_bias = torch.empty(2, 20, dtype=torch.float64).unbind(0)
    launch.backward(problem, [cotangent], grads, query_grad, gain_grad, priors=[None, None, None, of_partial], norm=norm,
                    norm_grads=(of_weight, of_bias if kind == "layer" else None))
    got = [*grads, query_grad[0], gain_grad, of_weight, *([of_bias] if kind == "layer" else ())]
    for value, leaf in zip(got, leaves, strict=kind == "layer"):
        torch.testing.assert_close(value, leaf.grad, rtol=1e-12, atol=1e-12)


# The way from a model


def step(compiled: Any, model: Any, ids: Tensor) -> list[Tensor]:
    """The logits and all gradients."""
    model.zero_grad()
    logits = compiled(ids, use_cache=False).logits
    logits.square().sum().backward()
    return [logits.detach().clone(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("downstream, schedule, stems", [
    pytest.param("aot_eager", "one-pass", ["mix"], marks=pytest.mark.slow),
    ("inductor", "one-pass", ["mix_norm"]),
    pytest.param("inductor", "two-phase", ["mix_phase1", "mix_norm"], marks=pytest.mark.slow)])
def test_a_compiled_llama_runs_them(
    downstream: str, schedule: str, stems: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of a converted model through torch.compile, against the reference kernels."""
    calls = []
    by_recipe = triton.recipes
    monkeypatch.setattr(triton, "recipes", lambda like: [])  # which would pass these functions by
    for module, stem in ((launch, "mix"), (phases, "mix_phase1"), (phases, "mix_phase2"), (fused, "mix_norm")):
        for name in (stem, f"{stem}_backward"):
            original = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *args, f=original, n=name, **outputs: calls.append(n) or f(*args, **outputs))
    model = models.llama(2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32)
    ids = models.token_ids(1, 4)
    attnres_fx.convert(model, (ids,), {"use_cache": False}, num_blocks=2)
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    results = {}
    for kernels in ("reference", "triton"):
        torch.compiler.reset()
        calls.clear()
        options = {"kernels": kernels, "downstream": downstream, "schedule": schedule}
        compiled = torch.compile(model, backend="attnres", options=options)
        results[kernels] = step(compiled, model, ids)
        assert set(calls) == (set() if kernels == "reference" else {*stems, *(f"{stem}_backward" for stem in stems)})
        assert all(calls.count(stem) == calls.count(f"{stem}_backward") for stem in stems)
        assert "mix" not in stems or calls.count("mix") in (0, 4)
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * largest([want]) + 1e-7)
    planned = len(calls)
    monkeypatch.setattr(triton, "recipes", by_recipe)
    for _ in range(2):
        calls.clear()
        assert all(map(torch.equal, step(compiled, model, ids), results["triton"]))
    assert len(calls) < planned / 2
