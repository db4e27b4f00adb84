"""What this machine offers the kernels, found out by trying: the content of ``attnres doctor``."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attnres_fx.reports.kernels import KernelTable, kernels
from attnres_fx.reports.streams import render
from attnres_fx.runtime.cpu import build, native
from attnres_fx.version import VERSION


@dataclass(frozen=True)
class Diagnosis:
    """``native``: whether the native CPU kernels work; ``state`` how they were obtained, or why they are missing."""

    versions: str
    cpu: str
    compiler: str
    cache: str
    native: bool
    state: str
    kernels: KernelTable

    def __str__(self) -> str:
        lines = [("versions", self.versions), ("cpu", self.cpu), ("compiler", self.compiler), ("cache", self.cache),
                 ("native kernels", self.state)]
        return render("\n".join(f"{name + ':':16}{value}" for name, value in lines), self.kernels.table())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kernels": self.kernels.to_dict()}


def diagnose() -> Diagnosis:
    """Build the native kernels if they do not exist yet, load them, and report the outcome."""
    there = build.is_built()
    working = native.ensure()
    found = native.state()
    how = "found in the cache" if there else "built"
    state = f"{how} and loaded in {found.seconds:.1f} s: {found.library}" if working else f"not available: {found.reason}"
    return Diagnosis(
        versions=f"attnres_fx {VERSION}, torch {torch.__version__}, Python {platform.python_version()}",
        cpu=f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}, kernels are built for "
            f"{build.capability()}, {torch.get_num_threads()} threads",
        compiler=_compiler(), cache=str(build.cache_directory()), native=working, state=state, kernels=kernels())


def _compiler() -> str:
    command = build.compiler()
    if command is None:
        return "none found (the environment's CXX, else g++, clang++ or c++)"
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)}, which does not run: {error}"
    return f"{' '.join(command)} ({(said.splitlines() or ['no version given'])[0]})"
