"""Lower: find the markers of converted streams in a graph, hold each to its plan, and rewrite its stream."""

from __future__ import annotations

from torch import fx

from attnres_fx.passes._dynamo import graph_break_reason
from attnres_fx.passes.detect import detect
from attnres_fx.passes.encoder_layer import expand_encoder_layers_graph
from attnres_fx.passes.finish import finish, keep_unread
from attnres_fx.passes.graph import copy_graph_module, place_of, stack_paths
from attnres_fx.passes.graph_breaks import explain_break
from attnres_fx.passes.injections import injections_graph
from attnres_fx.passes.inline import inline_graph
from attnres_fx.passes.normalize import normalize_graph
from attnres_fx.passes.plan import StreamPlan, common_path, find_sites, owner_path, tracer_path
from attnres_fx.passes.rewrite import Assignment, rewrite_graph
from attnres_fx.passes.shares import refuse_shares
from attnres_fx.passes.streams import Stream
from attnres_fx.passes.unfuse import unfuse_graph
from attnres_fx.runtime.errors import AttnResError, SitesChangedError, SplitStreamError
from attnres_fx.runtime.marker import ENTER

# Before the plan in a marker that a restarted frame calls from within (see attnres_fx.one_line): it counts only where the
# stream has no marker of its own, which it has as soon as the generated forward is traced.
RESTART = "restart:"


def markers_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The markers of converted streams in ``gm``, in graph order."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is ENTER]


def lower_marked(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[StreamPlan]]:
    """A rewritten copy of ``gm``, in which every marker is consumed, and the plans it carried.

    Raises: SitesChangedError, SplitStreamError, GraphBreakError or a refusal of the stream, if the graph does not hold
    exactly the layers that the conversion recorded.
    """
    gm = prepare(gm)
    assignments = assign(gm)
    rewrite_graph(gm.graph, assignments)
    for marker in markers_of(gm):
        gm.graph.erase_node(marker)
    finish(gm)
    return gm, [assignment.plan for assignment in assignments]


def prepare(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a traced graph on which detection works: bodies inlined, fused operators taken
    apart, additions and injections normalized. No code is generated."""
    gm = copy_graph_module(gm)
    keep_unread(gm.graph)
    inline_graph(gm)
    expand_encoder_layers_graph(gm.graph)
    unfuse_graph(gm.graph)
    normalize_graph(gm.graph)
    injections_graph(gm.graph)
    return gm


def assign(gm: fx.GraphModule) -> list[Assignment]:
    """Match every marker of a normalized graph with the stream whose sites its plan recorded."""
    streams = detect(gm)
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    free = list(streams)
    assignments = []
    markers = markers_of(gm)
    marked = {(marker.args[0], marker.args[2]) for marker in markers}
    for marker in markers:
        query, key_gain, text = marker.args
        content = str(text).removeprefix(RESTART)
        if content != text and (query, content) in marked:
            continue
        plan = StreamPlan.from_json(content)
        places = [(s, find_sites(s, plan.sites)) for s in free if order[s.layers[0].node] > order[marker]]
        # The marker of a restarted frame is called by a submodule; any other by the owner of the stream.
        found = next((s for s, place in places if place is not None
                      and (content != text or place == owner_path(marker) or _is_owner(s, marker))), None)
        if found is None:
            raise _explain_mismatch(gm, marker, plan, streams)
        found.name = plan.name
        refusal = found.refusal()
        if refusal is not None:
            raise refusal
        if found.width != plan.width:
            raise SitesChangedError(f"stream '{plan.name}' has width {found.width}; it was converted at {plan.width}",
                                    place=place_of(marker), remedy="convert the model anew for this width")
        free.remove(found)
        assert isinstance(query, fx.Node)
        gain = key_gain if isinstance(key_gain, fx.Node) else None
        refuse_shares(found, [query] if gain is None else [query, gain])
        assignments.append(Assignment(found, plan, query, gain))
    # In graph order, so that a stream that starts from another's value is rewritten after it.
    return sorted(assignments, key=lambda a: order[a.stream.layers[0].node])


def _is_owner(stream: Stream, marker: fx.Node) -> bool:
    """Whether the lowest module that runs all layers of ``stream`` called ``marker``, however the tracer spells its path."""
    caller, lowest = stack_paths(marker)[-1:], common_path(stream)[-1:]
    return bool(caller) and bool(lowest) and caller[0][0] == lowest[0][0]


def _explain_mismatch(gm: fx.GraphModule, marker: fx.Node, plan: StreamPlan, streams: list[Stream]) -> AttnResError:
    """Why no stream of the graph is the recorded one, in the words of the likeliest cause."""
    broken = graph_break_reason(gm)
    if broken is not None:
        return explain_break(*broken, what=f"stream '{plan.name}'", node=marker.name, module=plan.owner)
    bodies = [node for node in gm.graph.nodes if node.op == "get_attr" and isinstance(
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
            f"this graph holds {plan.num_layers - len(missing)} of the {plan.num_layers} layers of stream '{plan.name}'; "
            f"missing: {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}", place=place_of(marker),
            remedy="compile the whole model in one graph: no layer drop or early exit; with DistributedDataParallel set "
                   "torch._dynamo.config.optimize_ddp=False; if the layers of the model changed, convert anew")
    extra = sorted({tracer_path(layer.node) for s in streams for layer in s.layers})
    return SitesChangedError(
        f"the layers of this graph are not those that the conversion of stream '{plan.name}' recorded; the graph has "
        f"{[s.num_layers for s in streams]} layers at {extra[:4]}", place=place_of(marker),
        remedy="call the model as it was converted, or convert it anew with the inputs that it is used with")


def _closest(plan: StreamPlan, streams: list[Stream]) -> set[tuple[str, int]]:
    """The recorded sites that the best matching stream of the graph holds."""
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
