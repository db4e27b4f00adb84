"""The two oracles are worth having: rewrites that are wrong on purpose fail the reference and ``verify``.

Each mutation breaks the rewrite in one way. The first, second, third and fifth are invisible at zero queries, where
every mix is the plain mean of its sources: that is why the second oracle, with random queries and gains, goes with the
first.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support import models, reference
from torch import Tensor, fx

import attnres_fx
from attnres_fx.passes.graph.record import record_of
from attnres_fx.passes.rewrite import match, rewrite
from attnres_fx.runtime.mix import MIX

LAYERS, CLOSING = 6, [2, 4, 6]
Insert = Callable[..., fx.Node]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def boundary_moved(patch: pytest.MonkeyPatch) -> None:
    """Blocks close one layer late."""
    rewriter = rewrite._Rewriter

    def wrong(graph: fx.Graph, assignment: match.Assignment) -> Any:
        return rewriter(graph, replace(assignment, plan=replace(assignment.plan, boundaries=(3, 5, 6))))

    patch.setattr(rewrite, "_Rewriter", wrong)


def rows_swapped(patch: pytest.MonkeyPatch) -> None:
    """Positions 2 and 3 read each other's query."""
    insert, queries = rewrite.insert_call, set[str]()

    def wrong(graph: fx.Graph, target: Any, args: tuple[Any, ...], **options: Any) -> fx.Node:
        if target is operator.getitem and args[0].name in queries:
            args = (args[0], {2: 3, 3: 2}.get(args[1], args[1]))
        node = insert(graph, target, args, **options)
        if target is torch.ops.aten.unbind.int and "query" in args[0].name:
            queries.add(node.name)
        return node

    patch.setattr(rewrite, "insert_call", wrong)


def _mixes_changed(patch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, ...]]) -> None:
    insert = rewrite.insert_call

    def wrong(graph: fx.Graph, target: Any, args: tuple[Any, ...], **options: Any) -> fx.Node:
        return insert(graph, target, change(*args) if target is MIX else args, **options)

    patch.setattr(rewrite, "insert_call", wrong)


def gain_dropped(patch: pytest.MonkeyPatch) -> None:
    """Keys are normalised without their gain."""
    _mixes_changed(patch, lambda sources, query, gain, *rest: (sources, query, None, *rest))


def embedding_twice(patch: pytest.MonkeyPatch) -> None:
    """b_0 is listed twice in every mix."""
    _mixes_changed(patch, lambda sources, *rest: ([sources[0], *sources], *rest))


def eps_wrong(patch: pytest.MonkeyPatch) -> None:
    """The eps of the key norm is a thousand times what it should be."""
    _mixes_changed(patch, lambda sources, query, gain, eps, *rest: (sources, query, gain, 1e3 * eps, *rest))


def wrong_position(patch: pytest.MonkeyPatch) -> None:
    """The readers of position 3 get the mix of position 2."""
    insert, earlier = rewrite.insert_call, dict[int, fx.Node]()

    def wrong(graph: fx.Graph, target: Any, args: tuple[Any, ...], **options: Any) -> fx.Node:
        node = insert(graph, target, args, **options)
        if target is not MIX:
            return node
        position = record_of(node).position
        earlier[position] = node
        return earlier[2] if position == 3 else node

    patch.setattr(rewrite, "insert_call", wrong)


@dataclass(frozen=True)
class Mutation:
    apply: Callable[[pytest.MonkeyPatch], None]
    seen_at_zero: bool
    activations: float = 1.0


MUTATIONS = {
    "boundary moved": Mutation(boundary_moved, seen_at_zero=False),
    "rows swapped": Mutation(rows_swapped, seen_at_zero=False),
    "gain dropped": Mutation(gain_dropped, seen_at_zero=False),
    "b_0 twice": Mutation(embedding_twice, seen_at_zero=True),
    "eps wrong": Mutation(eps_wrong, seen_at_zero=False, activations=0.01),
    "wrong position": Mutation(wrong_position, seen_at_zero=True),
}


def build(activations: float) -> Any:
    """A plain model whose stream has values of size ``activations``."""
    model = models.set_norm_eps(models.nanogpt(LAYERS, width=16, heads=2).double())
    with torch.no_grad():
        for parameter in (model.wte.weight, model.wpe.weight):
            parameter.mul_(activations)
        for block in model.h:
            for layer in (block.attn.out, block.mlp.down):
                layer.weight.mul_(activations)
                layer.bias.mul_(activations)
    return model


def deviations(activations: float) -> tuple[float, float, Any]:
    """(at zero queries from the plain model, at random queries and gains from the reference, what verify says)."""
    plain, ids = build(activations), models.token_ids(2, 5)
    model = attnres_fx.convert(copy.deepcopy(plain), ids, num_blocks=3)
    with torch.no_grad():
        zero = models.relative(model(ids), plain(ids))
        checked = attnres_fx.verify(model, ids)
        stream, generator = model.attnres.stream, torch.Generator().manual_seed(4)
        draw = torch.randn(2, LAYERS + 1, 16, generator=generator, dtype=torch.float64)
        stream.query.copy_(0.5 * draw[0])
        stream.key_gain.copy_(1 + 0.5 * draw[1])
        expected: Tensor = reference.nanogpt(plain, ids, stream.query, stream.key_gain, CLOSING)
        return zero, models.relative(model(ids), expected), checked


@pytest.mark.parametrize("activations", [1.0, 0.01])
def test_without_a_mutation_everything_passes(activations: float) -> None:
    zero, random, checked = deviations(activations)
    assert zero <= 1e-10 and random <= 1e-10
    assert checked.passed and checked.zero_query <= 1e-10 and checked.random_query <= 1e-10


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    mutation.apply(monkeypatch)
    zero, random, checked = deviations(mutation.activations)
    assert random > 1e-4, "the reference comparison must fail"
    assert not checked.passed and checked.random_query > 1e-4, f"verify must fail:\n{checked}"
    assert "FAILED" in str(checked)
    if mutation.seen_at_zero:
        assert zero > 1e-3 and checked.zero_query > 1e-3
    else:
        assert zero <= 1e-10 and checked.zero_query <= 1e-10, "zero queries are blind to this"


@pytest.mark.parametrize("name", ["boundary moved", "rows swapped", "gain dropped"])
def test_mutation_is_caught_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """verify distinguishes rounding from a fault in single precision as well, and under "sum"."""
    MUTATIONS[name].apply(monkeypatch)
    ids = models.token_ids(2, 5)
    model = attnres_fx.convert(models.nanogpt(LAYERS, width=16, heads=2), ids, num_blocks=3, mix_scale="sum")
    assert not attnres_fx.verify(model, ids).passed
