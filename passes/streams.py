"""What detection finds, as plain data: streams, their layers, their readers, and what stands in the way of a rewrite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from attnres_fx.passes.graph import float_tensor, place_of
from attnres_fx.passes.vocabulary import ADDITIONS, STATE_UPDATES, op_name
from attnres_fx.runtime.errors import (
    GatedStreamError,
    HandWrittenMixError,
    HiddenLayersError,
    MutatedStreamError,
    Place,
    PostNormError,
    ScaledStreamError,
    StreamOperationError,
    StreamRefusedError,
)

# Operations that put other values in the place of a part of a tensor.
WRITES = frozenset({"setitem", "index_put", "index_put_", "masked_scatter", "masked_scatter_", "scatter", "scatter_",
                    "slice_scatter", "select_scatter", "index_copy", "index_copy_", "copy_"})


@dataclass(frozen=True)
class Obstacle:
    """An operation on the stream itself that forbids the rewrite.

    ``kind`` is "norm", "scale", "first value", "gate", "cell", "lanes", "long skip", "operation", "mutation", "hidden" or
    "mix"; ``node`` does it.
    """

    kind: str
    node: fx.Node

    @property
    def place(self) -> Place:
        return place_of(self.node)

    def explain(self) -> tuple[type[StreamRefusedError], str, str]:
        """(error class, one sentence of why, what the user can do)."""
        name = op_name(self.node)
        match self.kind:
            case "norm":
                return (PostNormError,
                        f"post-norm: '{name}' lies on the stream between two additions, so that layers see a normalised "
                        "sum and no plain sum of layer outputs exists",
                        "use a pre-norm variant of the model; attention residuals are defined for pre-norm streams")
            case "scale":
                return (ScaledStreamError,
                        f"the stream itself is scaled between two additions ('{name}'), so that it is not the sum of the "
                        "layer outputs",
                        "move the factor to the branch, or use a variant of the model without it")
            case "first value":
                return (ScaledStreamError,
                        f"the stream is scaled and its first value mixed back in between two additions ('{name}'; x0-lambda "
                        "mixing), so that it is not the sum of the layer outputs",
                        "use a variant of the model without the mixing; attention residuals let layers read the embedding")
            case "cell":
                return (GatedStreamError,
                        f"a gated recurrent cell ('{name}') takes the place of the residual additions: the stream is its "
                        "state",
                        "use a variant of the model with plain residual additions")
            case "lanes":
                return (GatedStreamError,
                        f"hyper-connections: several parallel residual lanes are mixed by a small matrix ('{name}') between "
                        "two additions",
                        "use a variant of the model with one residual stream; attention residuals replace the lanes")
            case "long skip":
                return (StreamOperationError,
                        f"a long skip from an earlier layer joins the stream ('{name}'; U-Net)",
                        "use a variant of the model without it; attention residuals let layers read earlier blocks")
            case "mutation" | "operation" if name in WRITES:
                return (MutatedStreamError if self.kind == "mutation" else StreamOperationError,
                        f"injected features: '{name}' writes over a part of the stream instead of adding to it",
                        "add the features, h[mask] = h[mask] + features, to a value that no other name refers to")
            case "operation" if name in ADDITIONS:
                return (StreamOperationError,
                        f"injected features: '{name}' adds to the stream what some of its readers do not see, in another "
                        "layout than that of the next addition",
                        "add the features in the layout of the layers, or let every reader read the sum")
            case "gate":
                return (GatedStreamError,
                        f"the stream itself is gated by a computed value between two additions ('{name}')",
                        "use a variant of the model with plain residual additions")
            case "mutation":
                return (MutatedStreamError,
                        f"a value of the stream is changed in place by '{name}', which is not a residual addition",
                        "make the operation out of place, or add its result to the stream")
            case "hidden":
                return (HiddenLayersError,
                        f"further layers of it are hidden in the body of '{name}', which may or may not run them",
                        "run the layers without it")
            case "mix":
                return (HandWrittenMixError,
                        f"values of this chain are mixed by a softmax over depth ('{name}'): the model spells attention "
                        "residuals out already, and is not converted a second time",
                        "compile the model as it is")
            case _:
                return (StreamOperationError,
                        f"'{name}' lies on the stream between two additions and is no pass-through",
                        "apply the operation inside a branch, or leave this stream out with streams=")


@dataclass(frozen=True)
class Layer:
    """One residual addition: ``value = skip + terms``.

    ``node`` is the addition, ``skip`` the raw operand that carries the stream, ``terms`` the raw branch operands (several
    where branches are added together, as in parallel blocks), ``inner`` further additions of the same sum. ``branches``
    counts the terms that are sublayers of their own: computed from the skip by a contraction. ``injections`` are sums
    between the last value of the stream and this layer that others read too; what they add is among the terms.
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


@dataclass
class Stream:
    """One residual stream of a graph.

    Position p is the value after p layers: ``values[0]`` is the embedding (b_0), ``values[p]`` the p-th addition.
    ``readers[p]`` are the nodes that read position p, the next addition of the stream excepted. ``feature_dim`` is the
    dimension of width d, counted from the end, in the layout of the first addition.
    """

    name: str
    layers: list[Layer]
    values: list[fx.Node]
    readers: list[list[fx.Node]]
    obstacles: list[Obstacle] = field(default_factory=list)
    norm_placement: str = "none"
    raw_readers: list[tuple[int, fx.Node]] = field(default_factory=list)
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


def sites_of(paths: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Sites of a stream: (module path, call ordinal) of each layer, the ordinal counting equal paths in order."""
    seen: dict[str, int] = {}
    sites = []
    for path in paths:
        sites.append((path, seen.get(path, 0)))
        seen[path] = seen.get(path, 0) + 1
    return tuple(sites)
