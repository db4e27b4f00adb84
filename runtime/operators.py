"""What all operators of the namespace ``attnres`` share: the library they are defined in, and how they find their kernels.

An operator ``name`` runs the fastest kernels available; ``name_reference`` and ``name_triton`` always those they are named
after; ``name_autograd`` is ``name``, entered where autograd has something to record.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
    """``kernel`` until a native kernel is registered for the device; from then on that one is called instead."""
    if all(tensor.device.type == "cpu" for tensor in tensors_in(arguments)) and native.ensure():
        return operator_of(base)(*arguments, **outputs)
    return kernel(*arguments, **outputs)


def on_gpu(
    ours: Callable[..., Any], fallback: Callable[..., Any], serves: Callable[[Sequence[Tensor]], bool],
    first: Tensor | list[Tensor], *rest: Any, **outputs: Any,
) -> Any:
    """``ours`` where it serves rows of this width: the operators take rows, or a list that begins with them, first."""
    return (ours if serves(first if isinstance(first, list) else [first]) else fallback)(first, *rest, **outputs)


@dataclass(frozen=True)
class Operator:
    """One operator without outputs to write: what it takes and gives, and the kernels that serve it.

    schema: arguments and result, as "(Tensor x) -> Tensor". reference: the kernel for every device without another one; its
    results have their own memory. composite: the same as differentiable torch operations, for transforms.
    fake: empty results, after a check of the arguments. triton: the kernels for GPUs; ``serves`` selects the rows that they
    take. autograd: how a call is differentiated, called with the variant before the arguments.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    composite: Callable[..., Any]
    fake: Callable[..., Any]
    triton: Callable[..., Any]
    serves: Callable[[Sequence[Tensor]], bool]
    autograd: Callable[..., Any]


def declare(operator: Operator) -> None:
    """Define ``attnres::<name>`` and its variants, and register the kernels that serve them."""
    name = operator.name
    for variant in (*VARIANTS, "_autograd"):
        LIBRARY.define(f"{name}{variant}{operator.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, partial(native_or, operator.reference, name), "CompositeExplicitAutograd")
    LIBRARY.impl(name, partial(on_gpu, operator.triton, operator.reference, operator.serves), "CUDA")
    LIBRARY.impl(f"{name}_reference", operator.reference, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_triton", operator.triton, "CompositeExplicitAutograd")
    # Where a native library answers under the autograd key, it passes on to this what autograd has to record.
    LIBRARY.impl(f"{name}_autograd", partial(operator.autograd, ""), "CompositeImplicitAutograd")
    for variant in VARIANTS:
        LIBRARY.impl(f"{name}{variant}", partial(operator.autograd, variant), "Autograd")
        for key in ("FuncTorchBatched", "Batched"):  # torch.vmap, and torch.autograd.grad(is_grads_batched=True)
            LIBRARY.impl(f"{name}{variant}", operator.composite, key)
        torch.library.register_fake(f"attnres::{name}{variant}", operator.fake, lib=LIBRARY)


class _Once(torch.autograd.Function):
    """The gradients, and an error if they are differentiated again: otherwise they would silently be constants."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], Sequence[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        with below_autograd():
            return tuple(call())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(
            "attnres::mix and similar operators can be differentiated only once by loss.backward() and torch.autograd.grad. "
            "For second derivatives use torch.func (grad of grad, hessian).")


def backward_autograd(base: str, variant: str, *arguments: Any) -> list[Tensor]:
    """Call the operator of a backward where autograd may be recording."""
    operator = operator_of(base, variant)
    tensors = tensors_in(arguments)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_Once.apply(lambda: operator(*arguments), *tensors))
    with below_autograd():
        made: list[Tensor] = operator(*arguments)
    return made
