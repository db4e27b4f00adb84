"""Every touch of torch's private interfaces in the runtime, each with its test in ``test_runtime_compat.py``.

Written against torch 2.13. A new torch release is supported when these tests pass on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad


def any_requires_grad(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None) -> bool:
    """Whether one of the tensors requires a gradient; in C++, as it is asked at every eager call."""
    return bool(torch._C._any_requires_grad(sources, query, key_gain))


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, so that tensors may carry tangents."""
    return forward_ad._current_level >= 0


def in_functorch_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) is active."""
    return bool(torch._C._are_functorch_transforms_active())


def below_autograd() -> AbstractContextManager[None]:
    """Dispatch past the autograd keys, as the kernel of an autograd.Function must."""
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard
