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
class Kind:
    """What a kind of obstacle means: the error that a conversion raises, one sentence of why, what a user can do.

    In ``why`` "{}" stands for the name of the operation.
    """

    error: type[StreamRefusedError]
    why: str
    remedy: str


_ADD_FEATURES = "add the features, h[mask] = h[mask] + features, to a value that no other name refers to"
KINDS: dict[str, Kind] = {
    "norm": Kind(
        PostNormError,
        "post-norm: '{}' lies on the stream between two additions, so that layers see a normalised sum and no plain sum of "
        "layer outputs exists",
        "use a pre-norm variant of the model; attention residuals are defined for pre-norm streams"),
    "scale": Kind(
        ScaledStreamError,
        "the stream itself is scaled between two additions ('{}'), so that it is not the sum of the layer outputs",
        "move the factor to the branch, or use a variant of the model without it"),
    "first value": Kind(
        ScaledStreamError,
        "the stream is scaled and its first value mixed back in between two additions ('{}'; x0-lambda mixing), so that it "
        "is not the sum of the layer outputs",
        "use a variant of the model without the mixing; attention residuals let layers read the embedding"),
    "cell": Kind(
        GatedStreamError,
        "a gated recurrent cell ('{}') takes the place of the residual additions: the stream is its state",
        "use a variant of the model with plain residual additions"),
    "lanes": Kind(
        GatedStreamError,
        "hyper-connections: several parallel residual lanes are mixed by a small matrix ('{}') between two additions",
        "use a variant of the model with one residual stream; attention residuals replace the lanes"),
    "long skip": Kind(
        StreamOperationError,
        "a long skip from an earlier layer joins the stream ('{}'; U-Net)",
        "use a variant of the model without it; attention residuals let layers read earlier blocks"),
    "overwriting mutation": Kind(
        MutatedStreamError,
        "injected features: '{}' writes over a part of the stream instead of adding to it", _ADD_FEATURES),
    "overwriting operation": Kind(
        StreamOperationError,
        "injected features: '{}' writes over a part of the stream instead of adding to it", _ADD_FEATURES),
    "addition": Kind(
        StreamOperationError,
        "injected features: '{}' adds to the stream what some of its readers do not see, in another layout than that of the "
        "next addition",
        "add the features in the layout of the layers, or let every reader read the sum"),
    "gate": Kind(
        GatedStreamError,
        "the stream itself is gated by a computed value between two additions ('{}')",
        "use a variant of the model with plain residual additions"),
    "mutation": Kind(
        MutatedStreamError,
        "a value of the stream is changed in place by '{}', which is not a residual addition",
        "make the operation out of place, or add its result to the stream"),
    "hidden": Kind(
        HiddenLayersError,
        "further layers of it are hidden in the body of '{}', which may or may not run them",
        "run the layers without it"),
    "mix": Kind(
        HandWrittenMixError,
        "values of this chain are mixed by a softmax over depth ('{}'): the model already implements attention residuals, "
        "and is not converted a second time",
        "compile the model as it is"),
    "operation": Kind(
        StreamOperationError,
        "'{}' lies on the stream between two additions and is not a pass-through",
        "apply the operation inside a branch, or leave this stream out with streams="),
}


@dataclass(frozen=True)
class Obstacle:
    """An operation on the stream itself that forbids the rewrite: ``kind``, one of ``KINDS``, and the node that does it."""

    kind: str
    node: fx.Node

    @property
    def place(self) -> Place:
        return place_of(self.node)

    def explain(self) -> tuple[type[StreamRefusedError], str, str]:
        """(error class, one sentence of why, what the user can do)."""
        name, kind = op_name(self.node), self.kind
        if kind in ("mutation", "operation") and name in WRITES:
            kind = f"overwriting {kind}"
        elif kind == "operation" and name in ADDITIONS:
            kind = "addition"
        meant = KINDS[kind]
        return meant.error, meant.why.format(name), meant.remedy


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
