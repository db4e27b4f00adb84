"""The operator ``attnres::mix``: a softmax over depth, its gradient, and the Python function that users call.

The operators are defined with ``torch.library.Library`` rather than ``custom_op``: a call is cheaper, and a native
kernel can replace the reference on one device by registering itself under that device's dispatch key. The kernels here
serve every device (CompositeExplicitAutograd) until that has happened; on GPUs (CUDA, which is ROCm's key too) Triton's
replace them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from . import triton as triton_kernels
from ._compat import any_requires_grad, below_autograd, in_forward_mode, in_functorch_transform
from .operators import Operator, Result, backward_autograd, declare, empty_results, operator_of, round_into_new

_ARGUMENTS = "Tensor[] sources, Tensor query, Tensor? key_gain, float eps{}, float logit_scale{}, bool normalize_values{}, "
_ARGUMENTS += "float output_factor{}"


def _mix_reference_kernel(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> Tensor:
    options = _with_defaults(*options)
    reference.check_arguments(sources, query, key_gain, options[0])
    wide = reference.mix_forward(sources, query, key_gain, *options)
    return round_into_new(wide, reference.output_shape(sources, query), reference.result_dtype(sources))


def mix_results(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> list[Result]:
    """The shape and the dtype of the mix, after a check of its arguments."""
    reference.check_arguments(sources, query, key_gain, _with_defaults(*options)[0])
    return [(reference.output_shape(sources, query), reference.result_dtype(sources))]


def _mix_fake(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> Tensor:
    return empty_results(query, mix_results(sources, query, key_gain, *options))[0]


def mix_composite(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> Tensor:
    """The mix as differentiable torch operations, for transforms that have to look inside."""
    options = _with_defaults(*options)
    reference.check_arguments(sources, query, key_gain, options[0])
    wide = reference.mix_forward(sources, query, key_gain, *options)
    return wide.to(reference.result_dtype(sources)).contiguous()


def _mix_backward_reference_kernel(
    grad: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    targets = _check_backward(grad, sources, query, key_gain, *options)
    grads = reference.mix_backward(grad, sources, query, key_gain, *options)
    return [round_into_new(wide, target.shape, target.dtype) for wide, target in zip(grads, targets, strict=True)]


def _mix_backward_fake(
    grad: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    return [target.new_empty(target.shape) for target in _check_backward(grad, sources, query, key_gain, *options)]


def _mix_backward_composite(
    grad: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    targets = _check_backward(grad, sources, query, key_gain, *options)
    grads = reference.mix_backward(grad, sources, query, key_gain, *options)
    return [wide.to(target.dtype).contiguous() for wide, target in zip(grads, targets, strict=True)]


def _mix_triton_kernel(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> Tensor:
    return triton_kernels.mix(sources, query, key_gain, *_with_defaults(*options))


def _with_defaults(
    eps: float = 1e-6, logit_scale: float = 1.0, normalize_values: bool = False, output_factor: float = 1.0
) -> tuple[float, float, bool, float]:
    """The dispatcher drops trailing arguments that equal their defaults; put them back."""
    return eps, logit_scale, normalize_values, output_factor


def _check_backward(
    grad: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, eps: float, *_: Any
) -> list[Tensor]:
    """The tensors that receive a gradient, after a check of everything."""
    reference.check_arguments(sources, query, key_gain, eps)
    reference.check_grad(grad, sources, query)
    return [*sources, query] if key_gain is None else [*sources, query, key_gain]


class _Mix(torch.autograd.Function):
    """Flat arguments: an autograd.Function does not look for tensors inside lists."""

    @staticmethod
    def forward(
        ctx: Any, variant: str, options: tuple[Any, ...], query: Tensor, key_gain: Tensor | None, *sources: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, key_gain, *sources)
        ctx.variant = variant
        ctx.options = options
        return _below_autograd(variant, list(sources), query, key_gain, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key_gain, *sources = ctx.saved_tensors
        _, _, needs_query, needs_gain, *needs_sources = ctx.needs_input_grad
        # A tangent that arrives with grad would be lost in the operator.
        operator = _mix_backward_composite if in_forward_mode() else operator_of("mix_backward", ctx.variant)
        grads = operator(grad, sources, query, key_gain, *ctx.options)
        count = len(sources)
        query_grad = grads[count] if needs_query else None
        gain_grad = grads[count + 1] if needs_gain else None
        return None, None, query_grad, gain_grad, *(g if n else None for g, n in zip(grads, needs_sources))


def _mix_autograd(
    variant: str, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> Tensor:
    """Choose how a call is differentiated.

    Not by ``torch.library.register_autograd``: the function it generates raises under torch.func.grad and silently drops the
    tangents of forward mode. Both are served by the differentiable composite.
    """
    needs_grad = torch.is_grad_enabled() and any_requires_grad(sources, query, key_gain)
    if in_forward_mode() or (needs_grad and in_functorch_transform()):
        return mix_composite(sources, query, key_gain, *options)
    if needs_grad:
        result: Tensor = _Mix.apply(variant, _with_defaults(*options), query, key_gain, *sources)
        return result
    return _below_autograd(variant, sources, query, key_gain, *options)


def _below_autograd(
    variant: str, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> Tensor:
    with below_autograd():
        result: Tensor = operator_of("mix", variant)(sources, query, key_gain, *options)
    return result


declare(Operator(
    "mix", f"({_ARGUMENTS.format('=1e-6', '=1.0', '=False', '=1.0')}) -> Tensor",
    _mix_reference_kernel, mix_composite, _mix_fake, _mix_triton_kernel, triton_kernels.serves, _mix_autograd))
declare(Operator(
    "mix_backward", f"(Tensor grad, {_ARGUMENTS.format('', '', '', '')}) -> Tensor[]",
    _mix_backward_reference_kernel, _mix_backward_composite, _mix_backward_fake, triton_kernels.mix_backward,
    triton_kernels.serves, partial(backward_autograd, "mix_backward")))

MIX = torch.ops.attnres.mix.default
MIX_BACKWARD = torch.ops.attnres.mix_backward.default
MIX_REFERENCE = torch.ops.attnres.mix_reference.default
MIX_BACKWARD_REFERENCE = torch.ops.attnres.mix_backward_reference.default
MIX_TRITON = torch.ops.attnres.mix_triton.default
MIX_BACKWARD_TRITON = torch.ops.attnres.mix_backward_triton.default


def mix(
    sources: Sequence[Tensor],
    query: Tensor,
    key_gain: Tensor | None = None,
    *,
    eps: float = 1e-6,
    logit_scale: float = 1.0,
    normalize_values: bool = False,
    output_factor: float = 1.0,
) -> Tensor:
    """Mix tensors by a softmax over depth: the read operation of Attention Residuals.

    For every position (every index of the leading dimensions) with source rows v_1 .. v_n of width d::

        r_i   = 1 / sqrt(mean(v_i ** 2) + eps)
        key_i = r_i * v_i * key_gain                       (key_gain = 1 if None)
        a     = softmax over i of (logit_scale * <query, key_i>)
        out   = output_factor * sum_i a_i * value_i        (value_i = v_i, or key_i if normalize_values)

    With the default options this is the paper's kernel and weights (Eq. 2), its shared keys and values (Eq. 3) and its
    weighted sum (Eq. 4); given the rows [b_0, .., b_{n-1}] or [b_0, .., b_{n-1}, partial sum] it is the read of Block
    Attention Residuals (Eq. 6). A zero query gives the mean of the sources, a single source gives that source.

    Normalised values are the keys themselves, key gain included. A gain on the keys alone folds into the query:
    ``mix(sources, query * key_gain, normalize_values=True)``. Inkling2 of transformers is ``key_gain=None,
    logit_scale=d ** -0.5, normalize_values=True``; it returns float32 whatever its sources are; pass any one source as
    float32 to get the same.

    Args:
        sources: n >= 1 tensors of one shape [..., d] on one device, in bfloat16, float16, float32 or float64; the
            dtypes may differ, strides are free (expanded tensors are fine), leading dimensions may be empty or missing.
        query: [d], or [M, d] for M mixes of the same sources. Its dtype is independent of the sources'.
        key_gain: None, or [d], or with an [M, d] query [M, d]. Its dtype is independent too.
        eps: added to the mean square, not negative. With eps=0 a zero row has no defined weight (NaN).
        logit_scale: multiplies the logits.
        normalize_values: sum the normalised keys instead of the raw sources.
        output_factor: multiplies the result.

    Returns:
        A new contiguous tensor, [..., d] for a [d] query and [M, ..., d] for an [M, d] one, in the promoted dtype of
        the sources; it never shares memory with an input. Everything is computed in float32 (float64 if a source is
        float64), also under autocast, and rounded once at the end.

    Differentiable with respect to the sources, the query and the key gain, each gradient in the dtype of its tensor. A
    second backward through the first raises NotImplementedError. torch.func (grad, vmap, jvp and their compositions)
    and forward mode work to any order, on plain torch operations.

    Raises:
        ValueError: no sources; sources of different shapes; a query or gain whose shape does not fit; different
            devices; an empty last dimension; a negative eps.
        TypeError: a dtype that is not one of the four, or sources given as one tensor instead of a sequence.
    """
    result: Tensor = MIX(_as_list(sources), query, key_gain, eps, logit_scale, normalize_values, output_factor)
    return result


def depth_weights(
    sources: Sequence[Tensor],
    query: Tensor,
    key_gain: Tensor | None = None,
    *,
    eps: float = 1e-6,
    logit_scale: float = 1.0,
) -> Tensor:
    """The weights a_i that :func:`mix` gives its sources, for reports and tests.

    Takes the arguments of :func:`mix` and raises what it raises. Returns [n, ...] for a [d] query, [M, n, ...] for an
    [M, d] one, in float32 (float64 if a source is); the weights of a position sum to one. Plain torch operations, so
    autograd differentiates it as often as wanted.
    """
    listed = _as_list(sources)
    reference.check_arguments(listed, query, key_gain, eps)
    return reference.depth_weights(listed, query, key_gain, eps, logit_scale)


def _as_list(sources: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(sources, Tensor):
        raise TypeError(
            "attnres::mix takes a list of sources, got one tensor; for a stacked tensor pass list(stacked.unbind(0))"
        )
    return list(sources)
