"""The operator ``attnres::mix_norm``: the addition that completes a partial sum, the mix, and the norm that reads it.

One operator for the beginning of a layer of Block AttnRes. Its backward computes the mix again from the sources, so neither
the mix nor its norm has to be kept, and also returns the norm, for use in the backward (by the gradient of a linear layer's
weight). The fuse pass replaces the three by it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from . import triton as triton_kernels
from ._compat import below_autograd, check_type, in_forward_mode, in_functorch_transform
from .operators import (
    Operator,
    Result,
    backward_autograd,
    declare,
    empty_results,
    operator_of,
    round_into_new,
    tensors_in,
)
from .reading import Reading

_READ = "Tensor[] sources, Tensor query, Tensor? key_gain, "
_EARLY_NORM = "Tensor? mixed, Tensor? lse, Tensor? weight, Tensor? bias, "
_OPTIONS = "float eps, float logit_scale, bool normalize_values, float output_factor, bool centered, float norm_eps"
ARGUMENTS = f"{_READ}Tensor? delta, {_EARLY_NORM}{_OPTIONS}"



def _reading(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, delta: Tensor | None, *rest: Any
) -> Reading:
    """The checked arguments of a forward, its sources as they were given."""
    reading = Reading(sources, query, key_gain, *rest)
    reading.check()
    if delta is not None:
        reference.check_shape("delta", delta, sources[-1].shape, "the shape of the source that it completes")
        check_type(delta.dtype == sources[-1].dtype, lambda: (
            f"attnres::mix_norm: delta is {delta.dtype}, the source that it completes {sources[-1].dtype}"))
    return reading


def mix_norm_composite(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, delta: Tensor | None, *rest: Any
) -> list[Tensor]:
    """The operator as differentiable torch operations: [normed], or [normed, partial] with a ``delta``."""
    reading = _reading(sources, query, key_gain, delta, *rest)
    if delta is None:
        return [reading.norm.forward(reading.mix()).to(reading.dtype)]
    partial_sum = sources[-1] + delta
    reading = replace(reading, sources=[*sources[:-1], partial_sum])
    return [reading.norm.forward(reading.mix()).to(reading.dtype), partial_sum]


def _reference(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, delta: Tensor | None, *rest: Any
) -> list[Tensor]:
    made = mix_norm_composite(sources, query, key_gain, delta, *rest)
    return [round_into_new(rows, rows.shape, rows.dtype) for rows in made]


def mix_norm_results(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, delta: Tensor | None, *rest: Any
) -> list[Result]:
    """The shapes and dtypes of the norm and, with a ``delta``, of the partial sum, after a check of the arguments."""
    reading = _reading(sources, query, key_gain, delta, *rest)
    shape, dtype = sources[-1].shape, sources[-1].dtype
    return [(shape, reading.dtype)] if delta is None else [(shape, reading.dtype), (shape, dtype)]


def _fake(sources: list[Tensor], query: Tensor, *rest: Any) -> list[Tensor]:
    return empty_results(query, mix_norm_results(sources, query, *rest))


def _checked(grad: Tensor, partial_grad: Tensor | None, *rest: Any) -> Reading:
    reading = Reading(*rest)
    reading.check()
    for name, given in (("grad", grad), ("partial_grad", partial_grad)):
        if given is not None:
            reference.check_shape(name, given, reading.sources[0].shape, "the shape of the sources")
    return reading


def mix_norm_backward_composite(grad: Tensor, partial_grad: Tensor | None, *rest: Any) -> list[Tensor]:
    """The norm again, then the gradients of ``Reading.targets``; that of the last source includes ``partial_grad``."""
    reading = _checked(grad, partial_grad, *rest)
    mixed = reading.mix()
    normed, before, parameters = reading.norm.backward(grad.to(mixed.dtype), mixed)
    grads = reading.mix_backward(before)
    if partial_grad is not None:
        place = len(reading.sources) - 1 + (0 if reading.mixed is None else 2)
        grads[place] = grads[place] + partial_grad
    made = [wide.to(target.dtype) for wide, target in zip([*grads, *parameters], reading.targets, strict=True)]
    return [normed.to(reading.dtype), *made]


def _backward_reference(grad: Tensor, partial_grad: Tensor | None, *rest: Any) -> list[Tensor]:
    made = mix_norm_backward_composite(grad, partial_grad, *rest)
    return [round_into_new(wide, wide.shape, wide.dtype) for wide in made]


def _backward_fake(grad: Tensor, partial_grad: Tensor | None, *rest: Any) -> list[Tensor]:
    reading = _checked(grad, partial_grad, *rest)
    normed = grad.new_empty(grad.shape, dtype=reading.dtype)
    return [normed, *(target.new_empty(target.shape) for target in reading.targets)]


def _triton(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, delta: Tensor | None, *rest: Any
) -> list[Tensor]:
    return triton_kernels.mix_norm(sources, query, key_gain, delta, *rest, check=_reading)


def _backward_triton(grad: Tensor, partial_grad: Tensor | None, *rest: Any) -> list[Tensor]:
    return triton_kernels.mix_norm_backward(grad, partial_grad, *rest, check=_checked)


class _MixNorm(torch.autograd.Function):
    """Flat arguments: an autograd.Function does not look for tensors inside lists."""

    @staticmethod
    def forward(ctx: Any, variant: str, options: tuple[Any, ...], query: Tensor, key_gain: Tensor | None,
                delta: Tensor | None, mixed: Tensor | None, lse: Tensor | None, weight: Tensor | None, bias: Tensor | None,
                *sources: Tensor) -> tuple[Tensor, ...]:
        with below_autograd():
            made = operator_of("mix_norm", variant)(
                list(sources), query, key_gain, delta, mixed, lse, weight, bias, *options)
        last = sources[-1] if delta is None else made[1]
        ctx.save_for_backward(query, key_gain, mixed, lse, weight, bias, *sources[:-1], last)
        ctx.variant, ctx.options, ctx.added = variant, options, delta is not None
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, partial_grad: Tensor | None = None) -> tuple[Any, ...]:
        query, key_gain, mixed, lse, weight, bias, *sources = ctx.saved_tensors
        if grad is None:
            nothing = [None] * (len(ctx.needs_input_grad) - 10)
            return None, None, None, None, partial_grad, None, None, None, None, *nothing, partial_grad
        backward = mix_norm_backward_composite if in_forward_mode() else operator_of("mix_norm_backward", ctx.variant)
        given = (mixed, lse, weight, bias)
        _, *made = backward(grad, partial_grad, list(sources), query, key_gain, *given, *ctx.options)
        found = iter(made)
        early = [next(found) if tensor is not None else None for tensor in (mixed, lse)]
        source_grads = [next(found) for _ in sources]
        parameters = [next(found) if tensor is not None else None for tensor in (query, key_gain, weight, bias)]
        delta_grad = source_grads[-1] if ctx.added else None
        wanted = [*parameters[:2], delta_grad, *early, *parameters[2:], *source_grads]
        needs = ctx.needs_input_grad[2:]
        return None, None, *(own if need else None for own, need in zip(wanted, needs, strict=True))


def _autograd(
    variant: str, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, delta: Tensor | None,
    mixed: Tensor | None, lse: Tensor | None, weight: Tensor | None, bias: Tensor | None, *options: Any,
) -> list[Tensor]:
    given = (query, key_gain, delta, mixed, lse, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in([sources, *given]))
    if in_forward_mode() or (needs_grad and in_functorch_transform()):
        return mix_norm_composite(sources, query, key_gain, delta, mixed, lse, weight, bias, *options)
    if needs_grad:
        return list(_MixNorm.apply(variant, options, *given, *sources))
    with below_autograd():
        made: list[Tensor] = operator_of("mix_norm", variant)(
            sources, query, key_gain, delta, mixed, lse, weight, bias, *options)
    return made


declare(Operator(
    "mix_norm", f"({ARGUMENTS}) -> Tensor[]", _reference, mix_norm_composite, _fake, _triton, triton_kernels.serves,
    _autograd))
declare(Operator(
    "mix_norm_backward", f"(Tensor grad, Tensor? partial_grad, {_READ}{_EARLY_NORM}{_OPTIONS}) -> Tensor[]",
    _backward_reference, mix_norm_backward_composite, _backward_fake, _backward_triton, triton_kernels.serves,
    partial(backward_autograd, "mix_norm_backward")))

MIX_NORM = operator_of("mix_norm")
MIX_NORM_BACKWARD = operator_of("mix_norm_backward")
MIX_NORM_REFERENCE = operator_of("mix_norm_reference")
MIX_NORM_TRITON = operator_of("mix_norm_triton")
MIX_NORM_BACKWARD_REFERENCE = operator_of("mix_norm_backward_reference")
MIX_NORM_BACKWARD_TRITON = operator_of("mix_norm_backward_triton")
