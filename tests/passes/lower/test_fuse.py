"""Fuse: addition, mix and norm become one node where nothing else reads between them, and no value changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import relative
from support.passes import applied
from support.rewritten_graphs import rewritten, values_and_gradients
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.vocabulary import is_mix
from attnres_fx.passes.lower.fuse import find_fusions, fuse_mixes
from attnres_fx.passes.lower.schedule import schedule_mixes
from attnres_fx.runtime.mix import mix
from attnres_fx.runtime.mix_norm import MIX_NORM
from attnres_fx.runtime.phases import PHASE2


def fused_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is MIX_NORM]


def traced(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The graph of Dynamo of a function."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return found[0]


def check(function: Callable[..., Any], inputs: list[Tensor], fused: int, added: int, tolerance: float = 1e-5) -> None:
    """Check that this many mixes fuse, this many with their addition, and that values and gradients stay."""
    gm = traced(function, *inputs)
    made = applied(fuse_mixes, gm)
    nodes = fused_nodes(made)
    assert (len(nodes), sum(node.args[3] is not None for node in nodes)) == (fused, added)
    assert applied(fuse_mixes, made) is made
    order = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert order == [node.name for node in made.graph.nodes if node.op == "placeholder"]
    results = []
    for graph in (gm, made):
        outputs = graph(*_in_order(gm, function, inputs))
        generator = torch.Generator().manual_seed(1)
        loss = sum((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in outputs)
        assert isinstance(loss, Tensor)
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        results.append([*outputs, *(grad for grad in grads if grad is not None)])
    for one, other in zip(*results, strict=True):
        assert relative(other, one) < tolerance


def _in_order(gm: fx.GraphModule, function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """The inputs as the graph takes them: Dynamo lifts what is used, in the order of use."""
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    known = dict(zip(function.__code__.co_varnames, inputs))
    return [known[next(name for name in known if f"_{name}_" in taken)] for taken in names]


WIDTH = 24


def vectors(*names: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"rows": (2, 5, WIDTH), "early": (2, 5, WIDTH), "delta": (2, 5, WIDTH)}
    return [torch.randn(shapes.get(name, (WIDTH,)), generator=generator).requires_grad_() for name in names]


def spelled(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def offset(x: Tensor, weight: Tensor) -> Tensor:
    return (x / (x * x).mean(-1, keepdim=True).add(1e-5).sqrt()) * (1.0 + weight)


def called(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), weight, 1e-5)


def unweighted(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,)) @ torch.diag(weight)


def layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weight, weight, 1e-5)


def layer_spelled(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.var(-1, keepdim=True, unbiased=False) + 1e-5) * weight


@pytest.mark.parametrize("norm", [spelled, offset, called, unweighted, layer_spelled])
def test_a_norm_is_found_in_any_spelling(norm: Callable[[Tensor, Tensor], Tensor]) -> None:
    def function(rows: Tensor, early: Tensor, delta: Tensor, query: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        partial = rows + delta
        return norm(mix([early, partial], query), weight).sin(), partial

    check(function, vectors("rows", "early", "delta", "query", "weight"), fused=1, added=1)


def test_one_vector_as_weight_and_bias() -> None:
    def function(rows: Tensor, early: Tensor, query: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (layer(mix([early, rows], query), weight),)

    check(function, vectors("rows", "early", "query", "weight"), fused=1, added=0)


def test_weight_and_bias() -> None:
    def function(rows: Tensor, early: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.layer_norm(mix([early, rows], query), (WIDTH,), weight, bias, 1e-3),)

    check(function, vectors("rows", "early", "query", "weight", "bias"), fused=1, added=0)


@pytest.mark.parametrize("reader", ["raw", "two norms", "another eps place", "maximum"])
def test_other_readers_and_other_functions_are_left_alone(reader: str) -> None:
    def function(rows: Tensor, early: Tensor, query: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        mixed = mix([early, rows], query)
        if reader == "raw":
            return spelled(mixed, weight), mixed.sin()
        if reader == "two norms":
            return spelled(mixed, weight), spelled(mixed, gain)
        if reader == "another eps place":
            return (weight * gain * mixed / (mixed.square().mean(-1, keepdim=True).sqrt() + 1e-2),)
        return (weight * gain * mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True).clamp_min(1e-2)),)

    check(function, vectors("rows", "early", "query", "weight", "gain"), fused=0, added=0)


def test_an_eps_that_a_call_decides_is_not_fixed() -> None:
    """Dynamo makes a number that has changed an input of the graph; the operator's eps is a constant of it."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(applied(fuse_mixes, gm))
        return graphs[-1].forward

    def function(rows: Tensor, early: Tensor, query: Tensor, eps: float) -> Tensor:
        mixed = mix([early, rows], query)
        return mixed * torch.rsqrt(mixed.pow(2).mean(-1, keepdim=True) + eps)

    inputs = vectors("rows", "early", "query")
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=keep, fullgraph=True)
    for eps in (1e-3, 1e-2, 1e-1):
        torch.testing.assert_close(compiled(*inputs, eps), function(*inputs, eps))
    assert [len(fused_nodes(gm)) for gm in graphs] == [1, 0]


def test_an_addition_that_is_read_before_the_norm_stays() -> None:
    def function(rows: Tensor, early: Tensor, delta: Tensor, query: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        partial = rows + delta
        mixed = mix([early, partial], query)
        scaled = weight * partial.cos().mean()
        return F.rms_norm(mixed, (WIDTH,), scaled), partial

    check(function, vectors("rows", "early", "delta", "query", "weight"), fused=1, added=0)

    def earlier(rows: Tensor, early: Tensor, delta: Tensor, query: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        partial = rows + delta
        other = partial.cos()
        return F.rms_norm(mix([early, partial], query), (WIDTH,), weight), other

    check(earlier, vectors("rows", "early", "delta", "query", "weight"), fused=1, added=0)


def test_a_source_that_is_changed_in_between_stays() -> None:
    def function(rows: Tensor, early: Tensor, query: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        other = early.clone()
        mixed = mix([other, rows], query)
        other.mul_(2.0)
        return F.rms_norm(mixed, (WIDTH,), weight), other

    # Autograd itself would refuse this, so that only the graph is looked at.
    with torch.no_grad():
        assert not fused_nodes(applied(fuse_mixes, traced(function, *vectors("rows", "early", "query", "weight"))))


def test_a_norm_behind_a_change_of_grad_mode_stays() -> None:
    def function(rows: Tensor, early: Tensor, query: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        mixed = mix([early, rows], query)
        with torch.no_grad():
            return F.rms_norm(mixed, (WIDTH,), weight), weight.sin()

    assert not fused_nodes(applied(fuse_mixes, traced(function, *vectors("rows", "early", "query", "weight"))))


@pytest.mark.parametrize("wished", ["one-pass", "two-phase"])
@pytest.mark.parametrize(("num_layers", "num_blocks", "mix_scale"), [(3, 4, "paper"), (2, 4, "sum")])
def test_llama(num_layers: int, num_blocks: int, mix_scale: str, wished: str) -> None:
    gm, inputs, leaves = rewritten(num_layers, num_blocks, mix_scale=mix_scale, shape=(2, 12), dtype=torch.float32)
    scheduled = applied(schedule_mixes, gm, schedule=wished, training=True)
    fused = applied(fuse_mixes, scheduled)
    mixes = sum(is_mix(node) or node.target is PHASE2 for node in scheduled.graph.nodes)
    assert len(fused_nodes(fused)) == mixes > 0
    for one, other in zip(values_and_gradients(scheduled, inputs, leaves), values_and_gradients(fused, inputs, leaves),
                          strict=True):
        if one is not None:
            assert relative(other, one) < 2e-5


def test_a_float64_model_that_norms_in_float32_is_left_alone() -> None:
    gm, _, _ = rewritten(3, 2)
    assert applied(fuse_mixes, gm) is gm


class Random(nn.Module):
    """A random network of additions, mixes and norms, some of which fit together."""

    def __init__(self, choices: list[tuple[int, int, bool]]) -> None:
        super().__init__()
        self.choices = choices
        self.norms = nn.ModuleList([nn.RMSNorm(8) if kind % 2 else nn.LayerNorm(8) for kind, _, _ in choices])
        self.linears = nn.ModuleList([nn.Linear(8, 8) for _ in choices])
        self.queries = nn.Parameter(torch.randn(len(choices), 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, partial, out = [x], x.sin(), []
        for number, (kind, take, raw) in enumerate(self.choices):
            mixed = mix([*rows[-1 - take % len(rows):], partial], self.queries[number])
            normed = self.norms[number](mixed)
            if raw:
                out.append(mixed.cos())
            branch = self.linears[number](normed)
            if kind >= 2:
                rows.append(partial)
                partial = branch
            else:
                partial = partial + branch
        return (*out, mix([*rows, partial], self.queries[0]))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=6))
def test_random_networks(choices: list[tuple[int, int, bool]]) -> None:
    torch.manual_seed(0)
    network = Random(choices).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    captured, inputs = capture(network, (x,), {})
    fused = applied(fuse_mixes, captured)
    assert len(find_fusions(captured.graph)) == len(fused_nodes(fused)) == sum(not raw for _, _, raw in choices)
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    for one, other in zip(values_and_gradients(captured, inputs, leaves), values_and_gradients(fused, inputs, leaves),
                          strict=True):
        if one is not None:
            assert relative(other, one) < 1e-10
