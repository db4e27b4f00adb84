"""What all operators of the namespace ``attnres`` share: the library they are defined in, and how they find their kernels.

An operator ``name`` is served by the fastest kernels there are; ``name_reference`` and ``name_triton`` always by those they
are named after; ``name_autograd`` is ``name``, entered where autograd has something to record.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import triton as triton_kernels
from ._compat import below_autograd
from .cpu import native

LIBRARY = torch.library.Library("attnres", "FRAGMENT")
VARIANTS = ("", "_reference", "_triton")
Result = tuple[Sequence[int], torch.dtype]  # the shape and the dtype of one


@functools.cache
def operator_of(base: str, variant: str = "") -> Any:
    """The overload of ``attnres::<base><variant>``."""
    return getattr(torch.ops.attnres, base + variant).default


def round_into_new(wide: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Copying into a tensor of our own fixes the strides to those the fake kernels announce and rules out aliases."""
    return torch.empty(shape, dtype=dtype, device=wide.device).copy_(wide)


def empty_results(like: Tensor, results: Sequence[Result]) -> list[Tensor]:
    """What a fake kernel returns: empty results on the device of ``like``."""
    return [like.new_empty(shape, dtype=dtype) for shape, dtype in results]


def tensors_in(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors among ``arguments`` and in the lists among them."""
    flat = itertools.chain.from_iterable(given if isinstance(given, list) else [given] for given in arguments)
    return [item for item in flat if isinstance(item, Tensor)]


def native_or(kernel: Callable[..., Any], base: str, *arguments: Any, **outputs: Any) -> Any:
    """Runs until a native kernel is registered, and after that never again on its device."""
    if all(tensor.device.type == "cpu" for tensor in tensors_in(arguments)) and native.ensure():
        return operator_of(base)(*arguments, **outputs)
    return kernel(*arguments, **outputs)


def on_gpu(
    ours: Callable[..., Any], fallback: Callable[..., Any], first: Tensor | list[Tensor], *rest: Any, **outputs: Any
) -> Any:
    """Triton where it serves rows of this width: the operators take rows, or a list that begins with them, first."""
    serves = triton_kernels.serves(first if isinstance(first, list) else [first])
    return (ours if serves else fallback)(first, *rest, **outputs)


class _Once(torch.autograd.Function):
    """The gradients, and an error for whoever differentiates them again: silence would make constants of them."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], Sequence[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        with below_autograd():
            return tuple(call())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(
            "attnres::mix and its kin can be differentiated only once by loss.backward() and torch.autograd.grad. "
            "For second derivatives use torch.func (grad of grad, hessian).")


def backward_autograd(operator: Any, *arguments: Any) -> list[Tensor]:
    """Call the operator of a backward where autograd may be recording."""
    tensors = tensors_in(arguments)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_Once.apply(lambda: operator(*arguments), *tensors))
    with below_autograd():
        made: list[Tensor] = operator(*arguments)
    return made
