"""Obstacles: what prevents the rewrite of a stream, and what a graph without streams has instead.

Each has the error that a conversion raises, a one-sentence reason, and what the user can do.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnres_fx.passes._compat.graphs import HigherOrderOperator, OpOverload, OpOverloadPacket
from attnres_fx.passes.graph.nodes import float_tensor, place_of, same_size
from attnres_fx.passes.graph.vocabulary import ADDITIONS, WRITES, addition_of, op_name
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
        """(error class, a one-sentence reason, what the user can do)."""
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
                        f"'{name}' lies on the stream between two additions and is not a pass-through",
                        "apply the operation inside a branch, or leave this stream out with streams=")


_NAMED = 3


def absence(graph: fx.Graph) -> str:
    """Why no stream was found in ``graph``: its additions of tensors of one shape, and what cannot be looked into."""
    sums = whole_sums(graph)
    if sums:
        said = (f"{len(sums)} additions of tensors of one shape were seen, and none adds to a value what a branch with a "
                f"contraction makes of that value; the first is at {place_of(sums[0])}")
    else:
        said = "no addition of two tensors of one shape was seen"
    opaque = sorted({op_name(node) for node in graph.nodes if _is_opaque(node)})
    if opaque:
        listed = ", ".join(opaque[:_NAMED]) + (" ..." if len(opaque) > _NAMED else "")
        said += f"; operators that cannot be looked into were seen: {listed}"
    return said


def whole_sums(graph: fx.Graph) -> list[fx.Node]:
    """The additions of two tensors of one shape, as residual additions are."""
    return [node for node in graph.nodes if _is_whole_sum(node)]


def _is_whole_sum(node: fx.Node) -> bool:
    found, whole = addition_of(node), float_tensor(node)
    if found is None or whole is None:
        return False
    return all((value := float_tensor(part)) is not None and same_size(value.shape, whole.shape)
               for part in (found.left, found.right))


def _is_opaque(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return op_name(node) not in {"flex_attention", "flex_attention_hop"}
    return isinstance(target, (OpOverload, OpOverloadPacket)) and not str(target).startswith(
        ("aten.", "prims.", "prim.", "attnres."))
