"""Rows in planned memory, through ``torch.compile``: where they lie."""

from __future__ import annotations

import math
import re
import weakref
from dataclasses import replace

import pytest
import torch
from support import models
from support.arenas import LAYERS, WIDTH, Tower, close, fast, held, ids, tower
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import attnres_fx
from attnres_fx.converted import plans_of
from attnres_fx.passes.memory import place as arena_pass
from attnres_fx.passes.memory.layout import Layout
from attnres_fx.passes.memory.place import Arena
from attnres_fx.reports.memory import plan_memory
from attnres_fx.runtime.arena import ArenaPool
from attnres_fx.runtime.errors import LayoutError

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("schedule", ["one-pass", "two-phase"])
def test_no_row_is_allocated_or_copied(schedule: str, planned: list[Arena]) -> None:
    """By Inductor's code: all that mixes write goes into the arena, and no kernel moves a row."""
    model = tower()
    with torch.no_grad():
        expected, (result, (code,)) = model(ids(7)), run_and_get_code(fast(model, schedule=schedule), ids(7))
    close(result, expected)
    calls = re.findall(r"torch\.ops\.attnres\.(\w+)\.default\((.*)", code)
    assert {name for name, _ in calls} <= {
        "arena", "addmm_into", "mix_norm_into", "mix_phase1_into", "mix_phase2_into"}
    assert len([name for name, _ in calls if name == "arena"]) == len(planned) == 1
    arenas = set(re.findall(r"(buf\d+) = torch\.ops\.attnres\.arena", code))
    arenas |= {new for new, old in re.findall(r"(buf\d+) = (buf\d+)$", code, re.MULTILINE) if old in arenas}
    for name, arguments in calls:
        for output in re.findall(r"_out=(\[.*?\]|reinterpret_tensor\(\w+|\w+)", arguments) if name != "arena" else []:
            assert output == "None" or set(re.findall(r"buf\d+", output)) <= arenas, arguments
    kernels = re.findall(r"cpp_fused_(\w+?)_\d+\(", code)
    assert kernels and not [name for name in kernels if re.search("copy|clone|cat|scatter|mix", name)]
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\),", code)
    sizes = [math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes]
    assert sizes and max(sizes) < 2 * (2 * 7 * WIDTH)  # nothing holds two rows


@pytest.mark.parametrize("num_blocks", [3, LAYERS])
def test_the_arena_is_the_plan(num_blocks: int, planned: list[Arena]) -> None:
    """Byte for byte, with one layer a block too: then every row but the norms is the product that ends a layer."""
    model = tower(num_blocks=num_blocks)
    with torch.no_grad():
        expected, (result, (code,)) = model(ids(8)), run_and_get_code(fast(model, schedule="one-pass"), ids(8))
    close(result, expected)
    (arena,) = planned
    plan = plan_memory(plans_of(model), 2 * 8, dtype="fp32", schedule="one-pass")
    assert 4 * arena.numel == plan.choice.layout.arena
    # The first layer of each block.
    opening = [place.row for place in arena.places if place.row.maker.target is torch.ops.aten.addmm.default]
    assert len(opening) == num_blocks == code.count("attnres.addmm_into.default(")
    # A partial sum goes on over the product, which has another shape.
    assert num_blocks == LAYERS or {row.node for row in opening} <= {place.row.over for place in arena.places}


@pytest.mark.slow
def test_the_arena_is_the_plan_of_two_streams_in_two_phases(planned: list[Arena]) -> None:
    """Of an encoder and a decoder of unlike lengths, whose rows share what they use one after the other."""
    model, _, given = models.CASES["t5"].build()
    given["decoder_input_ids"] = given["decoder_input_ids"][:, :4].contiguous()
    lengths = {"encoder": given["input_ids"].numel(), "decoder": given["decoder_input_ids"].numel()}
    attnres_fx.convert(model.eval(), (), given, num_blocks=2)
    with torch.no_grad():
        expected = model(**given).logits
        close(fast(model, schedule="two-phase")(**given).logits, expected)
    plan = plan_memory(plans_of(model), lengths, dtype="fp32", schedule="two-phase")
    assert lengths["encoder"] != lengths["decoder"]
    assert [4 * arena.numel for arena in planned] == [plan.choice.layout.arena]


def test_products_that_inductor_tunes_are_left_to_it(planned: list[Arena]) -> None:
    model = tower(num_blocks=LAYERS)
    compiled = fast(model, inductor={"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN"})
    with torch.no_grad():
        expected, (result, (code,)) = model(ids(8)), run_and_get_code(compiled, ids(8))
    close(result, expected)
    assert planned and "addmm_into" not in code


def test_a_row_is_read_where_it_was_written(planned: list[Arena], written: list[tuple[list[int], list[int]]]) -> None:
    """By addresses, so that a copy inside of an operator would be seen: every block is read in its slot, by all mixes."""
    model = tower()
    compiled = fast(model)
    with torch.no_grad():
        expected = model(ids(7))
        written.clear()
        close(compiled(ids(7)), expected)
    (arena,) = planned
    base = written[0][0][0] - 4 * arena.places[0].offset  # the embedding is the first row
    slots = {base + 4 * place.offset for place in arena.places}
    assert len(written) == LAYERS
    assert all(output in slots for _, outputs in written for output in outputs)
    # The last mix reads the embedding and three blocks, of which the last is completed over its partial sum.
    last, (_, completed) = written[-1]
    closing = [outputs[1] for position, (_, outputs) in enumerate(written, start=1) if position in (3, 6)]
    assert last == [base + 4 * arena.places[0].offset, *closing, completed]
    # A partial sum goes on where it stood.
    assert all(outputs[1] == sources[-1] for sources, outputs in written if len(outputs) == 2 and sources[-1] in slots)


def test_addresses_stay_and_short_calls_use_the_arena_of_long_ones(
    written: list[tuple[list[int], list[int]]], pools: list[weakref.ref[ArenaPool]]
) -> None:
    model = tower()
    compiled = fast(model)
    seen: list[list[list[int]]] = []
    with torch.no_grad():
        for length in (6, 11, 11, 8, 11):  # the second and later ones run one graph for all lengths
            written.clear()
            close(compiled(ids(length)), model(ids(length)))
            if length == 11:
                seen.append([outputs for _, outputs in written[:LAYERS]])
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    assert held(pools[0]) * 11 == held(pools[1]) * 6


def shifted(layout: Layout, moved: int, by: int) -> Layout:
    places = [replace(place, offset=place.offset + by) if index >= moved else place
              for index, place in enumerate(layout.placements)]
    return replace(layout, placements=tuple(places), arena=layout.arena + by)


def test_a_row_moves_with_its_offset(monkeypatch: pytest.MonkeyPatch, written: list[tuple[list[int], list[int]]]) -> None:
    model = tower()
    plan = arena_pass.plan_layout
    with torch.no_grad():
        expected = model(ids(7))
        offsets = []
        for by in (0, 4096):
            torch._dynamo.reset()
            monkeypatch.setattr(arena_pass, "plan_layout", lambda *given, by=by: shifted(plan(*given), 1, by))
            written.clear()
            close(fast(model)(ids(7)), expected)
            embedding = written[0][0][0]
            offsets.append([output - embedding for _, outputs in written for output in outputs])
    assert [later - earlier for earlier, later in zip(*offsets, strict=True)] == [4096] * len(offsets[0])


def overlapping(layout: Layout) -> Layout:
    """The slot of the second row, the product that opens a block, where the embedding is."""
    first, second, *_ = layout.placements
    return replace(layout, placements=tuple(
        replace(place, offset=first.offset) if place.offset == second.offset else place for place in layout.placements))


def test_an_overlap_is_caught_and_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    plan = arena_pass.plan_layout
    monkeypatch.setattr(arena_pass, "plan_layout", lambda *given: overlapping(plan(*given)))
    with torch.no_grad():
        expected = model(ids(7))
        with pytest.raises(Exception, match="share bytes while both are in use") as caught:
            fast(model)(ids(7))
        assert LayoutError.__name__ in str(caught.value)
        monkeypatch.setattr(arena_pass, "check_layout", lambda layout: None)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"holds another row|in another order"):  # the graph is checked apart from it
            fast(model)(ids(7))
        monkeypatch.setattr(arena_pass, "check_arena", lambda graph, memories: None)
        torch._dynamo.reset()
        assert (fast(model, kernels="reference")(ids(7)) - expected).abs().max() > 1e-2


@pytest.mark.slow
def test_a_norm_that_is_read_late_through_a_view_that_calls_itself_none(planned: list[Arena]) -> None:
    """Inductor makes a view of ``_unsafe_view``, whose schema promises new memory."""

    class Late(Tower):
        def forward(self, given: Tensor) -> Tensor:  # type: ignore[override]
            x = self.embedding(given)
            kept = []
            for layer in self.layers:
                normed = layer.norm(x)
                kept.append(torch.ops.aten._unsafe_view(normed, [-1, WIDTH]))
                x = x + layer.down(torch.tanh(layer.up(normed)))
            late = sum(torch.mm(row, self.embedding.weight.t()).sum() for row in kept)
            return self.head(self.norm(x)) + late

    torch.manual_seed(0)
    model = attnres_fx.convert(Late(), ids(7), num_blocks=3)
    with torch.no_grad():
        model.attnres.stream.query.normal_()
        expected = fast(model, arena="never")(ids(7))
        close(fast(model)(ids(7)), expected)
    assert planned


def test_rows_of_a_number_that_only_the_call_tells(planned: list[Arena]) -> None:
    """A stream whose length depends on values: no arena can be sized before, and everything runs as without one."""

    class Selected(Tower):
        def forward(self, given: Tensor) -> Tensor:
            chosen = given[given > 9]
            torch._check(chosen.shape[0] > 1)
            return super().forward(chosen)

    torch.manual_seed(0)
    model = attnres_fx.convert(Selected(), ids(30), num_blocks=3)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        close(fast(model)(ids(30)), model(ids(30)))
    assert planned == []


class Pair(nn.Module):
    """Two towers, for streams of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Tower(), Tower()


class Early(Pair):
    """The second stream's embedding is made before the first stream runs."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        x = self.second.embedding(other)
        head = self.first(one).mean(1, keepdim=True)
        for layer in self.second.layers:
            x = x + layer(x)
        return self.second.head(self.second.norm(x)) * head


@pytest.mark.slow
def test_a_stream_that_begins_early_shares_what_it_uses_late(planned: list[Arena]) -> None:
    """The embedding has a place of its own; the other rows share."""
    torch.manual_seed(0)
    model = attnres_fx.convert(Early(), (ids(5), ids(8)), num_blocks=3)
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        compiled = fast(model)
        for lengths in ((5, 8), (6, 11), (12, 3)):
            given = ids(lengths[0]), ids(lengths[1])
            close(compiled(*given), model(*given))
    fixed, symbolic = planned
    long, short = 2 * 8 * WIDTH, 2 * 5 * WIDTH
    assert fixed.numel <= 5 * long + short
    assert isinstance(symbolic.numel, torch.SymInt) and "Max" in str(symbolic.numel), symbolic.numel
    at = {place.row: (place.offset, place.offset + place.row.value.numel()) for place in symbolic.places}
    seen = 0
    for row, (begin, end) in at.items():
        for other, (start, stop) in at.items():
            alive = row.first <= other.last and other.first <= row.last
            if row is not other and alive and row.node is not other.over and other.node is not row.over:
                seen += 1
                hints = [number if isinstance(number, int) else number.node.hint for number in (begin, end, start, stop)]
                assert hints[1] <= hints[2] or hints[3] <= hints[0], (row.name, other.name)
    assert seen > 20


def test_an_overlap_of_sizes_that_a_call_decides_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = attnres_fx.convert(Early(), (ids(5), ids(8)), num_blocks=3)
    monkeypatch.setattr(arena_pass, "_floors", lambda groups: [list(groups)])
    compiled = torch.compile(model, backend="attnres", dynamic=True)
    with torch.no_grad(), pytest.raises(Exception, match="share bytes while both are in use"):
        compiled(ids(5), ids(8))


@pytest.mark.slow
def test_streams_of_different_lengths_share_what_they_use_one_after_the_other(planned: list[Arena]) -> None:
    class Late(Pair):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            head = self.first(one).mean(1, keepdim=True).mean(-1, keepdim=True)
            return self.second(other, head)

    torch.manual_seed(0)
    model = attnres_fx.convert(Late(), (ids(5), ids(8)), num_blocks=3)
    compiled = fast(model)
    with torch.no_grad():
        for lengths in ((5, 8), (6, 11), (12, 3)):
            given = ids(lengths[0]), ids(lengths[1])
            close(compiled(*given), model(*given))
    fixed, symbolic = planned
    assert fixed.numel == 5 * 2 * 8 * WIDTH  # what the longer one needs alone
    assert isinstance(symbolic.numel, torch.SymInt) and "Max" in str(symbolic.numel), symbolic.numel
