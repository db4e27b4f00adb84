"""How long Python takes over an eager call of an operator before Triton launches anything: every kernel is replaced by one
that does nothing, so any machine will do.

    python benchmarks/host.py

One token, d=2048, bfloat16; microseconds, minimum and median of 400 calls through torch's dispatcher.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from attnres_fx.runtime import mix, mix_norm, triton
from attnres_fx.runtime.into import INTO
from attnres_fx.runtime.triton import launch

WIDTH, ROUNDS = 2048, 400
OPTIONS = (1e-6, 1.0, False, 1.0)


class Nothing:
    """In place of a kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def operators(count: int) -> dict[str, Callable[[], Any]]:
    """A call of each operator on ``count`` sources."""
    *sources, delta, grad = (torch.randn(1, 1, WIDTH).bfloat16() for _ in range(count + 2))
    query, gain, weight = (torch.randn(WIDTH) for _ in range(3))
    normed, partial = torch.empty_like(delta), torch.empty_like(delta)
    norm = (None, None, weight, None, *OPTIONS, False, 1e-6)
    return {
        "mix": lambda: mix.MIX_TRITON(sources, query, gain, *OPTIONS),
        "mix_backward": lambda: mix.MIX_BACKWARD_TRITON(grad, sources, query, gain, *OPTIONS),
        "mix_norm": lambda: mix_norm.MIX_NORM_TRITON(sources, query, gain, delta, *norm),
        "mix_norm_into": lambda: INTO[mix_norm.MIX_NORM_TRITON](sources, query, gain, delta, *norm, normed_out=normed,
                                                               partial_out=partial),
        "mix_norm_backward": lambda: mix_norm.MIX_NORM_BACKWARD_TRITON(grad, grad, sources, query, gain, *norm)}


def microseconds(call: Callable[[], Any]) -> list[float]:
    for _ in range(50):
        call()
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begin) * 1e6)
    return taken


def replaced() -> list[Any]:
    """All that stands between the operators and a GPU."""
    kernels = {name: Nothing() for name in ("mix_backward", "mix_scores", "mix_source_grads", "reduce_parameter_grads")}
    others = {name: Nothing() for name in ("forward_kernel", "mix_backward_again", "norm_backward")}
    return [mock.patch.multiple(launch, **others), mock.patch.multiple(launch.kernels, **kernels),
            mock.patch.object(triton, "obstacle", lambda device: None)]


@torch.no_grad()
def main() -> None:
    planned = mock.patch.object(triton, "recipes", lambda like: [])
    table = Table(title=f"torch {torch.__version__}, us: minimum, median", title_justify="left")
    for heading in ("operator", "sources", "the like was called before", "planned anew"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    first, second, third = replaced()
    with first, second, third:
        for count in (2, 9):
            for name, call in operators(count).items():
                known = microseconds(call)
                with planned:
                    anew = microseconds(call)
                cells = [f"{min(taken):.1f}, {statistics.median(taken):.1f}" for taken in (known, anew)]
                table.add_row(name, str(count), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
