"""What the tests of arenas record of the graphs that are compiled and the operators that run."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_fx import downstream as downstream_module
from attnres_fx.passes.memory import place as arena_pass
from attnres_fx.passes.memory.place import Arena, plan_arenas
from attnres_fx.runtime.arena import ArenaPool
from attnres_fx.runtime.mix_norm import MIX_NORM_REFERENCE


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs from no cache: the passes are to run in every test."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Arena]:
    """The arenas of every graph that is compiled."""
    found: list[Arena] = []

    def record(rows: Any) -> list[Arena]:
        arenas = plan_arenas(rows)
        found.extend(arenas)
        return arenas

    monkeypatch.setattr(arena_pass, "plan_arenas", record)
    return found


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[ArenaPool]]:
    """The pools of all compiled graphs."""
    found: list[weakref.ref[ArenaPool]] = []

    def make() -> ArenaPool:
        pool = ArenaPool()
        found.append(weakref.ref(pool))
        return pool

    monkeypatch.setattr(downstream_module, "ArenaPool", make)
    return found


@pytest.fixture
def written() -> Iterator[list[tuple[list[int], list[int]]]]:
    """Addresses of the sources and of the results, of every fused mix that runs."""
    found: list[tuple[list[int], list[int]]] = []

    def into(*arguments: Any, normed_out: Tensor, partial_out: Tensor | None) -> None:
        results = MIX_NORM_REFERENCE(*arguments)
        outputs = [normed_out] if partial_out is None else [normed_out, partial_out]
        found.append(([source.data_ptr() for source in arguments[0]], [output.data_ptr() for output in outputs]))
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)

    library = torch.library.Library("attnres", "IMPL")
    library.impl("mix_norm_into", into, "CPU", allow_override=True)
    yield found
    library._destroy()
