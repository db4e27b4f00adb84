"""Arenas: the memory that planned rows of attention residuals share during one call, and the pool that lends it.

``attnres::arena(like, numel, dtype)`` gives uninitialised memory: inside :meth:`ArenaPool.lending` that of an arena which
the pool lends until the last tensor that shares its memory is gone, elsewhere new memory. So an arena that is still read,
after an error or in another thread, is never lent a second time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ._compat import is_capturing, is_shared, stream_id
from .operators import LIBRARY

# Arenas that a pool keeps for one device, stream and dtype: one for a call, more for calls that overlap.
KEPT = 4

LIBRARY.define("arena(Tensor like, SymInt numel, ScalarType dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

ARENA = torch.ops.attnres.arena.default


class ArenaPool:
    """The arenas of one compiled graph; they are freed with it. Safe in threads, and in calls that call themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arenas: dict[tuple[Any, ...], list[Tensor]] = {}

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """Lend arenas to the operators that this thread runs within the context."""
        token = _lender.set(self)
        try:
            yield
        finally:
            _lender.reset(token)

    def lease(self, like: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """``numel`` elements of a free arena: the smallest that is large enough, else a new one.

        A new one replaces the smaller free ones, so that a pool whose calls follow one another has one arena, as large as
        the largest call needs, at one address.
        """
        key = (like.device, stream_id(like.device), dtype)
        with self._lock:
            arenas = self._arenas.setdefault(key, [])
            free = [arena for arena in arenas if not is_shared(arena)]
            fitting = min((arena for arena in free if arena.numel() >= numel), key=Tensor.numel, default=None)
            if fitting is None:
                kept = [arena for arena in arenas if not any(arena is other for other in free)]
                arenas.clear()  # before the new one is made, so that the two never exist at the same time
                arenas += kept
                free.clear()
                fitting = _new(like, numel, dtype)
                if len(arenas) < KEPT:
                    arenas.append(fitting)
            return fitting[:numel]

    def clear(self) -> None:
        """Free the arenas; those in use are freed by their users."""
        with self._lock:
            self._arenas.clear()

    def bytes(self) -> int:
        """Bytes of the arenas that the pool keeps."""
        with self._lock:
            return sum(arena.untyped_storage().nbytes() for arenas in self._arenas.values() for arena in arenas)


_lender: ContextVar[ArenaPool | None] = ContextVar("attnres_arena_pool", default=None)


def _new(like: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # its memory outlives the mode
        return torch.empty(numel, dtype=dtype, device=like.device)


def _arena(like: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    pool = _lender.get()
    if pool is None or is_capturing(like.device):
        return _new(like, numel, dtype)
    return pool.lease(like, numel, dtype)


def _arena_fake(like: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty(numel, dtype=dtype)


LIBRARY.impl("arena", _arena, "CompositeExplicitAutograd")
torch.library.register_fake("attnres::arena", _arena_fake, lib=LIBRARY)
