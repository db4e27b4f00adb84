"""Rewrite: a stream becomes block sums and mixes, equal to the definition, sound in every node, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.graphs import Step, Toy, assert_sound, assignment, plan_for, run, toy_input, trace
from support.passes import in_place, rewrite
from torch import Tensor, fx, nn

from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.record import record_of
from attnres_fx.passes.graph.vocabulary import addition_of, is_mix, op_name
from attnres_fx.passes.prepare.normalize import normalize

BOTH = ("dynamo", "export")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def rewritten(model: nn.Module, *args: Any, tracer: str = "dynamo", **options: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The one stream of ``model`` rewritten, and the inputs of its graph, the query and the gain last."""
    gm, inputs = trace(model, *args, tracer=tracer)
    in_place(normalize, gm)
    (stream,) = detect(gm.graph)
    assert stream.refusal() is None
    chosen, values = assignment(gm, stream, plan_for(stream, **options))
    rewrite(gm, [chosen])
    return gm, [*inputs, *values]


def by_definition(model: Any, x: Tensor, layers: Sequence[Callable[[Tensor], Tensor]], inputs: list[Any],
                  boundaries: Sequence[int], **options: Any) -> Tensor:
    mixes = reference.attention_residuals(model.embed(x), layers, inputs[-2], inputs[-1], boundaries, **options)
    return model.head(model.norm(mixes[-1]))


def layers_of(model: Any, function: Step, count: int = 3) -> list[Callable[[Tensor], Tensor]]:
    return [lambda h, i=i: function(model, h, i) for i in range(count)]


# The addition, and the layer that it means.
FORMS: dict[str, tuple[Step, Step]] = {
    "plain": (lambda m, x, i: x + m.branch(x, i), lambda m, x, i: m.branch(x, i)),
    "operands exchanged": (lambda m, x, i: m.branch(x, i) + x, lambda m, x, i: m.branch(x, i)),
    "in place": (lambda m, x, i: x.add_(m.branch(x, i)), lambda m, x, i: m.branch(x, i)),
    "alpha": (lambda m, x, i: torch.add(x, m.branch(x, i), alpha=0.5), lambda m, x, i: 0.5 * m.branch(x, i)),
    "addcmul": (lambda m, x, i: torch.addcmul(x, m.branch(x, i), m.scale), lambda m, x, i: m.scale * m.branch(x, i)),
    "sub": (lambda m, x, i: x - m.branch(x, i), lambda m, x, i: -m.branch(x, i)),
    "stack": (lambda m, x, i: torch.stack([x, m.branch(x, i)]).sum(0), lambda m, x, i: m.branch(x, i)),
    "parallel": (lambda m, x, i: x + m.branch(x, i) + m.other(x, i), lambda m, x, i: m.branch(x, i) + m.other(x, i)),
    "parallel inside": (lambda m, x, i: m.branch(x, i) + (x + m.other(x, i)),
                        lambda m, x, i: m.branch(x, i) + m.other(x, i)),
    "parallel with copies": (lambda m, x, i: (x + m.branch(x, i)).contiguous() + m.other(x, i),
                             lambda m, x, i: m.branch(x, i) + m.other(x, i)),
    "learned scale": (lambda m, x, i: x + m.scale * m.branch(x, i), lambda m, x, i: m.scale * m.branch(x, i)),
    "broadcast": (lambda m, x, i: x + m.branch(x, i).mean(1, keepdim=True),
                  lambda m, x, i: m.branch(x, i).mean(1, keepdim=True).expand_as(x)),
    "bias": (lambda m, x, i: x + (m.branch(x, i) + m.scale), lambda m, x, i: m.branch(x, i) + m.scale),
    "nested": (lambda m, x, i: x + m.second[i](m.branch(x, i) + m.other(m.branch(x, i), i)),
               lambda m, x, i: m.second[i](m.branch(x, i) + m.other(m.branch(x, i), i))),
    "raw branch": (lambda m, x, i: x + m.first[i](x), lambda m, x, i: m.first[i](x)),
}


@pytest.mark.parametrize("tracer", BOTH)
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_definition(name: str, tracer: str) -> None:
    step, layer = FORMS[name]
    model, x = Toy(step).double(), toy_input().double()
    gm, inputs = rewritten(model, x, tracer=tracer, layers_per_block=2)
    with torch.no_grad():
        expected = by_definition(model, x, layers_of(model, layer), inputs, [2, 3])
    assert (run(gm, inputs) - expected).norm() <= 1e-12 * expected.norm()
    assert_sound(gm, inputs)
    assert [len(node.args[0]) for node in gm.graph.nodes if is_mix(node)] == [2, 2, 3]


@pytest.mark.parametrize("boundaries", [[1, 2, 3], [3], [1], [2]])
@pytest.mark.parametrize("options", [{}, {"mix_scale": "sum"}, {"eps": 0.1}])
def test_plans(boundaries: list[int], options: dict[str, Any]) -> None:
    step, layer = FORMS["plain"]
    model, x = Toy(step).double(), toy_input().double()
    gm, inputs = rewritten(model, x, boundaries=boundaries, **options)
    closing = boundaries if boundaries[-1] == 3 else [*boundaries, 3]
    with torch.no_grad():
        expected = by_definition(model, x, layers_of(model, layer), inputs, closing, **options)
    assert (run(gm, inputs) - expected).norm() <= 1e-12 * expected.norm()


def _two_dimensional(m: Any, x: Tensor, i: int) -> Tensor:
    x = x + m.branch(x, i)
    shape = x.shape
    x = x.reshape(-1, x.shape[-1])
    return (x + m.other(x, i)).view(shape)


def _stays_two_dimensional(m: Any, x: Tensor, i: int) -> Tensor:
    x = x + m.branch(x, i)
    return (x.flatten(0, 1) if i == 1 else x) + m.other(x.flatten(0, 1) if i == 1 else x, i)


def _time_first(m: Any, x: Tensor, i: int) -> Tensor:
    x = x + m.branch(x, i)
    x = x.transpose(0, 1)
    return (x + m.other(x, i)).transpose(0, 1)


def _permuted(m: Any, x: Tensor, i: int) -> Tensor:
    x = x + m.branch(x, i)
    x = x.permute(1, 0, 2)
    return (x + m.other(x, i)).movedim(0, 1)


@pytest.mark.parametrize("tracer", BOTH)
@pytest.mark.parametrize("step", [_two_dimensional, _stays_two_dimensional, _time_first, _permuted])
def test_layout_changes_on_the_stream(step: Step, tracer: str) -> None:
    """Sources are kept in one layout; readers get the layout that they read before. Branches here are token-wise."""
    model, x = Toy(step).double(), toy_input().double()
    gm, inputs = rewritten(model, x, tracer=tracer, layers_per_block=4)
    layers: list[Callable[[Tensor], Tensor]] = []
    for i in range(3):
        layers += [lambda h, i=i: model.branch(h, i), lambda h, i=i: model.other(h, i)]
    with torch.no_grad():
        expected = by_definition(model, x, layers, inputs, [4, 6])
        value = run(gm, inputs)
    assert value.shape == model(x).shape
    assert (value.reshape(expected.shape) - expected).norm() <= 1e-12 * expected.norm()
    assert_sound(gm, inputs)


def test_low_precision_branch_keeps_a_float32_stream() -> None:
    model, x = Toy(lambda m, x, i: x + m.branch(x, i).bfloat16()), toy_input()
    gm, inputs = rewritten(model, x, layers_per_block=2)
    mixes = [node for node in gm.graph.nodes if is_mix(node)]
    assert {value_of(source).dtype for mix in mixes for source in mix.args[0]} == {torch.float32}
    with torch.no_grad():
        layers = layers_of(model, lambda m, h, i: m.branch(h, i).bfloat16().float())
        expected = by_definition(model, x, layers, inputs, [2, 3])
    assert (run(gm, inputs) - expected).norm() <= 1e-5 * expected.norm()
    assert_sound(gm, inputs)


def test_dropout_in_a_branch_is_kept() -> None:
    def layer(m: Any, x: Tensor, i: int) -> Tensor:
        return F.dropout(m.branch(x, i), 0.4, training=True)

    model, x = Toy(lambda m, x, i: x + layer(m, x, i)).double(), toy_input().double()
    gm, inputs = rewritten(model, x, layers_per_block=2)
    assert sum(op_name(node) == "dropout" for node in gm.graph.nodes) == 3
    with torch.no_grad():
        torch.manual_seed(0)
        expected = by_definition(model, x, layers_of(model, layer), inputs, [2, 3])
        torch.manual_seed(0)
        value = run(gm, inputs)
    assert (value - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("tracer", BOTH)
def test_the_chain_of_additions_is_gone(tracer: str) -> None:
    """A second detection finds nothing left to rewrite, and further runs of the passes change nothing."""
    gm, inputs = rewritten(Toy(FORMS["plain"][0], 6), toy_input(), tracer=tracer, layers_per_block=2)
    assert not [s for s in detect(gm.graph) if s.refusal() is None]
    mixes = [node for node in gm.graph.nodes if is_mix(node)]
    assert [record_of(node).position for node in mixes] == [1, 2, 3, 4, 5, 6]
    for node in gm.graph.nodes:  # a partial sum never contains the embedding or a mix
        if addition_of(node) is not None:
            assert not [part for part in node.all_input_nodes if is_mix(part)]
    before = str(gm.graph)
    in_place(normalize, gm)
    rewrite(gm, [])
    assert str(gm.graph) == before
    assert_sound(gm, inputs)


def test_new_nodes_know_where_they_come_from() -> None:
    gm, _ = rewritten(Toy(FORMS["plain"][0]), toy_input(), layers_per_block=2)
    made = [node for node in gm.graph.nodes if record_of(node)]
    assert made and all(node.meta.get("stack_trace") and "graphs.py" in node.meta["stack_trace"] for node in made)
    assert all(node.meta.get("nn_module_stack") is not None for node in made)
    valueless = ("output", "get_attr", "call_module")
    assert all(value_of(node) is not None for node in gm.graph.nodes if node.op not in valueless)


def test_parameters_are_taken_apart_once() -> None:
    """One unbind a parameter: a select a row would add up whole-size gradients in the backward."""
    gm, inputs = rewritten(Toy(FORMS["plain"][0]), toy_input(), layers_per_block=2)
    assert sum(op_name(node) == "unbind" for node in gm.graph.nodes) == 2
    assert not [node for node in gm.graph.nodes if op_name(node) == "select"]
    leaves = [i.clone().requires_grad_() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
    value = gm(*leaves)
    (value[0] if isinstance(value, tuple) else value).square().sum().backward()
    for parameter in leaves[-2:]:
        assert not parameter.grad[0].any() and all(row.norm() > 0 for row in parameter.grad[1:])


def test_two_streams_of_one_graph() -> None:
    """The second stream reads the output of the first; both are rewritten in one go."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Toy(FORMS["plain"][0]), Toy(FORMS["plain"][0], 4, seed=1)
            self.cross = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(torch.tanh(self.cross(self.encoder(x))))

    model, x = Two().double(), toy_input().double()
    gm, inputs = trace(model, x)
    in_place(normalize, gm)
    streams = detect(gm.graph)
    assert [s.num_layers for s in streams] == [3, 4]
    pairs = [assignment(gm, stream, plan_for(stream, layers_per_block=2)) for stream in streams]
    rewrite(gm, [pair[0] for pair in pairs])
    values = [value for pair in pairs for value in pair[1]]
    with torch.no_grad():
        layers = layers_of(model.encoder, FORMS["plain"][1])
        hidden = by_definition(model.encoder, x, layers, values[:2], [2, 3])
        layers = layers_of(model.decoder, FORMS["plain"][1], 4)
        expected = by_definition(model.decoder, torch.tanh(model.cross(hidden)), layers, values[2:], [2, 4])
    assert (run(gm, [*inputs, *values]) - expected).norm() <= 1e-12 * expected.norm()
    assert_sound(gm, [*inputs, *values])
