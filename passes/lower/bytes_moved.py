"""Traffic: bytes that mixes move, and the schedule of one-pass and two-phase reads that moves fewest. Pure arithmetic.

A group of consecutive reads whose sources begin alike can be read in two phases (Algorithm 1): phase 1 reads the common
prefix once for all of them and writes one row each, phase 2 reads that row back with the sources that came later. Groups
need not be the blocks of the model: in Full Attention Residuals every read begins with all sources of the one before.

Counted are rows that have to come from and go to memory, per token, and queries and gains, divided by the number of tokens.
In training the backward is counted with the forward: every source is read again, every gradient written by each read and
read once more where they are summed, and rows of phase 1 are kept for phase 2's backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from attnres_fx.runtime.triton.configs import queries_per_sweep

# Phase 1 keeps one sum per query; beyond this many queries they leave the first-level cache of a CPU at common widths.
MOST_QUERIES = 32
# A penalty in bytes on a one-pass read that groups all reads with a source in common.
PREFER_TWO_PHASES = 1e15
_STATISTICS = 4  # bytes of a log-sum-exp, and of an element of a query


@dataclass(frozen=True)
class Machine:
    """What a schedule is made for: ``tokens`` per call, bytes per element, and how many queries one sweep can serve."""

    width: int
    element: int
    tokens: float
    training: bool
    queries_per_sweep: int = MOST_QUERIES
    gain: bool = True

    @property
    def row(self) -> float:
        """Bytes of a row of d stored elements."""
        return self.width * self.element

    @property
    def parameters(self) -> float:
        """Bytes of one query and its gain, per token."""
        return (1 + self.gain) * self.width * _STATISTICS / max(self.tokens, 1)


def cpu_machine(width: int, element: int, tokens: float, training: bool, gain: bool) -> Machine:
    """The CPU: one sweep serves as many queries as a phase 1."""
    return Machine(width, element, tokens, training, MOST_QUERIES, gain)


def gpu_machine(
    width: int, element: int, tokens: float, training: bool, gain: bool, normalize_values: bool = False
) -> Machine:
    """A GPU: how many queries a sweep serves is the Triton kernels' choice."""
    return Machine(width, element, tokens, training, queries_per_sweep(width, element, training, normalize_values), gain)


@dataclass(frozen=True)
class Group:
    """Consecutive reads ``start`` to ``stop`` (excluded) and their choice: ``prefix`` sources in phase 1; 0 is one pass."""

    start: int
    stop: int
    prefix: int
    one_pass: float
    two_phase: float

    @property
    def bytes(self) -> float:
        """Bytes per token of the choice."""
        return self.two_phase if self.prefix else self.one_pass


def one_pass(sources: int, machine: Machine) -> float:
    """Bytes per token of a read of this many sources in one pass.

    Training: the sources and the incoming gradient are read again, a gradient row for each source is written and read.
    """
    rows = sources + 1
    if machine.training:
        rows += (sources + 1) + sources + sources
    return rows * machine.row + machine.parameters * (3 if machine.training else 1)


def two_phase(prefix: int, tails: Sequence[int], machine: Machine) -> float:
    """Bytes per token of a group of reads: ``prefix`` sources in common, ``tails`` further ones each.

    A read without a tail takes the row of phase 1 as it is.
    """
    queries, merged = len(tails), [tail for tail in tails if tail]
    sweeps = math.ceil(queries / machine.queries_per_sweep)
    rows = sweeps * prefix + queries + sum(1 + tail + 1 for tail in merged)
    scalars = (queries + len(merged)) * _STATISTICS
    # The rows of queries and gains are stacked for phase 1: read, written and read again; phase 2 reads its own.
    parameters = (3 * queries + len(merged)) * machine.parameters
    if machine.training:
        rows += sum((1 + tail + 1) + (1 + tail) + tail for tail in merged)  # phase 2: reads, writes, sums
        rows += sweeps * prefix + queries + sweeps * prefix + prefix  # phase 1: reads, writes, sums
        scalars *= 3
        parameters *= 3
    return rows * machine.row + scalars + parameters


def schedule(
    reads: Sequence[Sequence[Hashable]], machine: Machine, joinable: Callable[[int, int], bool] = lambda first, later: True,
    penalty: float = 0.0, most: int = MOST_QUERIES,
) -> tuple[Group, ...]:
    """The groups of consecutive reads that move fewest bytes, each read by its list of sources.

    ``joinable(first, later)`` may keep a later read out of a group that starts at ``first`` (and all reads after it).
    ``penalty`` bytes are added to every one-pass read; a large one groups whatever can be grouped.
    ``most`` is the query tile: no group has more reads, so its phase 1 leaves at most as many rows. 1 is one pass
    throughout. Every read is in exactly one group; a group of one read is one-pass. Linear in the number of reads, apart
    from their sources.
    """
    best: list[float] = [0.0]
    chosen: list[Group] = []
    for stop in range(1, len(reads) + 1):
        best.append(math.inf)
        chosen.append(Group(stop - 1, stop, 0, 0.0, 0.0))
    for start, sources in enumerate(reads):
        alone = one_pass(len(sources), machine)
        _offer(best, chosen, Group(start, start + 1, 0, alone, two_phase(len(sources), [0], machine)), penalty)
        prefix, apart = len(sources), alone
        for later in range(start + 1, min(start + most, len(reads))):
            prefix = _common(sources, reads[later], prefix)
            if prefix == 0 or not joinable(start, later):
                break
            apart += one_pass(len(reads[later]), machine)
            tails = [len(read) - prefix for read in reads[start:later + 1]]
            _offer(best, chosen, Group(start, later + 1, prefix, apart, two_phase(prefix, tails, machine)))
    groups: list[Group] = []
    stop = len(reads)
    while stop:
        groups.append(chosen[stop - 1])
        stop = groups[-1].start
    return tuple(reversed(groups))


def _offer(best: list[float], chosen: list[Group], group: Group, penalty: float = 0.0) -> None:
    cost = best[group.start] + group.bytes + penalty
    if cost < best[group.stop]:
        best[group.stop], chosen[group.stop - 1] = cost, group


def _common(first: Sequence[Hashable], other: Sequence[Hashable], most: int) -> int:
    """The length of the common beginning of two lists, at most ``most``."""
    most = min(most, len(other))
    if first[:most] == other[:most]:
        return most
    return next(place for place in range(most) if first[place] != other[place])


def sources_of_plan(boundaries: Sequence[int], num_layers: int) -> list[tuple[Hashable, ...]]:
    """The sources of every mix of a stream by name, positions 1 to L, as Eq. 6 lists them."""
    reads: list[tuple[Hashable, ...]] = []
    blocks: tuple[Hashable, ...] = ("b_0",)
    for position in range(1, num_layers + 1):
        if position in boundaries:
            blocks = (*blocks, f"b_{len(blocks)}")
            reads.append(blocks)
        else:
            reads.append((*blocks, f"partial {position}"))
    return reads
