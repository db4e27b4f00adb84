"""Bytes that the Triton kernels move, counted in Triton's interpreter, beside the paper's count and a peer's kernels.

    python benchmarks/kernel_traffic.py                 (no GPU is used)

By mix: rows of d stored elements that a token loads and stores, forward and backward, for so many sources in bfloat16.
Queries and gains are left out: they belong to no token, and stay in a cache. One program walks over all tokens, so that the
sums over tokens are one row.
Liger-Kernel stands beside it where it is installed (see peers.py); what stacking its sources costs is not counted.
By network: the average for a layer of 128 in 8 blocks, as Table 1 of the paper has it, by the cost model to which the tests
hold the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from peers import liger_kernel
from rich.console import Console
from rich.table import Table
from support import kernel_traffic as traffic
from torch import Tensor

from attnres_fx.runtime.mix import MIX_TRITON
from attnres_fx.runtime.triton import configs
from attnres_fx.runtime.triton import traffic as costs

LAYERS, PER_BLOCK = 128, 16


def counted(mix: Callable[..., Tensor], count: int, tokens: int, width: int) -> tuple[float, float]:
    """Rows a token that the forward and the backward of one mix load and store."""
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(1, tokens, width, generator=generator).bfloat16().requires_grad_() for _ in range(count)]
    query, gain = (torch.randn(width, generator=generator).requires_grad_() for _ in range(2))
    rows = {f"source {index}": source for index, source in enumerate(sources)}
    moved = []
    with traffic.counting({"query": query, "gain": gain, **rows}) as counter:
        result = mix(sources, query, gain)
    moved.append(counter)
    grad = torch.randn(result.shape, generator=generator).bfloat16()
    with mock.patch.object(configs, "PARTIAL_ROWS", 1), traffic.counting({"query": query, "gain": gain, **rows}) as counter:
        torch.autograd.grad(result, [*sources, query, gain], grad)
    moved.append(counter)
    unit = tokens * width * grad.element_size()
    forward, backward = ((each.loaded.total() - each.loaded["query"] - each.loaded["gain"] + each.stored.total()) / unit
                         for each in moved)
    return forward, backward


def two_phases(width: int) -> float:
    """What the two-phase kernels move for a token and layer, in units of d, inference.

    A block's first mix takes the row of phase 1 as it is; the others read the partial sum, which the launch completes.
    """
    total = 0.0
    for block in range(LAYERS // PER_BLOCK):
        early = costs.Mix(block + 1, width, PER_BLOCK, phase=1)
        late = replace(costs.Mix(1, width, phase=2), add=True)
        total += costs.forward(early).total + (PER_BLOCK - 1) * costs.forward(late).total
    return total / LAYERS / early.row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 5, 9, 17, 33])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    forms: dict[str, Callable[..., Tensor]] = {"attnres_fx": MIX_TRITON}
    if find_spec("liger_kernel") is not None:
        forms["liger_kernel"] = liger_kernel
    found = {name: {count: counted(mix, count, chosen.tokens, chosen.width) for count in chosen.sources}
             for name, mix in forms.items()}
    paper, one_pass = costs.two_phase_network(LAYERS, PER_BLOCK), costs.one_pass_network(LAYERS, PER_BLOCK, chosen.width)
    network = {"paper, two phases": paper, "one pass": one_pass, "two phases": two_phases(chosen.width)}
    if chosen.json:
        print(json.dumps({"rows": found, "network": network}))
        return
    table = Table("sources", *(f"{name}, {step}" for name in forms for step in ("forward", "backward")),
                  title=f"rows a token, d={chosen.width}, bfloat16")
    for count in chosen.sources:
        table.add_row(str(count), *(f"{rows:.2f}" for name in forms for rows in found[name][count]))
    Console(width=110).print(table)
    told = ", ".join(f"{name} {rows:.2f}" for name, rows in network.items())
    print(f"d per token and layer, {LAYERS} layers in {LAYERS // PER_BLOCK} blocks: {told}")


if __name__ == "__main__":
    main()
