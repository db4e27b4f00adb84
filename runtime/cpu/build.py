"""Compile the C++ kernels once a machine and user, and find them again.

A library is named after everything that its machine code depends on: the sources, torch's release and ABI, the flags and
the instruction set. It is written under another name and renamed when it is whole, so that a process never loads half a
file; a lock keeps processes that start together from doing the same work.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_MAIN = "mix_cpu.cpp"
_TIME_LIMIT = 600

_VECTOR_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
}


class BuildError(Exception):
    """The kernels cannot be compiled here; the message is the reason, in one line."""


def capability() -> str:
    """The instruction set that torch itself uses on this machine, reduced to those that the kernels are compiled for."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in _VECTOR_FLAGS else "DEFAULT"


def compiler() -> list[str] | None:
    """The command of the C++ compiler: the environment's ``CXX``, else g++, clang++ or c++; None if there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        return given if shutil.which(given[0]) else None
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return None if found is None else [found]


def cache_directory() -> Path:
    """``$ATTNRES_CACHE_DIR``, or ``attnres_fx`` in the user's cache directory. It need not exist."""
    given = os.environ.get("ATTNRES_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attnres_fx"


def library_path() -> Path:
    """Where the library for this torch, these sources and this machine stands once it is built."""
    parts = [torch.__version__, str(torch.compiled_with_cxx11_abi()), platform.machine(), *platform.libc_ver(), *_flags()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\n" + source.read_bytes())
    return cache_directory() / f"mix_cpu_{digest.hexdigest()[:24]}.so"


def build() -> Path:
    """Compile, unless it has been done. Raises BuildError."""
    library = library_path()
    if library.exists():
        return library
    if sys.platform != "linux":
        raise BuildError(f"they are built on Linux only, and this is {sys.platform}")
    command = compiler()
    if command is None:
        wanted = os.environ.get("CXX") or "g++, clang++ or c++"
        raise BuildError(f"no C++ compiler was found ({wanted})")
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():
                _compile(command, library)
    except OSError as error:
        raise BuildError(f"{error.strerror or error}: {error.filename or library.parent} (ATTNRES_CACHE_DIR names another "
                         "directory for them)") from error
    return library


def _flags() -> list[str]:
    chosen = capability()
    rounds = chosen == "AVX512" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden", "-w",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-DCPU_CAPABILITY={chosen}",
            *_VECTOR_FLAGS.get(chosen, []), *(["-mavx512bf16"] if rounds else [])]


def _compile(command: list[str], library: Path) -> None:
    home = Path(torch.__file__).parent
    # torch's own OpenMP runtime, by its file, where the wheel brings one: a second one would mean a second thread pool.
    own = sorted((home / "lib").glob("libgomp*.so*")) + sorted((home.parent / "torch.libs").glob("libgomp*.so*"))
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as work:
        object_file, result = Path(work) / "mix.o", Path(work) / "mix.so"
        compiling = [*command, *(flag for flag in _flags() if flag != "-shared"), "-isystem", str(home / "include"), "-c",
                     str(SOURCES / _MAIN), "-o", str(object_file)]
        linking = [*command, "-shared", "-Wl,--no-undefined", str(object_file), "-o", str(result), f"-L{home / 'lib'}",
                   "-lc10", "-ltorch_cpu", *([str(own[0])] if own else ["-fopenmp"])]
        for step in (compiling, linking):
            _run(step)
        result.replace(library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {_TIME_LIMIT} s") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
        said = lines[0] if lines else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BuildError(f"{command[0]} failed with exit code {done.returncode}: {said}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` where the file system has locks; without, work may be done twice, never wrongly."""
    import fcntl

    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
