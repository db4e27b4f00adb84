"""Compile the kernels ahead of time, without a GPU, and read from the machine code what they use.

Everything needed is inside the triton package: compilers for NVIDIA and AMD, and NVIDIA's disassembler. Not possible in a
process that runs under ``TRITON_INTERPRET=1``, where the kernels are plain Python functions.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnres_fx.runtime.errors import OptionError

from . import cases

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
_WIDTHS = {"": 4, "32": 4, "64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "256": 32}


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has: registers (of 32 bits) for all its threads, the most a thread may use, shared memory."""

    registers: int
    thread_registers: int
    shared_bytes: int


_CUDA = {80: Limits(65536, 255, 163 << 10), 90: Limits(65536, 255, 227 << 10), 100: Limits(65536, 255, 227 << 10)}
# A compute unit has four register files of 128 KiB; a thread may use 512 registers, half of them through the AGPRs.
_HIP = {"gfx942": Limits(131072, 512, 64 << 10)}


@dataclass(frozen=True)
class Row:
    """What one compiled kernel uses.

    registers per thread, the larger of what the kernel and its calls need; spills: instructions (NVIDIA) or registers (AMD)
    that go through memory; shared_bytes per program; load_bytes: the narrowest global load needed to fetch the source rows;
    programs: how many fit on a multiprocessor by registers and shared memory.
    """

    name: str
    config: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    load_bytes: int
    warps: int
    programs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def parse_target(text: str) -> GPUTarget:
    """"cuda:90" or "hip:gfx942" as Triton's target. Raises OptionError."""
    backend, _, arch = text.partition(":")
    if backend == "cuda" and arch.isdigit() and int(arch) in _CUDA:
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and arch in _HIP:
        return GPUTarget("hip", arch, 64)
    raise OptionError(f"unknown target '{text}'", remedy=f"give one of {', '.join(TARGETS)}")


def table(target_name: str) -> list[cases.Case]:
    """What can be chosen on a target. Raises OptionError for an unknown one."""
    target = parse_target(target_name)
    return list(cases.cases(target.warp_size, int(target.arch) // 10 if target.backend == "cuda" else None))


def compile_case(case: cases.Case, target_name: str) -> Row:
    """Compile one kernel for one target and read its binary.

    Raises: OptionError for an unknown target, or under ``TRITON_INTERPRET=1``.
    """
    target = parse_target(target_name)
    if triton.knobs.runtime.interpret:
        raise OptionError("kernels cannot be compiled under TRITON_INTERPRET=1", remedy="unset TRITON_INTERPRET")
    arguments = case.arguments(target.warp_size)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(case.kernel.arg_names):
        value = arguments.values[name]
        if isinstance(value, tuple):
            signature[name] = tuple(_describe(item, (index, i), constants, attributes) for i, item in enumerate(value))
        else:
            signature[name] = _describe(value, (index,), constants, attributes)
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": arguments.warps}
    if target.backend == "cuda":
        options["maxnreg"] = arguments.registers
    compiled = triton.compile(source, target=target, options=options)
    shared = int(compiled.metadata.shared)
    if target.backend == "cuda":
        registers, spills, loads = _read_cuda(compiled.asm["cubin"])
        limits = _CUDA[int(target.arch)]
    else:
        registers, spills, loads = _read_amd(compiled.asm["amdgcn"])
        limits = _HIP[str(target.arch)]
    load_bytes = _width(loads, case.row_bytes(target.warp_size))
    threads = arguments.warps * target.warp_size
    resident = limits.registers // max(1, threads * (-(-registers // 8) * 8))
    resident = min(resident, limits.shared_bytes // max(1, shared + (1024 if target.backend == "cuda" else 0)))
    return Row(case.name, case.config, target_name, registers, spills, shared, load_bytes, arguments.warps, resident)


def _describe(value: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any], attributes: dict[Any, Any]) -> str:
    """One entry of the signature: a typed argument (aligned pointers, dividing strides) or a constant."""
    if not isinstance(value, cases.Typed):
        constants[path] = value
        return "constexpr"
    if value.divisible:
        attributes[path] = [["tt.divisibility", 16]]
    return value.type


@functools.cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cuda(cubin: bytes) -> tuple[int, int, Counter[int]]:
    """Registers, instructions that spill, and the bytes of global loads by their width."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True)
        code = subprocess.run([_tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True).stdout
    registers = max(int(found) for found in re.findall(r"REG:(\d+)", usage.stdout + usage.stderr))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    loads: Counter[int] = Counter()
    for suffixes in re.findall(r"\bLDG(?:STS)?((?:\.\w+)*)", code):
        width = next((w for part in suffixes.split(".")[::-1] if part and (w := _WIDTHS.get(part)) is not None), 4)
        loads[width] += width
    return registers, spills, loads


def _read_amd(text: str) -> tuple[int, int, Counter[int]]:
    """The same for AMD, from the assembler's own metadata."""
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    registers = number("vgpr_count")  # on gfx942 this counts the AGPRs too
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    loads: Counter[int] = Counter()
    for kind in re.findall(r"\b(?:global|buffer)_load_(\w+)", text):
        words = re.fullmatch(r"dword(?:x(\d))?", kind)
        width = 4 * int(words.group(1) or 1) if words else (2 if "short" in kind else 1)
        loads[width] += width
    return registers, spills, loads


def _width(loads: Counter[int], wanted: int) -> int:
    """The width of loads down to which the widest ones add up to the wanted bytes."""
    fetched = 0
    for width in sorted(loads, reverse=True):
        fetched += loads[width]
        if fetched >= wanted:
            return width
    return min(loads, default=0)
