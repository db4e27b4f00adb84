"""One test for each private interface of Dynamo that ``passes/_compat/dynamo.py`` touches."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from support.dynamo_graphs import Small, traced
from torch import Tensor, fx, nn

from attnres_fx.passes._compat import dynamo as _dynamo
from attnres_fx.passes.graph.capture import capture
from attnres_fx.runtime.errors import PlainPathError
from attnres_fx.runtime.marker import ENTER


def test_inner_error_is_taken_out_of_the_wrapper() -> None:
    def refuse(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        raise PlainPathError("ours")

    with pytest.raises(Exception) as caught, _dynamo.quiet_dynamo():
        traced(Small(), torch.ones(2, 4), backend=refuse)
    assert isinstance(_dynamo.inner_error(caught.value), PlainPathError)


def test_graph_breaks_are_told_from_other_errors() -> None:
    class Breaks(Small):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    with pytest.raises(Exception) as caught:
        traced(Breaks(), torch.ones(2, 4), fullgraph=True)
    assert _dynamo.is_graph_break(caught.value)
    assert not _dynamo.is_graph_break(ValueError())


def test_the_reason_of_a_graph_break_is_on_the_graph() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    graphs, _ = traced(Breaks(), torch.ones(2, 4))
    found = _dynamo.graph_break_reason(graphs[0])
    assert found is not None
    assert found[1].split(":")[0].endswith("test_dynamo.py")
    assert _dynamo.graph_break_reason(graphs[-1]) is None


def test_recompile_limit_is_recognised() -> None:
    torch._dynamo.reset()

    def double(x: Tensor) -> Tensor:
        return x * 2

    compiled = torch.compile(double, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception) as caught:
        for size in range(2, 6):
            compiled(torch.ones(size))
    assert _dynamo.is_recompile_limit(caught.value)


def test_the_graphs_being_traced() -> None:
    seen: list[Any] = []

    @torch.compiler.assume_constant_result
    def look() -> int:
        seen.append([len(graph.nodes) for graph in _dynamo.graphs_being_traced()])
        return 1

    def within(x: Tensor) -> Tensor:
        return x * look()

    torch._dynamo.reset()
    torch.compile(lambda x: torch.utils.checkpoint.checkpoint(within, x.sin(), use_reentrant=False), backend="eager")(
        torch.ones(2, requires_grad=True))
    assert len(seen[0]) == 2 and sum(seen[0]) >= 2
    assert _dynamo.graphs_being_traced() == []


def test_the_compiling_frame_names_its_modules() -> None:
    module = Small()
    seen: list[Any] = []

    def look(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(_dynamo.compiling_frame())
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=look)(torch.ones(2, 4))
    torch.compile(lambda x: module(x), backend=look)(torch.ones(2, 4))
    assert seen[0].this is module
    assert not seen[0].resumed
    assert module in seen[1].modules
    assert seen[1].this is None
    assert _dynamo.compiling_frame() is None


def test_tracing_can_be_restarted_by_a_backend() -> None:
    module, x = Small(), torch.randn(2, 4)
    calls: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        calls.append(len(gm.graph.nodes))
        if len(calls) == 1:
            module.extra = nn.Parameter(torch.ones(4))
            module.inner.register_forward_hook(lambda m, args, output: output * module.extra * 2)
            _dynamo.restart_tracing("changed")
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(module, backend=backend)(x)
    assert len(calls) == 2
    torch.testing.assert_close(result, module(x))




def test_tracing_many_models_meets_no_compile_limit() -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        graphs = [capture(Small(), (torch.ones(2, 4),), {})[0] for _ in range(4)]
    additions = [[node for node in gm.graph.nodes if node.target is operator.add] for gm in graphs]
    assert [len(found) for found in additions] == [1] * 4


def test_a_frame_given_up_for_a_break_in_its_loop_is_seen_from_within() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Small() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x)
                if index == 1:
                    torch._dynamo.graph_break()
            return x

    seen: list[tuple[str, str] | None] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(_dynamo.skipped_frame())
        return gm.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(Small(), backend=backend)(torch.ones(2, 4))
    assert seen == [None]
    torch.compile(Loop(), backend=backend)(torch.ones(2, 4))
    reason, place = seen[-1] or ("", "")
    assert "graph_break()" in reason
    assert place == f"{__file__}:{Loop.forward.__code__.co_firstlineno}"


class Hooked(Small):
    """Asks its input's gradient within the call, as hooks on the embeddings of a frozen model do."""

    marked = False

    def forward(self, x: Tensor) -> Tensor:
        if self.marked:
            ENTER(self.inner.weight, None, "{}")
        x = x * 2
        x.requires_grad_(True)
        return super().forward(x)


def test_gradients_asked_of_what_a_graph_computes_are_passed_over_where_we_trace() -> None:
    def kept(gm: fx.GraphModule, _: Any) -> Any:
        for node in list(gm.graph.nodes):
            if node.target is ENTER:
                gm.graph.erase_node(node)
        gm.recompile()
        return gm.forward

    x = torch.ones(2, 4)
    plain = Hooked().requires_grad_(False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="requires_grad_"):
        traced(plain, x, fullgraph=True)
    expected = plain(x).detach()
    graph, _ = capture(plain, (x,), {})
    assert not any("requires_grad" in str(node.target) for node in graph.graph.nodes)
    marked = Hooked()
    marked.load_state_dict(plain.state_dict())
    marked.marked = True
    graphs, value = traced(marked, x, fullgraph=True, backend=kept)
    assert len(graphs) == 1 and torch.equal(value, expected)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="requires_grad_"):  # afterwards as before
        traced(plain, x, fullgraph=True)


def test_the_limit_of_recompiles() -> None:
    assert _dynamo.recompile_limit() == torch._dynamo.config.recompile_limit > 1
