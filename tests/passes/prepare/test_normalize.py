"""Normalize: every spelling of an addition becomes a plain sum, and nothing else changes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.graphs import TRACERS, WIDTH, Step, Toy, assert_sound, run, toy_input, trace
from support.passes import in_place
from torch import Tensor, fx, nn

from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.graph.aliases import is_mutation
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.vocabulary import op_name
from attnres_fx.passes.prepare.normalize import ADD, normalize


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def _in_place(m: Any, x: Tensor, i: int) -> Tensor:
    x += m.branch(x, i)
    return x


def _scaled_in_place(m: Any, x: Tensor, i: int) -> Tensor:
    return x.add_(m.branch(x, i), alpha=0.5)


# name -> (the addition, whether normalize has something to do)
SPELLINGS: dict[str, tuple[Step, bool]] = {
    "x + f": (lambda m, x, i: x + m.branch(x, i), False),
    "f + x": (lambda m, x, i: m.branch(x, i) + x, False),
    "operator.add": (lambda m, x, i: operator.add(x, m.branch(x, i)), False),
    "torch.add": (lambda m, x, i: torch.add(x, m.branch(x, i)), False),
    "torch.add other=": (lambda m, x, i: torch.add(x, other=m.branch(x, i)), False),
    "torch.add alpha": (lambda m, x, i: torch.add(x, m.branch(x, i), alpha=0.5), True),
    "x.add": (lambda m, x, i: x.add(m.branch(x, i)), False),
    "x.add alpha": (lambda m, x, i: x.add(m.branch(x, i), alpha=2), True),
    "x += f": (_in_place, True),
    "x.add_": (lambda m, x, i: x.add_(m.branch(x, i)), True),
    "x.add_ alpha": (_scaled_in_place, True),
    "addcmul": (lambda m, x, i: torch.addcmul(x, m.branch(x, i), m.scale), True),
    "addcmul value": (lambda m, x, i: torch.addcmul(x, m.branch(x, i), m.scale, value=0.5), True),
    "stack.sum": (lambda m, x, i: torch.stack([x, m.branch(x, i)]).sum(0), True),
    "torch.sum of stack": (lambda m, x, i: torch.sum(torch.stack((m.branch(x, i), x), dim=1), dim=1), True),
    "x - f": (lambda m, x, i: x - m.branch(x, i), True),
    "torch.sub alpha": (lambda m, x, i: torch.sub(x, m.branch(x, i), alpha=0.5), True),
    "torch.subtract": (lambda m, x, i: torch.subtract(x, m.branch(x, i)), True),
    "sum of a list": (lambda m, x, i: sum([x, m.branch(x, i)]), True),
    "0 + x": (lambda m, x, i: (0 + x) + m.branch(x, i), True),
    "x + 0.0": (lambda m, x, i: (x + 0.0).add(m.branch(x, i)), True),
    "baddbmm": (lambda m, x, i: torch.baddbmm(x, m.branch(x, i), torch.eye(WIDTH).expand(2, -1, -1)), True),
    "baddbmm alpha": (lambda m, x, i: torch.baddbmm(x, m.branch(x, i), torch.eye(WIDTH).expand(2, -1, -1),
                                                    alpha=0.5), True),
    "addmm": (lambda m, x, i: torch.addmm(x.flatten(0, 1), m.branch(x, i).flatten(0, 1), torch.eye(WIDTH)).view(2, 4, WIDTH),
              True),
    "torch.clone": (lambda m, x, i: x.clone() + m.branch(x, i), False),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str, tracer: str) -> None:
    step, changes = SPELLINGS[name]
    model, x = Toy(step), toy_input()
    with torch.no_grad():
        expected = model(x)
    gm, inputs = trace(model, x, tracer=tracer)
    if name == "x += f" and tracer == "symbolic":
        changes = False  # symbolic_trace records the plain sum itself
    assert bool(normalize(gm.graph, Context())) == changes
    gm.recompile()
    assert torch.allclose(run(gm, inputs), expected, atol=1e-6)
    assert_sound(gm, inputs)
    assert not [node for node in gm.graph.nodes if is_mutation(node)]

    (stream,) = detect(gm.graph)
    assert stream.num_layers == 3 and stream.refusal() is None
    assert stream.norm_placement == "pre" and stream.function_preserving
    assert [len(layer.terms) for layer in stream.layers] == [1, 1, 1]

    once = str(gm.graph)
    assert normalize(gm.graph, Context()) == 0 and str(gm.graph) == once, "a second run changes nothing"


def _aliased(m: Any, x: Tensor, i: int) -> Tensor:
    before = x.view(-1, x.shape[-1])  # a second name for the memory of x, read after x has changed
    x.add_(m.branch(x, i))
    return x + torch.tanh(before).view_as(x)


def _sliced(m: Any, x: Tensor, i: int) -> Tensor:
    part = x[:, :2]
    part.add_(m.branch(x, i)[:, :2])
    return x


def _multiplied(m: Any, x: Tensor, i: int) -> Tensor:
    x = x + m.branch(x, i)
    x.mul_(0.5)
    return x


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("step", [_aliased, _sliced, _multiplied])
def test_shared_memory_is_left_alone(step: Step, tracer: str) -> None:
    """An in-place change that another name sees is not made functional; and no such stream is rewritten."""
    model, x = Toy(step), toy_input()
    with torch.no_grad():
        expected = model(x)
    gm, inputs = trace(model, x, tracer=tracer)
    mutations = sum(is_mutation(node) for node in gm.graph.nodes)
    assert mutations >= 3
    in_place(normalize, gm)
    assert sum(is_mutation(node) for node in gm.graph.nodes) == mutations
    assert torch.allclose(run(gm, inputs), expected, atol=1e-6)
    assert all(stream.refusal() is not None for stream in detect(gm.graph))


class ChangesItsInput(nn.Module):
    """The caller sees the addition, which must therefore stay in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(self.f(self.norm(x)))
        return self.norm(x.add_(self.f(self.norm(x))))


def _aliased_then_twice(m: Any, x: Tensor, i: int) -> Tensor:
    before = x.view(-1, x.shape[-1])
    x = x.add_(m.branch(x, i))
    x = x.add_(m.other(x, i))  # through the result of the first change, which is the same memory
    return x + torch.tanh(before).view_as(x)


@pytest.mark.parametrize("tracer", TRACERS)
def test_shared_memory_reached_through_a_change(tracer: str) -> None:
    model, x = Toy(_aliased_then_twice), toy_input()
    with torch.no_grad():
        expected = model(x)
    gm, inputs = trace(model, x, tracer=tracer)
    in_place(normalize, gm)
    assert torch.allclose(run(gm, inputs), expected, atol=1e-6)


@pytest.mark.parametrize("tracer", TRACERS)
def test_inputs_are_still_changed(tracer: str) -> None:
    model = ChangesItsInput()
    x = torch.randn(2, 3, 8)
    gm, inputs = trace(model, x.clone(), tracer=tracer)
    before = str(gm.graph)
    in_place(normalize, gm)
    assert str(gm.graph) == before
    assert all(stream.refusal() is not None for stream in detect(gm.graph))
    given = [i.clone() for i in inputs]
    changed, expected = x.clone(), x.clone()
    with torch.no_grad():
        model(expected)
        gm(*[changed if i.shape == x.shape else i for i in given])
    assert torch.equal(changed, expected) and not torch.equal(changed, x)


@pytest.mark.parametrize("tracer", TRACERS)
def test_in_place_keeps_the_dtype_of_its_target(tracer: str) -> None:
    """``x += f`` with a wider f rounds to the dtype of x; the plain sum has to as well."""

    def step(m: Any, x: Tensor, i: int) -> Tensor:
        return x.clone().add_(m.branch(x, i).double())

    model, x = Toy(step), toy_input()
    gm, inputs = trace(model, x, tracer=tracer)
    in_place(normalize, gm)
    assert_sound(gm, inputs)
    with torch.no_grad():
        assert run(gm, inputs).dtype == torch.float32 and torch.allclose(run(gm, inputs), model(x), atol=1e-6)


def test_other_sums_are_left_alone() -> None:
    """Sums of integers, of numbers, of vectors and of a kept dimension are not residual additions."""

    class Others(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            total = torch.stack([x, x]).sum(0, keepdim=True)
            return x - 1, x + 2, torch.arange(3) - torch.arange(3), torch.stack([x, 2 * x]).sum(1), total, x.sum(0)

    gm, _ = trace(Others(), torch.randn(2, 3))
    before = str(gm.graph)
    assert normalize(gm.graph, Context()) == 0 and str(gm.graph) == before


def test_provenance_is_kept() -> None:
    """New nodes carry the module, the source line and a value in the key of their tracer."""
    for tracer, key in (("dynamo", "example_value"), ("export", "val")):
        gm, _ = trace(Toy(SPELLINGS["addcmul"][0]), toy_input(), tracer=tracer)
        lines = [node.meta.get("stack_trace") for node in gm.graph.nodes if op_name(node) == "addcmul"]
        in_place(normalize, gm)
        made: list[fx.Node] = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is ADD]
        made = [node for node in made if node.meta.get("stack_trace") in lines]
        assert len(made) == 3
        assert all(key in node.meta for node in made)
