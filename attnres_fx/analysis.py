"""``analyze``: find the residual streams of a model. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from attnres_fx.by_value import ways_of
from attnres_fx.passes._compat.dynamo import unwrap
from attnres_fx.passes.find.obstacles import absence
from attnres_fx.passes.findings import Findings, find
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.nodes import module_path, source_line
from attnres_fx.passes.graph.vocabulary import argument, is_mix
from attnres_fx.planning import as_args, named_streams, owner_of
from attnres_fx.reports.streams import MixEntry, Report, describe_stream


def analyze(model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Report:
    """The residual streams of ``model``, traced on ``model(*args, **kwargs)``.

    The model is not run and not changed. A converted model is analysed as the plain network that it was.

    Raises: GraphBreakError if the model cannot be traced as one graph.
    """
    model = unwrap(model)
    gm, _ = capture(model, as_args(args), kwargs or {})
    return report_of(find(gm), model)


def report_of(found: Findings, model: nn.Module | None = None) -> Report:
    """The report on a graph: its streams, named as a conversion would name them, and its mixes."""
    graph = found.gm.graph
    mixes = tuple(_mix_entry(node) for node in graph.nodes if is_mix(node))
    streams = [s for s in found.streams if not any(o.kind == "mix" and is_mix(o.node) for o in s.obstacles)]
    streams = list(named_streams(streams, [owner_of(stream, model) for stream in streams]))
    seen = "" if streams or mixes else absence(graph)
    return Report(tuple(describe_stream(stream) for stream in streams), mixes, seen, {} if model is None else ways_of(model))


def _mix_entry(node: fx.Node) -> MixEntry:
    return MixEntry(module_path(node), source_line(node), len(argument(node, 0, "sources")))
