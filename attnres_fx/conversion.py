"""``convert``: turn a model into an Attention-Residuals model, in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn

from attnres_fx.adapters import host_of, train_with_adapters
from attnres_fx.analysis import as_args, name_streams, owner_of
from attnres_fx.passes._dynamo import unwrap
from attnres_fx.passes.absence import absence
from attnres_fx.passes.capture import capture
from attnres_fx.passes.detect import detect
from attnres_fx.passes.graph import place_of, stack_paths
from attnres_fx.passes.hidden import hidden_layers
from attnres_fx.passes.lower import lower_marked, markers_of, prepare
from attnres_fx.passes.partition import partition
from attnres_fx.passes.plan import MIX_SCALES, StreamPlan, relative_sites, tracer_path
from attnres_fx.passes.recognize import recognize
from attnres_fx.passes.streams import Obstacle, Stream, sites_of
from attnres_fx.runner import PART, ROOT, STREAMS, converted_class, is_converted_class, original_class
from attnres_fx.runtime.errors import (
    AlreadyConvertedError,
    HandWrittenMixError,
    HiddenLayersError,
    NoStreamError,
    NotConvertedError,
    OptionError,
    PartOfConvertedError,
    PlainPathError,
)
from attnres_fx.runtime.parameters import CONTAINER, AttnRes, StreamParameters, streams_of

Model = TypeVar("Model", bound=nn.Module)

GRAPH_PLANS = "attnres_plans"  # in the meta of a rewritten graph module, whose copies keep no class of ours: its plans


def convert(
    model: Model,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_blocks: int | None = None,
    layers_per_block: int | None = None,
    boundaries: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    streams: Collection[str] | str | None = None,
    mix_scale: str = "paper",
    eps: float = 1e-6,
    key_gain: bool = True,
    param_dtype: torch.dtype | None = None,
) -> Model:
    """Convert ``model`` to Attention Residuals in place, and return it.

    The model is traced on ``model(*args, **kwargs)`` and not run. It keeps its parameters and its ``state_dict`` keys, and
    gains ``model.attnres``: per stream a ``query`` [L+1, d] of zeros and a ``key_gain`` [L+1, d] of ones. Afterwards it runs
    the rewritten network however it is called, or raises; it never runs as the plain residual network. A model under
    adapters of PEFT gains them as a part of every adapter (``modules_to_save``).

    Args:
        num_blocks: at most so many blocks; a block has S = ceil(L / num_blocks) layers and the last may be short. 8 if
            neither this nor the next two are given.
        layers_per_block: S itself; 1 gives Full Attention Residuals.
        boundaries: the layer counts after which a block closes, for the one stream or by stream name.
        streams: names of the streams to convert (see :func:`attnres_fx.analyze`); all of them if None.
        mix_scale: "paper", the softmax mean of the paper; or "sum", each mix times its number of sources, so that zero
            queries give the residual stream itself to rounding. Use "sum" to start from trained weights exactly.
        eps: of the key norm.
        key_gain: whether keys have a learnable gain.
        param_dtype: of the new parameters; float32 if None (float64 in a float64 model).

    Raises:
        AlreadyConvertedError: the model, or a part of it, is converted.
        GraphBreakError: the model cannot be traced as one graph.
        NoStreamError: it has no residual stream.
        StreamRefusedError (a subclass for each cause): a stream cannot be rewritten safely.
        PartitionError, OptionError: an argument does not fit.

    A failed conversion leaves the model exactly as it was.
    """
    inner = unwrap(model)
    host = host_of(inner)
    _refuse_converted(host)
    if mix_scale not in MIX_SCALES:
        raise OptionError(f"mix_scale is {mix_scale!r}", remedy="give 'paper' or 'sum'")
    if isinstance(inner, fx.GraphModule):
        from attnres_fx.graph_modules import convert_graph  # which builds on this file

        convert_graph(inner, as_args(args), kwargs or {}, num_blocks=num_blocks, layers_per_block=layers_per_block,
                      boundaries=boundaries, streams=streams, mix_scale=mix_scale, eps=eps, key_gain=key_gain,
                      param_dtype=param_dtype)
        return model
    gm, _ = capture(inner, as_args(args), kwargs or {})
    if markers_of(gm):
        raise AlreadyConvertedError("a part of this model is converted already",
                                    remedy="convert the whole model from a plain one, once")
    plans = plan_streams(gm, host, num_blocks=num_blocks, layers_per_block=layers_per_block, boundaries=boundaries,
                         streams=streams, mix_scale=mix_scale, eps=eps, key_gain=key_gain)
    dtype = param_dtype or parameter_dtype(host)
    attach(host, plans, dtype)
    try:
        lowered, _ = capture(inner, as_args(args), kwargs or {})
        lower_marked(lowered)
    except BaseException:
        detach(host)
        raise
    if host is not inner:
        train_with_adapters(inner)
    return model


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """float64 for a model of float64 parameters, else float32."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def plan_streams(
    gm: fx.GraphModule,
    model: nn.Module,
    *,
    num_blocks: int | None = None,
    layers_per_block: int | None = None,
    boundaries: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    streams: Collection[str] | str | None = None,
    mix_scale: str = "paper",
    eps: float = 1e-6,
    key_gain: bool = True,
) -> list[StreamPlan]:
    """The plans of the streams to convert, from a captured graph; raises what :func:`convert` raises."""
    gm = prepare(gm)
    mixes = recognize(gm)
    found = detect(gm)
    if mixes and not any(isinstance(stream.refusal(), HandWrittenMixError) for stream in found):
        raise HandWrittenMixError(
            "the model spells attention residuals out already, and is not converted a second time",
            place=place_of(mixes[0].node), remedy="compile the model as it is")
    if not found:
        refuse_hidden(gm)
        raise NoStreamError(f"no residual stream was found in the model: {absence(gm.graph)}",
                            remedy="attention residuals need additions x + f(x) around the layers of a transformer")
    owners = [owner_of(stream, model) for stream in found]
    name_streams(found, owners)
    chosen = _choose(found, streams)
    plans: list[StreamPlan] = []
    for stream, (owner, spelled) in zip(found, owners):
        if stream.name not in chosen:
            continue
        closing = partition(stream.num_layers, num_blocks=num_blocks, layers_per_block=layers_per_block,
                            boundaries=_boundaries_of(stream, boundaries, len(chosen)))
        plan = StreamPlan(
            name=stream.name, owner=owner, num_layers=stream.num_layers, width=stream.width, boundaries=closing,
            sites=_sites_below(stream, model, owner, spelled), eps=float(eps), mix_scale=mix_scale, key_gain=key_gain)
        if not any(other.owner == plan.owner and other.sites == plan.sites for other in plans):
            plans.append(plan)  # a module called twice is one stream with one set of parameters
    return plans


def _sites_below(stream: Stream, model: nn.Module, owner: str, spelled: str) -> tuple[tuple[str, int], ...]:
    """The sites of ``stream`` below its owner, which the tracer calls ``spelled``.

    Where a call goes through a forward of the instance, the tracer spells owner and layers by different ways to them; then
    the layers are found by their identity.
    """
    if all(tracer_path(layer.node).startswith(spelled) for layer in stream.layers):
        return relative_sites(stream, spelled)
    names = {str(id(module)): name for name, module in model.get_submodule(owner).named_modules()}
    keys = [stack_paths(layer.node)[-1][0] for layer in stream.layers]
    if not all(key in names for key in keys):
        return relative_sites(stream, spelled)
    return sites_of([names[key] for key in keys])


def refuse_hidden(gm: fx.GraphModule) -> None:
    """Refuse a graph all of whose layers are hidden in bodies that detection does not enter; they are no plain network."""
    hidden = hidden_layers(gm.graph)
    if hidden:
        _, why, remedy = Obstacle("hidden", hidden[0]).explain()
        raise HiddenLayersError(f"no stream can be followed: {why}", place=place_of(hidden[0]), remedy=remedy)


def _choose(found: Sequence[Stream], streams: Collection[str] | str | None) -> set[str]:
    names = [stream.name for stream in found]
    wanted = names if streams is None else [streams] if isinstance(streams, str) else list(streams)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise OptionError(f"no stream is named {', '.join(map(repr, unknown)) or '(none given)'}",
                          remedy=f"the model's streams are: {', '.join(names)}")
    refusals = {s.name: s.refusal() for s in found if s.name in wanted}
    refused = {name: refusal for name, refusal in refusals.items() if refusal is not None}
    if not refused:
        return set(wanted)
    # A model that spells attention residuals out is told so, whatever else its weighted sums look like.
    first = min(refused.values(), key=lambda refusal: not isinstance(refusal, HandWrittenMixError))
    good = [name for name in wanted if name not in refused]
    if not good:
        raise first
    listed = "\n  ".join(str(refusal) for refusal in refused.values())
    raise type(first)(
        f"of {len(wanted)} streams {len(refused)} cannot be rewritten:\n  {listed}\n  convertible: {', '.join(good)}",
        place=first.place, remedy=f"convert the others alone with streams={good!r}")


def _boundaries_of(
    stream: Stream, boundaries: Sequence[int] | Mapping[str, Sequence[int]] | None, count: int
) -> Sequence[int] | None:
    if boundaries is None or isinstance(boundaries, Mapping):
        if isinstance(boundaries, Mapping) and stream.name not in boundaries:
            raise OptionError(f"boundaries have no entry for stream '{stream.name}'",
                              remedy="give one for every stream that is converted")
        return None if boundaries is None else boundaries[stream.name]
    if count > 1:
        raise OptionError("boundaries are one list, and the model has several streams",
                          remedy="give a dictionary from stream name to its boundaries")
    return boundaries


def _refuse_converted(model: nn.Module) -> None:
    if is_converted_class(type(model)) or streams_of(model) is not None:
        raise AlreadyConvertedError("this model is converted already",
                                    remedy="build a plain model to convert it another way; the plan is fixed")
    part = next((name for name, module in model.named_modules() if is_converted_class(type(module))), None)
    if part is not None:
        raise AlreadyConvertedError(f"the part '{part}' of this model is converted already",
                                    remedy="convert the whole model from a plain one, once")
    inside = model.__dict__.get(PART)
    if inside is not None:
        raise PartOfConvertedError(f"this module is a part of a converted model (owner '{inside}')",
                                   remedy="convert whole models, once")
    if hasattr(model, CONTAINER):
        raise OptionError("the model has an attribute 'attnres' of its own, where the new parameters would go",
                          remedy="rename that attribute")


def attach(model: nn.Module, plans: Sequence[StreamPlan], dtype: torch.dtype) -> None:
    """Give ``model`` the parameters of ``plans`` and swap the classes of the owners; all of it or nothing."""
    owners: dict[str, nn.Module] = {}
    for plan in plans:
        owner = model.get_submodule(plan.owner)
        if isinstance(owner, fx.GraphModule):
            raise PlainPathError(
                f"'{plan.owner or 'the model'}' is a graph (fx.GraphModule), whose forward is generated anew from it",
                remedy="convert the graph itself: attnres_fx.convert(graph_module, args, ...) rewrites it in place")
        if getattr(owner.__dict__.get("forward"), "__func__", None) is type(owner).forward:
            del owner.__dict__["forward"]  # the class's own, which hooks leave there when they are taken off
        if "forward" in owner.__dict__:
            raise PlainPathError(
                f"the forward of '{plan.owner or type(owner).__name__}' is replaced on the instance, so that the rewritten "
                "one would never be called", remedy="convert the model before other tools wrap its forward")
        owners[plan.owner] = owner
    parameters = {}
    for plan in plans:
        device = next((p.device for p in owners[plan.owner].parameters()), torch.device("cpu"))
        parameters[plan.name] = StreamParameters(plan.num_layers, plan.width, plan.to_json(), key_gain=plan.key_gain,
                                                 dtype=dtype, device=device)
    container = AttnRes(parameters)
    container.train(model.training)
    model.add_module(CONTAINER, container)
    for path, owner in owners.items():
        owner.__dict__[STREAMS] = {plan.name: parameters[plan.name].plan for plan in plans if plan.owner == path}
        if owner is not model:
            owner.__dict__[ROOT] = model._modules
        owner.__class__ = converted_class(type(owner), True, owner is model)
        for plan in plans:
            if plan.owner == path:
                for site, _ in plan.sites:
                    module = _submodule(owner, site)
                    if module is not None and module is not owner:
                        module.__dict__[PART] = path or type(model).__name__
    if model not in owners.values():
        model.__class__ = converted_class(type(model), False, True)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`."""
    for module in list(model.modules()):
        module.__class__ = original_class(type(module))
        for name in (STREAMS, ROOT, PART, "_attnres_runner"):
            module.__dict__.pop(name, None)
    del model._modules[CONTAINER]


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None


def plans_of(model: nn.Module) -> list[StreamPlan]:
    """The plans of a converted model, in graph order. Raises NotConvertedError."""
    inner = unwrap(model)
    streams = streams_of(inner)
    if isinstance(inner, fx.GraphModule) and GRAPH_PLANS in inner.meta:
        return [StreamPlan.from_json(text) for text in inner.meta[GRAPH_PLANS]]
    if streams is None:
        raise NotConvertedError("this model is not converted", remedy="call attnres_fx.convert(model, args, ...) first")
    return [StreamPlan.from_json(parameters.plan) for parameters in streams.values()]


