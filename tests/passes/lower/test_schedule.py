"""Schedule: mixes that share sources are read in two phases, and nothing else changes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from support import models
from support.models import relative
from support.passes import applied
from support.rewritten_graphs import rewritten, values_and_gradients
from torch import Tensor, fx, nn

import attnres_fx
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.vocabulary import is_mix
from attnres_fx.passes.lower import schedule
from attnres_fx.passes.lower.schedule import schedule_mixes
from attnres_fx.runtime.mix import MIX, mix
from attnres_fx.runtime.phases import PHASE1, PHASE2


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything comes from memory: the models here would fit in any cache."""
    monkeypatch.setattr(schedule, "last_level_cache", lambda: 0)


def count(gm: fx.GraphModule) -> tuple[int, int, int]:
    """(mixes, phases 1, phases 2)."""
    targets = [node.target for node in gm.graph.nodes]
    return sum(map(is_mix, gm.graph.nodes)), targets.count(PHASE1), targets.count(PHASE2)


def assert_same(before: fx.GraphModule, after: fx.GraphModule, inputs: list[Any], leaves: list[Tensor]) -> None:
    expected, got = (values_and_gradients(gm, inputs, leaves) for gm in (before, after))
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert relative(ours, theirs) < 1e-9  # norms of the model round through float32


@pytest.mark.parametrize("num_layers, num_blocks, mix_scale", [(3, 2, "sum"), (6, 12, "paper"), (4, 3, "paper")])
@pytest.mark.parametrize("wished", ["auto", "two-phase"])
def test_the_schedule_changes_no_value(num_layers: int, num_blocks: int, mix_scale: str, wished: str) -> None:
    before, inputs, leaves = rewritten(num_layers, num_blocks, mix_scale=mix_scale)
    after = applied(schedule_mixes, before, schedule=wished, training=True)
    after.graph.lint()
    mixes, first, second = count(after)
    assert first > 0
    assert second > 0
    if wished == "two-phase":
        assert mixes <= 1
    assert_same(before, after, inputs, leaves)
    assert count(applied(schedule_mixes, after, schedule=wished, training=True)) == count(after)


def test_one_pass_and_few_tokens_leave_the_graph_as_it_is() -> None:
    before, _, _ = rewritten(6, 12)
    assert applied(schedule_mixes, before, schedule="one-pass", training=True) is before
    few, _, _ = rewritten(4, 3, shape=(1, 1))
    assert applied(schedule_mixes, few, schedule="auto", training=False) is few


def test_inference_and_training_are_decided_apart() -> None:
    before, _, _ = rewritten(4, 3)
    inference, training = (applied(schedule_mixes, before, schedule="auto", training=t) for t in (False, True))
    assert count(inference) != count(training)


def test_on_the_cpu_only_what_waits_for_memory_is_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _, _ = rewritten(6, 12)
    rows = max(len(node.args[0]) for node in before.graph.nodes if is_mix(node))
    held = rows * 2 * 32 * 32 * 8
    monkeypatch.setattr(schedule, "last_level_cache", lambda: 8 * held)
    assert applied(schedule_mixes, before, schedule="auto", training=True) is before
    monkeypatch.setattr(schedule, "last_level_cache", lambda: 8 * held - 1)
    assert count(applied(schedule_mixes, before, schedule="auto", training=True))[1] > 0
    model, x = Sharing("nothing").bfloat16(), torch.randn(500, 8, dtype=torch.bfloat16)
    half, _ = capture(model, (x,), {})
    assert applied(schedule_mixes, half, schedule="auto", training=True) is half


class Sharing(nn.Module):
    """Four reads of the same three sources, with something between the second and the third."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = between
        self.queries = nn.ParameterList(torch.randn(4, 8, dtype=torch.float64).unbind(0))
        self.weight = nn.Parameter(torch.randn(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        sources = [x * self.weight, x.sin() * self.weight, x.cos() * self.weight]
        if self.between == "dtypes":
            sources = [source.float() for source in sources[:2]] + sources[2:]
        queries = list(self.queries)
        total = mix(sources, queries[0]) + mix(sources, queries[1]).tanh()
        match self.between:
            case "tokens":
                queries[2] = queries[2] * total.mean()
            case "change":
                sources[1].mul_(2.0)
            case "gradient":
                with torch.no_grad():
                    apart = mix(sources, queries[2]) + mix(sources, queries[3])
                return total + apart
            case "several":
                queries[2] = torch.stack([queries[2], queries[3]])
                return total + mix(sources, queries[2]).sum(0)
        return total + mix(sources, queries[2]).tanh() + mix(sources, queries[3])


@pytest.mark.parametrize("between, expected", [
    ("nothing", (0, 1, 0)), ("tokens", (0, 2, 0)), ("change", (0, 2, 0)), ("gradient", (0, 2, 0)), ("several", (1, 1, 0)),
    ("dtypes", (4, 0, 0))])
def test_reads_that_must_stay_apart_stay_apart(between: str, expected: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = Sharing(between)
    before, inputs = capture(model, (torch.randn(50, 8, dtype=torch.float64),), {})
    after = applied(schedule_mixes, before, schedule="two-phase", training=True)
    assert count(after) == expected
    if between == "change":  # autograd refuses a source that is changed after it was saved
        with torch.no_grad():
            torch.testing.assert_close(after(*inputs), before(*inputs), rtol=1e-12, atol=1e-12)
        return
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    assert_same(before, after, inputs, leaves)


def test_checkpointed_regions_share_nothing() -> None:
    before, _, _ = rewritten(6, 12)
    for index, node in enumerate(node for node in before.graph.nodes if is_mix(node)):
        node.meta["recompute"], node.meta["ac_graph_id"] = "prefer", index // 2
    after = applied(schedule_mixes, before, schedule="two-phase", training=True)
    phases = [node for node in after.graph.nodes if node.target is PHASE1]
    assert len(phases) == 6
    for node in phases:
        made = {user.meta.get("ac_graph_id") for part in node.users for user in part.users if user.target is PHASE2}
        assert made <= {node.meta["ac_graph_id"]}
        assert all(user.target is operator.getitem for user in node.users)


@pytest.mark.parametrize("wished, grad", [
    ("auto", True), pytest.param("two-phase", False, marks=pytest.mark.slow)])
def test_compiled_models_are_scheduled(wished: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnres_fx import downstream

    seen: list[fx.GraphModule] = []
    run = downstream.run_inductor
    monkeypatch.setattr(downstream, "run_inductor", lambda gm, *rest: (seen.append(gm), run(gm, *rest))[1])
    torch._dynamo.reset()
    model, ids = models.llama(4), models.token_ids(2, 64)
    attnres_fx.convert(model, ids, num_blocks=8)
    with torch.no_grad():
        model.attnres.stream.query.normal_()
    fast = torch.compile(model, backend="attnres", options={"schedule": wished})
    with torch.set_grad_enabled(grad):
        got, expected = fast(ids).logits, model(ids).logits
        assert relative(got, expected) < 1e-5
        if grad:
            parameters = list(model.parameters())
            ours, theirs = (torch.autograd.grad(value.square().mean(), parameters, allow_unused=True)
                            for value in (got, expected))
            for a, b in zip(ours, theirs, strict=True):
                assert relative(a, b) < 1e-4
    assert count(seen[0])[1] > 0


@pytest.mark.parametrize("training, grouped", [(False, True), (True, False)])
def test_on_a_gpu_a_training_step_is_read_in_one_pass(training: bool, grouped: bool) -> None:
    """By fakes: the backward of a phase 1 of several queries moves more there than it saves."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph = fx.Graph()
    rows, query = graph.placeholder("rows"), graph.placeholder("query")
    with FakeTensorMode():
        for node, shape in ((rows, (4096, 64)), (query, (64,))):
            node.meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    made = graph.call_function(MIX, ([rows, rows], query, None))
    made.meta["val"] = rows.meta["val"]
    read = schedule._read(made)
    assert read is not None
    assert schedule._waits_for_memory([read], schedule.machine_of(read, training)) is grouped
