"""Calls like earlier ones: nothing is checked or planned again, and the kernels take the tensors as they are.

What is derived from a call (whether it is valid, tiles, strides, registers, the grid) follows from its signature: the dtype,
shape, strides and device of every tensor, and the options. So it is kept by signature, for the last ``LIKES`` of them. A
decoding model makes the same few calls thousands of times, and would wait for Python.

Importing this module does not import triton.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIKES = 4096


class ForwardLaunch(NamedTuple):
    """One launch of ``mix_forward``: the kernel bound to its grid, and its arguments except tensors."""

    kernel: Any
    strides: tuple[int, ...]
    early_stride: int
    delta_stride: int
    tokens: int
    constants: dict[str, Any]

    def __call__(
        self, sources: tuple[Tensor, ...], query: Tensor, gain: Tensor | None, outputs: tuple[Tensor, ...],
        lses: tuple[Tensor, ...] | None = None, early: tuple[Tensor | None, Tensor | None] = (None, None),
        delta: Tensor | None = None, partial: Tensor | None = None,
        norm: tuple[Tensor | None, Tensor | None] = (None, None),
        states: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """early: mixed and log-sum-exp of phase 1. norm: weight and bias. states: sums and rows of launches in a chain."""
        mixed, lse = early
        self.kernel(sources, self.strides, query, gain, outputs, lses, mixed, self.early_stride, lse, delta,
                    self.delta_stride, partial, *norm, *states, self.tokens, **self.constants)


class BackwardLaunch(NamedTuple):
    """One launch of ``mix_backward`` or ``mix_backward_again``, and that of the sums it leaves, likewise.

    partial, norm_partial: the shapes of what the first leaves to the second. again: whether it is ``mix_backward_again``.
    """

    kernel: Any
    again: bool
    grad_strides: tuple[int, ...]
    strides: tuple[int, ...]
    early_stride: int
    tokens: int
    constants: dict[str, Any]
    partial: tuple[int, ...]
    norm_partial: tuple[int, ...] | None
    dtype: torch.dtype
    reduce: Any
    reduce_constants: dict[str, Any]

    def __call__(
        self, grads: tuple[Tensor, ...], sources: tuple[Tensor, ...], query: Tensor, gain: Tensor | None,
        source_grads: tuple[Tensor, ...], query_grad: Tensor, gain_grad: Tensor | None,
        priors: tuple[Tensor | None, ...], lse_grads: tuple[Tensor, ...] | None = None,
        early: tuple[Tensor | None, Tensor | None] = (None, None),
        early_grads: tuple[Tensor | None, Tensor | None] = (None, None),
        norm: tuple[Tensor | None, Tensor | None] = (None, None), normed: Tensor | None = None,
        norm_grads: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """The arguments of ``launch.backward``, for queries of one launch."""
        partial = torch.empty(self.partial, dtype=self.dtype, device=query.device)
        norm_partial = None
        if self.norm_partial is not None:
            norm_partial = torch.empty(self.norm_partial, dtype=self.dtype, device=query.device)
        if self.again:
            self.kernel(grads[0], self.grad_strides[0], sources, self.strides, query, gain, source_grads, priors, partial,
                        *norm, normed, norm_partial, self.tokens, **self.constants)
        else:
            self.kernel(grads, self.grad_strides, lse_grads, sources, self.strides, query, gain, early[0],
                        self.early_stride, early[1], source_grads, priors, *early_grads, partial, *norm, normed,
                        norm_partial, self.tokens, **self.constants)
        self.reduce(partial, self.partial[0], query, gain, query_grad, gain_grad, norm_partial, *norm_grads,
                    **self.reduce_constants)


Launch = ForwardLaunch | BackwardLaunch


def signature(name: str, options: Hashable, tensors: Sequence[Tensor | None]) -> Hashable:
    """What decides how a call of the operator ``name`` is checked and launched."""
    return name, options, tuple(
        [None if t is None else (t.dtype, t.shape, t.stride(), t.device) for t in tensors])


class Recipe(NamedTuple):
    """How calls of one signature are made: the launch, and shape, strides and dtype of each result."""

    launch: Any
    results: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]

    def empty(self, device: torch.device) -> list[Tensor]:
        """Results to be written. (``torch.empty`` takes twice as long.)"""
        return [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in self.results]


@functools.lru_cache(LIKES)
def recipes(like: Hashable) -> list[Recipe]:
    """The recipe for calls of a signature, once there is one."""
    return []


def keep(
    like: Hashable, launched: Sequence[Launch | None], results: Sequence[Tensor], rows: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
) -> None:
    """Keep how a call was made, if it took one launch without copying a tensor.

    rows: the tensors [..., d] that kernels take by the stride between rows; others: those they take contiguous.
    """
    if len(launched) != 1 or launched[0] is None:
        return
    if all(t is None or t.is_contiguous() for t in others) and all(t is None or by_one_stride(t) for t in rows):
        recipes(like).append(Recipe(launched[0], tuple((t.shape, t.stride(), t.dtype) for t in results)))


def device_guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


_NOTHING = contextlib.nullcontext()


def by_one_stride(tensor: Tensor) -> bool:
    """Whether [..., d] lies as [tokens, d] with unit stride along d and one stride between rows."""
    if tensor.is_contiguous():
        return True
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        return False
    expected = None
    for size, stride in zip(tensor.shape[-2::-1], tensor.stride()[-2::-1]):
        if size != 1:
            if expected is not None and stride != expected:
                return False
            expected = stride * size
    return True
