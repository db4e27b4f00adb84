"""``analyze``: find the residual streams of a model. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from attnres_fx.passes._dynamo import unwrap
from attnres_fx.passes.absence import absence
from attnres_fx.passes.capture import capture
from attnres_fx.passes.detect import detect
from attnres_fx.passes.graph import module_path, source_line
from attnres_fx.passes.lower import prepare
from attnres_fx.passes.plan import common_path
from attnres_fx.passes.recognize import recognize
from attnres_fx.passes.streams import Stream
from attnres_fx.passes.vocabulary import argument, is_mix
from attnres_fx.report import MixEntry, Report, describe_stream
from attnres_fx.runtime.parameters import AttnRes


def analyze(model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Report:
    """The residual streams of ``model``, traced on ``model(*args, **kwargs)``.

    The model is not run and not changed. A converted model is analysed as the plain network that it was.

    Raises: GraphBreakError if the model cannot be traced as one graph.
    """
    model = unwrap(model)
    gm, _ = capture(model, as_args(args), kwargs or {})
    return report_of(gm, model)


def report_of(gm: fx.GraphModule, model: nn.Module | None = None) -> Report:
    """The report on a graph: its streams, named as a conversion would name them, and the mixes that it holds."""
    gm = prepare(gm)
    recognize(gm)
    mixes = tuple(_mix_entry(node) for node in gm.graph.nodes if is_mix(node))
    streams = [s for s in detect(gm) if not any(o.kind == "mix" and is_mix(o.node) for o in s.obstacles)]
    name_streams(streams, [owner_of(stream, model) for stream in streams])
    seen = "" if streams or mixes else absence(gm.graph)
    return Report(tuple(describe_stream(stream) for stream in streams), mixes, seen)


def _mix_entry(node: fx.Node) -> MixEntry:
    return MixEntry(module_path(node), source_line(node), len(argument(node, 0, "sources")))


def as_args(args: Any) -> tuple[Any, ...]:
    """Positional arguments as a tuple; a lone tensor is one argument."""
    return (args,) if isinstance(args, torch.Tensor) else tuple(args)


def owner_of(stream: Stream, model: nn.Module | None) -> tuple[str, str]:
    """The lowest module that owns all additions of ``stream``: (its path in ``model``, its path as the tracer spells it).

    Dynamo keys its module stack by the identity of the live module, ``torch.export`` by path.
    """
    common = common_path(stream)
    if not common:
        return "", ""
    key, spelled = common[-1]
    if model is not None:
        for name, module in model.named_modules():
            if str(id(module)) == key:
                return name, spelled
    return spelled, spelled


def name_streams(streams: Sequence[Stream], owners: Sequence[tuple[str, str]]) -> None:
    """Name the streams: "stream" where there is one, else by the last named component of their owner's path."""
    if len(streams) == 1:
        streams[0].name = "stream"
        return
    taken: dict[str, int] = {}
    for stream, (path, _) in zip(streams, owners):
        parts = [part for part in path.split(".") if part and not part.isdigit()]
        base = parts[-1] if parts and parts[-1].isidentifier() else "stream"
        if hasattr(AttnRes, base):
            base = f"{base}_stream"
        taken[base] = taken.get(base, 0) + 1
        stream.name = base if taken[base] == 1 else f"{base}_{taken[base]}"


