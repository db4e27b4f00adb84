"""Where the time of a whole model goes: matrix products, attention, mixes, the kernels of Inductor, the rest.

The models and cases of ``model.py``, called in turn under torch's profiler. For each variant the microseconds of a call by
kind of operation, the minimum over the rounds, and beyond ``plain``; what the kinds leave of the whole call is overhead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
import model as whole_models

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::", "mkl::", "cpp_CppMicroGemm", "cpp_fused_mm",
                        "attnres::mm_into", "attnres::addmm_into"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash"),
    "mixes": ("attnres::mix", "attnres::arena"),
    "Inductor's kernels": ("cpp_fused", "graph_"),
}
WHOLE = "whole call"


@dataclass
class Result:
    """Microseconds of one kind of operation in a call, the least of all rounds."""

    case: str
    variant: str
    kind: str
    microseconds: float


def spent(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of one call by kind: of operations that no other of a known kind encloses."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded, torch.profiler.record_function(WHOLE):
        call()
    found = dict.fromkeys([*KINDS, WHOLE], 0.0)
    for event in recorded.events():
        kind = WHOLE if event.name == WHOLE else _kind(event.name)
        parent = event.cpu_parent
        while parent is not None and _kind(parent.name) is None:
            parent = parent.cpu_parent
        if kind is not None and (kind == WHOLE or parent is None):
            found[kind] += event.cpu_time_total
    found["overhead"] = found[WHOLE] - sum(found[kind] for kind in KINDS)
    return found


def _kind(name: str) -> str | None:
    return next((kind for kind, beginnings in KINDS.items() if name.startswith(beginnings)), None)


def account(case: whole_models.Case, rounds: int, variants: Sequence[str]) -> list[Result]:
    """Compile the variants, then profile them in turn."""
    torch._dynamo.reset()
    ids = torch.randint(256, (case.batch, case.tokens), generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[], Any]] = {}
    for name, network in whole_models.build(case, variants).items():
        ours: Any = {"backend": "attnres", "options": whole_models.OPTIONS[name]} if name in whole_models.OPTIONS else {}
        calls[name] = whole_models.call_of(case, network, torch.compile(network, **ours), ids)
        calls[name]()
    least: dict[tuple[str, str], float] = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            for kind, time in spent(call).items():
                if number:
                    least[name, kind] = min(time, least.get((name, kind), time))
    return [Result(case.name, name, kind, time) for (name, kind), time in least.items()]


def table_of(results: Sequence[Result]) -> Table:
    """A row a kind, a column a variant, and beyond plain in brackets."""
    variants = list(dict.fromkeys(result.variant for result in results))
    table = Table("case", "us of a call", *variants)
    known = {(result.case, result.variant, result.kind): result.microseconds for result in results}
    for case, kind in dict.fromkeys((result.case, result.kind) for result in results):
        plain = known[case, "plain", kind]
        cells = [f"{known[case, name, kind]:.0f}" + ("" if name == "plain" else f" ({known[case, name, kind] - plain:+.0f})")
                 for name in variants]
        table.add_row(case, kind, *cells, end_section=kind == "overhead")
    return table


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=[case.name for case in whole_models.CASES], help="repeatable")
    known = [*whole_models.OPTIONS, "pseudocode"]
    parser.add_argument("--variants", nargs="+", choices=known, default=["attnres", "unfused"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="two tiny cases, to see that the program runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    torch._inductor.config.cpp.enable_kernel_profile = True
    cases = whole_models.QUICK if chosen.quick else [
        case for case in whole_models.CASES if chosen.case is None or case.name in chosen.case]
    results = [result for case in cases for result in account(case, chosen.rounds, chosen.variants)]
    if chosen.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        Console(width=120, highlight=False).print(table_of(results))
    return results


if __name__ == "__main__":
    main()
