"""The check of an arena against its graph: graphs that are right pass, and each way to be wrong is named."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.memory import rows as rows_pass
from attnres_fx.passes.memory.check_places import check_arena
from attnres_fx.passes.memory.place import place_rows
from attnres_fx.runtime.errors import LayoutError
from attnres_fx.runtime.into import INTO
from attnres_fx.runtime.mix import MIX
from attnres_fx.runtime.mix_norm import MIX_NORM

aten: Any = torch.ops.aten
SHAPE, SIZE = (2, 3, 8), 48
REST = (None, None, None, None, 1e-6, 1.0, False, 1.0, False, 1e-6)  # of mix_norm, after its delta


class Written:
    """A graph over one arena, written by hand; ``row`` is a view of the arena that has not been written yet."""

    def __init__(self, numel: int = 4 * SIZE) -> None:
        self.graph = fx.Graph()
        self.first, self.second, self.query = (self.graph.placeholder(name) for name in ("first", "second", "query"))
        self.memory = self.call(aten.empty.memory_format, [numel], dtype=torch.float32, device=torch.device("cpu"),
                                pin_memory=False)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.create_node("call_function", target, args, kwargs)

    def row(self, start: int, strides: tuple[int, ...] = (24, 8, 1)) -> fx.Node:
        return self.call(aten.as_strided.default, self.memory, list(SHAPE), list(strides), start)

    def mix(self, out: fx.Node, *sources: fx.Node) -> None:
        self.call(INTO[MIX], list(sources), self.query, None, 1e-6, 1.0, False, 1.0, mixed_out=out)

    def mix_norm(self, out: fx.Node, sources: list[fx.Node], delta: fx.Node, partial: fx.Node) -> None:
        self.call(INTO[MIX_NORM], sources, self.query, None, delta, *REST, normed_out=out, partial_out=partial)

    def check(self, *results: fx.Node) -> None:
        self.graph.output(results)
        given = [torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(8)]
        with FakeTensorMode() as mode:
            FakeTensorProp(fx.GraphModule({}, self.graph), mode).propagate(*given)
        check_arena(self.graph, [self.memory])


def test_rows_one_after_the_other_are_right() -> None:
    g = Written()
    one, two, again, sums = g.row(0), g.row(SIZE), g.row(0), g.row(2 * SIZE)
    g.mix(one, g.first, g.second)
    g.mix(two, g.first, one)
    late = g.call(aten.mv.default, g.call(aten.view.default, two, [6, 8]), g.query)
    g.mix(again, g.second, two)  # over a row that is no longer read
    g.call(aten.copy_.default, sums, g.call(aten.add.Tensor, again, g.first))
    over = g.row(2 * SIZE)
    g.mix_norm(two, [g.first, sums], g.second, over)  # a partial sum goes on in place
    g.check(late, g.call(aten.sum.default, over))


def test_a_loop_may_add_in_place() -> None:
    g = Written()
    one, over = g.row(0), g.row(0)
    g.mix(one, g.first, g.second)
    g.call(aten.copy_.default, over, g.call(aten.add.Tensor, one, g.call(aten.tanh.default, g.first)))
    g.check(g.call(aten.sum.default, over))


def overwritten(g: Written) -> None:
    one, two = g.row(0), g.row(0)
    g.mix(one, g.first, g.second)
    g.mix(two, g.first, g.second)
    g.check(g.call(aten.mv.default, g.call(aten.view.default, one, [6, 8]), g.query))


def overwritten_in_part(g: Written) -> None:
    one, two, three = g.row(0), g.row(SIZE // 2), g.row(3 * SIZE)
    g.mix(one, g.first, g.second)
    g.mix(two, g.first, g.second)
    g.mix(three, one, two)
    g.check(g.call(aten.sum.default, three))


def read_late(g: Written) -> None:
    """The product is a loop over elements: it reads where its sum is computed."""
    one, two = g.row(0), g.row(0)
    g.mix(one, g.first, g.second)
    kept = g.call(aten.mul.Tensor, one, 2)
    g.mix(two, g.first, g.second)
    g.check(g.call(aten.add.Tensor, kept, two))


def read_before(g: Written) -> None:
    one, two = g.row(0), g.row(SIZE)
    g.mix(two, g.first, one)
    g.check(g.call(aten.sum.default, two))


def over_another_order(g: Written) -> None:
    one, two, out = g.row(0), g.row(0), g.row(SIZE)
    g.mix(one, g.first, g.second)
    turned = g.call(aten.permute.default, g.call(aten.view.default, one, [3, 2, 8]), [1, 0, 2])
    g.mix_norm(out, [g.first, turned], g.second, two)
    g.check(g.call(aten.sum.default, two))


def over_another_source(g: Written) -> None:
    one, two, out = g.row(0), g.row(0), g.row(SIZE)
    g.mix(one, g.first, g.second)
    g.mix_norm(out, [one, g.first], g.second, two)
    g.check(g.call(aten.sum.default, two))


def over_itself_twice(g: Written) -> None:
    one, two = g.row(0), g.row(0)
    g.mix(one, g.first, g.second)
    g.call(aten.copy_.default, two, g.call(aten.add.Tensor, one, g.call(torch.ops.prims.rev.default, one, [1])))
    g.check(g.call(aten.sum.default, two))


def mixed_over_a_source(g: Written) -> None:
    one, two = g.row(0), g.row(0)
    g.mix(one, g.first, g.second)
    g.mix(two, g.first, one)
    g.check(g.call(aten.sum.default, two))


def two_in_one(g: Written) -> None:
    one, two = g.row(0), g.row(0)
    g.mix_norm(one, [g.first, g.second], g.first, two)
    g.check(g.call(aten.sum.default, g.first))


def through_a_view(g: Written) -> None:
    view = g.call(aten.view.default, g.row(0), list(SHAPE))
    g.mix(view, g.first, g.second)
    g.check(g.call(aten.sum.default, view))


def another_layout(g: Written) -> None:
    one = g.row(0, (8, 16, 1))
    g.mix(one, g.first, g.second)
    g.check(g.call(aten.sum.default, one))


def beyond_the_end(g: Written) -> None:
    one = g.row(3 * SIZE + 8)
    g.mix(one, g.first, g.second)
    g.check(g.call(aten.sum.default, one))


@pytest.mark.parametrize("build", [
    overwritten, overwritten_in_part, read_late, read_before, over_another_order, over_another_source, over_itself_twice,
    mixed_over_a_source, two_in_one, through_a_view, another_layout, beyond_the_end])
def test_what_is_wrong_is_named(build: Callable[[Written], None]) -> None:
    named = r"holds another row|in another order|two rows to one|through the view|is not a row within"
    with pytest.raises(LayoutError, match=named) as caught:
        build(Written())
    assert "arena': 'never'" in str(caught.value)


def test_a_pass_that_ignores_strides_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row that opens a block comes out of a product whose batch and sequence are swapped."""
    def graph() -> fx.Graph:
        made = Written()
        rows = made.call(aten.view.default, made.first, [6, 8])
        product = made.call(aten.mm.default, rows, made.call(aten.mm.default, made.call(aten.t.default, rows), rows))
        turned = made.call(aten.permute.default, made.call(aten.view.default, product, [3, 2, 8]), [1, 0, 2])
        node = made.call(MIX_NORM, [made.second, turned], made.query, None, made.first, *REST)
        results = [made.call(operator.getitem, node, index) for index in (0, 1)]
        made.graph.output(tuple(made.call(aten.sum.default, result) for result in results))
        with FakeTensorMode() as mode:
            FakeTensorProp(fx.GraphModule({}, made.graph), mode).propagate(*[torch.randn(SHAPE)] * 2, torch.randn(8))
        made.graph.eliminate_dead_code()
        return made.graph

    place_rows(graph(), Context())
    monkeypatch.setattr(rows_pass, "is_dense", lambda value: True)
    with pytest.raises(LayoutError, match="in another order"):
        place_rows(graph(), Context())
