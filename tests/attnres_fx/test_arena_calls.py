"""The arenas of calls, through ``torch.compile``: what may see them, what frees them, what they hold."""

from __future__ import annotations

import gc
import math
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from support.arenas import LAYERS, WIDTH, Tower, close, fast, held, ids, tower
from support.scripts import load_script
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import attnres_fx
from attnres_fx.passes.memory.place import Arena
from attnres_fx.runtime.arena import ArenaPool
from attnres_fx.runtime.mix_norm import MIX_NORM_REFERENCE

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_what_is_returned_lies_elsewhere(pools: list[weakref.ref[ArenaPool]]) -> None:
    """Hidden states are the mixes: they stay as they are when the next call writes its own."""
    model = tower(hidden=True)
    compiled = fast(model)
    with torch.no_grad():
        first = compiled(ids(7))
        expected = model(ids(7))
        compiled(ids(7, seed=1))
        close(first, expected)
        assert len({tensor.untyped_storage().data_ptr() for tensor in [first[0], *first[1]]}) == LAYERS + 1
    assert held(pools[0]) <= 4 * 2 * 7 * WIDTH * 4


@pytest.mark.parametrize("around", [
    torch.no_grad, pytest.param(torch.inference_mode, marks=pytest.mark.slow),
    pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), marks=pytest.mark.slow)])
def test_modes(around: Callable[[], Any]) -> None:
    model = tower()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    compiled = fast(model)
    for length in (7, 4, 9):
        with around():
            torch.testing.assert_close(compiled(ids(length)), model(ids(length)), rtol=2e-2, atol=2e-2)
    close(compiled(ids(7)), model(ids(7)))


@pytest.mark.slow
def test_threads_and_models() -> None:
    towers = [tower(), tower(num_blocks=9)]
    compiled = [fast(model) for model in towers]
    with torch.no_grad():
        expected = {(number, length): model(ids(length)) for number, model in enumerate(towers) for length in range(3, 9)}
        for number, length in expected:
            compiled[number](ids(length))
    wrong: list[Any] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for step in range(60):
                number, length = (seed + step) % 2, 3 + (seed * 7 + step) % 6
                if not torch.allclose(compiled[number](ids(length)), expected[number, length], rtol=1e-4, atol=1e-5):
                    wrong.append((number, length))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_within_a_call(pools: list[weakref.ref[ArenaPool]]) -> None:
    """A compiled model that runs itself in the middle, in an operator that Inductor does not look into."""
    model = tower()

    @torch.library.custom_op("attnres_tests::runs_again", mutates_args=())
    def again(x: Tensor, depth: int) -> Tensor:
        with torch.no_grad():
            return x.clone() if depth == 0 else x + 0 * compiled(ids(7), depth - 1).sum()

    again.register_fake(lambda x, depth: torch.empty_like(x))

    class Within(Tower):
        def forward(self, given: Tensor, depth: int) -> Tensor:  # type: ignore[override]
            x = self.embedding(given)
            for index, layer in enumerate(self.layers):
                x = x + (again(layer(x), depth) if index == 4 else layer(x))
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = attnres_fx.convert(Within(), (ids(7), 0), num_blocks=3)
    compiled = fast(model)
    with torch.no_grad():
        expected = compiled(ids(7), 0)
        torch.testing.assert_close(compiled(ids(7), 2), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(ids(7), 1), expected, rtol=1e-4, atol=1e-5)


def test_a_freed_model_frees_its_arena(pools: list[weakref.ref[ArenaPool]]) -> None:
    model = tower()
    compiled = fast(model)
    with torch.no_grad():
        compiled(ids(7))
        compiled(ids(9))
    assert [held(pool) > 0 for pool in pools] == [True, True]
    del model, compiled
    gc.collect()
    assert [held(pool) for pool in pools] == [0, 0]


def test_a_reset_frees_the_arena_of_a_model_that_lives_on(pools: list[weakref.ref[ArenaPool]]) -> None:
    model = tower()
    with torch.no_grad():
        fast(model)(ids(7))
        torch._dynamo.reset()
        gc.collect()
        assert [pool() for pool in pools] == [None]
        close(fast(model)(ids(7)), model(ids(7)))


def test_a_failed_allocation_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    compiled = fast(model)
    lease = ArenaPool.lease
    failing = [False]

    def sometimes(self: ArenaPool, *given: Any) -> Tensor:
        if failing[0]:
            raise torch.OutOfMemoryError("no memory for the arena")
        return lease(self, *given)

    monkeypatch.setattr(ArenaPool, "lease", sometimes)
    with torch.no_grad():
        expected = compiled(ids(7))
        failing[0] = True
        with pytest.raises(torch.OutOfMemoryError, match="no memory for the arena"):
            compiled(ids(7))
        failing[0] = False
        torch.testing.assert_close(compiled(ids(7)), expected, rtol=0, atol=0)


def test_an_error_in_the_middle_gives_the_arena_back(pools: list[weakref.ref[ArenaPool]]) -> None:
    model = tower()
    fails = [False]

    def into(*arguments: Any, normed_out: Tensor, partial_out: Tensor | None) -> None:
        if fails[0]:
            raise torch.OutOfMemoryError("in the middle")
        for output, result in zip((normed_out, partial_out), MIX_NORM_REFERENCE(*arguments)):
            if output is not None:
                output.copy_(result)

    library = torch.library.Library("attnres", "IMPL")
    library.impl("mix_norm_into", into, "CPU", allow_override=True)
    try:
        compiled = fast(model)
        with torch.no_grad():
            expected = compiled(ids(7))
            fails[0] = True
            for _ in range(6):
                with pytest.raises(torch.OutOfMemoryError, match="in the middle"):
                    compiled(ids(7))
            fails[0] = False
            torch.testing.assert_close(compiled(ids(7)), expected, rtol=0, atol=0)
        pool = pools[0]()
        assert pool is not None and len([arena for arenas in pool._arenas.values() for arena in arenas]) == 1
    finally:
        library._destroy()


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
def test_ten_thousand_calls_of_random_shapes(pools: list[weakref.ref[ArenaPool]]) -> None:
    model = tower()
    compiled = fast(model)
    random = Random(0)
    held_at: list[int] = []
    with torch.no_grad():
        compiled(ids(5))
        compiled(ids(9, batch=3))
        compiled(ids(400, batch=4))
        for step in range(10_000):
            given = ids(random.randint(1, 400), batch=random.randint(1, 4), seed=step)
            result, expected = compiled(given), model(given)
            assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5), (step, given.shape)
            if step % 1000 == 999:
                held_at.append(resident())
    assert len(pools) <= 6  # graphs, for sizes of one and others
    assert max(held_at[1:]) - held_at[1] < 8 * 2**20, held_at


def test_never_means_never(planned: list[Arena]) -> None:
    model = tower()
    with torch.no_grad():
        result, (code,) = run_and_get_code(fast(model, arena="never"), ids(7))
        close(result, model(ids(7)))
    assert not planned and "attnres.mix_norm.default" in code
    with pytest.raises(Exception, match="give one of auto, never"):
        fast(model, arena="sometimes")(ids(7))


def simulated_peak(code: str, arena: int) -> int:
    """The most bytes that Inductor's code holds, by its own allocations and deletions; ``arena`` is what one is lent."""
    owner: dict[str, int] = {}
    bytes_of: list[int] = []
    live = peak = 0
    assigned = re.compile(r"(\w+) = (?:(empty_strided_cpu)\(\(([\d, ]*)\), .*, torch\.(\w+)\)"
                          r"|(torch\.ops\.attnres\.arena\.default)|reinterpret_tensor\((\w+),.*?|(\w+))"
                          r"(?:\(.*|;.*|  # alias.*)?$")
    lines = code[code.index("args.clear()"):code.index("return (")].splitlines()
    for line in map(str.strip, lines):
        made = assigned.match(line)
        if made:
            name, empty, shape, dtype, lent, viewed, same = made.groups()
            if empty or lent:
                numel = math.prod(map(int, re.findall(r"\d+", shape or "")))
                bytes_of.append(arena if lent else numel * getattr(torch, dtype).itemsize)
                owner[name] = len(bytes_of) - 1
                live += bytes_of[-1]
                peak = max(peak, live)
            elif (viewed or same) in owner:
                owner[name] = owner[viewed or same]
        for name in re.findall(r"\bdel (\w+)", line):
            storage = owner.pop(name, None)
            if storage is not None and storage not in owner.values():
                live -= bytes_of[storage]
    return peak


@pytest.mark.parametrize("schedule", [pytest.param("one-pass", marks=pytest.mark.slow), "two-phase"])
def test_an_inference_holds_what_its_schedule_says_and_the_plan_allows(
    planned: list[Arena], pools: list[weakref.ref[ArenaPool]], schedule: str
) -> None:
    memory = load_script("benchmarks/memory.py")
    model, given = tower(), ids(64, batch=8)
    torch.manual_seed(0)
    plain = torch.compile(Tower())
    compiled = fast(model, schedule=schedule)
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, given)
        plain(given)
        bound = memory.held(lambda: plain(given))[1].peak + 4 * planned[0].numel
        pool = pools[0]()
        assert pool is not None
        pool.clear()  # so that the arena is among the events
        measured = memory.held(lambda: compiled(given))[1].peak
    simulated = simulated_peak(code, 4 * planned[0].numel)
    assert simulated > 4 * planned[0].numel > 0
    assert abs(measured - simulated) <= 0.05 * simulated, (measured, simulated)
    assert measured <= bound
