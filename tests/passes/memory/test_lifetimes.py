"""Lifetimes: from plans alone, and from graphs, which have to agree."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import models
from support.passes import applied
from support.plans import Clobbered, planned, planned_steps, run_in_arena, stream_plan
from torch import Tensor, nn

import attnres_fx
from attnres_fx.converted import plans_of
from attnres_fx.passes.findings import find_marked
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.lower.fuse import fuse_mixes
from attnres_fx.passes.lower.schedule import schedule_mixes
from attnres_fx.passes.memory.check_layout import check_layout
from attnres_fx.passes.memory.layout import plan_layout
from attnres_fx.passes.memory.lifetimes import Buffer, Step, last_step, lifetimes, live_bytes
from attnres_fx.passes.memory.steps import steps_of_graph
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.runtime.mix import mix

ROW = 128  # bytes per token: 64 elements of two bytes


def lives(buffers: tuple[Buffer, ...]) -> dict[str, tuple[int, int]]:
    return {buffer.name: (buffer.first, buffer.last) for buffer in buffers}


def test_an_inference_by_hand() -> None:
    """Four layers in two blocks. Steps: 0 embedding, 1 layer, 2 mix, 3 layer, 4 sum, 5 mix, 6 layer, 7 mix, 8 layer,
    9 sum, 10 mix, 11 output."""
    steps = planned_steps([stream_plan(4, 2)], "one-pass")
    assert [step.name for step in steps] == [
        "embedding", "layer 1", "mix 1", "layer 2", "sum 2", "mix 2", "layer 3", "mix 3", "layer 4", "sum 4", "mix 4",
        "output"]
    buffers = lifetimes(steps, training=False)
    assert lives(buffers) == {
        "b_0": (0, 10), "partial 1": (1, 3), "mix 1": (2, 3), "b_1": (4, 10), "mix 2": (5, 6), "partial 3": (6, 8),
        "mix 3": (7, 8), "b_2": (9, 10), "mix 4": (10, 11)}
    assert {buffer.name: buffer.over for buffer in buffers if buffer.over} == {"b_1": "partial 1", "b_2": "partial 3"}
    assert {buffer.size for buffer in buffers} == {"128 * T"}


def test_a_training_step_by_hand() -> None:
    """Two layers in one block: 0 embedding, 1 layer, 2 mix, 3 layer, 4 sum, 5 mix, 6 output, and the backward 7-13."""
    buffers = lifetimes(planned_steps([stream_plan(2, 1)], "one-pass"), training=True)
    assert lives(buffers) == {
        "b_0": (0, 12), "partial 1": (1, 11), "mix 1": (2, 3), "b_1": (4, 8), "mix 2": (5, 6),
        "gradient of mix 2": (7, 8), "gradient of b_1": (8, 8), "gradient of mix 1": (10, 11),
        "gradient of partial 1": (9, 12), "gradient of b_0": (8, 13), "mix 2 again": (8, 8), "mix 1 again": (11, 11)}
    assert {b.name: b.over for b in buffers if b.over} == {"gradient of partial 1": "gradient of b_1"}


@pytest.mark.parametrize("num_layers, num_blocks", [(4, 2), (12, 5), (16, 8), (64, 8), (128, 8), (24, 24)])
def test_rows_of_the_paper(num_layers: int, num_blocks: int) -> None:
    """Inference: N + 1 blocks to the end (the last is formed in place), and one mix. Training: what is saved is one row a
    layer and the embedding, as in the plain network; the gradients of blocks and partial sums are N + 1 rows, and all that
    is held at once is at most 2 N + 4 rows more than what the plain network saves."""
    rows = num_blocks_of(num_layers, num_blocks) + 1
    buffers = planned(num_layers, num_blocks)
    assert max(live_bytes(buffers, 1)) == (rows + 1) * ROW
    assert last_step(buffers) == last_step([b for b in buffers if b.kind == "mix"])
    output_mix = max(b.first for b in buffers if b.kind == "mix")
    assert all(b.last == output_mix for b in buffers if b.kind == "block")

    training = planned(num_layers, num_blocks, training=True)
    end = (last_step(training) + 1) // 2 - 1
    saved = sum(ROW for b in training if b.first <= end < b.last)
    assert saved == (num_layers + 1) * ROW
    assert max(live_bytes(training, 1)) <= (num_layers + 1 + 2 * (rows - 1) + 4) * ROW
    gradients = [b for b in training if b.kind in ("gradient of block", "gradient of partial")]
    assert max(live_bytes(gradients, 1)) == rows * ROW
    kept = planned(num_layers, num_blocks, training=True, keep_mixes=True)
    assert sum(ROW for b in kept if b.first <= end < b.last) == (2 * num_layers + 1) * ROW


def num_blocks_of(num_layers: int, num_blocks: int) -> int:
    return stream_plan(num_layers, num_blocks).num_blocks


def test_rows_of_phase_1_end_with_their_phase_2() -> None:
    buffers = {b.name: b for b in planned(6, 2, "two-phase")}
    assert {name for name in buffers if name.startswith(("row", "lse"))} == {f"{n} {p}" for n in ("row", "lse")
                                                                             for p in range(1, 7)}
    assert buffers["lse 4"].bytes(10) == 40
    for position in (4, 5):
        assert buffers[f"row {position}"].last == buffers[f"lse {position}"].last == buffers[f"mix {position}"].first
    # Position 3 opens a block: it reads complete blocks alone, so that its row is the mix, and its statistic is not read.
    assert "mix 3" not in buffers
    assert buffers["lse 3"].first == buffers["lse 3"].last == buffers["row 3"].first < buffers["row 3"].last
    training = {b.name: b for b in planned(6, 2, "two-phase", training=True)}
    assert training["row 4"].last > buffers["row 4"].last
    # The norm that reads row 3 is fused with no mix, and keeps it.
    assert training["row 3"].last == training["gradient of row 3"].first and "mix 3 again" not in training
    assert training["gradient of row 4"].first == training["gradient of mix 4"].last
    assert "gradient of lse 3" not in training


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wished", ["one-pass", "two-phase", "auto"])
@pytest.mark.parametrize("num_layers, num_blocks, scale", [(2, 1, "paper"), (5, 3, "sum"), (9, 9, "paper"), (12, 3, "sum")])
def test_a_run_in_the_arena_finds_every_row(
    num_layers: int, num_blocks: int, scale: str, wished: str, training: bool
) -> None:
    plans = [stream_plan(num_layers, num_blocks, name="encoder", mix_scale=scale),
             stream_plan(num_layers + 2, 2, width=96, name="decoder")]
    steps = planned_steps(plans, wished, training)
    layout = plan_layout(lifetimes(steps, training), {"T_encoder": 2, "T_decoder": 3})
    check_layout(layout)
    run_in_arena(steps, layout, training)


def test_a_run_in_the_arena_sees_a_life_cut_short() -> None:
    """The run is not a formality: with any one life a step shorter, some plan fails in it."""
    steps = planned_steps([stream_plan(6, 2)], "one-pass")
    buffers = lifetimes(steps, training=False)
    cut = [Buffer(**{**vars(b), "last": b.last - 1}) if b.name == "b_0" else b for b in buffers]
    with pytest.raises(Clobbered, match="'b_0' was overwritten"):
        run_in_arena(steps, plan_layout(cut, 1), training=False)


@functools.cache
def lowered(family: str, mix_scale: str) -> tuple[Any, list[StreamPlan]]:
    model, args, kwargs = models.CASES[family].build()
    attnres_fx.convert(model, args, kwargs, num_blocks=3, mix_scale=mix_scale)
    return find_marked(capture(model, args, kwargs)[0]).rewritten(), plans_of(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wished", ["one-pass", "two-phase"])
@pytest.mark.parametrize("family, mix_scale", [("nanogpt", "paper"), ("nanogpt", "sum"), ("t5", "paper")])
def test_graphs_hold_what_plans_say(family: str, mix_scale: str, wished: str, training: bool) -> None:
    gm, plans = lowered(family, mix_scale)
    steps, tokens = steps_of_graph(applied(schedule_mixes, gm, schedule=wished, training=training))
    found = lifetimes(steps, training)
    expected = lifetimes(tuple(_in_float32(planned_steps(plans, wished, training))), training)
    assert Counter(b.kind for b in found) == Counter(b.kind for b in expected)
    assert {b.stream for b in found} == {plan.name for plan in plans}
    ours = plan_layout(found, tokens)
    names = dict.fromkeys(b.tokens for b in expected)
    theirs = plan_layout(expected, dict(zip(names, tokens.values(), strict=True)))
    check_layout(ours)
    run_in_arena(steps, ours, training)
    assert (ours.arena, ours.lower_bound, ours.naive) == (theirs.arena, theirs.lower_bound, theirs.naive)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wished", ["one-pass", "two-phase"])
def test_fused_nodes_save_sums_and_no_norms(wished: str, training: bool) -> None:
    gm, (plan,) = lowered("nanogpt", "paper")
    scheduled = applied(schedule_mixes, gm, schedule=wished, training=training)
    steps, tokens = steps_of_graph(applied(fuse_mixes, scheduled))
    buffers = lifetimes(steps, training)
    layout = plan_layout(buffers, tokens)
    check_layout(layout)
    run_in_arena(steps, layout, training)
    assert layout.ratio <= 1.05
    kinds = Counter(b.kind for b in buffers)
    apart = Counter(b.kind for b in lifetimes(steps_of_graph(scheduled)[0], training))
    assert kinds["norm of a mix"] == apart["mix"] > 0 and kinds["mix"] == 0
    assert all(kinds[kind] == apart[kind] for kind in ("block", "partial", "phase 1", "log-sum-exp"))
    names = {b.name for b in buffers if b.kind == "norm of a mix"}
    written = {value.name for step in steps for value in step.writes if value.kind == "norm of a mix"}
    assert names == written | ({f"{name} again" for name in written} if training else set())
    if training and wished == "one-pass":
        end = len(steps) - 1
        row = max(place.size for place in layout.placements)
        assert sum(b.bytes(tokens) for b in buffers if b.first <= end < b.last) == (plan.num_layers + 1) * row


def _in_float32(steps: tuple[Step, ...]) -> list[Step]:
    """Plans are made for two bytes per element here, the models run in four."""
    return [replace(step, writes=tuple(
        replace(value, bytes_per_token=value.bytes_per_token * (1 if value.kind == "log-sum-exp" else 2))
        for value in step.writes)) for step in steps]


class Mixing(nn.Module):
    """Two mixes by hand: one of its sources is an input, one value is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        partial = self.layer(x)
        first = mix([x, partial], self.query)
        partial = partial + self.layer(first)
        return mix([x, partial], self.query), partial


def test_memory_of_the_caller_is_not_planned() -> None:
    gm, _ = capture(Mixing(), (torch.randn(3, 5, 8),), {})
    steps, tokens = steps_of_graph(gm)
    assert tokens == {"15": 15}
    buffers = lifetimes(steps, training=False)
    # Neither the input, nor the sum and the last mix, which are returned; so that the sum is not formed in place, either.
    assert [(b.kind, b.over) for b in buffers] == [("partial", None), ("mix", None)]
    assert steps_of_graph(capture(nn.Linear(8, 8), (torch.randn(3, 8),), {})[0]) == ((), {})
    assert lifetimes((), training=True) == ()
