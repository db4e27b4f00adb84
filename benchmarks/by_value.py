"""Models whose stream is a value, beside plain ones and the whole graph: eagerly, and with layers compiled one by one.

    plain        the residual network, called in the same way
    control      the same model once more: what the machine's noise makes of nothing (A/A)
    attnres      converted, one whole graph: run as it is (eager), or through the backend ``attnres`` (regions)
    by value     converted, its stream an object between the layers
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from model import Case, Result, build, call_of, in_turn, summarize, table_of
from rich.console import Console
from torch import Tensor

from attnres_fx.runtime.stream import BY_GRAPH, BY_VALUE

CASES = [
    Case("inference-64-2x128", 64, 2, 128),
    Case("inference-512-2x128", 512, 2, 128),
    Case("inference-512-2x512", 512, 2, 512),
    Case("training-64-2x128", 64, 2, 128, training=True),
    Case("training-512-2x512", 512, 2, 512, training=True),
]
QUICK = [Case("quick-inference", 64, 1, 16, layers=2), Case("quick-training", 64, 1, 16, training=True, layers=2)]


def callables(case: Case, way: str) -> dict[str, Callable[[], Tensor]]:
    """What is called of each variant; ``way`` is "eager" or "regions"."""
    models = build(case, ["attnres"])
    models["by value"] = copy.deepcopy(models["attnres"])
    models["attnres"].__dict__[BY_GRAPH] = models["by value"].__dict__[BY_VALUE] = "to compare"
    run: dict[str, Any] = dict(models)
    if way == "regions":
        for name, backend in (("plain", "inductor"), ("by value", "attnres")):
            for layer in models[name].layers:
                layer.compile(backend=backend)
        run["attnres"] = torch.compile(models["attnres"], backend="attnres")
    ids = torch.randint(256, (case.batch, case.tokens), generator=torch.Generator().manual_seed(1))
    return {name: call_of(case, model, run[name], ids) for name, model in models.items()}


def measure(case: Case, way: str, rounds: int) -> list[Result]:
    """All variants in turn, ``rounds`` times."""
    torch._dynamo.reset()
    calls = callables(case, way)
    first: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        outputs[name] = call()
        first[name] = time.perf_counter() - begin
    calls["control"], first["control"] = calls["plain"], first["plain"]
    taken = in_turn(calls, ["plain", "control", "attnres", "by value"], rounds, outputs)
    results = summarize(case, taken, first, outputs)
    assert max(result.deviation for result in results) < 1e-3, results
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=["eager", "regions"], default=["eager", "regions"])
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two tiny cases, to see that the benchmark runs")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    console = Console(width=120, highlight=False)
    for way in chosen.ways:
        results = [result for case in (QUICK if chosen.quick else CASES) for result in measure(case, way, chosen.rounds)]
        console.print(f"{way}: torch {torch.__version__}, {chosen.threads} threads, {chosen.rounds} rounds")
        console.print(table_of(results))


if __name__ == "__main__":
    main()
