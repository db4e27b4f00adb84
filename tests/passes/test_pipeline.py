"""The list of passes, and what holds for each of them: alone, it changes its example, soundly, and a second time nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import handwritten
from support.arenas import ids as tower_ids
from support.arenas import tower
from support.graphs import Toy, toy_input, trace
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import attnres_fx
from attnres_fx.errors import OptionError
from attnres_fx.options import Options
from attnres_fx.passes import pipeline
from attnres_fx.passes._compat.inductor import GraphPasses, run_inductor
from attnres_fx.passes.findings import find, find_marked
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import copy_graph_module, insert_call, keep_unread
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.pipeline import ALL, LOWER, PREPARE, RECOGNIZE, REWRITE, Done, Pass, run, run_in_place

WIDTH = 16


def marked() -> fx.GraphModule:
    model = Toy(lambda m, x, i: x + m.branch(x, i), 4)
    attnres_fx.convert(model, toy_input(), num_blocks=2)
    return trace(model, toy_input())[0]


def traced(step: Callable[[Any, Tensor, int], Tensor]) -> fx.GraphModule:
    return trace(Toy(step), toy_input())[0]


def encoder() -> fx.GraphModule:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True, norm_first=True).eval()
    with torch.no_grad():
        return capture(layer, (torch.randn(2, 5, WIDTH),), {})[0]


@torch.library.custom_op("pipeline_tests::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight, total


@add_rms_norm.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def opaque(m: Any, x: Tensor, i: int) -> Tensor:
    normed, total = add_rms_norm(x, m.branch(x, i), m.scale, 1e-6)
    return total + m.second[i](normed)


def injected(m: Any, x: Tensor, i: int) -> Tensor:
    x = x + m.branch(x, i)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    x[mask] = x[mask] + m.scale
    return x


def read_twice(m: Any, x: Tensor, i: int) -> Tensor:
    sources = [x, m.branch(x, i)]
    return attnres_fx.mix(sources, m.scale) * attnres_fx.mix(sources, m.scale)


def with_dead_node() -> fx.GraphModule:
    gm = copy_graph_module(traced(lambda m, x, i: x + m.branch(x, i)))
    keep_unread(gm.graph)
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    with gm.graph.inserting_after(node):
        insert_call(gm.graph, torch.ops.aten.neg.default, (node,), like=node)
    return gm


def tagged() -> fx.GraphModule:
    return run(PREPARE, traced(lambda m, x, i: checkpoint(lambda y: y + m.branch(y, i), x, use_reentrant=False)), Context())


def spelled_out() -> fx.GraphModule:
    return capture(handwritten.Network(handwritten.READS[0]), (torch.arange(10).view(2, 5),), {})[0]


def rewritten() -> fx.GraphModule:
    return find_marked(marked()).rewritten()


def aot_graph(joint: bool) -> fx.Graph:
    """The joint graph of a training step of a converted model, or the graph of a call, as our passes are given them."""
    model = tower()
    found: list[fx.Graph] = []

    def keep(graph: fx.Graph) -> None:
        found.append(copy.deepcopy(graph))

    with torch.set_grad_enabled(joint):
        gm, inputs = capture(model, (tower_ids(5),), {})
        gm = run((*PREPARE, *REWRITE, *LOWER), gm, Context(training=joint))
        torch._dynamo.reset()
        passes = GraphPasses("tests of the pipeline", keep if joint else lambda graph: None, None if joint else keep)
        run_inductor(gm, inputs, {"force_disable_caches": True}, passes)(*inputs)
    return found[0]


# For each pass: a graph that it changes, and its context.
EXAMPLES: dict[str, tuple[Callable[[], fx.GraphModule | fx.Graph], dict[str, Any]]] = {
    "prepare.inline": (lambda: traced(lambda m, x, i: checkpoint(lambda y: y + m.branch(y, i), x, use_reentrant=False)), {}),
    "prepare.encoder_layers": (encoder, {}),
    "prepare.unfuse": (lambda: traced(opaque), {}),
    "prepare.normalize": (lambda: traced(lambda m, x, i: torch.add(x, m.branch(x, i), alpha=2.0)), {}),
    "prepare.injections": (lambda: traced(injected), {}),
    "recognize.mixes": (spelled_out, {}),
    "rewrite.streams": (marked, {}),
    "rewrite.remove_dead": (with_dead_node, {}),
    "lower.recomputation": (tagged, {}),
    "lower.share": (lambda: traced(read_twice), {}),
    "lower.schedule": (rewritten, {"schedule": "two-phase"}),
    "lower.fuse": (rewritten, {}),
    "lower.select": (rewritten, {"kernels": "reference"}),
    "lower.reread": (lambda: aot_graph(joint=True), {"training": True}),
    "memory.place": (lambda: aot_graph(joint=False), {}),
}


def test_every_pass_has_an_example_and_a_name_of_its_own() -> None:
    names = [each.name for each in ALL]
    assert list(EXAMPLES) == names and len(set(names)) == len(names)


@pytest.mark.parametrize("single", ALL, ids=lambda each: each.name)
def test_a_pass_alone(single: Pass) -> None:
    """Checked as ``check_passes`` does: lint-clean, new nodes have values, a second run changes nothing."""
    make, told = EXAMPLES[single.name]
    given = make()
    graph = given if isinstance(given, fx.Graph) else copy_graph_module(given).graph
    context = Context(**{"schedule": "one-pass", "checks": True, **told})
    (done,) = run_in_place((single,), graph, context)
    assert done.changes and done.seconds > 0
    assert not single.run(graph, context)


def broken(graph: fx.Graph, context: Context) -> int:
    node = next(node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_after(node):
        graph.call_function(torch.ops.aten.neg.default, (node,))
    return 1


def restless(graph: fx.Graph, context: Context) -> int:
    return 1


def unordered(graph: fx.Graph, context: Context) -> int:
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    nodes[0].prepend(nodes[-1])
    return 1


@pytest.mark.parametrize(("wrong", "said"), [
    (broken, "without a value: neg"), (restless, "a second run"), (unordered, "before it has been defined")])
def test_a_pass_that_breaks_its_contract_is_named(wrong: Callable[[fx.Graph, Context], int], said: str) -> None:
    gm = traced(lambda m, x, i: x + m.branch(x, i))
    with pytest.raises(RuntimeError, match=said):
        run((Pass("wrong", wrong),), gm, Context(checks=True))


def test_nothing_changed_is_the_same_module_and_the_given_one_never_changes() -> None:
    plain = traced(lambda m, x, i: x + m.branch(x, i))
    assert run(PREPARE, plain, Context()) is plain
    gm = traced(lambda m, x, i: torch.add(x, m.branch(x, i), alpha=2.0))
    before = str(gm.graph)
    after = run(PREPARE, gm, Context())
    assert after is not gm and str(gm.graph) == before != str(after.graph)


def test_passes_are_left_out_by_name_but_for_those_that_are_needed() -> None:
    gm = marked()
    names = frozenset(each.name for each in ALL)
    done = run_in_place((*PREPARE, *REWRITE), copy_graph_module(gm).graph, Context(disabled=names))
    assert [one.name for one in done if one.changes is not None] == ["rewrite.streams"]


def test_the_option_knows_the_names() -> None:
    assert Options.from_arguments(None, {"disable": ["lower.fuse"]}).context(training=False).disabled == {"lower.fuse"}
    for wrong in (["lower.fuze"], ["rewrite.streams"], "lower.fuse"):
        with pytest.raises(OptionError, match=r"lower\.fuse"):
            Options.from_arguments(None, {"disable": wrong})


def compiled(x: Tensor, **options: Any) -> tuple[Tensor, nn.Module]:
    torch._dynamo.reset()
    model = Toy(lambda m, x, i: x + m.branch(x, i), 4)
    attnres_fx.convert(model, x, num_blocks=2)
    with torch.no_grad():
        model.attnres.stream.query.normal_(generator=torch.Generator().manual_seed(0))
    return torch.compile(model, backend="attnres", options=options)(x), model


@pytest.mark.parametrize("name", [each.name for each in (*LOWER, *pipeline.JOINT)])
def test_leaving_a_pass_out_changes_no_value(name: str) -> None:
    x = toy_input()
    got, model = compiled(x, downstream="aot_eager", fuse="always", schedule="two-phase", disable=[name], check_passes=True)
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)


def test_the_log_lists_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(pipeline, "trace_structured", lambda _, metadata_fn, payload_fn: seen.append(metadata_fn()["name"]))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(pipeline.__name__)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        compiled(toy_input(), downstream="eager", disable=["lower.schedule"])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    listed = [line.split() for line in lines[-12:]]  # the compiled call came last
    assert [words[1] for words in listed] == [each.name for each in (*PREPARE, *REWRITE, *LOWER)]
    assert [words[0] for words in listed] == [str(number) for number in range(1, 13)]
    assert listed[5][-2:] == ["4", "changes"] and listed[9][-2:] == ["left", "out"]
    assert "attnres_6_rewrite_streams" in seen and not any("schedule" in name for name in seen)


def test_findings_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion detects the plain model and the marked one; a verification the marked one alone."""
    from attnres_fx.passes import findings
    from attnres_fx.passes.rewrite import match

    counted: list[Sequence[Any]] = []

    def counting(detect: Any) -> Any:
        return lambda graph: (counted.append(graph), detect(graph))[1]

    for module in (findings, match):
        monkeypatch.setattr(module, "detect", counting(module.detect))
    model = Toy(lambda m, x, i: x + m.branch(x, i), 4)
    attnres_fx.convert(model, toy_input(), num_blocks=2)
    assert len(counted) == 2
    assert attnres_fx.verify(model, toy_input()).passed and len(counted) == 3


def test_findings_stay_as_they_are() -> None:
    gm = traced(lambda m, x, i: x + m.branch(x, i))
    found = find(gm)
    (stream,) = found.streams
    with pytest.raises(AttributeError):
        stream.name = "other"  # type: ignore[misc]
    assert [value_of(value).shape[-1] for value in stream.values] == [8, 8, 8, 8] and not found.mixes
    both = find_marked(marked())
    before = str(both.gm.graph)
    once, again = both.rewritten(), both.rewritten()
    assert str(once.graph) == str(again.graph) and str(both.gm.graph) == before
    (assignment,) = both.plain().assignments
    assert {node.graph for node in assignment.stream.values} == {assignment.query.graph} != {both.gm.graph}


def test_a_pass_that_was_left_out_says_so() -> None:
    (done,) = run_in_place(RECOGNIZE, traced(lambda m, x, i: x).graph, Context(disabled=frozenset({"recognize.mixes"})))
    assert done == Done("recognize.mixes", 0.0, None)
