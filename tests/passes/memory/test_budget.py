"""Budgets limit how many queries phase 1 serves at once, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support.plans import stream_plan

from attnres_fx.passes.memory.budget import (
    Setting,
    bytes_text,
    choose_tile,
    parse_budget,
    tilings,
    tokens_per_device,
)
from attnres_fx.passes.memory.check_layout import check_layout
from attnres_fx.passes.memory.layout import plan_layout
from attnres_fx.runtime.errors import AttnResError, MemoryBudgetError, OptionError

PAPER = stream_plan(128, 8, width=7168)


@pytest.mark.parametrize("text, expected", [
    ("512MB", 512_000_000), ("512 mb", 512_000_000), ("1.5GiB", 1_610_612_736), ("64KiB", 65536), ("2g", 2 * 10**9),
    ("100 b", 100), ("7B", 7), (7, 700)])
def test_budgets(text: str | int, expected: int) -> None:
    assert parse_budget(text, tokens=100) == expected


@pytest.mark.parametrize("wrong", ["", "100", "MB", "-1MB", "0", "0.0GB", "12 apples", "1e9", 0, -3, True, "0.5"])
def test_what_is_no_budget(wrong: str | int) -> None:
    with pytest.raises(OptionError, match="memory_budget"):
        parse_budget(wrong, tokens=100)


def test_sizes_for_people() -> None:
    assert [bytes_text(n) for n in (0, 999, 1500, 15_032_385_536, 234_881_024, 1_879_048_192, 99_960_000, 2e12)] == [
        "0 B", "999 B", "1.50 kB", "15.0 GB", "235 MB", "1.88 GB", "100 MB", "2,000 GB"]


def test_the_papers_numbers() -> None:
    """Section 5: 15 GB at 128K tokens, 1.9 GB on each of 8 devices, and under 0.3 GB there with chunks of 16K."""
    stored = PAPER.num_blocks * PAPER.width * 2
    counts = [tokens_per_device(131072), tokens_per_device(131072, devices=8), tokens_per_device(131072, 16384, 8)]
    assert [round(stored * tokens / 1e9, 2) for tokens in counts] == [15.03, 1.88, 0.23]
    # The blocks are a part of what is held: the plan with the embedding, the partial sum and the mix stays below, too.
    chosen = choose_tile(tilings([PAPER], Setting(counts[-1])), parse_budget("0.3GB", counts[-1]))
    assert 10 * PAPER.width * 2 * counts[-1] == chosen.layout.arena < 0.3e9
    kept = {buffer.name for buffer in chosen.buffers if buffer.kind == "block"}
    assert kept == {f"b_{n}" for n in range(9)}
    whole = plan_layout(chosen.buffers, 131072)
    assert sum(place.size for place in whole.placements if place.buffer.kind == "block" and place.buffer.name != "b_0") \
        == stored * 131072


def test_tokens_of_a_call() -> None:
    assert tokens_per_device(1000, chunk=4096) == 1000
    assert tokens_per_device(1000, chunk=300, devices=7) == 43


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("schedule", ["auto", "two-phase"])
def test_a_budget_buys_traffic(schedule: str, training: bool) -> None:
    """Of what fits, the plan that moves fewest bytes; blocks and their rows are the same in all."""
    plans = [stream_plan(48, 4, width=1024)]
    setting = Setting(4096, training=training, schedule=schedule)
    choices = tilings(plans, setting)
    assert len({choice.tile for choice in choices}) == len(choices) > 3 and choices[-1].tile == 1
    for choice in choices:
        check_layout(choice.layout)
        assert choice.layout.ratio <= 1.05
        assert sum(buffer.kind == "block" for buffer in choice.buffers) == 5
        within = choose_tile(choices, choice.layout.arena)
        assert within.layout.arena <= choice.layout.arena
        others = [other for other in choices if other.layout.arena <= choice.layout.arena]
        if schedule == "two-phase":
            others = [other for other in others if other.tile > 1] or others
        assert round(within.moved) == min(round(other.moved) for other in others)
    assert choose_tile(choices) == choose_tile(choices, 10**15)
    assert choose_tile(choices).tile > 1


def test_tiles_hold_fewer_rows_and_move_more() -> None:
    choices = tilings([stream_plan(128, 8, width=1024)], Setting(4096, schedule="two-phase"))
    arenas, traffic = [c.layout.arena for c in choices], [round(c.moved) for c in choices]
    assert arenas == sorted(arenas, reverse=True) and arenas[0] > 2 * arenas[-1]
    assert traffic[-1] == max(traffic)
    one_pass = tilings([stream_plan(128, 8, width=1024)], Setting(4096, schedule="one-pass"))
    assert [choice.tile for choice in one_pass] == [1]
    assert one_pass[0].layout == choices[-1].layout


def test_an_impossible_budget_names_the_least_possible() -> None:
    choices = tilings([PAPER], Setting(2048))
    with pytest.raises(MemoryBudgetError, match="the least possible is") as caught:
        choose_tile(choices, 200_000_000)
    assert isinstance(caught.value, AttnResError)
    found = re.search(r"least possible is ([\d,]+) bytes", str(caught.value))
    assert found is not None
    least = int(found.group(1).replace(",", ""))
    assert choose_tile(choices, least).layout.arena == least
    with pytest.raises(MemoryBudgetError):
        choose_tile(choices, least - 1)
    remedy = re.search(r"give ([\d,.]+) MB", str(caught.value))
    assert remedy is not None and float(remedy.group(1).replace(",", "")) * 1e6 >= least


def test_streams_with_their_own_numbers_of_tokens() -> None:
    plans = [stream_plan(6, 3, name="encoder"), stream_plan(6, 3, name="decoder")]
    even, long = (tilings(plans, Setting({"T_encoder": 512, "T_decoder": count})) for count in (512, 5120))
    assert long[-1].layout.arena > 5 * even[-1].layout.arena
    assert tilings(plans, Setting(512)) == [replace(choice, setting=Setting(512)) for choice in even]
