"""Triton kernels of the mix, its two phases, and mix and norm in one. Importing this package does not import triton; calling
its functions does.

Their values are tested in Triton's interpreter and their resources in binaries compiled ahead of time; ``benchmarks/gpu.py``
checks and times them on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnres_fx.runtime.errors import KernelError

from .configs import MAX_WIDTH


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def obstacle(device_type: str) -> KernelError | None:
    """Why the kernels cannot run on this kind of device, or None. Does not import triton where the answer is plain."""
    if not _installed():
        return KernelError("the Triton kernels need the package triton, which is not installed",
                           remedy="pip install 'attnres-fx[triton]', or compile with options={'kernels': 'auto'}")
    if device_type == "cuda":
        return None
    if device_type != "cpu":
        return KernelError(f"the Triton kernels do not run on devices of type '{device_type}'",
                           remedy="compile with options={'kernels': 'auto'}")
    refusal = KernelError(
        "Triton has no compiler for the CPU; there its kernels run only in its interpreter, slowly and for tests",
        remedy="compile with options={'kernels': 'auto'}, or start Python with TRITON_INTERPRET=1 in the environment")
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "on", "yes", "y"):
        return refusal
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    # Triton reads the variable when it is first imported.
    return None if isinstance(triton.language.sum, InterpretedFunction) else refusal


def serves(sources: Sequence[Tensor]) -> bool:
    """Whether ``attnres::mix`` on a GPU runs these kernels; where not, plain torch serves, which a warning says once."""
    if not sources or sources[0].shape[-1:].numel() > MAX_WIDTH:
        return False
    refusal = obstacle("cuda")
    if refusal is not None:
        _warn_once(str(refusal))
    return refusal is None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"attnres::mix runs as plain torch operations, several times slower: {reason}", stacklevel=2)


def mix(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any, mixed_out: Tensor | None = None
) -> Tensor:
    """``attnres::mix`` by the Triton kernels. Raises KernelError where they cannot run, and what the mix raises.

    Here and below, results are written to the tensors given for them, checked and contiguous; else to new ones.
    """
    return _launcher(query).mix(sources, query, key_gain, *options, mixed_out=mixed_out)


def mix_backward(
    grad: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """``attnres::mix_backward`` by the Triton kernels, likewise."""
    return _launcher(query).mix_backward(grad, sources, query, key_gain, *options)


def mix_phase1(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any, **outputs: list[Tensor]
) -> list[Tensor]:
    """``attnres::mix_phase1`` by the Triton kernels, for checked arguments. Raises KernelError where they cannot run."""
    made: list[Tensor] = _phases(query).mix_phase1(sources, query, key_gain, *options, **outputs)
    return made


def mix_phase1_backward(
    grads: list[Tensor], sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """``attnres::mix_phase1_backward``, likewise."""
    made: list[Tensor] = _phases(query).mix_phase1_backward(grads, sources, query, key_gain, *options)
    return made


def mix_phase2(
    mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any,
    mixed_out: Tensor | None = None,
) -> Tensor:
    """``attnres::mix_phase2``, likewise."""
    made: Tensor = _phases(query).mix_phase2(mixed, lse, sources, query, key_gain, *options, mixed_out=mixed_out)
    return made


def mix_phase2_backward(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """``attnres::mix_phase2_backward``, likewise."""
    made: list[Tensor] = _phases(query).mix_phase2_backward(grad, mixed, lse, sources, query, key_gain, *options)
    return made


def mix_norm(sources: list[Tensor], query: Tensor, *arguments: Any, **outputs: Tensor | None) -> list[Tensor]:
    """``attnres::mix_norm``, likewise."""
    made: list[Tensor] = _fused(query).mix_norm(sources, query, *arguments, **outputs)
    return made


def mix_norm_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """``attnres::mix_norm_backward``, likewise."""
    made: list[Tensor] = _fused(grad).mix_norm_backward(grad, *arguments)
    return made


def _launcher(tensor: Tensor) -> Any:
    _demand(tensor)
    from . import launch

    return launch


def _phases(tensor: Tensor) -> Any:
    _demand(tensor)
    from . import phases

    return phases


def _fused(tensor: Tensor) -> Any:
    _demand(tensor)
    from . import fused

    return fused


def _demand(tensor: Tensor) -> None:
    """Raise KernelError where the kernels cannot run on the tensor's device."""
    refusal = obstacle(tensor.device.type)
    if refusal is not None:
        raise refusal
