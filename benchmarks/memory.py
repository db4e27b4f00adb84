"""What models hold, by the allocator's own events, beside what is planned: plain, converted, the paper's pseudocode.

The model of ``model.py``, small. Everything is counted in rows, of tokens x d elements of the stream, and relative to the
plain network: the peak of an inference, the arena included that a pool keeps from call to call, and this arena, which is the
plan's size; in training, what is kept between forward and backward, and the peak of a step. All models are compiled.
Times play no part, so that one call of each is enough.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from attnres_fx.runtime.arena import ArenaPool

sys.path.insert(0, str(Path(__file__).parent))
import model as whole_models


@dataclass(frozen=True)
class Held:
    """Bytes above what stood before a call: kept when it ended, and at most meanwhile."""

    kept: int
    peak: int


@dataclass
class Result:
    """One variant, in rows; ``arena`` is the part of ``inference_peak`` that is planned."""

    layers: int
    blocks: int
    variant: str
    inference_peak: float
    arena: float
    kept_for_backward: float
    step_peak: float


def held(call: Callable[[], Any]) -> tuple[Any, Held]:
    """A call, and what the CPU's allocator was asked for meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return result, Held(total, peak)


def measure(variant: str, network: nn.Module, ids: Tensor, row: int) -> tuple[float, float, float, float]:
    """Rows at the peak of an inference, in the arena, kept for the backward, and at the peak of a training step."""
    torch._dynamo.reset()
    gc.collect()
    ours: Any = {"backend": "attnres", "options": whole_models.OPTIONS[variant]} if variant in whole_models.OPTIONS else {}
    compiled = torch.compile(network, **ours)

    def infer() -> Tensor:
        with torch.no_grad():
            return compiled(ids)

    def forward() -> Tensor:
        return F.cross_entropy(compiled(ids).flatten(0, 1), ids.flatten())

    infer()
    inference = held(infer)[1]
    arena = sum(pool.bytes() for pool in gc.get_objects() if type(pool) is ArenaPool)
    forward().backward()  # the gradients of the parameters stand from here on
    loss, kept = held(forward)
    del loss

    def step() -> None:
        forward().backward()

    peak = held(step)[1]
    return (inference.peak + arena) / row, arena / row, kept.kept / row, peak.peak / row


def compare(layers: int, blocks: int, width: int, tokens: int, variants: Sequence[str]) -> list[Result]:
    """All variants of one size."""
    case = whole_models.Case("memory", width, 1, tokens, training=True, layers=layers)
    models = whole_models.build(case, variants, blocks)
    ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))
    return [Result(2 * layers, blocks, name, *measure(name, network, ids, tokens * width * 4))
            for name, network in models.items()]


def table_of(results: Sequence[Result]) -> Table:
    """In rows, and beyond plain in brackets."""
    table = Table("layers", "blocks", "variant", "inference peak", "of it the arena", "kept for backward", "step peak")
    plain: Result | None = None
    for result in results:
        if result.variant == "plain":
            plain = result
        assert plain is not None
        columns = [(result.inference_peak, plain.inference_peak), (result.kept_for_backward, plain.kept_for_backward),
                   (result.step_peak, plain.step_peak)]
        shown = [f"{own:.1f}" if result is plain else f"{own:.1f} ({own - base:+.1f})" for own, base in columns]
        table.add_row(str(result.layers), str(result.blocks), result.variant, shown[0], f"{result.arena:.1f}", *shown[1:])
    return table


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="transformer layers, of two additions each")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--variants", nargs="+", choices=whole_models.VARIANTS, default=list(whole_models.VARIANTS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    results: list[Result] = []
    for layers in chosen.layers:
        for blocks in chosen.blocks:
            results += compare(layers, blocks, chosen.width, chosen.tokens, chosen.variants)
    if chosen.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        console = Console(width=120, highlight=False)
        console.print(f"rows of {chosen.tokens} x {chosen.width} float32; beyond plain in brackets")
        console.print(table_of(results))
    return results


if __name__ == "__main__":
    main()
