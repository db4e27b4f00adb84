"""The one-line form: ``torch.compile(plain_model, backend="attnres")`` converts the model while it is being compiled.

The backend is called with the plain graph of a frame. It finds the live modules behind the graph, gives the model its
parameters and classes as ``convert`` does, and asks Dynamo to trace the frame again: the first call already runs the
rewritten graph. Where anything is in doubt it raises, and names the two-line form.

A graph without residual streams is compiled as it is, with one warning per place. It is an error if options ask for a
conversion, or if the graph is a piece of a broken frame and has additions. No warning is given in three cases: the frame can
reach a converted model (whose own forward takes care of itself), its streams are parts of a converted model that were left
out of the conversion, or its model spells the mixes out.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from attnres_fx.conversion import attach
from attnres_fx.converted import PART, STREAMS, is_converted_class
from attnres_fx.options import Options
from attnres_fx.passes._compat.distributed import calling_modules
from attnres_fx.passes._compat.dynamo import (
    Frame,
    compiling_frame,
    graph_break_reason,
    is_traced,
    restart_tracing,
    runs_within_a_module,
    skipped_frame,
)
from attnres_fx.passes.find.obstacles import absence, whole_sums
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.findings import Findings
from attnres_fx.passes.graph.graph_breaks import explain_break
from attnres_fx.passes.graph.nodes import stack_paths
from attnres_fx.passes.graph.vocabulary import base_of, is_mix
from attnres_fx.passes.rewrite.sites import common_path
from attnres_fx.planning import parameter_dtype, plan_streams, refuse_hidden
from attnres_fx.runner import enter_streams
from attnres_fx.runtime.errors import GraphBreakError, NoStreamError, OneLineError, PartOfConvertedError
from attnres_fx.runtime.parameters import CONTAINER

_TWO_LINES = (
    "convert first, then compile: attnres_fx.convert(model, args, kwargs, num_blocks=8); "
    "model = torch.compile(model, backend='attnres')"
)
_RESTARTED = "_attnres_restarted"  # on the submodule that carries the marker of a restarted frame: the root


def convert_while_compiling(gm: fx.GraphModule, found: Findings, options: Options) -> None:
    """Convert the plain model behind ``gm`` and restart the tracing of its frame; return if there is nothing to convert.

    ``found`` is what was found in ``gm``.

    Raises: a refusal of the stream, or OneLineError where the live model cannot be found with certainty.
    """
    streams = found.streams
    frame = compiling_frame()
    modules = [] if frame is None else frame.modules
    _refuse_parts(modules)
    # A model that already mixes, by hand or by attnres_fx.mix, is compiled as it is.
    mixed = any(obstacle.kind == "mix" for stream in streams for obstacle in stream.obstacles)
    if mixed or any(is_mix(node) for node in gm.graph.nodes):
        return
    broken = graph_break_reason(gm)
    if broken is None and frame is not None and frame.resumed:
        broken = "the frame resumes after a graph break", ""
    if not streams:
        refuse_hidden(found.gm.graph)
        if not _in_reach_of_converted(modules):
            _without_streams(found.gm, frame, broken, bool(options.conversion()))
        return
    if _left_plain(streams, frame):
        return
    if broken is not None:
        raise _cut(*broken)
    _refuse_pieces(found.gm, streams)
    if frame is None:
        raise OneLineError("the compiling frame cannot be seen, so the model cannot be converted while it is compiled",
                           remedy=_TWO_LINES)
    root = _root(streams[0], modules, frame.this)
    converted = is_converted_class(type(root)) or "attnres" in root._modules
    if not converted:
        plans = plan_streams(found, root, **options.conversion())
        attach(root, plans, parameter_dtype(root))
        _watch_optimizers(root)
    if root is frame.this and STREAMS in root.__dict__:
        _mark_from_inside(found.gm, root)
    elif converted:
        raise OneLineError("the model is converted, and its graph does not call the rewritten forward", remedy=_TWO_LINES)
    restart_tracing("attnres_fx converted the model")


def _cut(reason: str, source: str, what: str = "the model") -> GraphBreakError:
    return explain_break(reason, source, what=what, otherwise=_TWO_LINES)


def _left_plain(streams: Sequence[Stream], frame: Frame | None) -> bool:
    """Whether all ``streams`` are parts of a converted model whose conversion left them out, as with ``streams=[...]``."""
    parts = _converted_parts([] if frame is None else frame.modules)
    for stream in streams:
        path = common_path(stream)
        this = frame.this if frame is not None and frame.this is not None else next(iter(calling_modules()), None)
        owner = parts.get(path[-1][0] if path else str(id(this)))
        if owner is None or STREAMS in owner.__dict__:
            return False
    return bool(parts)


def _converted_parts(modules: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The parts, by identity key, of converted models that are below ``modules`` or are being called."""
    roots = {id(part): part for module in [*modules, *calling_modules()] for part in module.modules()
             if is_converted_class(type(part)) and CONTAINER in part._modules}
    return {str(id(part)): part for root in roots.values() for part in root.modules()}


def _in_reach_of_converted(modules: Sequence[nn.Module]) -> bool:
    """Whether one of ``modules`` contains a converted model or is a part of one, or the innermost module that runs is."""
    if any(is_converted_class(type(part)) for module in modules for part in module.modules()):
        return True
    parts = _converted_parts(modules)
    return any(str(id(module)) in parts for module in [*modules, *calling_modules()[:1]])


def _without_streams(gm: fx.GraphModule, frame: Frame | None, broken: tuple[str, str] | None, asked: bool) -> None:
    """Report that ``gm`` stays as it is: as an error if a conversion was ``asked`` for or was probably intended."""
    given_up = skipped_frame()
    broken = broken or given_up
    if broken is not None and (asked or whole_sums(gm.graph)):
        raise _cut(*broken)
    what = f"no residual stream was found in {_named(frame)}: {absence(gm.graph)}"
    if asked:
        raise NoStreamError(what, remedy="leave out the options of the conversion if there is nothing to convert, or "
                                         + _TWO_LINES)
    if given_up is not None and runs_within_a_module(None if frame is None else frame.this):
        return  # which was given up itself, and already reported
    cut = f"; a graph break cuts it: {broken[0].splitlines()[0]}" if broken is not None else ""
    _warn_plain(f"{what}{cut}. It is compiled as it is")


def refuse_given_up(frame: Frame, reason: str, source: str, settings: Mapping[str, Any]) -> None:
    """Report that Dynamo gave up the forward of a plain model, which runs in Python as it is.

    Raises: GraphBreakError where the backend's ``settings`` ask for a conversion; else it warns.
    """
    plain = frame.this is not None and any(True for _ in frame.this.parameters())
    if not plain or _in_reach_of_converted(frame.modules):
        return
    if Options.from_arguments(settings.get("mode"), settings.get("options")).conversion():
        raise _cut(reason, source)
    _warn_plain(f"torch.compile gave {_named(frame)} up at {source}: {reason}. It runs as it is")


def _named(frame: Frame | None) -> str:
    """What a frame runs, in words."""
    if frame is None:
        return "the compiled function"
    run = frame.this or next(iter(frame.modules), None)
    return frame.code if run is None else f"{type(run).__name__}, {frame.code}"


def _warn_plain(what: str) -> None:
    warnings.warn(f"{what}, without attention residuals. If it should have them, {_TWO_LINES}; "
                  "attnres_fx.analyze(model, args, kwargs) shows what is found", stacklevel=3)


def _refuse_parts(modules: list[nn.Module]) -> None:
    """A piece of a converted model that is compiled on its own would run without its mixes."""
    for module in modules:
        owner = module.__dict__.get(PART)
        if owner is not None:
            raise PartOfConvertedError(
                f"this {type(module).__name__} is one layer of a converted model (its stream belongs to '{owner}')",
                remedy="compile the whole model: torch.compile(model, backend='attnres')")


def _refuse_pieces(gm: fx.GraphModule, streams: Sequence[Stream]) -> None:
    """A frame whose stream enters as an input and leaves raw is a piece of a larger network."""
    for stream in streams:
        start = base_of(stream.layers[0].skip)
        leaves_raw = any(user.op == "output" for user in stream.values[-1].users)
        if start.op == "placeholder" and leaves_raw:
            broken = skipped_frame()
            if broken is not None:
                raise _cut(*broken, what="the model, layer by layer (torch.compile(..., fullgraph=True) names the line)")
            raise OneLineError(
                f"the residual stream crosses the border of what is compiled: it comes in as '{start.name}' and goes out "
                "unnormalised, as in one layer of a larger model", place=stream.layers[0].place,
                remedy="compile the whole model instead of its layers. If that is what was compiled, a graph break took it "
                       "apart: torch.compile(..., fullgraph=True) names the line. If this is the whole model, " + _TWO_LINES)


def _root(stream: Stream, modules: list[nn.Module], this: nn.Module | None) -> nn.Module:
    """The outermost module of the frame that runs the stream."""
    keys = {key for layer in stream.layers for key, _ in stack_paths(layer.node)}
    if this is not None and (not keys or any(str(id(m)) in keys for m in this.modules())):
        return this
    outermost = stack_paths(stream.layers[0].node)[:1]
    for module in modules:
        for candidate in module.modules():
            if outermost and str(id(candidate)) == outermost[0][0]:
                return candidate
    raise OneLineError("the module that runs the stream cannot be found from the compiled function",
                       place=stream.layers[0].place, remedy=_TWO_LINES)


def _mark_from_inside(gm: fx.GraphModule, root: nn.Module) -> None:
    """The frame is the root's old forward, which is traced again as it is: its first submodule calls the marker."""
    names = {str(id(module)): module for module in root.modules() if module is not root}
    first = next((names[key] for node in gm.graph.nodes for key, _ in stack_paths(node)[:1] if key in names), None)
    if first is None:
        raise OneLineError("the model's forward calls no submodule that could carry its parameters into the graph",
                           remedy=_TWO_LINES)

    first.__dict__[_RESTARTED] = root
    first.register_forward_pre_hook(_enter_again)


def _enter_again(module: nn.Module, args: Any) -> None:
    """A pre-hook that outlives the restart, since the guards of the restarted frame name it."""
    if is_traced():
        enter_streams(module.__dict__[_RESTARTED], within=True)


def _watch_optimizers(model: nn.Module) -> None:
    """An optimizer built before the first call does not have the queries: report it at its first step."""
    reference = weakref.ref(model)
    checked: weakref.WeakSet[Any] = weakref.WeakSet()

    def check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        watched = reference()
        if watched is None or optimizer in checked:
            return
        checked.add(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {id(p) for name, p in watched.named_parameters() if not name.startswith("attnres.")}
        new = {id(p) for p in watched.attnres.parameters() if p.requires_grad}  # type: ignore[union-attr]
        if held & own and not new <= held:
            raise OneLineError(
                "this optimizer was built before the model was converted by its first compiled call, and does not hold "
                "the queries", remedy=f"build the optimizer after the first call, or {_TWO_LINES}")

    weakref.finalize(model, register_optimizer_step_pre_hook(check).remove)

