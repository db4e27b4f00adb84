"""Match: find the markers of converted streams in a graph, and check each against its plan. Analysis alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from attnres_fx.passes._compat.dynamo import graph_break_reason
from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.graph_breaks import explain_break
from attnres_fx.passes.graph.nodes import module_of, place_of, stack_paths
from attnres_fx.passes.graph.vocabulary import argument
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.passes.rewrite.shares import refuse_shares
from attnres_fx.passes.rewrite.sites import common_path, find_sites, owner_path, tracer_path
from attnres_fx.runtime.errors import AttnResError, SitesChangedError, SplitStreamError
from attnres_fx.runtime.marker import ENTER


def markers_of(graph: fx.Graph) -> list[fx.Node]:
    """The markers of converted streams in ``graph``, in graph order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is ENTER]


def plans_of_markers(graph: fx.Graph) -> list[StreamPlan]:
    """The plans that the markers of ``graph`` carry, each once."""
    texts = dict.fromkeys(str(marker.args[2]) for marker in markers_of(graph))
    return [StreamPlan.from_json(text) for text in texts]


def match(graph: fx.Graph) -> tuple[Assignment, ...]:
    """Match every marker of a prepared graph with the stream whose sites its plan recorded, and check it against the plan.

    Raises: SitesChangedError, SplitStreamError, GraphBreakError or a refusal of the stream, if the graph does not have
    exactly the layers that the conversion recorded.
    """
    markers = markers_of(graph)
    if not markers:
        return ()
    streams = detect(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    free = list(streams)
    assignments = []
    entered = {marker.args[:3:2] for marker in markers if not _within(marker)}
    for marker in markers:
        query, key_gain, text = marker.args[:3]
        within = _within(marker)
        if within and (query, text) in entered:
            continue
        plan = StreamPlan.from_json(str(text))
        places = [(s, find_sites(s, plan.sites)) for s in free if order[s.layers[0].node] > order[marker]]
        # The marker of a restarted frame is called by a submodule; any other by the owner of the stream.
        found = next((s for s, place in places if place is not None
                      and (within or place == owner_path(marker) or _is_owner(s, marker))), None)
        if found is None:
            raise _explain_mismatch(graph, marker, plan, streams)
        free.remove(found)
        found = replace(found, name=plan.name)
        refusal = found.refusal()
        if refusal is not None:
            raise refusal
        if found.width != plan.width:
            raise SitesChangedError(f"stream '{plan.name}' has width {found.width}; it was converted at {plan.width}",
                                    place=place_of(marker), remedy="convert the model again for this width")
        assert isinstance(query, fx.Node)
        gain = key_gain if isinstance(key_gain, fx.Node) else None
        refuse_shares(found, [query] if gain is None else [query, gain])
        assignments.append(Assignment(found, plan, query, gain))
    # In graph order, so that a stream that starts from another's value is rewritten after it.
    return tuple(sorted(assignments, key=lambda a: order[a.stream.layers[0].node]))


def _within(marker: fx.Node) -> bool:
    """Whether a submodule called ``marker`` for the frame around it."""
    return bool(argument(marker, 3, "within", False))


def _is_owner(stream: Stream, marker: fx.Node) -> bool:
    """Whether the lowest module that runs all layers of ``stream`` called ``marker``, however the tracer spells its path."""
    caller, lowest = stack_paths(marker)[-1:], common_path(stream)[-1:]
    return bool(caller) and bool(lowest) and caller[0][0] == lowest[0][0]


def _explain_mismatch(graph: fx.Graph, marker: fx.Node, plan: StreamPlan, streams: Sequence[Stream]) -> AttnResError:
    """Why no stream of the graph is the recorded one: an error that names the likeliest cause."""
    gm = module_of(graph)
    broken = graph_break_reason(gm)
    if broken is not None:
        return explain_break(*broken, what=f"stream '{plan.name}'", node=marker.name, module=plan.owner)
    bodies = [node for node in graph.nodes if node.op == "get_attr" and isinstance(
        getattr(gm, str(node.target), None), fx.GraphModule)]
    present = _closest(plan, streams)
    missing = [f"{path or 'the owner itself'} (call {ordinal + 1})" for path, ordinal in plan.sites
               if (path, ordinal) not in present]
    if bodies and missing:
        return SplitStreamError(
            f"layers of stream '{plan.name}' are hidden in the body of a higher-order operator: {', '.join(missing[:4])}",
            place=place_of(marker), remedy="run the model without it (for instance without nested compile regions)")
    if missing:
        return SplitStreamError(
            f"this graph has {plan.num_layers - len(missing)} of the {plan.num_layers} layers of stream '{plan.name}'; "
            f"missing: {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}", place=place_of(marker),
            remedy="compile the whole model in one graph: no layer drop or early exit; with DistributedDataParallel set "
                   "torch._dynamo.config.optimize_ddp=False; if the layers of the model changed, convert it again")
    extra = sorted({tracer_path(layer.node) for s in streams for layer in s.layers})
    return SitesChangedError(
        f"the layers of this graph are not those that the conversion of stream '{plan.name}' recorded; the graph has "
        f"{[s.num_layers for s in streams]} layers at {extra[:4]}", place=place_of(marker),
        remedy="call the model as it was converted, or convert it again with the inputs that it is used with")


def _closest(plan: StreamPlan, streams: Sequence[Stream]) -> set[tuple[str, int]]:
    """The recorded sites that the best matching stream of the graph has."""
    best: set[tuple[str, int]] = set()
    for stream in streams:
        counts: dict[str, int] = {}
        here = set()
        for layer in stream.layers:
            path = tracer_path(layer.node)
            relative = next((p for p, _ in plan.sites if p and (path == p or path.endswith("." + p))), "")
            here.add((relative, counts.get(relative, 0)))
            counts[relative] = counts.get(relative, 0) + 1
        here &= set(plan.sites)
        if len(here) > len(best):
            best = here
    return best


@dataclass(frozen=True)
class Assignment:
    """A stream to rewrite, its plan, and the nodes of its parameters ([L+1, d] each; the gain may be None)."""

    stream: Stream
    plan: StreamPlan
    query: fx.Node
    key_gain: fx.Node | None
