"""The pool of arenas: lent while their memory is in use, one for calls that follow one another, bounded."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import Tensor

from attnres_fx.runtime.arena import ARENA, KEPT, ArenaPool

LIKE = torch.ones(1)


def lease(pool: ArenaPool, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with pool.lending():
        arena: Tensor = ARENA(LIKE, numel, dtype)
    assert arena.shape == (numel,) and arena.dtype == dtype and arena.is_contiguous()
    return arena


def address(arena: Tensor) -> int:
    assert arena.data_ptr() % 64 == 0
    return arena.data_ptr()


def test_calls_that_follow_one_another_share_one_arena() -> None:
    pool = ArenaPool()
    first = address(lease(pool, 1000))
    assert [address(lease(pool, numel)) for numel in (1000, 10, 999, 1)] == [first] * 4
    assert pool.bytes() == 4000


def test_a_larger_one_takes_the_place_of_smaller_ones() -> None:
    pool = ArenaPool()
    for numel in (10, 500, 1000, 40, 2000):
        lease(pool, numel)
    assert pool.bytes() == 8000


def test_what_somebody_holds_is_not_lent_again() -> None:
    pool = ArenaPool()
    held = [lease(pool, 100) for _ in range(KEPT + 3)]
    assert len({address(arena) for arena in held}) == len(held)
    assert pool.bytes() == KEPT * 400
    places = {address(arena) for arena in held[:KEPT]}
    part = held[1][10:20].view(5, 2)
    held.clear()
    del part  # the last that shared the second one
    assert {address(arena) for arena in [lease(pool, 100) for _ in range(KEPT)]} <= places


def test_a_view_holds_an_arena() -> None:
    pool = ArenaPool()
    view = lease(pool, 100).as_strided((2, 3), (3, 1), 50)
    view.fill_(1)
    other = lease(pool, 100)
    other.zero_()
    assert view.sum() == 6
    taken = {address(other), view.data_ptr() - 200}
    del other, view
    first, second = lease(pool, 100), lease(pool, 100)
    assert {address(first), address(second)} == taken


def test_dtypes_have_arenas_of_their_own() -> None:
    pool = ArenaPool()
    places = [address(lease(pool, 64, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert places == [address(lease(pool, 64, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert pool.bytes() == 64 * 6


def test_without_a_pool_memory_is_new() -> None:
    first, second = (ARENA(LIKE, 50, torch.float32) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


def test_pools_nest() -> None:
    outer, inner = ArenaPool(), ArenaPool()
    with outer.lending():
        with inner.lending():
            ARENA(LIKE, 10, torch.float32)
        ARENA(LIKE, 20, torch.float32)
    assert (outer.bytes(), inner.bytes()) == (80, 40)
    ARENA(LIKE, 30, torch.float32)
    assert (outer.bytes(), inner.bytes()) == (80, 40)


def test_an_error_gives_the_arena_back() -> None:
    pool = ArenaPool()

    def call(fails: bool) -> int:
        arena = ARENA(LIKE, 100, torch.float32)
        if fails:
            raise RuntimeError("in the middle")
        return address(arena)

    with pool.lending():
        first = call(False)
    with pytest.raises(RuntimeError, match="in the middle"), pool.lending():
        call(True)
    with pool.lending():
        assert call(False) == first
    assert ARENA(LIKE, 100, torch.float32).data_ptr() != first


def test_a_failed_allocation_leaves_the_pool_usable() -> None:
    pool = ArenaPool()
    lease(pool, 100)
    with pytest.raises(RuntimeError):
        lease(pool, 2**60)
    assert pool.bytes() == 0
    lease(pool, 100)
    assert pool.bytes() == 400


def test_an_arena_made_in_inference_mode_is_written_outside_of_it() -> None:
    pool = ArenaPool()
    with torch.inference_mode():
        lease(pool, 10).zero_()
    lease(pool, 10).add_(1)


def test_a_pool_frees_its_arenas() -> None:
    pool = ArenaPool()
    storage = weakref.ref(lease(pool, 1000).untyped_storage())
    arenas = [weakref.ref(arena) for members in pool._arenas.values() for arena in members]
    del pool
    assert len(arenas) == 1 and arenas[0]() is None and storage() is None


def test_threads_never_share_an_arena() -> None:
    pool, wrong = ArenaPool(), []

    def work(number: int) -> None:
        for size in range(1, 200):
            arena = lease(pool, size * 17)
            arena.fill_(number)
            if not (arena == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
