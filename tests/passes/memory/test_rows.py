"""Rows of graphs made by hand: what may be placed, how long it is in use, what goes on in place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attnres_fx.passes.graph.aliases import view_of
from attnres_fx.passes.memory.rows import Row, rows_for_backward, rows_of_call
from attnres_fx.runtime.mix import MIX
from attnres_fx.runtime.mix_norm import MIX_NORM
from attnres_fx.runtime.phases import PHASE1

aten: Any = torch.ops.aten
SHAPE = (2, 3, 8)
REST = (None, None, None, None, 1e-6, 1.0, False, 1.0, False, 1e-6)  # of mix_norm, after its delta


def graph_of(build: Callable[..., Any]) -> fx.Graph:
    """A graph whose inputs are ``table`` [9, 8], ``ids`` [2, 3], ``first`` and ``second`` [2, 3, 8], ``query`` [8]."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("table", "ids", "first", "second", "query")]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        packet = getattr(target, "overloadpacket", target)
        return graph.create_node("call_function", target, args, kwargs, packet.__name__.strip("<>"))

    graph.output(build(call, *inputs))
    given = [torch.randn(9, 8), torch.zeros(2, 3, dtype=torch.long), torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(8)]
    with FakeTensorMode() as mode:
        FakeTensorProp(fx.GraphModule({}, graph), mode).propagate(*given)
    graph.lint()
    return graph


def named(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def fused(call: Any, sources: list[fx.Node], query: fx.Node, delta: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    made = call(MIX_NORM, sources, query, None, delta, *REST)
    return call(operator.getitem, made, 0), call(operator.getitem, made, 1)


def test_rows_end_with_the_last_reader_of_a_view() -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        block = call(aten.embedding.default, table, ids)
        normed, partial = fused(call, [block, first], query, second)
        half = call(operator.getitem, call(aten.split.Tensor, call(aten.view.default, normed, [6, 8]), 3), 1)
        mixed = call(MIX, [block, partial], query, None)
        return call(aten.add.Tensor, call(aten.mul.Tensor, half, half), call(aten.sum.default, mixed)),

    graph = graph_of(build)
    rows, order = named(rows_of_call(graph)), {node: index for index, node in enumerate(graph.nodes)}
    by_name = {node.name: node for node in graph.nodes}
    assert set(rows) == {"embedding", "getitem", "getitem_1", "mix"}
    # The product is a loop over elements, computed where the sum that it is a part of is returned.
    assert rows["getitem"].last == order[graph.output_node()] and rows["getitem"].index == 0
    assert rows["getitem_1"].last == rows["embedding"].last == order[by_name["mix"]]
    assert rows["getitem"].first == rows["getitem_1"].first == order[by_name["mix_norm"]]
    assert all(row.over is None for row in rows.values())  # what was added to came from outside
    assert view_of(by_name["view"]) is by_name["getitem"] and view_of(by_name["getitem_2"]) is by_name["split"]
    assert view_of(by_name["getitem"]) is None


def test_what_becomes_a_view_without_saying_so_is_one() -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        normed, partial = fused(call, [second, first], query, second)
        flat = call(aten._unsafe_view.default, normed, [6, 8])
        mixed = call(MIX, [second, partial], query, None)
        return call(aten.sum.default, mixed), call(aten.mm.default, flat, call(aten.t.default, flat))

    graph = graph_of(build)
    last = max(index for index, node in enumerate(graph.nodes) if node.target is aten.mm.default)
    assert named(rows_of_call(graph))["getitem"].last == last


def test_a_sum_goes_on_over_the_part_that_it_reads_last() -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        block = call(aten.embedding.default, table, ids)
        _, one = fused(call, [block, first], query, second)
        _, two = fused(call, [block, one], query, second)
        normed, _ = fused(call, [block, two, two], query, second)  # the part is a source twice
        return call(aten.sum.default, normed),

    rows = named(rows_of_call(graph_of(build)))
    assert rows["getitem_3"].over is rows["getitem_1"].node
    assert rows["getitem_5"].over is None
    assert rows["getitem_2"].last == rows["getitem_2"].first  # nothing reads this norm


def test_a_sum_goes_on_over_no_part_that_it_reads_in_another_order() -> None:
    """As torch's own encoder hands its products on: batch and sequence are swapped on the way."""
    def swapped(call: Any, node: Any) -> Any:
        return call(aten.permute.default, call(aten.view.default, node, [3, 2, 8]), [1, 0, 2])

    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        rows = call(aten.view.default, first, [6, 8])
        square = call(aten.mm.default, call(aten.t.default, rows), rows)
        one, two = (swapped(call, call(aten.mm.default, rows, square)) for _ in range(2))
        normed, completed = fused(call, [second, one], query, first)
        opened = call(MIX, [second, two], query, None)
        summed = call(aten.add.Tensor, two, first)
        again = call(MIX, [second, summed], query, None)
        return tuple(call(aten.sum.default, each) for each in (normed, completed, opened, again))

    rows = named(rows_of_call(graph_of(build)))
    assert {"mm_1", "mm_2", "getitem_1"} <= set(rows)
    assert [row.over for row in rows.values()] == [None] * len(rows)


def test_a_sum_goes_on_over_no_part_that_its_other_operand_is_made_of() -> None:
    """Inductor computes the other operand within the loop that adds, and there reads the part in its own order."""
    def build(turn: bool) -> Callable[..., Any]:
        def built(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
            block = call(aten.embedding.default, table, ids)
            part = call(aten.mul.Tensor, first, second)
            opened = call(MIX, [block, part], query, None)
            read = call(torch.ops.prims.rev.default, part if turn else second, [1])
            summed = call(aten.add.Tensor, part, call(aten.tanh.default, read))
            mixed = call(MIX, [block, summed], query, None)
            return call(aten.sum.default, opened), call(aten.sum.default, mixed)
        return built

    assert named(rows_of_call(graph_of(build(False))))["add"].over is not None
    assert named(rows_of_call(graph_of(build(True))))["add"].over is None


def test_a_row_is_in_use_until_what_is_made_of_it_is_computed() -> None:
    """A loop over elements does not read at its place in the graph: Inductor computes it where its result is needed, and
    again."""
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        block = call(aten.embedding.default, table, ids)
        normed, partial = fused(call, [block, first], query, second)
        kept = call(aten.tanh.default, normed)
        flat = call(aten.view.default, kept, [6, 8])
        product = call(aten.mm.default, flat, call(aten.t.default, flat))
        mixed = call(MIX, [block, partial], query, None)
        return call(aten.sum.default, product), call(aten.add.Tensor, mixed, 1), call(aten.neg.default, kept)

    graph = graph_of(build)
    order = {node: index for index, node in enumerate(graph.nodes)}
    rows, output = named(rows_of_call(graph)), order[graph.output_node()]
    assert rows["getitem"].last == rows["mix"].last == output
    assert rows["embedding"].last == rows["getitem_1"].last == rows["mix"].first  # a mix is computed where it stands


@pytest.mark.parametrize("reader", [
    lambda call, row, other: call(aten.as_strided.default, row, [6, 8], [8, 1], 0),
    lambda call, row, other: call(aten.as_strided.default, call(aten.view.default, row, [48]), [8], [1], 3),
    lambda call, row, other: call(aten.as_strided_copy.default, row, [8], [1], 3),
    lambda call, row, other: call(aten.copy_.default, row, other),
], ids=["as_strided", "as_strided of a view", "as_strided_copy", "copy into"])
def test_what_is_taken_by_its_place_or_written_to_is_not_placed(reader: Callable[..., Any]) -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        normed, partial = fused(call, [second, first], query, second)
        return call(aten.sum.default, reader(call, normed, first)), call(aten.sum.default, partial)

    assert set(named(rows_of_call(graph_of(build)))) == {"getitem_1"}


@pytest.mark.parametrize("escape", [lambda call, node: node, lambda call, node: call(aten.view.default, node, [6, 8])])
def test_what_the_graph_returns_is_nobodys_to_place(escape: Callable[[Any, Any], Any]) -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        block = call(aten.embedding.default, table, ids)
        normed, partial = fused(call, [block, first], query, second)
        return call(aten.sum.default, normed), escape(call, partial)

    assert set(named(rows_of_call(graph_of(build)))) == {"embedding", "getitem"}


COLLECTIVES = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no collectives here")
READERS = [lambda x: torch.relu_(x), aten.relu_.default, pytest.param("all_reduce", marks=COLLECTIVES)]


@pytest.mark.parametrize("reader", READERS)
def test_what_may_be_changed_by_its_reader_or_read_later_is_not_placed(reader: Any) -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        normed, partial = fused(call, [second, first], query, second)
        if reader == "all_reduce":
            read = call(torch.ops._c10d_functional.all_reduce.default, normed, "sum", "0")
        else:
            read = call(reader, normed)
        return call(aten.sum.default, read), call(aten.sum.default, partial)

    assert set(named(rows_of_call(graph_of(build)))) == {"getitem_1"}


def test_unread_results_of_phase_1_have_a_place_for_a_moment() -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        queries = call(aten.expand.default, query, [2, 8])
        made = call(PHASE1, [first, second], queries, None)
        return call(aten.sum.default, call(operator.getitem, made, 1)),

    rows = named(rows_of_call(graph_of(build)))
    assert {name: tuple(row.value.shape) for name, row in rows.items()} == {
        "mix_phase1[0]": SHAPE, "getitem": SHAPE, "mix_phase1[2]": SHAPE[:2], "mix_phase1[3]": SHAPE[:2]}
    assert all(row.first == row.last for name, row in rows.items() if name != "getitem")


def test_the_backward_keeps_blocks_and_not_partial_sums() -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        block = call(aten.embedding.default, table, ids)
        _, one = fused(call, [block, first], query, second)
        normed, closed = fused(call, [block, one], query, second)
        mixed = call(MIX, [block, closed], query, None)
        seen = call(aten.neg.default, first)
        last = call(MIX, [block, closed, seen], query, None)
        return last, call(aten.view.default, seen, [6, 8]), normed, block, one, closed, mixed, seen

    graph = graph_of(build)
    assert set(named(rows_for_backward(graph, 2))) == {"embedding", "getitem_3"}
    assert rows_for_backward(graph, 8) == []


def test_inputs_and_strange_layouts_stay() -> None:
    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        turned = call(aten.neg.default, call(aten.permute.default, call(aten.view.default, first, [8, 2, 3]), [1, 2, 0]))
        product = call(aten.view.default, call(aten.mm.default, table, call(aten.t.default, table)), [9, 9])
        mixed = call(MIX, [first, turned], query, None)
        return call(aten.sum.default, mixed), product

    assert set(named(rows_of_call(graph_of(build)))) == {"mix"}


def test_a_graph_without_mixes_has_no_rows() -> None:
    graph = graph_of(lambda call, table, ids, first, second, query: (call(aten.neg.default, first),))
    assert rows_of_call(graph) == [] and rows_for_backward(graph, 0) == []


def test_what_an_unknown_operator_returns_again_is_not_placed() -> None:
    library = torch.library.Library("attnres_rows_tests", "FRAGMENT")
    library.define("second(Tensor x, Tensor(a) y) -> Tensor(a)")
    library.impl("second", lambda x, y: y.view(-1), "CompositeExplicitAutograd")
    torch.library.register_fake("attnres_rows_tests::second", lambda x, y: y.view(-1), lib=library)

    def build(call: Any, table: Any, ids: Any, first: Any, second: Any, query: Any) -> Any:
        normed, partial = fused(call, [second, first], query, second)
        again = call(torch.ops.attnres_rows_tests.second.default, first, normed)
        return call(aten.sum.default, again), call(aten.sum.default, partial)

    assert set(named(rows_of_call(graph_of(build)))) == {"getitem_1"}
