"""``attnres::mix_norm`` on the Triton kernels in Triton's interpreter, against its composite of torch operations. Run by
test_triton.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import kernel_traffic as traffic
from torch import Tensor

from attnres_fx.errors import KernelError
from attnres_fx.runtime import mix_norm
from attnres_fx.runtime.triton import configs
from attnres_fx.runtime.triton import traffic as costs

FORWARD, BACKWARD = mix_norm.MIX_NORM_TRITON, mix_norm.MIX_NORM_BACKWARD_TRITON
DOUBLE = torch.float64
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
OPTIONAL = ("key_gain", "delta", "mixed", "weight", "bias")  # lse comes with mixed
EVERYTHING = set(OPTIONAL)
# eps, logit_scale, normalize_values, output_factor, centered, norm_eps
RMS, LAYER = (1e-5, 0.7, False, 3.0, False, 1e-4), (1e-2, -1.5, True, 0.5, True, 1e-5)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(13)
        yield


@pytest.fixture(params=[
    "held", "again", pytest.param("norm first", marks=pytest.mark.slow), "norm first, again", "split"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways through the backward, whatever the table would choose."""
    chosen, again, fits = configs.backward_tile, configs.again_plan, request.param

    def tile(width: int, count: int, queries: int, warp_size: int = 32, norm: bool = False,
             phase: int | None = None, normalize: bool = False) -> configs.Tile | None:
        held = fits != "split" and "again" not in fits and not (norm and "first" in fits)
        return chosen(width, count, queries, phase=None) if held else None

    def plan(shape: configs.Shape) -> configs.Plan | None:
        return again(shape) if "again" in fits and not (shape.norm and "first" in fits) else None

    monkeypatch.setattr(configs, "backward_tile", tile)
    monkeypatch.setattr(configs, "again_plan", plan)


def normal(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).to(dtype)


def call(count: int, *shape: int, given: set[str], dtype: torch.dtype = DOUBLE) -> list[Any]:
    """The tensors of a call in the order of the operator; those not given are None. Of half precision are rows alone."""
    vectors, width = torch.promote_types(dtype, torch.float32), shape[-1]
    sizes = {"key_gain": (width,), "delta": shape, "mixed": shape, "lse": shape[:-1], "weight": (width,), "bias": (width,)}
    wanted = given | {"lse"} if "mixed" in given else given
    made = {name: normal(*size, dtype=dtype if size == shape else vectors) if name in wanted else None
            for name, size in sizes.items()}
    sources = [normal(*shape, dtype=dtype) for _ in range(count)]
    return [sources, normal(width, dtype=vectors) / width**0.5, *made.values()]


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def same(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * max(1.0, largest(other)))


def of_backward(tensors: list[Any], partial: Tensor | None) -> list[Any]:
    """The tensors of the backward: those of the forward without delta, and the completed sum as the last source."""
    sources, query, key_gain, _, *rest = tensors
    return [sources if partial is None else [*sources[:-1], partial], query, key_gain, *rest]


def check(tensors: list[Any], options: tuple[Any, ...] = RMS, alone: bool = True) -> None:
    """Float64: values and all gradients against the composite's own autograd; of the norm alone too, if requested."""
    sources = [source.detach().requires_grad_() for source in tensors[0]]
    others = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors[1:]]
    leaves = [*sources, *(tensor for tensor in others if tensor is not None)]
    got = FORWARD(sources, *others, *options)
    wanted = mix_norm.mix_norm_composite(sources, *others, *options)
    same(got, wanted)
    assert all(rows.is_contiguous() for rows in got)
    grads = [normal(*rows.shape) for rows in got]
    for used in {1 if alone else len(got), len(got)}:
        ours, theirs = (torch.autograd.grad(made[:used], leaves, grads[:used], retain_graph=True, materialize_grads=True)
                        for made in (got, wanted))
        same(ours, theirs)


# Each tensor that may be missing is, once, and each option meets each way through the backward.
FAMILY = [*itertools.product([RMS, LAYER], [EVERYTHING, {"delta", "weight"}]),
          ((*RMS[:4], *LAYER[4:]), EVERYTHING - {"mixed"}), ((*LAYER[:4], *RMS[4:]), EVERYTHING - {"delta", "key_gain"}),
          (LAYER, EVERYTHING - {"bias"}), (RMS, set())]


@pytest.mark.parametrize("options, given", FAMILY)
@pytest.mark.usefixtures("path")
def test_family(options: tuple[Any, ...], given: set[str]) -> None:
    check(call(3, 2, 3, 12, given=given), options)


@pytest.mark.parametrize("count, options, given", [
    (1, RMS, {"mixed"}), (2, RMS, {"delta"}), (25, RMS, {"delta", "mixed", "weight"}), (33, LAYER, {"delta", "mixed"}),
    (64, LAYER, {"delta", "bias"}), (65, RMS, {"weight"})])
def test_number_of_sources(count: int, options: tuple[Any, ...], given: set[str]) -> None:
    check(call(count, 2, 6, given=given), options, alone=count < 4)


@pytest.mark.parametrize("options", [RMS, LAYER])
def test_one_source_is_its_norm(options: tuple[Any, ...]) -> None:
    check(call(1, 3, 6, given={"delta", "weight", "bias"}), options)


@pytest.mark.usefixtures("path")
def test_the_backward_hands_out_the_norm_again() -> None:
    for options in (RMS, LAYER):
        tensors = call(3, 5, 12, given=EVERYTHING)
        normed, partial = FORWARD(*tensors, *options)
        same(BACKWARD(normal(5, 12), None, *of_backward(tensors, partial), *options)[:1], [normed])


@pytest.mark.parametrize("shape", [(7,), (5, 1), (2, 1000), (1, 2304), (1, 4100), (70, 8), (1, 1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    check(call(2, *shape, given={"delta", "key_gain", "weight"}), LAYER if shape[-1] % 8 else RMS, alone=False)
    check(call(1, *shape, given=EVERYTHING), RMS if shape[-1] % 8 else LAYER, alone=False)


@pytest.mark.parametrize("given", [{"weight"}, EVERYTHING], ids=["sources", "with an early mix"])
def test_no_tokens(given: set[str]) -> None:
    tensors = call(3, 0, 4, given=given)
    check(tensors)
    made = BACKWARD(normal(0, 4), None, *of_backward(tensors, None), *RMS)
    assert not any(tensor.any() for tensor in made)


def is_the_sum(partial: Tensor, tensors: list[Any]) -> None:
    """Bit by bit, but for bfloat16, which the interpreter cuts off where the compiled kernels round."""
    wanted = tensors[0][-1] + tensors[3]
    cut_off = 2 * EPSILON[torch.bfloat16] if wanted.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(partial, wanted, rtol=cut_off, atol=0)


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("given", [{"delta", "weight"}, EVERYTHING], ids=["sources", "with an early mix"])
@pytest.mark.usefixtures("path")
def test_dtypes(dtype: torch.dtype, given: set[str]) -> None:
    """Against float64 on the rounded inputs; and everything twice, bit by bit."""
    tensors = call(3, 3, 40, given=given, dtype=dtype)
    results = FORWARD(*tensors, *RMS)
    normed, partial = results
    is_the_sum(partial, tensors)
    grads = [normal(*normed.shape, dtype=dtype) for _ in range(2)]
    arguments = of_backward(tensors, partial)
    got = BACKWARD(*grads, *arguments, *RMS)
    exact = [[t.double() for t in given] if isinstance(given, list) else given.double() if given is not None else None
             for given in arguments]
    wanted = mix_norm.mix_norm_backward_composite(*(grad.double() for grad in grads), *exact, *RMS)
    targets = mix_norm.Reading(*arguments, *RMS).targets
    for one, other, like in zip([normed, *got], [wanted[0], *wanted], [normed, normed, *targets], strict=True):
        assert (one.dtype, one.shape, one.is_contiguous()) == (like.dtype, like.shape, True)
        atol = 64 * 2.0**-22 * (1 + largest(other))
        torch.testing.assert_close(one.double(), other, rtol=2 * EPSILON[one.dtype], atol=atol)
    again = [*FORWARD(*tensors, *RMS), *BACKWARD(*grads, *arguments, *RMS)]
    assert all(torch.equal(one, other) for one, other in zip([*results, *got], again, strict=True))


def test_several_dtypes() -> None:
    """The sum is rounded to the dtype of the last source, the norm to the promoted one."""
    tensors = call(3, 4, 8, given=EVERYTHING - {"mixed"}, dtype=torch.float32)
    tensors[0][-1], tensors[3] = tensors[0][-1].bfloat16(), tensors[3].bfloat16()
    normed, partial = FORWARD(*tensors, *RMS)
    assert (normed.dtype, partial.dtype) == (torch.float32, torch.bfloat16)
    is_the_sum(partial, tensors)
    torch.testing.assert_close(normed, mix_norm.mix_norm_composite(*tensors, *RMS)[0], rtol=0.02, atol=0.02)
    tensors[0][-1], tensors[3] = tensors[0][-1].half(), tensors[3].half()
    tensors[0][0] = tensors[0][0].double()
    same(FORWARD(*tensors, *RMS), mix_norm.mix_norm_composite(*tensors, *RMS))


@pytest.mark.usefixtures("path")
def test_layouts() -> None:
    """Strided rows of everything, each with strides of its own, parameters too."""
    tensors = call(1, 3, 4, 8, given=set())
    tensors[0] = [normal(3, 4, 16)[..., ::2], normal(4, 3, 8).transpose(0, 1), normal(1, 1, 8).expand(3, 4, 8)]
    tensors[2:] = [normal(16)[::2], normal(3, 4, 24)[..., 8:16], normal(3, 4, 1).expand(3, 4, 8), normal(4, 3).t(),
                   normal().expand(8), normal(8, 2)[:, 0]]
    check(tensors)
    grads = [normal(4, 3, 8).transpose(0, 1), normal().expand(3, 4, 8)]
    arguments = of_backward(tensors, None)
    for grad, partial_grad in (grads, grads[::-1]):
        same(BACKWARD(grad, partial_grad, *arguments, *RMS),
             mix_norm.mix_norm_backward_composite(grad, partial_grad, *arguments, *RMS))


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("given", [{"delta", "weight"}, EVERYTHING], ids=["sources", "with an early mix"])
@pytest.mark.usefixtures("path")
def test_every_element_is_written(count: int, given: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start poisoned, so that what a kernel leaves out shows."""
    plain, tensors = torch.empty, call(count, 5, 10, given=given)

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = plain(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    made = FORWARD(*tensors, *LAYER)
    grads = BACKWARD(made[0], made[1], *of_backward(tensors, made[1]), *LAYER)
    assert all(tensor.isfinite().all() for tensor in (*made, *grads))


def test_more_tokens_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "PARTIAL_ROWS", 3)
    for count in (3, 5):  # held, and the norm first
        check(call(count, 1, 7, 1024, given=EVERYTHING - {"mixed"}), alone=False)


def test_the_operator() -> None:
    tensors = call(2, 3, 4, given=EVERYTHING, dtype=torch.float32)
    leaves = [[source.requires_grad_() for source in tensors[0]], *(tensor.requires_grad_() for tensor in tensors[1:])]
    torch.library.opcheck(FORWARD, (*leaves, *RMS))
    rows = [[source.detach() for source in tensors[0]], *(tensor.detach() for tensor in tensors[1:])]
    torch.library.opcheck(BACKWARD, (normal(3, 4), None, *of_backward(rows, None), *RMS))


def test_too_wide_is_refused() -> None:
    with pytest.raises(KernelError, match="at most 8192"):
        FORWARD(*call(2, 1, 8193, given=set(), dtype=torch.bfloat16), *RMS)


# Traffic


@pytest.mark.parametrize("count, width, phase, add", [
    (4, 1024, None, True), (4, 1024, None, False), (9, 1024, None, True), (30, 64, None, True), (2, 4096, None, False),
    (2, 1024, 2, True), (3, 1024, 2, True), (2, 64, 2, False), (5, 64, 2, True), (1, 4096, 2, True)])
def test_the_cost_model_is_what_the_kernels_move(
    count: int, width: int, phase: int | None, add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One program walks over all tokens, so that partial rows cost the same whatever their number.
    monkeypatch.setattr(configs, "PARTIAL_ROWS", 1)
    mix = costs.Mix(count, width, add=add, norm=True, phase=phase)
    given = {"weight", "bias", *(["delta"] if add else []), *(["mixed"] if phase else [])}

    def moved(tokens: int) -> list[costs.Traffic]:
        """By forward and backward, but for the parameters."""
        tensors = call(count, tokens, width, given=given, dtype=torch.bfloat16)
        results: list[Tensor] = []
        parameters = {"query": tensors[1], "weight": tensors[6], "bias": tensors[7]}
        counted = []
        for backward in (False, True):
            with traffic.counting(parameters) as counter:
                if backward:
                    BACKWARD(results[0], results[1] if add else None, *of_backward(tensors, *results[1:] or [None]), *RMS)
                else:
                    results = FORWARD(*tensors, *RMS)
            counted.append(costs.Traffic(counter.loaded.total() - sum(map(counter.loaded.get, parameters, [0] * 3)),
                                         counter.stored.total()))
        return counted

    few, many = moved(1), moved(2)
    assert few[0] == costs.forward(mix)
    wanted = costs.backward(mix)
    assert [more + less * -1 for more, less in zip(many, few)] == [
        costs.forward(mix), costs.Traffic(wanted.loaded, wanted.written)]
