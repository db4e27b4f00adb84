"""Lifetimes: when each row of attention residuals is first and last used. Analysis; pure.

A pass over a list of steps, in graph order, that says what each reads and writes;
:mod:`attnres_fx.passes.memory.steps` makes it from a scheduled graph or from the plans of streams alone. In training the
backward follows in reverse, one step for each. What the layers themselves allocate is not counted.

In inference a sum is formed in place: the bytes of the partial sum become those of the next one, and at last of the block.
In training each partial sum is a source that the backward of its mix reads again; mixes, or their norms, are computed again
there. A gradient row exists from the backward of the value's last reader, accumulates in place, and ends where the value was
made; the gradient of a sum continues as that of its earlier part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

BLOCK, PARTIAL, PHASE1_ROW, LOG_SUM_EXP, MIXED = "block", "partial", "phase 1", "log-sum-exp", "mix"
NORMED = "norm of a mix"
GRADIENT, AGAIN = "gradient of ", " again"  # what the backward writes: gradients, and mixes computed again
KINDS = (BLOCK, PARTIAL, PHASE1_ROW, LOG_SUM_EXP, MIXED, NORMED)
# Roles of steps: a sum continues a partial sum; a mix is one, or a phase of one, or one fused with its sum and its norm; a
# scale multiplies by a constant; a reader is anything else that reads or makes a value: layers, the output.
SUM, MIX, SCALE, READER = "sum", "mix", "scale", "reader"

Tokens = int | Mapping[str, int]


@dataclass(frozen=True)
class Value:
    """A row (or a statistic) per token that a step writes: ``bytes_per_token`` bytes for each of ``tokens`` tokens.

    ``tokens`` is the name of a number that a call decides, as "T", or an expression of a symbolic trace.
    """

    name: str
    stream: str
    kind: str
    bytes_per_token: int
    tokens: str = "T"


@dataclass(frozen=True)
class Step:
    """One step of the forward: what it does, the values it reads by name (a sum: its earlier part first), and writes.

    ``saves`` names the values, of those it reads and writes, that its backward reads again.
    """

    name: str
    role: str
    reads: tuple[str, ...]
    writes: tuple[Value, ...]
    saves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """A value, and the steps of its first and last use, both included; the backward's steps follow the forward's.

    ``over`` names the buffer whose bytes it takes over in place, at the step after that one's last.
    """

    name: str
    stream: str
    kind: str
    bytes_per_token: int
    tokens: str
    first: int
    last: int
    over: str | None = None

    @property
    def size(self) -> str:
        """Bytes as an expression in the number of tokens."""
        return f"{self.bytes_per_token} * {self.tokens}"

    def bytes(self, tokens: Tokens) -> int:
        """Bytes for a number of tokens: one for all streams, or by name."""
        return self.bytes_per_token * (tokens if isinstance(tokens, int) else tokens[self.tokens])


def lifetimes(steps: Sequence[Step], training: bool, keep_mixes: bool = False) -> tuple[Buffer, ...]:
    """The buffers of a forward, or with ``training`` of a forward and its backward, in the order in which they are written.

    ``keep_mixes``: mixes and their norms are kept for the backward by what reads them, and not computed again.
    """
    made = [(value, index) for index, step in enumerate(steps) for value in step.writes]
    known = {value.name: value for value, _ in made}
    readers: dict[str, list[int]] = {name: [] for name in known}
    savers: dict[str, list[int]] = {name: [] for name in known}
    for index, step in enumerate(steps):
        for name in step.reads:
            if name in known:
                readers[name].append(index)
                if keep_mixes and step.role == READER and known[name].kind in (MIXED, NORMED):
                    savers[name].append(index)
        for name in step.saves:
            if name in known:
                savers[name].append(index)
    buffers = {value.name: Buffer(**vars(value), first=index, last=max([index, *readers[value.name]]))
               for value, index in made}
    sums = list(_sums(steps, known, readers))
    if not training:
        return tuple(_chained(buffers, sums).values())
    final = 2 * len(steps) - 1
    kept = [replace(buffer, last=final - min(savers[buffer.name]) if savers[buffer.name] else buffer.last)
            for buffer in buffers.values()]
    again = [
        replace(buffers[value.name], name=value.name + AGAIN, first=final - index, last=final - index)
        for value, index in reversed(made)
        if value.kind in (MIXED, NORMED) and steps[index].role == MIX and readers[value.name] and not savers[value.name]]
    gradients = {GRADIENT + value.name: Buffer(
        GRADIENT + value.name, value.stream, GRADIENT + value.kind, value.bytes_per_token, value.tokens,
        first=final - max(readers[value.name]), last=final - index)
        for value, index in reversed(made) if readers[value.name]}
    links = [(GRADIENT + earlier, GRADIENT + later, final - at) for later, earlier, at in reversed(sums)
             if GRADIENT + later in gradients]
    return (*kept, *sorted([*again, *_chained(gradients, links).values()], key=lambda buffer: buffer.first))


def last_step(buffers: Sequence[Buffer]) -> int:
    """The number of the last step in which something is held; -1 if there is none."""
    return max((buffer.last for buffer in buffers), default=-1)


def live_bytes(buffers: Sequence[Buffer], tokens: Tokens) -> list[int]:
    """Bytes that are held in each step."""
    change = [0] * (last_step(buffers) + 2)
    for buffer in buffers:
        change[buffer.first] += buffer.bytes(tokens)
        change[buffer.last + 1] -= buffer.bytes(tokens)
    held, total = [], 0
    for difference in change[:-1]:
        total += difference
        held.append(total)
    return held


def _sums(
    steps: Sequence[Step], known: Mapping[str, Value], readers: Mapping[str, Sequence[int]]
) -> list[tuple[str, str, int]]:
    """(sum, earlier part, step) where the step is the last to read the earlier part, which has the size of the sum."""
    found = []
    for index, step in enumerate(steps):
        if step.role == SUM and step.writes and step.reads and step.reads[0] in known:
            earlier, later = known[step.reads[0]], step.writes[0]
            alike = (earlier.bytes_per_token, earlier.tokens) == (later.bytes_per_token, later.tokens)
            if alike and readers[earlier.name][-1] == index:
                found.append((later.name, earlier.name, index))
    return found


def _chained(buffers: dict[str, Buffer], links: Sequence[tuple[str, str, int]]) -> dict[str, Buffer]:
    """The buffers, where the first of each link takes the bytes of the second over at the given step."""
    result = dict(buffers)
    for taker, giver, at in links:
        result[taker] = replace(result[taker], first=at, over=giver)
        result[giver] = replace(result[giver], last=at - 1)
    return result
