"""Inductor's C++ for the tests: the same kernels, many in one translation unit, at -O1.

Reading the precompiled header and linking cost more than most kernels do, and Inductor pays both for each. Here all kernels
that wait are compiled together when one of them is first called, and a kernel that was built is found again by its source.
Scheduling, code generation, the wrapper's code and every pass are Inductor's and the project's own; only what calls the C++
compiler, and how often, is other. ``ATTNRES_TESTS_CXX=inductor`` leaves that to Inductor too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache

_SCALARS = {"float": ctypes.c_float, "double": ctypes.c_double}


class _Units(CppCodeCache):
    """Compiled as Inductor compiles its kernels, and loaded through ctypes: a unit exports many."""

    cache: dict[str, Any] = {}
    cpp_compile_command_flags = CppPythonBindingsCodeCache.cpp_compile_command_flags
    _get_uncompiled_header = CppPythonBindingsCodeCache._get_uncompiled_header


class _Kernel:
    """A kernel of the source ``code``, which is built with all that wait when it is first called."""

    waiting: dict[str, _Kernel] = {}
    built: dict[str, _Kernel] = {}
    lock = threading.RLock()

    def __init__(self, argtypes: list[str], code: str) -> None:
        self.code, self.function = code, None
        self.types = [ctypes.c_void_p if each.endswith("*") else _SCALARS.get(each.removeprefix("const "), ctypes.c_int64)
                      for each in argtypes]

    @classmethod
    def of(cls, argtypes: list[str], code: str) -> _Kernel:
        with cls.lock:
            return cls.built.get(code) or cls.waiting.setdefault(code, cls(argtypes, code))

    @classmethod
    def build(cls) -> None:
        """One unit of everything that waits."""
        with cls.lock:
            kernels, cls.waiting = list(cls.waiting.values()), {}
            includes: dict[str, None] = {}
            parts = []
            for at, kernel in enumerate(kernels):
                lines = kernel.code.splitlines()
                includes.update(dict.fromkeys(line for line in lines if line.startswith("#include")))
                body = "\n".join(line for line in lines if not line.startswith("#include"))
                parts.append(f"#define kernel kernel_{at}\nnamespace unit_{at} {{\n{body}\n}}\n#undef kernel\n")
            # An empty second part is Inductor's sign for little optimisation, in one step.
            library = _Units.load("\n".join([*includes, *parts]), optimized_code="")
            for at, kernel in enumerate(kernels):
                kernel.function = getattr(library, f"kernel_{at}")
                kernel.function.argtypes, kernel.function.restype = kernel.types, None
                cls.built[kernel.code] = kernel

    def __call__(self, *args: Any) -> None:
        if self.function is None:
            with self.lock:
                if self.function is None:
                    self.build()
        assert self.function is not None
        self.function(*(value.data_ptr() if isinstance(value, Tensor) else value for value in args))


def _cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Callable[..., None]:
    return _Kernel.of(argtypes, source_code)


@contextlib.contextmanager
def one_unit() -> Iterator[None]:
    """Within, Inductor's CPU kernels are built so, and no processes are started to build them."""
    if os.environ.get("ATTNRES_TESTS_CXX") == "inductor":
        yield
        return
    theirs = AsyncCompile.cpp_pybinding
    AsyncCompile.cpp_pybinding = _cpp_pybinding  # type: ignore[method-assign]
    try:
        with torch._inductor.config.patch(compile_threads=1):
            yield
    finally:
        AsyncCompile.cpp_pybinding = theirs  # type: ignore[method-assign]
