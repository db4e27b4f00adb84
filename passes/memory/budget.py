"""Budget: the query tile of phase 1 with which the rows of attention residuals fit into a number of bytes. Pure.

The blocks and the layers per block are part of the model's definition and never change. What can change is how many queries
phase 1 serves at once: it leaves a row for each until phase 2 takes it. Fewer at once need fewer rows and may read the
blocks more often; with one, every mix is read in one pass, without a phase 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from attnres_fx.passes.lower.bytes_moved import (
    MOST_QUERIES,
    PREFER_TWO_PHASES,
    Group,
    Machine,
    gpu_machine,
    schedule,
    sources_of_plan,
)
from attnres_fx.passes.memory.layout import Layout, plan_layout
from attnres_fx.passes.memory.lifetimes import Buffer, Step, Tokens, lifetimes
from attnres_fx.passes.memory.steps import steps_of_plans
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.runtime.errors import MemoryBudgetError, OptionError

Candidate = TypeVar("Candidate")

# Query tiles that are tried; those between would make hardly any difference.
TILES = (MOST_QUERIES, 24, 16, 12, 8, 6, 4, 3, 2, 1)
_UNITS = {"b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(b|([kmgt]i?)b?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """What a memory plan is made for: tokens of a call on one device, bytes per element, and how mixes are read.

    ``schedule``: "auto", by bytes moved on a GPU; "one-pass"; "two-phase", wherever mixes have sources in common.
    ``keep_mixes``: in training, mixes are kept for the backward and not recomputed.
    """

    tokens: Tokens
    element: int = 2
    training: bool = False
    schedule: str = "auto"
    keep_mixes: bool = False


@dataclass(frozen=True)
class Choice:
    """A memory plan: what it was made for, the tile (most queries of one phase 1; 1 is one pass), and the result.

    ``moved``: bytes that the mixes move, per token of each stream; nan if they were not counted.
    """

    setting: Setting
    tile: int
    moved: float
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    layout: Layout


def parse_budget(budget: str | int, tokens: int) -> int:
    """Bytes of a budget: a text such as "512MB" (decimal) or "512MiB" (binary) is the whole, a number is bytes per token.

    Raises: OptionError if it is neither, or not positive.
    """
    if isinstance(budget, str):
        found = _BYTES.fullmatch(budget)
        whole = int(float(found.group(1)) * _UNITS[(found.group(3) or found.group(2)).lower()]) if found else 0
    else:
        whole = 0 if isinstance(budget, bool) else budget * tokens
    if whole <= 0:
        raise OptionError(f"memory_budget is {budget!r}",
                          remedy="give bytes as text, as \"512MB\" or \"1.5GiB\", or bytes per token as a whole number")
    return whole


def bytes_text(count: float) -> str:
    """Bytes for people, in decimal units to three digits and more."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            digits = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
            return f"{count:,.{digits}f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def tokens_per_device(tokens: int, chunk: int | None = None, devices: int = 1) -> int:
    """Tokens of one call on each of the devices that share its sequence, where prompts are read in chunks."""
    return math.ceil(min(tokens, chunk or tokens) / devices)


def tilings(plans: Sequence[StreamPlan], setting: Setting) -> list[Choice]:
    """The memory plans of the tiles that make a difference, the largest tile first."""
    seen: dict[tuple[tuple[Group, ...], ...], None] = {}
    for most in TILES:
        seen.setdefault(_groups(plans, setting, most))
    return [_laid_out(plans, setting, groups) for groups in seen]


def choose_tile(choices: Sequence[Choice], budget: int | None = None) -> Choice:
    """The plan that moves fewest bytes of those whose peak is at most ``budget`` bytes; of equals the lowest peak.

    If two phases are requested, one pass is chosen only if nothing else fits.

    Raises: MemoryBudgetError, which states the smallest budget that would do, if none fits.
    """
    ordered = sorted(choices, key=lambda choice: (
        choice.setting.schedule == "two-phase" and choice.tile == 1, round(choice.moved), choice.layout.arena))
    return first_that_fits((choice, choice.layout.arena, budget) for choice in ordered)


def first_that_fits(candidates: Iterable[tuple[Candidate, int, int | None]]) -> Candidate:
    """The first of ``candidates``, each with what it holds and the budget that it is given, in bytes, that keeps to it.

    Raises: MemoryBudgetError, which says the least that would do, if none does.
    """
    least, allowed = None, 0
    for candidate, held, budget in candidates:
        if budget is None or held <= budget:
            return candidate
        least, allowed = held if least is None else min(least, held), budget
    assert least is not None
    raise _too_small(allowed, least)


def _too_small(budget: int, least: int) -> MemoryBudgetError:
    """The error of a budget that nothing fits."""
    return MemoryBudgetError(
        f"the rows of attention residuals do not fit into a memory budget of {budget:,} bytes: the least possible is "
        f"{least:,} bytes",
        remedy=f"give {math.ceil(least / 10**5) / 10:,} MB or more, or fewer tokens at once (smaller chunks, more devices)")


def _groups(plans: Sequence[StreamPlan], setting: Setting, most: int) -> tuple[tuple[Group, ...], ...]:
    penalty = PREFER_TWO_PHASES if setting.schedule == "two-phase" else 0.0
    most = 1 if setting.schedule == "one-pass" else most
    return tuple(schedule(sources_of_plan(plan.boundaries, plan.num_layers), _machine(plan, setting), penalty=penalty,
                          most=most) for plan in plans)


def _machine(plan: StreamPlan, setting: Setting) -> Machine:
    tokens = setting.tokens if isinstance(setting.tokens, int) else setting.tokens[f"T_{plan.name}"]
    return gpu_machine(plan.width, setting.element, tokens, setting.training, plan.key_gain)


def _laid_out(plans: Sequence[StreamPlan], setting: Setting, groups: Sequence[Sequence[Group]]) -> Choice:
    steps = steps_of_plans(plans, groups, setting.element)
    buffers = lifetimes(steps, setting.training, setting.keep_mixes)
    read = [group for grouped in groups for group in grouped]
    tile = max((group.stop - group.start for group in read if group.prefix), default=1)
    return Choice(setting, tile, sum(group.bytes for group in read), steps, buffers,
                  plan_layout(buffers, setting.tokens))
