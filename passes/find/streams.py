"""What detection finds, as plain data: streams, their layers, their readers, and what stands in the way of a rewrite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from attnres_fx.passes.find.obstacles import Obstacle
from attnres_fx.passes.graph.nodes import float_tensor, place_of
from attnres_fx.passes.graph.vocabulary import STATE_UPDATES, op_name
from attnres_fx.runtime.errors import (
    Place,
    StreamRefusedError,
)


@dataclass(frozen=True)
class Layer:
    """One residual addition: ``value = skip + terms``.

    ``node`` is the addition, ``skip`` the raw operand that carries the stream, ``terms`` the raw branch operands (several
    where branches are added together, as in parallel blocks), ``inner`` further additions of the same sum. ``branches``
    counts the terms that are sublayers of their own: computed from the skip by a contraction. ``injections`` are sums
    between the last value of the stream and this layer that have other readers, too; what they add is among the terms.
    """

    node: fx.Node
    skip: fx.Node
    terms: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...] = ()
    branches: int = 1
    injections: tuple[fx.Node, ...] = ()

    @property
    def place(self) -> Place:
        return place_of(self.node)

    @property
    def form(self) -> str:
        """The form of the addition in words."""
        if op_name(self.node) in STATE_UPDATES:
            return f"{op_name(self.node)}(x, f(x))"
        if len(self.terms) == 1:
            return "x + f(x)"
        return "x + " + " + ".join(f"f{index}(x)" for index in range(1, len(self.terms) + 1))


@dataclass(frozen=True)
class Stream:
    """One residual stream of a graph.

    Position p is the value after p layers: ``values[0]`` is the embedding (b_0), ``values[p]`` the p-th addition.
    ``readers[p]`` are the nodes that read position p, the next addition of the stream excepted. ``feature_dim`` is the
    dimension of width d, counted from the end, in the layout of the first addition. ``norm_placement`` is one word for where
    norms stand, ``raw_readers`` are those that are not scale-invariant, with their positions.
    """

    name: str
    layers: tuple[Layer, ...]
    values: tuple[fx.Node, ...]
    readers: tuple[tuple[fx.Node, ...], ...]
    obstacles: tuple[Obstacle, ...] = ()
    norm_placement: str = "none"
    raw_readers: tuple[tuple[int, fx.Node], ...] = ()
    feature_dim: int = -1

    @property
    def num_layers(self) -> int:
        """L of the paper."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """d of the paper: the size of the feature dimension of the first addition."""
        value = float_tensor(self.layers[0].node)
        return int(value.shape[self.feature_dim]) if value is not None else 0

    @property
    def function_preserving(self) -> bool:
        """Whether zero queries reproduce the plain network under ``mix_scale="paper"`` as norm eps goes to 0."""
        return not self.raw_readers and not self.obstacles

    def refusal(self) -> StreamRefusedError | None:
        """The error that a conversion of this stream raises, or None."""
        if not self.obstacles:
            return None
        first = self.obstacles[0]
        if first.kind == "scale":  # in the first layer the stream still is its first value
            first = next((obstacle for obstacle in self.obstacles if obstacle.kind == "first value"), first)
        cls, why, remedy = first.explain()
        if first.kind == "scale" and any(obstacle.kind == "norm" for obstacle in self.obstacles):
            why += "; with the norm of the sums, that is DeepNorm or KEEL"
        return cls(f"stream '{self.name}' cannot be rewritten: {why}", place=first.place, remedy=remedy)


def moved(stream: Stream, copies: Mapping[fx.Node, fx.Node]) -> Stream:
    """``stream`` in a copy of its graph; ``copies`` gives the copy of each node."""

    def of(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(copies[node] for node in nodes)

    layers = tuple(replace(layer, node=copies[layer.node], skip=copies[layer.skip], terms=of(layer.terms),
                           inner=of(layer.inner), injections=of(layer.injections)) for layer in stream.layers)
    return replace(
        stream, layers=layers, values=of(stream.values), readers=tuple(map(of, stream.readers)),
        obstacles=tuple(replace(obstacle, node=copies[obstacle.node]) for obstacle in stream.obstacles),
        raw_readers=tuple((position, copies[node]) for position, node in stream.raw_readers))
