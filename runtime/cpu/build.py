"""Compile the C++ kernels once per machine and user, and find them again.

A library is named after everything that its machine code depends on: the sources, torch's release and ABI, the flags and
the instruction set. It is written under another name and renamed when it is whole, so that a process never loads half a
file; a lock keeps processes that start together from doing the same work.

Beside it stands a record of its size and hash. A library that does not match its record (cut short by a full disk, say)
would crash the process when loaded: it is built again. In a directory that others can write to, a library may be theirs:
nothing is loaded from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_MAIN = "operators.cpp"
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
    """The path of the library for this torch, these sources and this machine, once it is built."""
    parts = [torch.__version__, str(torch.compiled_with_cxx11_abi()), platform.machine(), *platform.libc_ver(), *_flags()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\n" + source.read_bytes())
    return cache_directory() / f"mix_cpu_{digest.hexdigest()[:24]}.so"


def build(report: Callable[[str], None] = lambda reason: None) -> Path:
    """Compile, unless it has been done. ``report`` is called with the reason why an existing library is built again.

    Raises: BuildError.
    """
    library = library_path()
    _check_directory(library.parent)
    fault = _fault(library)
    if fault is None:
        return library
    if sys.platform != "linux":
        raise BuildError(f"they are built on Linux only, and this is {sys.platform}")
    command = compiler()
    if command is None:
        wanted = os.environ.get("CXX") or "g++, clang++ or c++"
        damaged = f"'{library}' {fault}, and " if library.exists() else ""
        raise BuildError(f"{damaged}no C++ compiler was found ({wanted})")
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_directory(library.parent)
        with _locked(library.with_suffix(".lock")):
            if _fault(library) is not None:
                if library.exists():
                    report(f"'{library}' {fault}; it is built again")
                _compile(command, library)
    except OSError as error:
        raise BuildError(f"{error.strerror or error}: {error.filename or library.parent} (ATTNRES_CACHE_DIR names another "
                         "directory for them)") from error
    return library


def is_built() -> bool:
    """Whether the library exists, as it was written."""
    return _fault(library_path()) is None


def _record_of(content: bytes) -> str:
    """The content of a library's record: its size in bytes and its SHA-256."""
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def _check_directory(directory: Path) -> None:
    """Raise BuildError if another user may have put files into ``directory``, or could replace them."""
    try:
        found = directory.stat()
    except OSError:
        return  # it is made, or found missing, later
    if hasattr(os, "geteuid") and found.st_uid not in (os.geteuid(), 0):
        raise BuildError(f"the cache directory '{directory}' belongs to another user, whose code would be run "
                         "(ATTNRES_CACHE_DIR names another)")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise BuildError(f"anyone can write to the cache directory '{directory}', so that its code may be anyone's "
                         "(take the right away: chmod o-w; or ATTNRES_CACHE_DIR names another)")


def _fault(library: Path) -> str | None:
    """Why ``library`` must not be loaded, in words that follow its name; None if it is as it was written."""
    try:
        content, recorded = library.read_bytes(), _record(library).read_text()
        owners = {path.stat().st_uid for path in (library, _record(library))}
        open_to_all = any(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for path in (library, _record(library)))
    except (OSError, UnicodeDecodeError):
        return "has no record of its size and hash"
    if hasattr(os, "geteuid") and not owners <= {os.geteuid(), 0}:
        return "belongs to another user"
    if open_to_all:
        return "can be written to by others"
    return None if recorded == _record_of(content) else f"has other bytes than were written ({len(content):,} of them)"


def _record(library: Path) -> Path:
    return library.with_suffix(".sha256")


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
        recorded = Path(work) / "mix.sha256"
        recorded.write_text(_record_of(result.read_bytes()))
        for path in (recorded, result):
            path.chmod(0o644)
        library.unlink(missing_ok=True)  # a process that has it loaded keeps what it has
        recorded.replace(_record(library))
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
