"""Memory reports: what a converted model holds besides its layers, from its plans alone, as tables and plain data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from attnres_fx.passes.lower.schedule import SCHEDULES
from attnres_fx.passes.memory.budget import (
    Choice,
    Setting,
    bytes_text,
    choose_tile,
    parse_budget,
    tilings,
    tokens_per_device,
)
from attnres_fx.passes.memory.check_layout import check_layout
from attnres_fx.passes.memory.layout import Layout, plan_layout
from attnres_fx.passes.memory.lifetimes import BLOCK, PHASE1_ROW, Tokens, lifetimes, live_bytes
from attnres_fx.passes.memory.steps import steps_of_graph
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.runtime.errors import OptionError

ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_SPELLED = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "float64": "fp64",
            "double": "fp64"}


@dataclass(frozen=True)
class Scope:
    """The tokens of one call on one device (by stream where they differ), what the blocks take for them (b_1 to b_N: N T d),
    and the layout.
    """

    name: str
    tokens: int | dict[str, int]
    blocks: int
    layout: Layout


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen memory plan of a call on one device, the tiles that it was chosen from, and its size in several scopes.

    The last scope is the one that the tile was chosen for and that a budget applies to.
    """

    dtype: str
    budget: int | None
    choice: Choice
    tiles: tuple[Choice, ...]
    scopes: tuple[Scope, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan without its buffers, as plain data for JSON. Bytes are for one device."""
        return {
            "dtype": self.dtype, "training": self.choice.setting.training, "schedule": self.choice.setting.schedule,
            "memory_budget": self.budget, "tile": self.choice.tile,
            "scopes": [{"name": scope.name, "tokens": scope.tokens, "blocks": scope.blocks, **_sizes(scope.layout)}
                       for scope in self.scopes],
            "tiles": [{"tile": tile.tile, "moved": tile.moved, "planned": tile.layout.arena} for tile in self.tiles],
        }


def plan_memory(
    plans: Sequence[StreamPlan], tokens: int | Mapping[str, int], *, dtype: str = "bf16", chunk: int | None = None,
    devices: int = 1,
    training: bool = False, schedule: str = "auto", memory_budget: str | int | None = None,
) -> MemoryPlan:
    """The memory plan of converted streams for a sequence of this many tokens; nothing is run.

    ``tokens``: of all streams alike, or of each by its name. ``chunk``: a prefill that reads this many tokens at once.
    ``devices`` share the tokens of a call. ``memory_budget`` is for one device: text as "512MB", or bytes per token of the
    longest stream.

    Raises: OptionError for a meaningless value; MemoryBudgetError if no query tile fits into the budget.
    """
    name = _SPELLED.get(dtype, dtype)
    if name not in ELEMENTS:
        raise OptionError(f"dtype is {dtype!r}", remedy=f"give one of {', '.join(ELEMENTS)}")
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule is {schedule!r}", remedy=f"give one of {', '.join(SCHEDULES)}")
    if training and chunk is not None:
        raise OptionError("a training step was asked for in chunks",
                          remedy="leave out chunk, which is for prefill: a backward needs the rows of all tokens")
    counts = _of_streams(plans, tokens)
    held = {stream: tokens_per_device(count, chunk, devices) for stream, count in counts.items()}
    setting = Setting(_sizes_of(held), ELEMENTS[name], training, schedule)
    budget = None if memory_budget is None else parse_budget(memory_budget, max(held.values()))
    tiles = tilings(plans, setting)
    choice = choose_tile(tiles, budget)
    check_layout(choice.layout)
    scopes = tuple(
        Scope(name, _alike(scope), sum(plan.num_blocks * plan.width * setting.element * scope[plan.name] for plan in plans),
              plan_layout(choice.buffers, _sizes_of(scope))) for name, scope in _scopes(counts, chunk, devices))
    return MemoryPlan(name, budget, choice, tuple(tiles), scopes)


def plan_graph_memory(gm: fx.GraphModule, tokens: int, training: bool = False) -> MemoryPlan:
    """The memory plan of a graph with mixes, for this many tokens instead of those it was traced with.

    The graph's inputs and outputs are the caller's memory, and not part of the plan.
    """
    steps, traced = steps_of_graph(gm)
    counts = dict.fromkeys(traced, tokens)
    buffers = lifetimes(steps, training)
    layout = plan_layout(buffers, counts)
    check_layout(layout)
    tile = max((sum(value.kind == PHASE1_ROW for value in step.writes) for step in steps), default=0)
    setting = Setting(counts, training=training, schedule="one-pass" if tile == 0 else "two-phase")
    choice = Choice(setting, max(tile, 1), math.nan, steps, buffers, layout)
    blocks = sum(buffer.bytes(counts) for buffer in buffers if buffer.kind == BLOCK)
    return MemoryPlan("the dtypes of the model", None, choice, (),
                      (Scope("sequence", tokens, blocks, layout),))


def _of_streams(plans: Sequence[StreamPlan], tokens: int | Mapping[str, int]) -> dict[str, int]:
    """The tokens of each stream by its name. Raises OptionError unless every stream has some, and nothing else."""
    names = [plan.name for plan in plans]
    if not isinstance(tokens, Mapping):
        return dict.fromkeys(names, tokens)
    if set(tokens) != set(names) or any(count < 1 for count in tokens.values()):
        given = ", ".join(f"{name}={count}" for name, count in tokens.items())
        raise OptionError(f"tokens are given as {given}",
                          remedy=f"give one number for all streams, or one of 1 or more for each of {', '.join(names)}")
    return {name: tokens[name] for name in names}


def _alike(counts: dict[str, int]) -> int | dict[str, int]:
    """One number where all streams have as many tokens."""
    return next(iter(counts.values())) if len(set(counts.values())) == 1 else counts


def _sizes_of(counts: dict[str, int]) -> Tokens:
    """The same by the names that buffers give to numbers of tokens."""
    alike = _alike(counts)
    return alike if isinstance(alike, int) else {f"T_{name}": count for name, count in counts.items()}


def _scopes(counts: dict[str, int], chunk: int | None, devices: int) -> list[tuple[str, dict[str, int]]]:
    def held(chunk: int | None, devices: int) -> dict[str, int]:
        return {name: tokens_per_device(count, chunk, devices) for name, count in counts.items()}

    each = f" on {devices} devices" if devices > 1 else ""
    found = [("sequence", counts)]
    if devices > 1:
        found.append((f"sequence{each}", held(None, devices)))
    if chunk is not None:
        found.append((f"chunk of {min(chunk, max(counts.values())):,}{each}", held(chunk, devices)))
    return found


def tokens_text(tokens: int | Mapping[str, int]) -> str:
    """Numbers of tokens for people."""
    return f"{tokens:,}" if isinstance(tokens, int) else ", ".join(f"{name} {count:,}" for name, count in tokens.items())


def _sizes(layout: Layout) -> dict[str, Any]:
    return {"naive": layout.naive, "planned": layout.arena, "lower_bound": layout.lower_bound, "ratio": layout.ratio,
            "fragmentation": layout.fragmentation}


def buffers_json(memory: MemoryPlan) -> dict[str, Any]:
    """The plan with every buffer, its slot and offset."""
    placements = [{**asdict(place.buffer), "size": place.size, "slot": place.slot, "offset": place.offset}
                  for place in memory.choice.layout.placements]
    return {**memory.to_dict(), "forward_steps": len(memory.choice.steps), "buffers": placements}


def scopes_table(memory: MemoryPlan) -> Any:
    """A table of the memory on one device, by scope."""
    from rich.table import Table

    table = Table("for", "tokens", "blocks b_1 to b_N", "planned peak", "lower bound", "without sharing", "ratio")
    for scope in memory.scopes:
        layout = scope.layout
        held = (scope.blocks, layout.arena, layout.lower_bound, layout.naive)
        table.add_row(scope.name, tokens_text(scope.tokens), *map(bytes_text, held), f"{layout.ratio:.3f}")
    return table


def tiles_table(memory: MemoryPlan) -> Any:
    """A table of the query tiles: the memory each needs, and the bytes that the mixes move with it."""
    from rich.table import Table

    table = Table("queries of a phase 1", "planned peak", "bytes moved, per token", "")
    for tile in memory.tiles:
        queries = str(tile.tile) if tile.tile > 1 else "1: one pass"
        remark = "chosen" if tile is memory.choice else ""
        if memory.budget is not None and tile.layout.arena > memory.budget:
            remark = "over the budget"
        table.add_row(queries, bytes_text(tile.layout.arena), f"{tile.moved:,.0f}", remark)
    return table


def buffers_table(memory: MemoryPlan) -> Any:
    """A table of the buffers in the order of their first use."""
    from rich.table import Table

    table = Table("buffer", "kind", "bytes per token", "slot", "offset", "first", "last")
    for place in memory.choice.layout.placements:
        buffer = place.buffer
        table.add_row(buffer.name, buffer.kind, f"{buffer.bytes_per_token:,}", str(place.slot), f"{place.offset:,}",
                      str(buffer.first), str(buffer.last))
    return table


def summary(memory: MemoryPlan) -> str:
    """The lines below the table of buffers: steps, sizes, and how good the plan is."""
    layout, steps = memory.choice.layout, len(memory.choice.steps)
    purpose = "training" if memory.choice.setting.training else "inference"
    counted = f"steps 0-{steps - 1} are the forward"
    if memory.choice.setting.training:
        counted += f", {steps}-{2 * steps - 1} the backward"
    read = f"phase 1 serves {memory.choice.tile} queries at most" if memory.choice.tile > 1 else "mixes are read in one pass"
    return "\n".join([
        f"{purpose}, {tokens_text(memory.scopes[-1].tokens)} tokens, {memory.dtype}; {counted}; {read}",
        f"without sharing {bytes_text(layout.naive)}: {len(layout.placements)} buffers, each its own",
        f"planned {bytes_text(layout.arena)} in {layout.slots} slots, lower bound {bytes_text(layout.lower_bound)}, "
        f"ratio {layout.ratio:.3f}, fragmentation {layout.fragmentation:.1%}",
        "held by kind at the fullest step: " + ", ".join(f"{kind} {bytes_text(size)}" for kind, size in _fullest(memory))])


def _fullest(memory: MemoryPlan) -> list[tuple[str, int]]:
    """Bytes by kind in the first step with the most bytes in use."""
    buffers, tokens = memory.choice.buffers, memory.choice.setting.tokens
    held = live_bytes(buffers, tokens)
    step = held.index(max(held))
    live = sorted((buffer for buffer in buffers if buffer.first <= step <= buffer.last), key=lambda buffer: buffer.kind)
    return [(kind, sum(buffer.bytes(tokens) for buffer in group))
            for kind, group in itertools.groupby(live, key=lambda buffer: buffer.kind)]
