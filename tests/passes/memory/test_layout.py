"""Layouts: as small as can be, and right by a check of their own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exact_layout import Piece, exact_arena, most_live
from support.plans import Clobbered, grouped, planned, planned_steps, run_in_arena, stream_plan

from attnres_fx.passes.memory.check_layout import check_layout
from attnres_fx.passes.memory.layout import ALIGNMENT, Layout, plan_layout
from attnres_fx.passes.memory.lifetimes import Buffer, Tokens, lifetimes
from attnres_fx.passes.memory.steps import steps_of_plans
from attnres_fx.runtime.errors import AttnResError, LayoutError

SIZES = [(2, 1), (2, 2), (3, 2), (8, 8), (12, 5), (16, 8), (24, 3), (33, 8), (64, 8), (64, 64)]


def buffers_of(pieces: list[Piece]) -> list[Buffer]:
    return [Buffer(f"v{i}", "stream", "block", size, "T", first, last) for i, (size, first, last) in enumerate(pieces)]


def pieces_of(layout: Layout) -> list[Piece]:
    """The storages of a layout: what is taken over in place is one with what takes it over, all of them aligned."""
    graph = nx.Graph()
    places = {place.buffer.name: place for place in layout.placements}
    graph.add_nodes_from(places)
    graph.add_edges_from((place.buffer.name, place.buffer.over) for place in places.values() if place.buffer.over)
    found = []
    for names in nx.connected_components(graph):
        parts = [places[name] for name in names]
        size = -(-max(part.size for part in parts) // ALIGNMENT) * ALIGNMENT
        found.append((size, min(part.buffer.first for part in parts), max(part.buffer.last for part in parts)))
    return found


def assert_good(buffers: tuple[Buffer, ...], tokens: Tokens = 512) -> Layout:
    """The planned peak is at most 5 % above the largest sum of live bytes."""
    layout = plan_layout(buffers, tokens)
    check_layout(layout)
    assert layout.lower_bound <= layout.arena <= 1.05 * layout.lower_bound
    assert layout.naive == sum(buffer.bytes(tokens) for buffer in buffers)
    assert layout.ratio == layout.arena / layout.lower_bound
    assert 0 <= layout.fragmentation <= 0.05
    return layout


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wished", ["one-pass", "two-phase"])
@pytest.mark.parametrize("num_layers, num_blocks", SIZES)
def test_plans_reach_their_lower_bound(num_layers: int, num_blocks: int, wished: str, training: bool) -> None:
    layout = assert_good(planned(num_layers, num_blocks, wished, training))
    if len(layout.placements) < 40:
        assert layout.arena <= 1.05 * exact_arena(pieces_of(layout), layout.arena)


@pytest.mark.parametrize("most", [32, 16, 8, 4, 2, 1])
def test_the_papers_setting_in_two_phases(most: int) -> None:
    """128 layers in 8 blocks of 16: untiled, the rows of phase 1 are twice the block cache; a tile brings them down."""
    plan = stream_plan(128, 8)
    layout = assert_good(lifetimes(steps_of_plans([plan], [grouped(plan, "two-phase", most=most)], 2), False))
    row = plan.width * 2 * 512
    rows_of_phase_1 = layout.arena / row - 9
    assert rows_of_phase_1 == pytest.approx({32: 17, 16: 16, 8: 9, 4: 5, 2: 3, 1: 1}[most], abs=0.6)


@pytest.mark.parametrize("training", [False, True])
def test_two_streams_share_slots(training: bool) -> None:
    plans = [stream_plan(12, 4, width=48, name="encoder"), stream_plan(18, 6, width=64, name="decoder")]
    tokens = {"T_encoder": 600, "T_decoder": 256}
    both = assert_good(lifetimes(planned_steps(plans, "one-pass", training), training), tokens)
    steps = planned_steps(plans, "two-phase", training)
    assert_good(lifetimes(steps, training), tokens)
    apart = [plan_layout(lifetimes(planned_steps([plan], "one-pass", training), training), count).arena
             for plan, count in zip(plans, tokens.values())]
    assert both.arena < sum(apart)
    if not training:
        assert both.arena <= 1.05 * max(apart)
        offsets: dict[int, set[str]] = {}
        for place in both.placements:
            offsets.setdefault(place.offset, set()).add(place.buffer.stream)
        assert {"encoder", "decoder"} in offsets.values()


lives = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair)))


@settings(max_examples=200, deadline=None)
@given(st.lists(lives, min_size=1, max_size=24))
def test_equal_rows_take_no_more_than_most_live(intervals: list[tuple[int, int]]) -> None:
    """Optimal: as many slots as the largest clique of the interference graph has buffers."""
    layout = plan_layout(buffers_of([(ALIGNMENT, first, last) for first, last in intervals]), 1)
    check_layout(layout)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(intervals)))
    graph.add_edges_from((a, b) for a, b in itertools.combinations(range(len(intervals)), 2)
                         if max(intervals[a][0], intervals[b][0]) <= min(intervals[a][1], intervals[b][1]))
    cliques = nx.chordal_graph_cliques(graph)
    assert layout.arena == layout.lower_bound == ALIGNMENT * max(map(len, cliques))
    assert layout.slots == layout.arena // ALIGNMENT


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), lives), max_size=20), st.integers(1, 3))
def test_mixed_sizes_are_placed_right(drawn: list[tuple[int, tuple[int, int]]], tokens: int) -> None:
    buffers = buffers_of([(size, *life) for size, life in drawn])
    layout = plan_layout(buffers, tokens)
    check_layout(layout)
    assert layout.arena >= layout.lower_bound == most_live([(size * tokens, *life) for size, life in drawn])
    assert layout.arena <= sum(piece[0] for piece in pieces_of(layout))
    assert plan_layout(buffers, tokens) == layout


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), lives), min_size=1, max_size=7))
def test_the_exact_solver_is_exact(drawn: list[tuple[int, tuple[int, int]]]) -> None:
    """Against all orders of setting the pieces down; and no layout of the planner is smaller."""
    pieces = [(size * ALIGNMENT, *life) for size, life in drawn]
    layout = plan_layout(buffers_of(pieces), 1)
    best = exact_arena(pieces, 10**9)
    assert most_live(pieces) <= best <= layout.arena
    if len(pieces) <= 5:
        assert best == min(settled(order) for order in itertools.permutations(pieces))


def settled(order: tuple[Piece, ...]) -> int:
    """The arena where each piece lies upon the highest of those before it that live with it."""
    tops: list[tuple[Piece, int]] = []
    for piece in order:
        below = max((top for other, top in tops if other[1] <= piece[2] and piece[1] <= other[2]), default=0)
        tops.append((piece, below + piece[0]))
    return max(top for _, top in tops)


def moved(layout: Layout, name: str, offset: int) -> Layout:
    return replace(layout, placements=tuple(
        replace(place, offset=offset) if place.buffer.name == name else place for place in layout.placements))


def test_a_layout_that_overlaps_is_caught_and_gives_a_wrong_answer() -> None:
    steps = planned_steps([stream_plan(6, 3)], "one-pass")
    layout = plan_layout(lifetimes(steps, False), 4)
    run_in_arena(steps, layout, False)
    offsets = {place.buffer.name: place.offset for place in layout.placements}
    for shift in (0, ALIGNMENT):
        wrong = moved(layout, "mix 4", offsets["b_1"] + shift)
        with pytest.raises(LayoutError, match=r"'b_1' \(steps .*'mix 4' \(steps") as caught:
            check_layout(wrong)
        assert isinstance(caught.value, AttnResError)
        with pytest.raises(Clobbered, match="'b_1' was overwritten by"):
            run_in_arena(steps, wrong, False)


def test_what_else_a_layout_must_not_do() -> None:
    layout = plan_layout(planned(6, 3), 4)
    for wrong, message in [
        (moved(layout, "b_0", 8), "'b_0' begins at byte 8"),
        (moved(layout, "mix 6", layout.arena), "'mix 6' at bytes .* lies outside"),
        (moved(layout, "mix 6", -ALIGNMENT), "'mix 6' at bytes .* lies outside"),
        (moved(layout, "b_3", 0), "'b_3' .* takes over the bytes of .*'partial 5'"),
        (replace(layout, arena=layout.arena - 1), "lies outside"),
        (replace(layout, placements=layout.placements * 2), "the same name"),
    ]:
        with pytest.raises(LayoutError, match=message):
            check_layout(wrong)


def test_nothing_takes_nothing() -> None:
    layout = plan_layout((), 100)
    check_layout(layout)
    assert (layout.arena, layout.naive, layout.lower_bound, layout.ratio, layout.fragmentation) == (0, 0, 0, 1.0, 0.0)
