"""Fit: a budget limits the queries that a phase 1 serves, changes no value, and is refused where nothing fits."""

from __future__ import annotations

import re

import pytest
import torch
from support.models import relative
from support.passes import applied
from support.rewritten_graphs import rewritten, values_and_gradients
from torch import fx

from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.lower.fuse import fuse_mixes
from attnres_fx.passes.lower.schedule import schedule_mixes
from attnres_fx.passes.memory.layout import plan_layout
from attnres_fx.passes.memory.lifetimes import lifetimes
from attnres_fx.passes.memory.steps import steps_of_graph
from attnres_fx.passes.pipeline import lowered_within
from attnres_fx.runtime.errors import MemoryBudgetError
from attnres_fx.runtime.phases import PHASE1


def queries(gm: fx.GraphModule) -> int:
    """Most queries that a phase 1 of the graph serves; 0 where there is none."""
    return max((len(node.args[1].args[0]) for node in gm.graph.nodes if node.target is PHASE1), default=0)


def held(gm: fx.GraphModule, training: bool) -> int:
    steps, tokens = steps_of_graph(gm)
    return plan_layout(lifetimes(steps, training), tokens).arena


@pytest.mark.parametrize("training", [False, True])
def test_a_smaller_budget_gives_smaller_tiles(training: bool) -> None:
    gm, inputs, leaves = rewritten(3, 2, shape=(2, 12), dtype=torch.float32)
    free = applied(fuse_mixes, applied(schedule_mixes, gm, schedule="two-phase", training=training))
    most, least = held(free, training), held(applied(fuse_mixes, gm), training)
    assert least < most and queries(free) > 2
    tiles = []
    for budget in range(most, least - 1, -(2 * 12 * 32 * 4) // 2):
        chosen = lowered_within(gm, Context(schedule="two-phase", training=training), f"{budget}B")
        assert held(chosen, training) <= budget
        tiles.append(queries(chosen))
    assert tiles[0] == queries(free) and tiles == sorted(tiles, reverse=True) and len(set(tiles)) > 1
    chosen = lowered_within(gm, Context(schedule="two-phase", training=training), f"{most - 1}B")
    for one, other in zip(values_and_gradients(free, inputs, leaves), values_and_gradients(chosen, inputs, leaves),
                          strict=True):
        if one is not None:
            assert relative(other, one) < 2e-5


def test_the_least_possible_is_named_and_fits() -> None:
    gm, _, _ = rewritten(3, 2, shape=(2, 12), dtype=torch.float32)
    with pytest.raises(MemoryBudgetError, match="least possible") as caught:
        lowered_within(gm, Context(schedule="two-phase", training=False), "1kB")
    found = re.search(r"least possible is ([\d,]+) bytes", str(caught.value))
    assert found is not None
    named = int(found.group(1).replace(",", ""))
    assert held(lowered_within(gm, Context(schedule="two-phase", training=False), f"{named}B"), False) == named
    with pytest.raises(MemoryBudgetError):
        lowered_within(gm, Context(schedule="two-phase", training=False), f"{named - 1}B")


def test_a_number_is_bytes_per_token() -> None:
    gm, _, _ = rewritten(3, 2, shape=(2, 16), dtype=torch.float32)
    whole = held(applied(fuse_mixes, applied(schedule_mixes, gm, schedule="two-phase", training=False)), False)
    assert whole % 32 == 0
    code = applied(fuse_mixes, applied(schedule_mixes, gm, schedule="two-phase", training=False)).code
    assert lowered_within(gm, Context(schedule="two-phase", training=False), whole // 32).code == code
    assert lowered_within(gm, Context(schedule="two-phase", training=False), whole // 32 - 1).code != code
