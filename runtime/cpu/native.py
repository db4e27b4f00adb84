"""Load the native kernels at the first call that can use them; warn once and stay with the reference if it fails."""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import dataclass

import torch

from attnres_fx.runtime.cpu import build


@dataclass(frozen=True)
class State:
    """``status`` is "not loaded", "ready" or "unavailable"; ``reason`` says why; ``seconds`` is what loading took, building
    included."""

    status: str
    reason: str = ""
    library: str = ""
    seconds: float = 0.0


class NativeKernelsWarning(RuntimeWarning):
    """The native kernels are not available; mixes on the CPU run on the reference."""


_lock = threading.Lock()
_state = State("not loaded")


def state() -> State:
    """What is known so far. Builds nothing."""
    return _state


def ensure() -> bool:
    """Whether the native kernels are registered, after building and loading them if that was not tried yet.

    The first failure gives one NativeKernelsWarning; after it this returns False at once.
    """
    global _state
    if _state.status != "not loaded":
        return _state.status == "ready"
    with _lock:
        if _state.status == "not loaded":
            _state = _load()
            if _state.status == "unavailable":
                warnings.warn(
                    "the native CPU kernels of attnres_fx are not available, so mixes run on the slower reference: "
                    f"{_state.reason}. `attnres doctor` shows more", NativeKernelsWarning, stacklevel=2)
    return _state.status == "ready"


def _load() -> State:
    begin = time.perf_counter()
    try:
        library = build.build(lambda reason: warnings.warn(reason, NativeKernelsWarning, stacklevel=4))
        torch.ops.load_library(str(library))
    except build.BuildError as error:
        return State("unavailable", str(error), seconds=time.perf_counter() - begin)
    except (OSError, RuntimeError) as error:
        return State("unavailable", f"{library} was built but cannot be loaded: {error.__cause__ or error}", str(library),
                     time.perf_counter() - begin)
    return State("ready", "", str(library), time.perf_counter() - begin)
