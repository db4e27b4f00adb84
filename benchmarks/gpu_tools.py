"""What the parts of ``gpu.py`` share: results line by line, time that is left, and microseconds of a call on a GPU."""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FAR = 120 << 20  # bytes that calls rotate through: more than the second-level cache of an H100 (50 MB)


class Bench:
    """Where results go, on what device, and for how long.

    Every result is a line of JSON in ``folder``/results.jsonl, written at once, and a line on stdout.
    """

    def __init__(self, folder: Path, device: str, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.device, self.seconds = folder / "results.jsonl", torch.device(device), seconds
        self.section_ends = float("inf")
        self.wanted = ""  # what a section is narrowed to: parts whose names hold this text
        self.cuda = self.device.type == "cuda"
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    def say(self, kind: str, **values: Any) -> None:
        row = {"kind": kind, "t": round(time.monotonic() - self.began, 1), **values}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)

    def left(self) -> float:
        """Seconds before the time of the section, or of all, is up."""
        return min(self.began + self.seconds, self.section_ends) - time.monotonic()

    @contextmanager
    def section(self, name: str, most: float, wanted: str = "") -> Iterator[None]:
        """A section that takes no more than so many seconds, and says how many it took."""
        begin = time.monotonic()
        self.section_ends, self.wanted = begin + most, wanted
        try:
            yield
        finally:
            self.section_ends, self.wanted = float("inf"), ""
            self.say("section", name=name, seconds=round(time.monotonic() - begin, 1))

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What fails is a result, too, and the next part runs."""
        try:
            yield
        except Exception as error:
            self.say("FAILED", what=what, error=f"{type(error).__name__}: {str(error)[:600]}")
            traceback.print_exc(limit=12, file=sys.stdout)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted; not a number where one of them is none."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def problem(bench: Bench, count: int, tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Random sources, each [tokens, width] in ``dtype``, then query and gain [width] in float32, and a gradient."""
    generator = torch.Generator(device=bench.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=bench.device)

    sources = [(normal(tokens, width) * 0.7 ** (index % 12)).to(dtype) for index in range(count)]
    return [*sources, normal(width) * 0.05, 1 + 0.1 * normal(width), normal(tokens, width).to(dtype)]


def sets_of(bench: Bench, size: int) -> int:
    """How many sets of so many bytes a rotation takes, so that none is in the cache when its turn comes."""
    return max(1, min(32, -(-FAR // max(size, 1)))) if bench.cuda else 1


def microseconds(bench: Bench, calls: Sequence[Callable[[], Any]], rounds: int = 7, least: int = 8) -> tuple[float, str]:
    """Median microseconds of one call, of calls taken in turn; replayed from one graph, where that can be captured.

    The second result says how: "graph" or "calls". A graph holds at least ``least`` calls, so that what the events and its
    launch take is a small part of each.
    """
    turns = [calls[index % len(calls)] for index in range(max(least, len(calls)))]

    def all_of_them() -> None:
        for call in turns:
            call()

    replay, how = all_of_them, "calls"
    for call in calls[:2]:
        call()
    bench.sync()
    if not bench.cuda:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            all_of_them()
            times.append((time.perf_counter() - begin) * 1e6 / len(turns))
        return statistics.median(times), how
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_of_them()
        replay, how = graph.replay, "graph"
    except Exception as error:
        torch.cuda.synchronize()
        print(f"no graph: {str(error)[:200]}")
    times = []
    for number in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        if number:
            times.append(begin.elapsed_time(end) * 1e3 / len(turns))
    return statistics.median(times), how


def copy_speed(bench: Bench) -> float:
    """Gigabytes a second of a copy of 512 MB, read and written; what the speed of a mix is held against."""
    elements = (512 << 20 if bench.cuda else 1 << 20) // 2
    source = torch.randn(elements, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    taken, how = microseconds(bench, [lambda: target.copy_(source)])
    speed = 4 * elements / taken / 1e3
    bench.say("copy", MB=elements * 2 >> 20, us=round(taken, 1), GB_s=round(speed), how=how)
    return speed
