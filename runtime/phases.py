"""The two phases of Algorithm 1 as operators: ``attnres::mix_phase1`` and ``attnres::mix_phase2``.

Phase 1 reads sources once for M queries and keeps, of each, the mix over these sources and the log-sum-exp of its logits.
Phase 2 completes one of these mixes by the sources that came later (the partial sum, in Block AttnRes). Together they are
:func:`attnres_fx.mix` over all sources, to rounding. The schedule pass replaces it by them where that moves fewer bytes.
The kernels here are the reference; native and Triton kernels register themselves beside it, as in runtime/mix.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from . import triton as triton_kernels
from ._compat import any_requires_grad, below_autograd, check_value, in_forward_mode, in_functorch_transform
from .operators import (
    Operator,
    Result,
    backward_autograd,
    declare,
    empty_results,
    operator_of,
    round_into_new,
)

_READ = "Tensor[] sources, Tensor query, Tensor? key_gain, float eps{}, float logit_scale{}, bool normalize_values{}"
_DEFAULTS = ("=1e-6", "=1.0", "=False")


def _read_defaults(eps: float = 1e-6, logit_scale: float = 1.0, normalize_values: bool = False) -> tuple[float, float, bool]:
    """The dispatcher drops trailing arguments that equal their defaults; put them back."""
    return eps, logit_scale, normalize_values


def _merge_defaults(*options: Any) -> tuple[float, float, bool, float]:
    return *_read_defaults(*options[:3]), options[3] if len(options) > 3 else 1.0


# ------------------------------------------------------------------------------------------------ phase 1


def check_phase1(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, eps: float) -> None:
    """Raise ValueError or TypeError for meaningless arguments of phase 1: those of the mix, and a lone query."""
    reference.check_arguments(sources, query, key_gain, eps)
    check_value(query.ndim == 2, lambda: f"attnres::mix_phase1: query must be [M, d], got {tuple(query.shape)}")


def phase1_composite(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> list[Tensor]:
    """Phase 1 as differentiable torch operations."""
    options = _read_defaults(*options)
    check_phase1(sources, query, key_gain, options[0])
    mixed, lse = reference.phase1(sources, query, key_gain, *options)
    return [*mixed.to(reference.result_dtype(sources)).unbind(0), *lse.unbind(0)]


def _phase1_reference(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> list[Tensor]:
    return [round_into_new(made, made.shape, made.dtype) for made in phase1_composite(sources, query, key_gain, *options)]


def phase1_results(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> list[Result]:
    """The shapes and dtypes of the M mixes and the M log-sum-exps, after a check of the arguments."""
    check_phase1(sources, query, key_gain, _read_defaults(*options)[0])
    shape, count = sources[0].shape, query.shape[0]
    mixed: Result = (shape, reference.result_dtype(sources))
    lse: Result = (shape[:-1], reference.statistics_dtype(sources))
    return [mixed] * count + [lse] * count


def _phase1_fake(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> list[Tensor]:
    return empty_results(query, phase1_results(sources, query, key_gain, *options))


def _check_phase1_backward(
    grads: list[Tensor], sources: list[Tensor], query: Tensor, key_gain: Tensor | None, eps: float, *_: Any
) -> list[Tensor]:
    """The tensors that receive a gradient, after a check of everything."""
    check_phase1(sources, query, key_gain, eps)
    count = query.shape[0]
    check_value(len(grads) == 2 * count, lambda: f"attnres::mix_phase1: {2 * count} gradients, got {len(grads)}")
    shape = sources[0].shape
    for name, listed, expected in (("grad", grads[:count], shape), ("lse_grad", grads[count:], shape[:-1])):
        for grad in listed:
            reference.check_shape(name, grad, expected, "that of the result")
    return [*sources, query] if key_gain is None else [*sources, query, key_gain]


def phase1_backward_composite(
    grads: list[Tensor], sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """The gradients of phase 1 as differentiable torch operations."""
    targets = _check_phase1_backward(grads, sources, query, key_gain, *options)
    count = query.shape[0]
    mixed_grads, lse_grads = torch.stack(grads[:count]), torch.stack(grads[count:])
    made = reference.phase1_backward(mixed_grads, lse_grads, sources, query, key_gain, *options)
    return [wide.to(target.dtype) for wide, target in zip(made, targets, strict=True)]


def _phase1_backward_reference(
    grads: list[Tensor], sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    made = phase1_backward_composite(grads, sources, query, key_gain, *options)
    return [round_into_new(wide, wide.shape, wide.dtype) for wide in made]


def _phase1_backward_fake(
    grads: list[Tensor], sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    targets = _check_phase1_backward(grads, sources, query, key_gain, *options)
    return [target.new_empty(target.shape) for target in targets]


class _Phase1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, options: tuple[Any, ...], query: Tensor, key_gain: Tensor | None,
                *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(query, key_gain, *sources)
        ctx.name, ctx.options = name, options
        with below_autograd():
            return tuple(operator_of("mix_phase1", name)(list(sources), query, key_gain, *options))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key_gain, *sources = ctx.saved_tensors
        backward = phase1_backward_composite if in_forward_mode() else operator_of("mix_phase1_backward", ctx.name)
        made = backward(list(grads), sources, query, key_gain, *ctx.options)
        needs = ctx.needs_input_grad[2:]
        wanted = [made[len(sources)], None if key_gain is None else made[len(sources) + 1], *made[: len(sources)]]
        return None, None, *(grad if need else None for grad, need in zip(wanted, needs, strict=True))


def _phase1_autograd(
    name: str, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    needs_grad = torch.is_grad_enabled() and any_requires_grad(sources, query, key_gain)
    if in_forward_mode() or (needs_grad and in_functorch_transform()):
        return phase1_composite(sources, query, key_gain, *options)
    if needs_grad:
        return list(_Phase1.apply(name, _read_defaults(*options), query, key_gain, *sources))
    with below_autograd():
        made: list[Tensor] = operator_of("mix_phase1", name)(sources, query, key_gain, *options)
    return made


# ------------------------------------------------------------------------------------------------ phase 2


def check_phase2(
    mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, eps: float
) -> None:
    """Raise ValueError or TypeError for meaningless arguments of phase 2."""
    reference.check_arguments([*sources, mixed], query, key_gain, eps)
    check_value(len(sources) > 0, lambda: "attnres::mix_phase2 needs at least one source, got an empty list")
    check_value(query.ndim == 1, lambda: f"attnres::mix_phase2: query must be [d], got {tuple(query.shape)}")
    check_value(lse.shape == mixed.shape[:-1], lambda: (
        f"attnres::mix_phase2: lse has the shape {tuple(lse.shape)}, expected {tuple(mixed.shape[:-1])}"))


def phase2_composite(
    mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> Tensor:
    """Phase 2 as differentiable torch operations."""
    options = _merge_defaults(*options)
    check_phase2(mixed, lse, sources, query, key_gain, options[0])
    wide = reference.phase2(mixed, lse, sources, query, key_gain, *options)
    return wide.to(reference.result_dtype([mixed, *sources]))


def _phase2_reference(
    mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> Tensor:
    made = phase2_composite(mixed, lse, sources, query, key_gain, *options)
    return round_into_new(made, made.shape, made.dtype)


def phase2_results(
    mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Result]:
    """The shape and the dtype of the completed mix, after a check of the arguments."""
    check_phase2(mixed, lse, sources, query, key_gain, _merge_defaults(*options)[0])
    return [(mixed.shape, reference.result_dtype([mixed, *sources]))]


def _phase2_fake(mixed: Tensor, *rest: Any) -> Tensor:
    return empty_results(mixed, phase2_results(mixed, *rest))[0]


def _check_phase2_backward(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, eps: float,
    *_: Any,
) -> list[Tensor]:
    check_phase2(mixed, lse, sources, query, key_gain, eps)
    check_value(grad.shape == mixed.shape, lambda: (
        f"attnres::mix_phase2: grad has the shape {tuple(grad.shape)}, expected {tuple(mixed.shape)}"))
    return [mixed, lse, *sources, query] if key_gain is None else [mixed, lse, *sources, query, key_gain]


def phase2_backward_composite(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """The gradients of phase 2 as differentiable torch operations."""
    targets = _check_phase2_backward(grad, mixed, lse, sources, query, key_gain, *options)
    made = reference.phase2_backward(grad, mixed, lse, sources, query, key_gain, *options)
    return [wide.to(target.dtype) for wide, target in zip(made, targets, strict=True)]


def _phase2_backward_reference(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    made = phase2_backward_composite(grad, mixed, lse, sources, query, key_gain, *options)
    return [round_into_new(wide, wide.shape, wide.dtype) for wide in made]


def _phase2_backward_fake(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    targets = _check_phase2_backward(grad, mixed, lse, sources, query, key_gain, *options)
    return [target.new_empty(target.shape) for target in targets]


class _Phase2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, options: tuple[Any, ...], mixed: Tensor, lse: Tensor, query: Tensor,
                key_gain: Tensor | None, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(mixed, lse, query, key_gain, *sources)
        ctx.name, ctx.options = name, options
        with below_autograd():
            made: Tensor = operator_of("mix_phase2", name)(mixed, lse, list(sources), query, key_gain, *options)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mixed, lse, query, key_gain, *sources = ctx.saved_tensors
        backward = phase2_backward_composite if in_forward_mode() else operator_of("mix_phase2_backward", ctx.name)
        made = backward(grad, mixed, lse, sources, query, key_gain, *ctx.options)
        count = 2 + len(sources)
        wanted = [*made[:2], made[count], None if key_gain is None else made[count + 1], *made[2:count]]
        needs = ctx.needs_input_grad[2:]
        return None, None, *(grad if need else None for grad, need in zip(wanted, needs, strict=True))


def _phase2_autograd(
    name: str, mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any_requires_grad([mixed, lse, *sources], query, key_gain)
    if in_forward_mode() or (needs_grad and in_functorch_transform()):
        return phase2_composite(mixed, lse, sources, query, key_gain, *options)
    if needs_grad:
        result: Tensor = _Phase2.apply(name, _merge_defaults(*options), mixed, lse, query, key_gain, *sources)
        return result
    with below_autograd():
        made: Tensor = operator_of("mix_phase2", name)(mixed, lse, sources, query, key_gain, *options)
    return made


# ------------------------------------------------------------------------------------------------ Triton


def _phase1_triton(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> list[Tensor]:
    options = _read_defaults(*options)
    return triton_kernels.mix_phase1(
        sources, query, key_gain, *options, check=lambda *_: check_phase1(sources, query, key_gain, options[0]))


def _phase1_backward_triton(
    grads: list[Tensor], sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    _check_phase1_backward(grads, sources, query, key_gain, *options)
    return triton_kernels.mix_phase1_backward(grads, sources, query, key_gain, *options)


def _phase2_triton(
    mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> Tensor:
    options = _merge_defaults(*options)
    return triton_kernels.mix_phase2(
        mixed, lse, sources, query, key_gain, *options,
        check=lambda *_: check_phase2(mixed, lse, sources, query, key_gain, options[0]))


def _phase2_backward_triton(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    _check_phase2_backward(grad, mixed, lse, sources, query, key_gain, *options)
    return triton_kernels.mix_phase2_backward(grad, mixed, lse, sources, query, key_gain, *options)


# ------------------------------------------------------------------------------------------------ declaration


declare(Operator(
    "mix_phase1", f"({_READ.format(*_DEFAULTS)}) -> Tensor[]",
    _phase1_reference, phase1_composite, _phase1_fake, _phase1_triton, triton_kernels.serves, _phase1_autograd))
declare(Operator(
    "mix_phase1_backward", f"(Tensor[] grads, {_READ.format('', '', '')}) -> Tensor[]",
    _phase1_backward_reference, phase1_backward_composite, _phase1_backward_fake, _phase1_backward_triton,
    triton_kernels.serves, partial(backward_autograd, "mix_phase1_backward")))
declare(Operator(
    "mix_phase2", f"(Tensor mixed, Tensor lse, {_READ.format(*_DEFAULTS)}, float output_factor=1.0) -> Tensor",
    _phase2_reference, phase2_composite, _phase2_fake, _phase2_triton, triton_kernels.serves, _phase2_autograd))
declare(Operator(
    "mix_phase2_backward",
    f"(Tensor grad, Tensor mixed, Tensor lse, {_READ.format('', '', '')}, float output_factor) -> Tensor[]",
    _phase2_backward_reference, phase2_backward_composite, _phase2_backward_fake, _phase2_backward_triton,
    triton_kernels.serves, partial(backward_autograd, "mix_phase2_backward")))

PHASE1 = torch.ops.attnres.mix_phase1.default
PHASE2 = torch.ops.attnres.mix_phase2.default
PHASE1_REFERENCE = torch.ops.attnres.mix_phase1_reference.default
PHASE2_REFERENCE = torch.ops.attnres.mix_phase2_reference.default
PHASE1_TRITON = torch.ops.attnres.mix_phase1_triton.default
PHASE2_TRITON = torch.ops.attnres.mix_phase2_triton.default
