"""One mix of 9 sources, on the CPU: the native kernel beside what memory allows and beside what else there is.

    native       attnres_fx.mix
    control      the same once more: what the machine's noise makes of nothing (A/A)
    roofline     a C++ loop that reads the same bytes and writes the same rows (roofline.cpp); every ratio is to it
    inductor     the list form of the mix (no stack), torch.compile
    reference    attnres_fx's reference kernels, eager
    attn_res     the eager operator of the package attn-res, and the same under Inductor (only if named by --variants)

Far: the calls rotate through so many working sets that none is in a cache when its turn comes (--megabytes). Near: one
working set, call after call. Variants are called in turn; minimum and median over the rounds. One token is judged by its
overhead instead: a compiled graph of 16 mixes, minus one of none, divided by 16.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers import attn_res
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attnres_fx
from attnres_fx.runtime.cpu import build, native
from attnres_fx.runtime.mix import MIX_REFERENCE

SOURCES, EPS, CHAIN = 9, 1e-6, 16
VARIANTS = ("native", "control", "roofline", "inductor", "reference")
PEERS = ("attn_res", "attn_res, inductor")


@dataclass
class Result:
    """Microseconds of one variant in one case, and its ratios to the roofline."""

    case: str
    variant: str
    min_us: float
    median_us: float
    min_ratio: float
    median_ratio: float


def list_form(sources: Sequence[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """The mix without a stack, in plain torch: what one writes by hand for a compiler."""
    keyed = query * gain
    wide = [source.float() for source in sources]
    logits = [(row * keyed).sum(-1) * torch.rsqrt(row.square().mean(-1) + EPS) for row in wide]
    weights = torch.softmax(torch.stack(logits), dim=0)
    out = weights[0].unsqueeze(-1) * wide[0]
    for weight, row in zip(weights[1:], wide[1:]):
        out = out + weight.unsqueeze(-1) * row
    return out.to(sources[0].dtype)


def load_roofline() -> Any:
    """The loops of roofline.cpp, compiled for this machine."""
    command = build.compiler()
    if command is None:
        sys.exit("the roofline needs a C++ compiler")
    with tempfile.TemporaryDirectory() as work:
        library = Path(work) / "roofline.so"
        source = Path(__file__).with_name("roofline.cpp")
        subprocess.run([*command, "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", str(source), "-o", str(library)],
                       check=True)
        return ctypes.CDLL(str(library))


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: else a call pays or does not pay for fresh pages, by chance, in every variant."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest value it takes


def pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@dataclass
class Case:
    """Sources for one case: ``sets`` working sets, handed out in turn."""

    tokens: int
    width: int
    dtype: torch.dtype
    backward: bool
    sets: list[list[Tensor]]

    @property
    def name(self) -> str:
        kind = "forward+backward" if self.backward else "forward"
        return f"{kind} {str(self.dtype).removeprefix('torch.')} {self.tokens} x {self.width}"


def make_case(tokens: int, width: int, dtype: torch.dtype, backward: bool, bytes_: float) -> Case:
    size = SOURCES * tokens * width * dtype.itemsize
    count = max(1, -(-int(bytes_) // size))
    sets = [[torch.randn(1, tokens, width, dtype=torch.float32).to(dtype).requires_grad_(backward)
             for _ in range(SOURCES)] for _ in range(min(count, 2))]
    # Random numbers take long to make; what is in the further sets does not matter, only where it is.
    sets += [[source.detach().clone().requires_grad_(backward) for source in sets[0]] for _ in range(count - len(sets))]
    return Case(tokens, width, dtype, backward, sets)


def calls_of(case: Case, roofline: Any, inductor: Any) -> dict[str, Callable[[list[Tensor]], Any]]:
    """One function of a working set for each variant."""
    query = (torch.randn(case.width) / case.width**0.5).requires_grad_(case.backward)
    gain = torch.ones(case.width).requires_grad_(case.backward)
    cotangent = torch.randn(1, case.tokens, case.width).to(case.dtype)
    words = case.width * case.dtype.itemsize // 8

    def run(function: Callable[..., Tensor]) -> Callable[[list[Tensor]], Any]:
        if not case.backward:
            return lambda sources: function(sources, query, gain)
        return lambda sources: torch.autograd.grad(function(sources, query, gain), [*sources, query, gain], cotangent)

    def limit(sources: list[Tensor]) -> Tensor:
        result = torch.empty_like(cotangent)
        size = (ctypes.c_int64(case.tokens), ctypes.c_int64(words))
        given = pointers(sources)
        roofline.forward(given, ctypes.c_int64(SOURCES), ctypes.c_void_p(result.data_ptr()), *size)
        if case.backward:
            grads = [torch.empty_like(cotangent) for _ in sources]
            roofline.backward(given, ctypes.c_void_p(cotangent.data_ptr()), ctypes.c_int64(SOURCES), pointers(grads), *size)
        return result

    mixed = run(lambda s, q, g: attnres_fx.mix(s, q, g, eps=EPS))
    return {"native": mixed, "control": mixed, "roofline": limit, "inductor": run(inductor),
            "reference": run(lambda s, q, g: MIX_REFERENCE(s, q, g, EPS)), "attn_res": run(attn_res),
            "attn_res, inductor": run(torch.compile(attn_res, dynamic=False))}


def measure(case: Case, rounds: int, roofline: Any, variants: Sequence[str]) -> list[Result]:
    """Call the variants in turn, each time on the next working set."""
    torch._dynamo.reset()
    calls = calls_of(case, roofline, torch.compile(list_form, dynamic=False))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    turn = itertools.cycle(case.sets)
    with torch.set_grad_enabled(case.backward):
        for number in range(rounds + 2):
            shift = number % len(variants)
            for name in (*variants[shift:], *variants[:shift]):
                sources = next(turn)
                begin = time.perf_counter()
                calls[name](sources)
                if number >= 2:
                    taken[name].append(1e6 * (time.perf_counter() - begin))
    low, middle = min(taken["roofline"]), statistics.median(taken["roofline"])
    return [Result(case.name, name, min(times), statistics.median(times), min(times) / low,
                   statistics.median(times) / middle) for name, times in taken.items()]


def measure_overhead(width: int, dtype: torch.dtype, rounds: int) -> list[Result]:
    """Microseconds that one mix of one token adds to a compiled graph, and an eager call of the operator."""
    sources = [torch.randn(1, 1, width).to(dtype) for _ in range(SOURCES)]
    query, gain = torch.randn(width) / width**0.5, torch.ones(width)

    def chain(mix: Callable[..., Tensor], length: int) -> Callable[..., Tensor]:
        def run(*given: Tensor) -> Tensor:
            value = given[0] + 1
            for _ in range(length):
                value = mix([value, *given[1:]], query, gain)
            return value
        return run

    def ours(s: list[Tensor], q: Tensor, g: Tensor) -> Tensor:
        return attnres_fx.mix(s, q, g, eps=EPS)

    torch._dynamo.reset()
    plain, mixes, lists = (torch.compile(chain(*what), dynamic=False)
                           for what in ((ours, 0), (ours, CHAIN), (list_form, CHAIN)))
    calls: dict[str, Callable[[], Any]] = {
        "native": lambda: mixes(*sources), "control": lambda: mixes(*sources), "inductor": lambda: lists(*sources),
        "plain": lambda: plain(*sources), "eager": lambda: [ours(sources, query, gain) for _ in range(CHAIN)]}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(20 * rounds + 10):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if number >= 10:
                    taken[name].append(1e6 * (time.perf_counter() - begin))
    low, middle = min(taken["plain"]), statistics.median(taken["plain"])
    case = f"one token, {str(dtype).removeprefix('torch.')}, width {width}: us a mix"
    return [Result(case, name, (min(times) - low) / CHAIN, (statistics.median(times) - middle) / CHAIN, 0, 0)
            for name, times in taken.items() if name != "plain"]


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Case]]]:
    for place, size in (("near", 0.0), ("far", arguments.megabytes * 1e6)):
        for tokens, width, name, backward in itertools.product(
                arguments.tokens, arguments.widths, arguments.dtypes, (False, True)):
            if tokens > 1:
                yield place, lambda t=tokens, w=width, n=name, b=backward, s=size: make_case(t, w, getattr(torch, n), b, s)


def table_of(results: Sequence[Result]) -> Table:
    table = Table("case", "variant", "min us", "median us", "min ratio", "median ratio")
    for before, result in zip([None, *results], results):
        ratios = (f"{result.min_ratio:.2f}", f"{result.median_ratio:.2f}") if result.min_ratio else ("", "")
        if before is not None and before.case != result.case:
            table.add_section()
        table.add_row(result.case, result.variant, f"{result.min_us:.1f}", f"{result.median_us:.1f}", *ratios)
    return table


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1024, 2304, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS + PEERS)
    parser.add_argument("--megabytes", type=float, default=640, help="bytes that the far cases rotate through")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that it runs")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.tokens, chosen.widths, chosen.dtypes, chosen.megabytes = [1, 8], [64], ["float32"], 0.1
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    if not native.ensure():
        sys.exit(f"no native kernels to measure: {native.state().reason}")
    roofline, results = load_roofline(), []
    variants = [name for name in VARIANTS + PEERS if name in chosen.variants or name == "roofline"]
    for place, make in cases(chosen):
        case = make()
        results += measure(case, chosen.rounds, roofline, variants)
        for result in results[-len(variants):]:
            result.case += f", {place}"
        print(results[-len(variants)].case, file=sys.stderr)
    if 1 in chosen.tokens:
        for width, name in itertools.product(chosen.widths, chosen.dtypes):
            results += measure_overhead(width, getattr(torch, name), chosen.rounds)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": chosen.threads,
               "capability": torch.backends.cpu.get_cpu_capability(), "rounds": chosen.rounds, "load": os.getloadavg()}
    if chosen.json:
        print(json.dumps({"machine": machine, "results": [asdict(result) for result in results]}, indent=2))
    else:
        console = Console(width=110)
        console.print(table_of(results), machine)
    return results


if __name__ == "__main__":
    main()
