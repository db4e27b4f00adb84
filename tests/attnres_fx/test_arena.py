"""Rows in planned memory, through ``torch.compile``: where they lie, who may see them, who frees them."""

from __future__ import annotations

import gc
import math
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import models
import pytest
import torch
from scripts import load_script
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import attnres_fx
from attnres_fx import backend as backend_module
from attnres_fx.conversion import plans_of
from attnres_fx.memory import plan_memory
from attnres_fx.passes import arena as arena_pass
from attnres_fx.passes.arena import Arena, plan_arenas
from attnres_fx.passes.layout import Layout
from attnres_fx.runtime.arena import ArenaPool
from attnres_fx.runtime.errors import LayoutError
from attnres_fx.runtime.mix_norm import MIX_NORM_REFERENCE

WIDTH = 32
LAYERS = 9


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """Nine layers; ``hidden`` returns the stream before each, too."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.hidden = hidden

    def forward(self, ids: Tensor, context: Tensor | float = 0.0) -> Any:
        x, seen = self.embedding(ids) + context, []
        for layer in self.layers:
            seen.append(x)
            x = x + layer(x)
        result = self.head(self.norm(x))
        return (result, seen) if self.hidden else result


def tower(hidden: bool = False, num_blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = attnres_fx.convert(Tower(hidden), ids(5), num_blocks=num_blocks)
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def ids(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed + length))


def fast(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="attnres", options=options)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Graphs from no cache: the passes are to run in every test."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Arena]:
    """The arenas of every graph that is compiled."""
    found: list[Arena] = []

    def record(rows: Any) -> list[Arena]:
        arenas = plan_arenas(rows)
        found.extend(arenas)
        return arenas

    monkeypatch.setattr(arena_pass, "plan_arenas", record)
    return found


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[ArenaPool]]:
    """The pools of all compiled graphs."""
    found: list[weakref.ref[ArenaPool]] = []

    def make() -> ArenaPool:
        pool = ArenaPool()
        found.append(weakref.ref(pool))
        return pool

    monkeypatch.setattr(backend_module, "ArenaPool", make)
    return found


@pytest.fixture
def written() -> Iterator[list[tuple[list[int], list[int]]]]:
    """Addresses of the sources and of the results, of every fused mix that runs."""
    found: list[tuple[list[int], list[int]]] = []

    def into(*arguments: Any, normed_out: Tensor, partial_out: Tensor | None) -> None:
        results = MIX_NORM_REFERENCE(*arguments)
        outputs = [normed_out] if partial_out is None else [normed_out, partial_out]
        found.append(([source.data_ptr() for source in arguments[0]], [output.data_ptr() for output in outputs]))
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)

    library = torch.library.Library("attnres", "IMPL")
    library.impl("mix_norm_into", into, "CPU", allow_override=True)
    yield found
    library._destroy()


def held(pool: weakref.ref[ArenaPool]) -> int:
    """Bytes of the arenas that a pool keeps; none if it is gone."""
    found = pool()
    return 0 if found is None else found.bytes()


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ where rows lie


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
        assert (fast(model)(ids(7)) - expected).abs().max() > 1e-2


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


# ------------------------------------------------------------------------------------------------ who may see them


def test_what_is_returned_lies_elsewhere(pools: list[weakref.ref[ArenaPool]]) -> None:
    """Hidden states are the mixes: they stay as they are when the next call writes its own."""
    model = tower(hidden=True)
    compiled = fast(model)
    with torch.no_grad():
        first = compiled(ids(7))
        expected = model(ids(7))
        compiled(ids(7, seed=1))
        close(first, expected)
        assert len({tensor.untyped_storage().data_ptr() for tensor in [first[0], *first[1]]}) == LAYERS + 1
    assert held(pools[0]) <= 4 * 2 * 7 * WIDTH * 4


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes(around: Callable[[], Any]) -> None:
    model = tower()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    compiled = fast(model)
    for length in (7, 4, 9):
        with around():
            torch.testing.assert_close(compiled(ids(length)), model(ids(length)), rtol=2e-2, atol=2e-2)
    close(compiled(ids(7)), model(ids(7)))


@pytest.mark.slow
def test_threads_and_models() -> None:
    towers = [tower(), tower(num_blocks=9)]
    compiled = [fast(model) for model in towers]
    with torch.no_grad():
        expected = {(number, length): model(ids(length)) for number, model in enumerate(towers) for length in range(3, 9)}
        for number, length in expected:
            compiled[number](ids(length))
    wrong: list[Any] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for step in range(60):
                number, length = (seed + step) % 2, 3 + (seed * 7 + step) % 6
                if not torch.allclose(compiled[number](ids(length)), expected[number, length], rtol=1e-4, atol=1e-5):
                    wrong.append((number, length))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_within_a_call(pools: list[weakref.ref[ArenaPool]]) -> None:
    """A compiled model that runs itself in the middle, in an operator that Inductor does not look into."""
    model = tower()

    @torch.library.custom_op("attnres_tests::runs_again", mutates_args=())
    def again(x: Tensor, depth: int) -> Tensor:
        with torch.no_grad():
            return x.clone() if depth == 0 else x + 0 * compiled(ids(7), depth - 1).sum()

    again.register_fake(lambda x, depth: torch.empty_like(x))

    class Within(Tower):
        def forward(self, given: Tensor, depth: int) -> Tensor:  # type: ignore[override]
            x = self.embedding(given)
            for index, layer in enumerate(self.layers):
                x = x + (again(layer(x), depth) if index == 4 else layer(x))
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = attnres_fx.convert(Within(), (ids(7), 0), num_blocks=3)
    compiled = fast(model)
    with torch.no_grad():
        expected = compiled(ids(7), 0)
        torch.testing.assert_close(compiled(ids(7), 2), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(ids(7), 1), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ training


def gradients(run: Callable[[], Any], model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    run()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and max(map(models.relative, got, expected)) < 1e-4


@pytest.mark.parametrize("schedule", ["one-pass", "two-phase"])
def test_the_blocks_of_a_training_step_lie_together(schedule: str, planned: list[Arena]) -> None:
    model = tower()
    compiled = fast(model, schedule=schedule)

    def two_forwards() -> None:  # before either backward, one of them twice
        first, second = compiled(ids(7)), compiled(ids(7, seed=1))
        second.square().sum().backward()
        (first.sum() + first.square().sum()).backward()

    def plainly() -> None:
        model(ids(7, seed=1)).square().sum().backward()
        result = model(ids(7))
        (result.sum() + result.square().sum()).backward()

    assert same(gradients(two_forwards, model), gradients(plainly, model))
    (arena,) = planned
    # The embedding and three blocks; nothing is over anything, as the backward reads all.
    assert len(arena.places) == 4 and arena.numel == 4 * 2 * 7 * WIDTH
    assert len({place.offset for place in arena.places}) == 4


def test_blocks_are_freed_with_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    compiled = fast(model)
    compiled(ids(7)).sum().backward()
    kept: list[weakref.ref[torch.UntypedStorage]] = []
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        kept.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compiled(ids(7))
    assert 4 * 4 * 2 * 7 * WIDTH in sizes
    del result
    gc.collect()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert [ref for ref in kept if (storage := ref()) is not None and storage.data_ptr() not in parameters] == []


def test_what_a_training_step_returns_lies_elsewhere(planned: list[Arena]) -> None:
    model = tower(hidden=True)
    compiled = fast(model)
    result, seen = compiled(ids(7))
    expected, theirs = model(ids(7))
    close([result, *seen], [expected, *theirs])
    assert len({tensor.untyped_storage().data_ptr() for tensor in [result, *seen]}) == LAYERS + 1
    rows = 2 * 7 * WIDTH * 4
    assert all(tensor.untyped_storage().nbytes() == rows for tensor in seen)
    assert same(gradients(lambda: result.sum().backward(), model), gradients(lambda: expected.sum().backward(), model))


@pytest.mark.slow
def test_checkpointed_layers(planned: list[Arena]) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Tower):
        def forward(self, given: Tensor) -> Tensor:
            x = self.embedding(given)
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=False)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = attnres_fx.convert(Checkpointed(), ids(7), num_blocks=3)
    with torch.no_grad():
        model.attnres.stream.query.normal_()
    compiled = fast(model)
    assert same(gradients(lambda: compiled(ids(7)).square().sum().backward(), model),
                gradients(lambda: model(ids(7)).square().sum().backward(), model))
    assert planned


# ------------------------------------------------------------------------------------------------ who frees them


def test_a_freed_model_frees_its_arena(pools: list[weakref.ref[ArenaPool]]) -> None:
    model = tower()
    compiled = fast(model)
    with torch.no_grad():
        compiled(ids(7))
        compiled(ids(9))
    assert [held(pool) > 0 for pool in pools] == [True, True]
    del model, compiled
    gc.collect()
    assert [held(pool) for pool in pools] == [0, 0]


def test_a_reset_frees_the_arena_of_a_model_that_lives_on(pools: list[weakref.ref[ArenaPool]]) -> None:
    model = tower()
    with torch.no_grad():
        fast(model)(ids(7))
        torch._dynamo.reset()
        gc.collect()
        assert [pool() for pool in pools] == [None]
        close(fast(model)(ids(7)), model(ids(7)))


def test_a_failed_allocation_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    compiled = fast(model)
    lease = ArenaPool.lease
    failing = [False]

    def sometimes(self: ArenaPool, *given: Any) -> Tensor:
        if failing[0]:
            raise torch.OutOfMemoryError("no memory for the arena")
        return lease(self, *given)

    monkeypatch.setattr(ArenaPool, "lease", sometimes)
    with torch.no_grad():
        expected = compiled(ids(7))
        failing[0] = True
        with pytest.raises(torch.OutOfMemoryError, match="no memory for the arena"):
            compiled(ids(7))
        failing[0] = False
        torch.testing.assert_close(compiled(ids(7)), expected, rtol=0, atol=0)


def test_an_error_in_the_middle_gives_the_arena_back(pools: list[weakref.ref[ArenaPool]]) -> None:
    model = tower()
    fails = [False]

    def into(*arguments: Any, normed_out: Tensor, partial_out: Tensor | None) -> None:
        if fails[0]:
            raise torch.OutOfMemoryError("in the middle")
        for output, result in zip((normed_out, partial_out), MIX_NORM_REFERENCE(*arguments)):
            if output is not None:
                output.copy_(result)

    library = torch.library.Library("attnres", "IMPL")
    library.impl("mix_norm_into", into, "CPU", allow_override=True)
    try:
        compiled = fast(model)
        with torch.no_grad():
            expected = compiled(ids(7))
            fails[0] = True
            for _ in range(6):
                with pytest.raises(torch.OutOfMemoryError, match="in the middle"):
                    compiled(ids(7))
            fails[0] = False
            torch.testing.assert_close(compiled(ids(7)), expected, rtol=0, atol=0)
        pool = pools[0]()
        assert pool is not None and len([arena for arenas in pool._arenas.values() for arena in arenas]) == 1
    finally:
        library._destroy()


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
def test_ten_thousand_calls_of_random_shapes(pools: list[weakref.ref[ArenaPool]]) -> None:
    model = tower()
    compiled = fast(model)
    random = Random(0)
    held_at: list[int] = []
    with torch.no_grad():
        compiled(ids(5))
        compiled(ids(9, batch=3))
        compiled(ids(400, batch=4))
        for step in range(10_000):
            given = ids(random.randint(1, 400), batch=random.randint(1, 4), seed=step)
            result, expected = compiled(given), model(given)
            assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5), (step, given.shape)
            if step % 1000 == 999:
                held_at.append(resident())
    assert len(pools) <= 6  # graphs, for sizes of one and others
    assert max(held_at[1:]) - held_at[1] < 8 * 2**20, held_at


def test_never_means_never(planned: list[Arena]) -> None:
    model = tower()
    with torch.no_grad():
        result, (code,) = run_and_get_code(fast(model, arena="never"), ids(7))
        close(result, model(ids(7)))
    assert not planned and "attnres.mix_norm.default" in code
    with pytest.raises(Exception, match="give one of auto, never"):
        fast(model, arena="sometimes")(ids(7))


# ------------------------------------------------------------------------------------------------ what is held


def simulated_peak(code: str, arena: int) -> int:
    """The most bytes that Inductor's code holds, by its own allocations and deletions; ``arena`` is what one is lent."""
    owner: dict[str, int] = {}
    bytes_of: list[int] = []
    live = peak = 0
    assigned = re.compile(r"(\w+) = (?:(empty_strided_cpu)\(\(([\d, ]*)\), .*, torch\.(\w+)\)"
                          r"|(torch\.ops\.attnres\.arena\.default)|reinterpret_tensor\((\w+),.*?|(\w+))"
                          r"(?:\(.*|;.*|  # alias.*)?$")
    lines = code[code.index("args.clear()"):code.index("return (")].splitlines()
    for line in map(str.strip, lines):
        made = assigned.match(line)
        if made:
            name, empty, shape, dtype, lent, viewed, same = made.groups()
            if empty or lent:
                numel = math.prod(map(int, re.findall(r"\d+", shape or "")))
                bytes_of.append(arena if lent else numel * getattr(torch, dtype).itemsize)
                owner[name] = len(bytes_of) - 1
                live += bytes_of[-1]
                peak = max(peak, live)
            elif (viewed or same) in owner:
                owner[name] = owner[viewed or same]
        for name in re.findall(r"\bdel (\w+)", line):
            storage = owner.pop(name, None)
            if storage is not None and storage not in owner.values():
                live -= bytes_of[storage]
    return peak


@pytest.mark.parametrize("schedule", ["one-pass", "two-phase"])
def test_an_inference_holds_what_its_schedule_says_and_the_plan_allows(
    planned: list[Arena], pools: list[weakref.ref[ArenaPool]], schedule: str
) -> None:
    memory = load_script("benchmarks/memory.py")
    model, given = tower(), ids(64, batch=8)
    torch.manual_seed(0)
    plain = torch.compile(Tower())
    compiled = fast(model, schedule=schedule)
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, given)
        plain(given)
        bound = memory.held(lambda: plain(given))[1].peak + 4 * planned[0].numel
        pool = pools[0]()
        assert pool is not None
        pool.clear()  # so that the arena is among the events
        measured = memory.held(lambda: compiled(given))[1].peak
    simulated = simulated_peak(code, 4 * planned[0].numel)
    assert simulated > 4 * planned[0].numel > 0
    assert abs(measured - simulated) <= 0.05 * simulated, (measured, simulated)
    assert measured <= bound
