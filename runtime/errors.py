"""The one family of errors: every refusal is a class, and every message says where and what to do.

The classes live at the bottom of the import order, so that operators, passes and the public face raise the same ones;
users import them from :mod:`attnres_fx.errors`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where in the user's model something stands.

    ``node`` is the name of the graph node, ``module`` the path of the innermost module that runs it, ``source`` the
    ``file:line`` of the user's code. Each may be empty if the tracer recorded none.
    """

    node: str = ""
    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        parts = []
        if self.node:
            parts.append(f"node '{self.node}'")
        if self.module:
            parts.append(f"module '{self.module}'")
        if self.source:
            parts.append(self.source)
        return ", ".join(parts) or "place not recorded by the tracer"


class AttnResError(RuntimeError):
    """Base of all refusals. ``place`` says where, ``remedy`` what to do; both are part of the message."""

    def __init__(self, message: str, *, place: Place | None = None, remedy: str = "") -> None:
        text = message if place is None else f"{message} [{place}]"
        if remedy:
            text = f"{text}\n  What to do: {remedy}"
        super().__init__(text)
        self.place = place
        self.remedy = remedy


class PlainPathError(AttnResError):
    """A converted model was about to run as the plain residual network."""


class ReplacedParametersError(PlainPathError):
    """What stands in place of a converted model's parameters is not what the model can read."""


class NoStreamError(AttnResError):
    """No residual stream was found in the model."""


class StreamRefusedError(AttnResError):
    """A residual stream was found, and it cannot be rewritten safely."""


class PostNormError(StreamRefusedError):
    """A norm lies on the stream between two additions (post-norm)."""


class ScaledStreamError(StreamRefusedError):
    """The stream itself is scaled between two additions (DeepNorm, KEEL, x0-lambda mixing)."""


class GatedStreamError(StreamRefusedError):
    """The stream itself is gated by a value computed from the input (highway, recurrent cells, hyper-connections)."""


class StreamOperationError(StreamRefusedError):
    """Some other operation that is not a pass-through lies on the stream, or a long skip joins it."""


class MutatedStreamError(StreamRefusedError):
    """A value of the stream is changed in place by something that is not a residual addition."""


class HiddenLayersError(StreamRefusedError):
    """Layers of the stream are hidden in the body of a higher-order operator (cond, while_loop)."""


class HandWrittenMixError(StreamRefusedError):
    """The chain of additions belongs to attention residuals that the model already spells out."""


class GraphBreakError(AttnResError):
    """The tracer could not capture the model as one graph, so that a stream would be cut."""


class TracingError(AttnResError):
    """The model itself fails on the given inputs while it is traced."""


class SplitStreamError(AttnResError):
    """A graph of a converted model holds only a part of its stream."""


class SitesChangedError(AttnResError):
    """A graph of a converted model has other layers than the conversion recorded."""


class ShardedStreamError(StreamRefusedError):
    """A process has only a share of a stream, so the gradients of its queries would be those of the share."""


class UnreducedGradientsError(AttnResError):
    """A wrapper that adds up gradients over processes would leave out parameters of a converted model."""


class PartOfConvertedError(AttnResError):
    """A part of a converted model is compiled on its own."""


class AlreadyConvertedError(AttnResError):
    """The model is converted already."""


class NotConvertedError(AttnResError):
    """The call needs a converted model."""


class PartitionError(AttnResError, ValueError):
    """The requested blocks do not fit the stream."""


class OptionError(AttnResError, ValueError):
    """An unknown option, or a value that the option does not take."""


class OneLineError(AttnResError):
    """The model cannot be converted while it is being compiled."""


class CheckpointFileError(AttnResError):
    """A file or directory is missing, truncated, of another format, or does not fit the model."""


class MemoryBudgetError(AttnResError, ValueError):
    """No tiling makes the rows of attention residuals fit into the memory budget."""


class LayoutError(AttnResError):
    """A memory layout breaks its own rules: two buffers share bytes while both are in use, or one lies out of bounds."""


class KernelError(AttnResError):
    """The requested kernels cannot run here: on this device, at this size, or without a package."""


class LoweringError(AttnResError):
    """The rewritten graph could not be built. This is a fault of attnres_fx; the message says where."""
