"""Every touch of torch's private interfaces in the runtime, each with its test in ``test_runtime_compat.py``.

Written against torch 2.11 to 2.15. A new torch release is supported when these tests pass on it.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad

__all__ = ["OpOverload", "OpOverloadPacket"]

# Raise ValueError or TypeError unless a condition holds; like ``torch._check``, they accept symbolic sizes.
check_value, check_type = torch._check_value, torch._check_type

TESTED = (2, 11), (2, 15)  # the oldest and the newest release


def warn_of_untested(version: str) -> None:
    """Warn, once per process, if this release of torch is not one that the private interfaces were tested on."""
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else None
    if release is None or not TESTED[0] <= release <= TESTED[1]:
        oldest, newest = (".".join(map(str, each)) for each in TESTED)
        warnings.warn(f"attnres_fx was tested on torch {oldest} to {newest}, this is {version}: it goes on, and where it "
                      "fails, that may be why", stacklevel=2)


warn_of_untested(torch.__version__)


def any_requires_grad(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None) -> bool:
    """Whether one of the tensors requires a gradient; in C++, since it is checked at every eager call."""
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


def is_shared(tensor: Tensor) -> bool:
    """Whether another tensor shares the memory of ``tensor``, or could through the tensor that it is a view of."""
    handle = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(handle._cdata)) > 2  # the tensor's own, and the handle's


def stream_id(device: torch.device) -> int:
    """The stream in whose order this thread's work on a device is done; memory must not silently pass to another."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a graph of GPU work is being captured, which owns the memory that is allocated meanwhile."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def inside_autograd_function() -> bool:
    """Whether a torch.autograd.Function is running its forward, in which autograd records nothing.

    By the frames on the stack. A backward is not meant: a checkpointed layer is computed again within one.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" or code.co_varnames[:1] == ("ctx",):
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if not isinstance(first, torch.nn.Module) and code in _forwards(torch.autograd.Function):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _forwards(function: Any) -> Iterator[Any]:
    """The code of the forwards of all functions derived from ``function``."""
    for derived in function.__subclasses__():
        yield getattr(inspect.unwrap(derived.forward), "__code__", None)
        yield from _forwards(derived)


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread: what runs is computed again for it."""
    return bool(torch._C._current_graph_task_id() != -1)


def saved_tensor_hooks() -> Any:
    """What tells one checkpointed region, and its recomputation, from another: the hooks that keep what autograd saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def times_written(tensor: Tensor) -> int:
    """How often ``tensor``, or what shares its memory, was written into; -1 of an inference tensor, which does not count."""
    return -1 if tensor.is_inference() else int(tensor._version)
