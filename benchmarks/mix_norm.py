"""What a layer of Block AttnRes begins with, on the CPU: partial sum + delta, a mix of 9 sources, and its RMSNorm.

    fused        attnres::mix_norm, one native kernel
    control      the same once more: what the machine's noise makes of nothing (A/A)
    parts        an addition and F.rms_norm around attnres::mix, the native kernel of the mix alone

All of them compiled by Inductor. Near and far as in mix.py. The backward is timed by itself, of a forward that was not. With
one thread its CPU time is taken, which leaves out the waiting for a core; with more, the time on the clock.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mix import EPS, SOURCES, keep_freed_memory
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import attnres_fx
from attnres_fx.runtime.cpu import native
from attnres_fx.runtime.mix_norm import MIX_NORM

VARIANTS = ("fused", "control", "parts")
Set = list[Tensor]


def fused(sources: Set, delta: Tensor, query: Tensor, gain: Tensor, weight: Tensor) -> list[Tensor]:
    made: list[Tensor] = MIX_NORM(sources, query, gain, delta, None, None, weight, None, EPS, 1.0, False, 1.0, False, EPS)
    return made


def parts(sources: Set, delta: Tensor, query: Tensor, gain: Tensor, weight: Tensor) -> list[Tensor]:
    partial = sources[-1] + delta
    mixed = attnres_fx.mix([*sources[:-1], partial], query, gain, eps=EPS)
    return [F.rms_norm(mixed, [mixed.shape[-1]], weight.to(mixed.dtype), EPS), partial]


def timed(
    calls: dict[str, Callable[[Set], Any]], sets: Sequence[Set], rounds: int, before: Any = None
) -> dict[str, list[float]]:
    """Microseconds of the variants, called in turn, each time on the next working set."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    turn = itertools.cycle(sets)
    for number in range(rounds + 2):
        shift = number % len(VARIANTS)
        for name in (*VARIANTS[shift:], *VARIANTS[:shift]):
            given = next(turn) if before is None else before(name, next(turn))
            begin = clock()
            calls[name](given)
            if number >= 2:
                taken[name].append(1e6 * (clock() - begin))
    return taken


def measure(
    compiled: dict[str, Any], tokens: int, width: int, dtype: torch.dtype, megabytes: float, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Forward and backward of one case, on working sets of ``megabytes`` together."""
    count = max(1, -(-int(megabytes * 1e6) // (SOURCES * tokens * width * dtype.itemsize)))
    first = [torch.randn(1, tokens, width).to(dtype) for _ in range(SOURCES + 1)]
    sets = [[tensor.clone().requires_grad_() for tensor in first] for _ in range(count)]
    vectors = [torch.randn(width) / width**0.5, torch.ones(width), torch.ones(width)]
    parameters = [vector.requires_grad_() for vector in vectors]
    cotangents = [torch.randn(1, tokens, width).to(dtype) for _ in range(2)]

    def call(name: str, given: Set) -> list[Tensor]:
        made: list[Tensor] = compiled[name](given[:-1], given[-1], *parameters)
        return made

    with torch.no_grad():
        forward = timed({name: functools.partial(call, name) for name in VARIANTS}, sets, rounds)

    def prepared(name: str, given: Set) -> Set:
        return [*call(name, given), *given, *parameters]

    def backward(made: Set) -> Any:
        return torch.autograd.grad(made[:2], made[2:], cotangents)

    return {"forward": forward, "backward": timed(dict.fromkeys(VARIANTS, backward), sets, rounds, prepared)}


def main(arguments: Sequence[str] | None = None) -> list[tuple[str, dict[str, list[float]]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512x1024", "2048x512", "1x1024"], help="tokens x width")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--megabytes", type=float, default=640, help="bytes that the far cases rotate through")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that it runs")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.shapes, chosen.dtypes, chosen.megabytes, chosen.rounds = ["4x64"], ["float32"], 0.1, 2
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    if not native.ensure():
        sys.exit(f"no native kernels to measure: {native.state().reason}")
    results = []
    table = Table("case", "variant", "min us", "median us", "parts / fused, min", "median")
    for shape, dtype in itertools.product(chosen.shapes, chosen.dtypes):
        tokens, width = map(int, shape.split("x"))
        torch._dynamo.reset()
        compiled = {name: torch.compile(function, dynamic=False) for name, function in (("fused", fused), ("parts", parts))}
        compiled["control"] = compiled["fused"]
        for place, megabytes in (("near", 0.0), ("far", chosen.megabytes))[: 1 if tokens == 1 else 2]:
            rounds = chosen.rounds * (20 if tokens == 1 else 1)
            for direction, taken in measure(
                    compiled, tokens, width, getattr(torch, dtype), megabytes, rounds).items():
                results.append((f"{direction} {dtype} {shape}, {place}", taken))
                found = {name: (min(times), statistics.median(times)) for name, times in taken.items()}
                for name, (low, middle) in found.items():
                    ratios = [f"{one / other:.2f}" for one, other in zip(found["parts"], (low, middle))]
                    table.add_row(results[-1][0], name, f"{low:.1f}", f"{middle:.1f}", *ratios)
                table.add_section()
                print(results[-1][0], file=sys.stderr)
    Console(width=110).print(table, {"torch": torch.__version__, "threads": chosen.threads, "load": os.getloadavg()})
    return results


if __name__ == "__main__":
    main()
