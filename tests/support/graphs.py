"""Small residual networks and their graphs from three tracers, for the tests of single passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attnres_fx.passes._compat.graphs import fake_mode_of
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.rewrite.match import Assignment
from attnres_fx.passes.rewrite.partition import partition
from attnres_fx.passes.rewrite.plan import StreamPlan
from support import models

TRACERS = ("dynamo", "export", "symbolic")
WIDTH = 8
Step = Callable[[Any, Tensor, int], Tensor]


def value_key(graph: fx.Graph) -> str:
    """The metadata key under which a graph keeps its traced values."""
    return "example_value" if any("example_value" in node.meta for node in graph.nodes) else "val"



class Toy(nn.Module):
    """An embedding, ``num_layers`` calls of ``step``, a norm and a head; ``branch`` is a layer with its norm."""

    def __init__(self, step: Step, num_layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(num_layers))
        self.first = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))
        self.second = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.step, self.num_layers = step, num_layers
        models.randomize(self, seed)

    def branch(self, x: Tensor, i: int) -> Tensor:
        return torch.tanh(self.first[i](self.norms[i](x)))

    def other(self, x: Tensor, i: int) -> Tensor:
        return torch.relu(self.second[i](self.norms[i](x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(self.num_layers):
            x = self.step(self, x, i)
        return self.head(self.norm(x))


def toy_input(batch: int = 2, length: int = 4) -> Tensor:
    return torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(11))


def trace(model: nn.Module, *args: Any, tracer: str = "dynamo") -> tuple[fx.GraphModule, list[Any]]:
    """The graph of ``model(*args)`` and the values to call it with."""
    match tracer:
        case "dynamo":
            return capture(model, args, {})
        case "export":
            with torch.no_grad():
                return torch.export.export(model, args, strict=False).module(), list(args)  # type: ignore[return-value]
        case _:
            gm = fx.symbolic_trace(model)
            FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*args)
            return gm, list(args)


def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Call a graph on copies of ``inputs``, so that graphs that change their inputs can be called again."""
    copies = [i.detach().clone() if isinstance(i, Tensor) else i for i in inputs]
    with torch.no_grad():  # not through the module, which for an exported program counts its inputs
        value = fx.Interpreter(gm).run(*copies, enable_io_processing=False)
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def plan_for(stream: Stream, **options: Any) -> StreamPlan:
    """A plan for a stream of a bare graph; sites do not matter to the rewrite."""
    parts = {key: options.pop(key) for key in ("num_blocks", "layers_per_block", "boundaries") if key in options}
    plan = StreamPlan(
        name=stream.name, owner="", num_layers=stream.num_layers, width=stream.width,
        boundaries=partition(stream.num_layers, **parts),
        sites=tuple(("", index) for index in range(stream.num_layers)), eps=1e-6, mix_scale="paper", key_gain=True)
    return replace(plan, **options)


def assignment(gm: fx.GraphModule, stream: Stream, plan: StreamPlan) -> tuple[Assignment, list[Tensor]]:
    """Give ``gm`` two more inputs, its last, for the query and the gain of ``stream``; and random values for them."""
    generator = torch.Generator().manual_seed(5)
    dtype = value_of(stream.values[0]).dtype
    draw = torch.randn(2, plan.num_layers + 1, plan.width, generator=generator, dtype=torch.float64).to(dtype)
    values = [0.6 * draw[0], 1 + 0.3 * draw[1]]
    mode, nodes = fake_mode_of([value_of(stream.values[0])]), []
    places = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for name, value in zip(("query", "gain"), values):
        with gm.graph.inserting_after(places[-1]):
            node = gm.graph.placeholder(f"{stream.name}_{name}")
        node.meta[value_key(gm.graph)] = mode.from_tensor(value) if mode is not None else value
        places.append(node)
        nodes.append(node)
    return Assignment(stream, plan, nodes[0], nodes[1]), values


def assert_sound(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """The graph is lint-clean, and what every node is traced to is what it computes."""
    gm.graph.lint()

    class Check(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            made, traced = super().run_node(n), value_of(n)
            if n.op in ("call_function", "call_method") and isinstance(made, Tensor):
                assert isinstance(traced, Tensor), f"{n.name} has no traced value"
                assert traced.dtype == made.dtype, n.name
                assert len(traced.shape) == len(made.shape), n.name
                assert all(int(a) == b for a, b in zip(traced.shape, made.shape) if isinstance(a, int)), n.name
            return made

    with torch.no_grad():
        copies = [i.clone() if isinstance(i, Tensor) else i for i in inputs]
        Check(gm, garbage_collect_values=False).run(*copies, enable_io_processing=False)


def fingerprint(gm: fx.GraphModule) -> tuple[str, list[tuple[Any, ...]]]:
    """All that a pass must leave alone in a graph that is not its own: nodes, arguments, and the identity of values."""
    return str(gm.graph), [(n.name, n.op, n.target, n.args, n.kwargs, sorted(n.meta), id(value_of(n)))
                           for n in gm.graph.nodes]
