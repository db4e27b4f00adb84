"""attnres::mix against an independent float64 formulation that stacks the sources and differentiates by autograd."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from attnres_fx.runtime.mix import depth_weights, mix

MIX = torch.ops.attnres.mix.default
MIX_BACKWARD = torch.ops.attnres.mix_backward.default
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22, torch.float64: 2.0**-48}
FAMILY: list[dict[str, Any]] = [
    {},
    {"logit_scale": 0.25},
    {"output_factor": 3.0},
    {"normalize_values": True},
    {"eps": 1e-2, "logit_scale": -1.5, "normalize_values": True, "output_factor": 0.5},
]


def oracle(
    sources: Sequence[Tensor],
    query: Tensor,
    key_gain: Tensor | None = None,
    eps: float = 1e-6,
    logit_scale: float = 1.0,
    normalize_values: bool = False,
    output_factor: float = 1.0,
) -> Tensor:
    if query.ndim == 2:
        gains = [None] * len(query) if key_gain is None else list(key_gain.expand_as(query))
        options = (eps, logit_scale, normalize_values, output_factor)
        return torch.stack([oracle(sources, q, gain, *options) for q, gain in zip(query, gains, strict=True)])
    values = torch.stack([source.double() for source in sources])
    keys = torch.nn.functional.rms_norm(values, values.shape[-1:], eps=eps)
    if key_gain is not None:
        keys = keys * key_gain.double()
    weights = torch.softmax(logit_scale * torch.einsum("n...d,d->n...", keys, query.double()), dim=0)
    return output_factor * torch.einsum("n...,n...d->...d", weights, keys if normalize_values else values)


def gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return list(torch.autograd.grad(function(*leaves), leaves, cotangent))


def unpack(tensors: Sequence[Tensor], gain: bool) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Split [*sources, query, (key_gain)]."""
    *sources, query = tensors[:-1] if gain else tensors
    return sources, query, tensors[-1] if gain else None


def check(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None = None, **options: Any) -> None:
    """Values, dtypes, strides and all gradients of one call."""
    result = mix(sources, query, key_gain, **options)
    dtype = sources[0].dtype
    for source in sources:
        dtype = torch.promote_types(dtype, source.dtype)
    assert result.dtype == dtype
    assert result.is_contiguous()
    # A cotangent of the result's dtype, so that both sides start from the same numbers.
    cotangent = torch.randn(result.shape, dtype=torch.float64).to(dtype)
    exact_result = oracle(sources, query, key_gain, **options)
    assert largest([result.double() - exact_result]) <= 8 * EPSILON[dtype] * largest([exact_result])

    gain = key_gain is not None
    tensors = [*sources, query] + ([key_gain] if key_gain is not None else [])
    actual = gradients(lambda *t: mix(*unpack(t, gain), **options), tensors, cotangent)
    exact = [tensor.detach().double() for tensor in tensors]
    expected = gradients(lambda *t: oracle(*unpack(t, gain), **options), exact, cotangent.double())
    # Rounding is relative to the terms of a gradient, which may cancel (at d = 1 they all do), not to their sum.
    computed = torch.float64 if any(source.dtype == torch.float64 for source in sources) else torch.float32
    terms = abs(options.get("output_factor", 1.0)) * largest([cotangent]) * (1 + largest(tensors[len(sources) :])) ** 2
    inverse_rms = [torch.rsqrt(source.detach().double().square().mean(-1) + 1e-6) for source in sources]
    terms *= (1 + largest(sources)) * (1 + largest(inverse_rms)) * cotangent.numel() ** 0.5
    for tensor, got, want in zip(tensors, actual, expected, strict=True):
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        bound = 4 * EPSILON[computed] * terms + 2 * EPSILON[tensor.dtype] * largest([want])
        assert largest([got.double() - want]) <= bound


def largest(tensors: Sequence[Tensor]) -> float:
    return max((tensor.detach().abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


def make(
    count: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    queries: int | None = None,
    gain: str | None = "same",
    parameters: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    width = shape[-1]
    sources = [torch.randn(*shape).to(dtype) * (0.5 + i % 3) for i in range(count)]
    query = torch.randn(*(() if queries is None else (queries,)), width).to(parameters) * 2 / math.sqrt(width)
    if gain is None:
        return sources, query, None
    gain_shape = query.shape if gain == "same" else (width,)
    return sources, query, (1 + 0.3 * torch.randn(gain_shape)).to(parameters)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield
    torch.compiler.reset()


# Values and gradients


@pytest.mark.parametrize("count", [1, 2, 3, 9, 33, 64, 65])
@pytest.mark.parametrize("normalize_values", [False, True])
def test_number_of_sources(count: int, normalize_values: bool) -> None:
    check(*make(count, (2, 3, 16)), normalize_values=normalize_values)


@pytest.mark.parametrize("options", FAMILY)
@pytest.mark.parametrize(
    "queries, gain", [(None, None), (None, "same"), (1, "same"), (3, None), (3, "one"), (3, "same")]
)
def test_family(options: dict[str, Any], queries: int | None, gain: str | None) -> None:
    check(*make(5, (2, 4, 12), queries=queries, gain=gain), **options)


@pytest.mark.parametrize("shape", [(7,), (5, 1), (4, 7), (3, 1000), (2, 1, 3, 1, 8), (1, 1, 1)])
@pytest.mark.parametrize("queries", [None, 2])
@pytest.mark.parametrize("normalize_values", [False, True])
def test_shapes(shape: tuple[int, ...], queries: int | None, normalize_values: bool) -> None:
    check(*make(4, shape, queries=queries), normalize_values=normalize_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, parameters: torch.dtype) -> None:
    check(*make(6, (3, 32), dtype, parameters=parameters))
    check(*make(6, (3, 32), dtype, queries=2, gain="one", parameters=parameters), normalize_values=True)


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_mixed_source_dtypes(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    sources, query, key_gain = make(len(dtypes), (4, 24))
    sources = [source.to(dtype) for source, dtype in zip(sources, dtypes, strict=True)]
    assert mix(sources, query, key_gain).dtype == expected
    check(sources, query, key_gain)


def test_statistics_do_not_overflow_in_half_precision() -> None:
    sources = [torch.full((2, 64), 60000.0, dtype=torch.float16), torch.full((2, 64), -60000.0, dtype=torch.float16)]
    result = mix(sources, torch.full((64,), 0.01))
    torch.testing.assert_close(result, oracle(sources, torch.full((64,), 0.01)).half())


@pytest.mark.parametrize("normalize_values", [False, True])
@pytest.mark.parametrize("queries", [None, 3])
def test_strides(normalize_values: bool, queries: int | None) -> None:
    _, query, key_gain = make(1, (6,), queries=queries)
    sources = [
        torch.randn(6, 5, 4).permute(2, 1, 0),
        torch.randn(6).expand(4, 5, 6),
        torch.randn(4, 1, 6).expand(4, 5, 6),
        torch.randn(4, 5, 13)[..., ::2][..., :6],
        torch.randn(4, 5, 1).expand(4, 5, 6),
    ]
    check(sources, query, key_gain, normalize_values=normalize_values)
    check(sources[:1], query, key_gain, normalize_values=normalize_values)
    if queries is not None:
        check(sources, query.t().contiguous().t(), key_gain, normalize_values=normalize_values)
        check(sources, query[:1].expand(3, 6), key_gain, normalize_values=normalize_values)


def test_expanded_cotangent_and_shared_source() -> None:
    source = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    query = torch.randn(8, dtype=torch.float64)
    (actual,) = torch.autograd.grad(mix([source, 2 * source, source], query).sum(), source)
    (expected,) = torch.autograd.grad(oracle([source, 2 * source, source], query).sum(), source)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("options", FAMILY)
def test_empty_batch(shape: tuple[int, ...], count: int, options: dict[str, Any]) -> None:
    for queries in (None, 2):
        sources, query, key_gain = make(count, shape, queries=queries)
        check(sources, query, key_gain, **options)
        leaf = query.requires_grad_()
        (grad,) = torch.autograd.grad(mix(sources, leaf, key_gain, **options).sum(), leaf)
        assert torch.equal(grad, torch.zeros_like(query))


@pytest.mark.parametrize("options", FAMILY)
@pytest.mark.parametrize("queries, gain", [(None, None), (None, "same"), (2, "one"), (2, "same")])
@pytest.mark.parametrize("count", [1, 3])
def test_gradcheck(options: dict[str, Any], queries: int | None, gain: str | None, count: int) -> None:
    sources, query, key_gain = make(count, (2, 3), torch.float64, queries, gain, torch.float64)
    tensors = [*sources, query] + ([key_gain] if key_gain is not None else [])
    torch.autograd.gradcheck(
        lambda *t: mix(*unpack(t, key_gain is not None), **options), [t.requires_grad_() for t in tensors]
    )


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_gradient_of_one_tensor_only(wanted: int) -> None:
    sources, query, key_gain = make(2, (3, 5), torch.float64, parameters=torch.float64)
    tensors = [*sources, query, key_gain]
    leaf = tensors[wanted].requires_grad_()  # type: ignore[union-attr]
    mix(sources, query, key_gain).square().sum().backward()
    (expected,) = torch.autograd.grad(oracle(sources, query, key_gain).square().sum(), leaf)
    torch.testing.assert_close(leaf.grad, expected)
    assert all(t.grad is None for i, t in enumerate(tensors) if i != wanted and t is not None)


# Laws


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_call_agrees_with_the_oracle(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    leading = data.draw(st.lists(st.integers(0, 3), max_size=3))
    sources, query, key_gain = make(
        data.draw(st.integers(1, 12)),
        (*leading, data.draw(st.integers(1, 40))),
        data.draw(st.sampled_from([torch.float32, torch.float64])),
        data.draw(st.sampled_from([None, 1, 3])),
        data.draw(st.sampled_from([None, "one", "same"])),
    )
    check(
        sources,
        query,
        key_gain,
        eps=data.draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        logit_scale=data.draw(st.floats(-2, 2, width=16)),
        normalize_values=data.draw(st.booleans()),
        output_factor=data.draw(st.floats(-3, 3, width=16)),
    )


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 20), width=st.integers(1, 50), entropy=st.integers(0, 2**20))
def test_zero_query_is_the_mean(count: int, width: int, entropy: int) -> None:
    torch.manual_seed(entropy)
    sources = [torch.randn(3, width, dtype=torch.float64) for _ in range(count)]
    query = torch.zeros(width, requires_grad=True)
    mean = torch.stack(sources).mean(0)
    torch.testing.assert_close(mix(sources, query), mean)
    torch.testing.assert_close(mix(sources, query, output_factor=count), mean * count)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1e-3, 1e3), count=st.integers(1, 8), data=st.data())
def test_weights_ignore_the_length_of_a_source(factor: float, count: int, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    sources, query, key_gain = make(count, (3, 9), torch.float64)
    before = depth_weights(sources, query, key_gain, eps=0.0)
    which = data.draw(st.integers(0, count - 1))
    sources[which] = sources[which] * factor
    torch.testing.assert_close(depth_weights(sources, query, key_gain, eps=0.0), before)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(list(range(6))), normalize_values=st.booleans())
def test_order_of_the_sources_does_not_matter(order: list[int], normalize_values: bool) -> None:
    sources, query, key_gain = make(6, (4, 5), torch.float64)
    shuffled = mix([sources[i] for i in order], query, key_gain, normalize_values=normalize_values)
    torch.testing.assert_close(shuffled, mix(sources, query, key_gain, normalize_values=normalize_values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_one_source_is_the_identity_in_new_memory(dtype: torch.dtype, grad: bool) -> None:
    source = torch.randn(3, 4, dtype=dtype, requires_grad=grad)
    query = torch.randn(4, requires_grad=grad)
    key_gain = torch.randn(4, requires_grad=grad)
    result = mix([source], query, key_gain)
    assert torch.equal(result, source)
    assert result.data_ptr() != source.data_ptr()
    several = mix([source], torch.randn(3, 4))
    assert torch.equal(several, source.expand(3, 3, 4))
    several.detach()[0].zero_()
    assert torch.equal(several[1], source)
    if grad:
        cotangent = torch.randn(3, 4).to(dtype)
        grads = torch.autograd.grad(result, [source, query, key_gain], cotangent)
        assert torch.equal(grads[0], cotangent)
        assert grads[0].data_ptr() != cotangent.data_ptr()
        assert not grads[1].any()
        assert not grads[2].any()


def test_several_queries_are_several_mixes() -> None:
    sources, query, key_gain = make(4, (2, 3, 8), torch.float64, queries=3)
    assert key_gain is not None
    together = mix(sources, query, key_gain, normalize_values=True)
    apart = [mix(sources, q, g, normalize_values=True) for q, g in zip(query, key_gain, strict=True)]
    torch.testing.assert_close(together, torch.stack(apart))


def test_a_gain_on_the_keys_alone_folds_into_the_query() -> None:
    sources, query, key_gain = make(4, (2, 8), torch.float64, parameters=torch.float64)
    assert key_gain is not None
    torch.testing.assert_close(mix(sources, query, key_gain), mix(sources, query * key_gain))
    unweighted = [torch.nn.functional.rms_norm(source, (8,), eps=1e-6) for source in sources]
    expected = (depth_weights(sources, query, key_gain).unsqueeze(-1) * torch.stack(unweighted)).sum(0)
    torch.testing.assert_close(mix(sources, query * key_gain, normalize_values=True), expected)


@pytest.mark.parametrize("num_queries", [1, 3])
def test_inkling2_of_transformers_is_a_member(num_queries: int) -> None:
    modeling = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    config = type("Config", (), {"hidden_size": 32})()
    module = modeling.Inkling2BlockAttentionResidual(config, num_queries=num_queries)
    torch.nn.init.normal_(module.query)
    blocks = torch.randn(2, 5, 4, 32).bfloat16()
    partial = torch.randn(2, 5, 32).bfloat16()
    expected = torch.stack(module(blocks, partial))
    sources = [*blocks.unbind(-2), partial.float()]
    query = module.query.view(-1, 32)
    actual = mix(sources, query, eps=module.norm.eps, logit_scale=32**-0.5, normalize_values=True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [None, 2])
def test_depth_weights(queries: int | None) -> None:
    sources, query, key_gain = make(5, (2, 3, 6), torch.bfloat16, queries=queries)
    weights = depth_weights(sources, query, key_gain, logit_scale=0.5)
    assert weights.shape == ((5, 2, 3) if queries is None else (2, 5, 2, 3))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-3), torch.ones_like(weights.sum(-3)))
    wide = [source.double() for source in sources]
    rebuilt = (weights.double().unsqueeze(-1) * torch.stack(wide)).sum(-4)
    torch.testing.assert_close(rebuilt, oracle(wide, query, key_gain, logit_scale=0.5), rtol=1e-5, atol=1e-5)
    assert torch.equal(depth_weights(sources[:1], query), torch.ones_like(weights.narrow(-3, 0, 1)))


# Errors


def _fake(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


ERRORS: list[tuple[type[Exception], str, Callable[[], tuple[list[Tensor], Tensor, Tensor | None]]]] = [
    (ValueError, "at least one source", lambda: ([], torch.ones(3), None)),
    (
        ValueError,
        r"sources\[1\].*\(2, 4\).*\(2, 3\)",
        lambda: ([torch.ones(2, 3), torch.ones(2, 4)], torch.ones(3), None),
    ),
    (ValueError, r"sources\[1\]", lambda: ([torch.ones(2, 3), torch.ones(3)], torch.ones(3), None)),
    (ValueError, r"sources\[2\]", lambda: ([torch.ones(2, 3)] * 2 + [torch.ones(1, 3)], torch.ones(3), None)),
    (ValueError, "scalar", lambda: ([torch.tensor(1.0)], torch.ones(1), None)),
    (ValueError, "last dimension", lambda: ([torch.ones(2, 0)], torch.ones(0), None)),
    (ValueError, "query", lambda: ([torch.ones(2, 3)], torch.ones(4), None)),
    (ValueError, "query", lambda: ([torch.ones(2, 3)], torch.ones(2, 4), None)),
    (ValueError, "query", lambda: ([torch.ones(2, 3)], torch.ones(1, 1, 3), None)),
    (ValueError, "query", lambda: ([torch.ones(2, 3)], torch.tensor(1.0), None)),
    (ValueError, "query is empty", lambda: ([torch.ones(2, 3)], torch.ones(0, 3), None)),
    (ValueError, "key_gain", lambda: ([torch.ones(2, 3)], torch.ones(3), torch.ones(4))),
    (ValueError, "key_gain", lambda: ([torch.ones(2, 3)], torch.ones(3), torch.ones(2, 3))),
    (ValueError, "key_gain", lambda: ([torch.ones(2, 3)], torch.ones(2, 3), torch.ones(1, 3))),
    (TypeError, r"sources\[0\].*int64", lambda: ([torch.ones(2, 3, dtype=torch.int64)], torch.ones(3), None)),
    (TypeError, r"sources\[1\].*bool", lambda: ([torch.ones(3), torch.ones(3).bool()], torch.ones(3), None)),
    (TypeError, "sources.*complex", lambda: ([torch.ones(3, dtype=torch.complex64)], torch.ones(3), None)),
    (TypeError, "query.*int32", lambda: ([torch.ones(3)], torch.ones(3, dtype=torch.int32), None)),
    (TypeError, "key_gain.*int32", lambda: ([torch.ones(3)], torch.ones(3), torch.ones(3, dtype=torch.int32))),
]


@pytest.mark.parametrize("kind, message, build", ERRORS)
def test_errors(kind: type[Exception], message: str, build: Callable[[], Any]) -> None:
    sources, query, key_gain = build()
    for function in (mix, depth_weights, MIX):
        with pytest.raises(kind, match=message):
            function(sources, query, key_gain)
    with pytest.raises(kind, match=message):
        MIX([_fake(s) for s in sources], _fake(query), None if key_gain is None else _fake(key_gain))
    with pytest.raises(kind, match=message):
        MIX_BACKWARD(torch.ones(3), sources, query, key_gain, 1e-6, 1.0, False, 1.0)


def test_other_errors() -> None:
    source, query = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match="eps"):
        mix([source], query, eps=-1.0)
    with pytest.raises(ValueError, match="query is on meta"):
        mix([source], query.to("meta"))
    with pytest.raises(TypeError, match="unbind"):
        mix(source, query)
    with pytest.raises(ValueError, match="grad has the shape"):
        MIX_BACKWARD(torch.ones(3), [source], query, None, 1e-6, 1.0, False, 1.0)


def test_changing_a_source_in_place_before_the_backward_raises() -> None:
    query = torch.ones(3, requires_grad=True)
    sources = [torch.randn(2, 3), torch.randn(2, 3)]
    result = mix(sources, query)
    sources[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


# Modes, transforms, compilation


@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype, cast_to: torch.dtype) -> None:
    sources, query, key_gain = make(4, (3, 16), dtype, queries=2)
    plain = mix(sources, query, key_gain)
    weights = depth_weights(sources, query, key_gain)
    leaf = query.clone().requires_grad_()
    (plain_grad,) = torch.autograd.grad(mix(sources, leaf, key_gain).sum(), leaf)
    with torch.autocast("cpu", cast_to):
        assert torch.equal(mix(sources, query, key_gain), plain)
        assert torch.equal(depth_weights(sources, query, key_gain), weights)
        (grad,) = torch.autograd.grad(mix(sources, leaf, key_gain).sum(), leaf)
    assert torch.equal(grad, plain_grad)


def test_inference_mode_and_no_grad() -> None:
    sources, query, key_gain = make(3, (2, 4))
    expected = mix(sources, query, key_gain)
    query.requires_grad_()
    with torch.inference_mode():
        result = mix(sources, query, key_gain)
    assert result.is_inference()
    assert torch.equal(result, expected)
    with torch.no_grad():
        result = mix(sources, query, key_gain)
    assert not result.requires_grad
    assert torch.equal(result, expected)


def test_double_backward_raises() -> None:
    sources, query, key_gain = make(3, (2, 4))
    query.requires_grad_()
    (grad,) = torch.autograd.grad(mix(sources, query, key_gain).square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated only once"):
        grad.sum().backward()


def test_func_transforms() -> None:
    sources, query, key_gain = make(3, (2, 4), torch.float64, parameters=torch.float64)

    def loss(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(list(tensors[:-2]), *tensors[-2:], logit_scale=0.5).square().sum()

    tensors = [*sources, query, key_gain]
    everything = tuple(range(5))
    for transform in (
        lambda f: torch.func.grad(f, everything),
        lambda f: torch.func.jacfwd(f, everything),
        lambda f: torch.func.grad_and_value(f, everything),
        lambda f: torch.func.hessian(f, (0, 3)),
    ):
        actual = transform(lambda *t: loss(mix, *t))(*tensors)
        expected = transform(lambda *t: loss(oracle, *t))(*tensors)
        torch.testing.assert_close(actual, expected)


def test_vmap() -> None:
    stacked = [torch.randn(6, 3, 4, dtype=torch.float64) for _ in range(3)]
    queries = torch.randn(6, 4, dtype=torch.float64)

    def call(function: Callable[..., Tensor], query: Tensor, *sources: Tensor) -> Tensor:
        return function(list(sources), query, normalize_values=True)

    for axes in ((None, 0, 0, 0), (0, 0, None, 0)):
        query = queries[0] if axes[0] is None else queries
        inputs = (query, *(s if axis == 0 else s[0] for s, axis in zip(stacked, axes[1:], strict=True)))
        results = [torch.vmap(lambda *t, f=f: call(f, *t), axes)(*inputs) for f in (mix, oracle)]
        torch.testing.assert_close(*results)
        grads = [torch.vmap(torch.func.grad(lambda *t, f=f: call(f, *t).sum()), axes)(*inputs) for f in (mix, oracle)]
        torch.testing.assert_close(*grads)


def test_batched_backward() -> None:
    sources, query, key_gain = make(3, (2, 4), torch.float64, parameters=torch.float64)
    cotangents = torch.randn(5, 2, 4, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (*sources, query, key_gain) if t is not None]
    actual = torch.autograd.grad(mix(sources, query, key_gain), tensors, cotangents, is_grads_batched=True)
    expected = torch.autograd.grad(oracle(sources, query, key_gain), tensors, cotangents, is_grads_batched=True)
    torch.testing.assert_close(actual, expected)


def test_forward_mode_keeps_the_tangent() -> None:
    sources, query, key_gain = make(3, (2, 4), torch.float64, parameters=torch.float64)
    tangent = torch.randn_like(query)

    def push(function: Callable[..., Tensor]) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(sources, forward_ad.make_dual(query, tangent), key_gain)).tangent

    torch.testing.assert_close(push(mix), push(oracle))


def test_a_tangent_of_the_cotangent_survives_the_backward() -> None:
    sources, query, key_gain = make(3, (2, 4), torch.float64, parameters=torch.float64)
    query.requires_grad_()
    result = mix(sources, query, key_gain)
    cotangent, tangent = torch.randn(2, 2, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(result, query, tangent, retain_graph=True)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(result, query, forward_ad.make_dual(cotangent, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(grad).tangent, expected)


class Model(torch.nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))
        self.query = torch.nn.Parameter(torch.randn(4, width))
        self.key_gain = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        sources = [x]
        for layer, query in zip(self.layers, self.query.unbind(0), strict=False):
            sources.append(layer(mix(sources, query, self.key_gain, logit_scale=0.5)))
        several = mix(sources, self.query[2:], self.key_gain, normalize_values=True, output_factor=2.0)
        return several[0].tanh() + several[1]


def test_functional_call_deepcopy_and_pickle() -> None:
    model = Model()
    x = torch.randn(2, 8)
    expected = model(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    parameters = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    expected.sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_with_dynamic_shapes(backend: str) -> None:
    model = Model()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for size in (2, 5, 7):
        x = torch.randn(size, 3, 8)
        expected = model(x)
        actual = compiled(x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        cotangent = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, list(model.parameters()), cotangent)
        actual_grads = torch.autograd.grad(actual, list(model.parameters()), cotangent)
        torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_under_autocast() -> None:
    sources, query, key_gain = make(3, (2, 8))
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(sources, query, key_gain), mix(sources, query, key_gain))


def test_errors_while_compiling_name_the_argument() -> None:
    compiled = torch.compile(mix, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"sources\[1\] has the shape"):
        compiled([torch.ones(2, 3), torch.ones(2, 4)], torch.ones(3))


def test_one_node_in_the_traced_graph() -> None:
    sources, query, key_gain = make(3, (2, 4))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda *t: mix(list(t), query, key_gain), backend=backend, fullgraph=True)(*sources)
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [MIX]


OPCHECKS: list[tuple[int, tuple[int, ...], int | None, str | None, torch.dtype, tuple[Any, ...]]] = [
    (1, (2, 4), None, None, torch.float32, ()),
    (3, (2, 3, 4), None, "same", torch.float32, ()),
    (3, (2, 4), 2, "one", torch.bfloat16, (1e-5, 0.5, True, 2.0)),
    (1, (4,), 3, "same", torch.float64, (1e-5, 1.0, True)),
    (2, (0, 4), None, "same", torch.float32, ()),
]


@pytest.mark.parametrize("count, shape, queries, gain, dtype, options", OPCHECKS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(
    count: int,
    shape: tuple[int, ...],
    queries: int | None,
    gain: str | None,
    dtype: torch.dtype,
    options: tuple[Any, ...],
    grad: bool,
) -> None:
    sources, query, key_gain = make(count, shape, dtype, queries, gain)
    sources[0] = sources[0].mT.contiguous().mT if len(shape) > 1 else sources[0]
    cotangent = torch.randn(mix(sources, query).shape, dtype=dtype)
    for tensor in (*sources, query, key_gain):
        if tensor is not None:
            tensor.requires_grad_(grad)
    torch.library.opcheck(MIX, (sources, query, key_gain, *options))
    full = (*options, *(1e-6, 1.0, False, 1.0)[len(options) :])
    if not grad:
        torch.library.opcheck(MIX_BACKWARD, (cotangent, sources, query, key_gain, *full))
