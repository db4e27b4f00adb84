"""Layout: a place in one arena for every buffer, so that buffers which live at different times share bytes. Pure.

Buffers that take over bytes in place are placed as one. Rows of one size are placed by colouring their lifetimes in the
order in which they start, which is optimal for intervals. Mixed sizes are placed by best fit (the smallest gap between what
is in use meanwhile) in several orders, of which the best is taken. Several streams share the arena: only lifetimes count.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from attnres_fx.passes.memory.lifetimes import Buffer, Tokens, live_bytes

ALIGNMENT = 64  # bytes: a cache line, and the widest load of a vector unit


@dataclass(frozen=True)
class Placement:
    """Where a buffer lies: ``offset`` and ``size`` in bytes; ``slot`` numbers the offsets in use, from 0."""

    buffer: Buffer
    offset: int
    size: int
    slot: int


@dataclass(frozen=True)
class Layout:
    """The plan of one arena, in bytes.

    ``arena`` is its size, the planned peak. ``naive`` is what a graph allocates without a plan, each buffer its own;
    ``lower_bound`` the largest sum of live bytes over the steps, below which no plan can come.
    """

    placements: tuple[Placement, ...]
    arena: int
    naive: int
    lower_bound: int

    @property
    def ratio(self) -> float:
        """The planned peak against its lower bound; 1 is the best possible."""
        return self.arena / self.lower_bound if self.lower_bound else 1.0

    @property
    def fragmentation(self) -> float:
        """The part of the arena that is unused when the most is in use."""
        return 1 - self.lower_bound / self.arena if self.arena else 0.0

    @property
    def slots(self) -> int:
        """How many different offsets there are."""
        return len({placement.offset for placement in self.placements})


@dataclass(frozen=True)
class _Storage:
    """Bytes in use from one step to another, both included: a buffer and those that take it over."""

    size: int
    first: int
    last: int

    def overlaps(self, other: _Storage) -> bool:
        return self.first <= other.last and other.first <= self.last


def plan_layout(buffers: Sequence[Buffer], tokens: Tokens) -> Layout:
    """Place ``buffers`` for these numbers of tokens (one for all streams, or by the name that each buffer gives)."""
    heads, storages = _storages(buffers, tokens)
    offsets = _place(storages)
    arena = max((offset + storage.size for offset, storage in zip(offsets, storages)), default=0)
    used = sorted(set(offsets))
    slots = {offset: slot for slot, offset in enumerate(used)}
    placements = tuple(
        Placement(buffer, offsets[head], buffer.bytes(tokens), slots[offsets[head]])
        for buffer, head in zip(buffers, heads, strict=True))
    sizes = [placement.size for placement in placements]
    return Layout(placements, arena, sum(sizes), max(live_bytes(buffers, tokens), default=0))


def _storages(buffers: Sequence[Buffer], tokens: Tokens) -> tuple[list[int], list[_Storage]]:
    """The storage of each buffer by number, and the storages, in aligned sizes."""
    by_name = {buffer.name: buffer for buffer in buffers}
    chains: dict[str, list[Buffer]] = {}
    for buffer in buffers:
        head = buffer
        while head.over is not None:
            head = by_name[head.over]
        chains.setdefault(head.name, []).append(buffer)
    number = {buffer.name: index for index, chain in enumerate(chains.values()) for buffer in chain}
    storages = [
        _Storage(_aligned(max(buffer.bytes(tokens) for buffer in chain)), min(buffer.first for buffer in chain),
                 max(buffer.last for buffer in chain)) for chain in chains.values()]
    return [number[buffer.name] for buffer in buffers], storages


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def _place(storages: Sequence[_Storage]) -> list[int]:
    """An offset for every storage."""
    if not storages:
        return []
    coloured = _colour_by_size(storages)
    if len({storage.size for storage in storages}) == 1:
        return coloured
    orders: Iterable[Callable[[_Storage], tuple[int, ...]]] = (
        lambda s: (-s.size, s.first), lambda s: (-s.size, s.first - s.last), lambda s: (s.first - s.last, -s.size),
        lambda s: (s.first, -s.size), lambda s: (-s.size * (s.last - s.first + 1), s.first))
    least = _most_live(storages)
    best = coloured
    for order in orders:
        if _arena(storages, best) == least:
            break
        numbers = sorted(range(len(storages)), key=lambda index: order(storages[index]))
        best = min(best, _best_fit(storages, numbers), key=lambda offsets: _arena(storages, offsets))
    return best


def _arena(storages: Sequence[_Storage], offsets: Sequence[int]) -> int:
    return max(offset + storage.size for offset, storage in zip(offsets, storages))


def _most_live(storages: Sequence[_Storage]) -> int:
    """The largest sum of sizes in use in one step."""
    changes = sorted([(s.first, s.size) for s in storages] + [(s.last + 1, -s.size) for s in storages])
    most = held = 0
    for _, change in changes:  # of one step, what ends stands first
        held += change
        most = max(most, held)
    return most


def _colour_by_size(storages: Sequence[_Storage]) -> list[int]:
    """Sizes one above the other; within a size the first free of equal slots, in the order of the starts (optimal)."""
    offsets = [0] * len(storages)
    bottom = 0
    for size in sorted({storage.size for storage in storages}, reverse=True):
        free: list[int] = []
        running: list[tuple[int, int]] = []  # (last step, slot)
        slots = 0
        numbers = [index for index, storage in enumerate(storages) if storage.size == size]
        for index in sorted(numbers, key=lambda index: storages[index].first):
            while running and running[0][0] < storages[index].first:
                heapq.heappush(free, heapq.heappop(running)[1])
            if not free:
                free, slots = [slots], slots + 1
            slot = heapq.heappop(free)
            heapq.heappush(running, (storages[index].last, slot))
            offsets[index] = bottom + slot * size
        bottom += slots * size
    return offsets


def _best_fit(storages: Sequence[_Storage], numbers: Sequence[int]) -> list[int]:
    """Offsets by best fit in the given order: the smallest gap that is free all the while, else above everything."""
    offsets = [0] * len(storages)
    placed: list[int] = []  # by offset
    for index in numbers:
        storage = storages[index]
        top, chosen, smallest = 0, -1, math.inf
        for other in placed:
            if storages[other].overlaps(storage):
                gap = offsets[other] - top
                if storage.size <= gap < smallest:
                    chosen, smallest = top, gap
                top = max(top, offsets[other] + storages[other].size)
        offsets[index] = top if chosen < 0 else chosen
        _insert(placed, index, offsets)
    return offsets


def _insert(placed: list[int], index: int, offsets: Sequence[int]) -> None:
    """Put ``index`` behind all of no larger offset."""
    low, high = 0, len(placed)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if offsets[placed[middle]] <= offsets[index] else (low, middle)
    placed.insert(low, index)
