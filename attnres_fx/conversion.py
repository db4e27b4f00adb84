"""``convert``: turn a model into an Attention-Residuals model, in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn

from attnres_fx.adapters import host_of, train_with_adapters
from attnres_fx.by_value import record_starts, witnessed
from attnres_fx.converted import PART, ROOT, STREAMS, device_of, is_converted_class, new_parameters, original_class
from attnres_fx.graph_modules import convert_graph
from attnres_fx.passes._compat.dynamo import unwrap
from attnres_fx.passes.find.additions import witnesses_of
from attnres_fx.passes.findings import find, find_marked
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.rewrite.match import markers_of
from attnres_fx.passes.rewrite.plan import MIX_SCALES, StreamPlan
from attnres_fx.planning import as_args, parameter_dtype, plan_streams
from attnres_fx.runner import RUNNER, converted_class
from attnres_fx.runtime.errors import (
    AlreadyConvertedError,
    OptionError,
    PartOfConvertedError,
    PlainPathError,
)
from attnres_fx.runtime.parameters import CONTAINER, streams_of
from attnres_fx.runtime.stream import BY_GRAPH, BY_VALUE, ENTRY, SITE
from attnres_fx.trial import try_by_value

Model = TypeVar("Model", bound=nn.Module)


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

    The model is traced on ``model(*args, **kwargs)``, and then called once on copies of them, to see whether it runs by
    value as it does by its graph (docs/by_value.md); its buffers, attributes and the random state are put back. It keeps
    its parameters and its ``state_dict`` keys, and gains ``model.attnres``: per stream a ``query`` [L+1, d] of zeros and a
    ``key_gain`` [L+1, d] of ones. Afterwards it runs the rewritten network however it is called, or raises; it never runs
    as the plain residual network. A model under adapters of PEFT gains them as a part of every adapter
    (``modules_to_save``).

    Args:
        num_blocks: the largest number of blocks; a block has S = ceil(L / num_blocks) layers, and the last may be short. 8
            if neither this nor the next two are given.
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
        PartitionError, OptionError: an argument is not valid here.

    A failed conversion leaves the model exactly as it was.
    """
    inner = unwrap(model)
    host = host_of(inner)
    _refuse_converted(host)
    if mix_scale not in MIX_SCALES:
        raise OptionError(f"mix_scale is {mix_scale!r}", remedy="give 'paper' or 'sum'")
    if isinstance(inner, fx.GraphModule):
        convert_graph(inner, as_args(args), kwargs or {}, num_blocks=num_blocks, layers_per_block=layers_per_block,
                      boundaries=boundaries, streams=streams, mix_scale=mix_scale, eps=eps, key_gain=key_gain,
                      param_dtype=param_dtype)
        return model
    gm, _ = capture(inner, as_args(args), kwargs or {})
    if markers_of(gm.graph):
        raise AlreadyConvertedError("a part of this model is converted already",
                                    remedy="convert the whole model from a plain one, once")
    plans = plan_streams(find(gm), host, num_blocks=num_blocks, layers_per_block=layers_per_block, boundaries=boundaries,
                         streams=streams, mix_scale=mix_scale, eps=eps, key_gain=key_gain)
    dtype = param_dtype or parameter_dtype(host)
    attach(host, plans, dtype)
    try:
        with witnessed(host, plans):
            lowered, inputs = capture(inner, as_args(args), kwargs or {})
        marked = find_marked(lowered)
        record_starts(host, marked, witnesses_of(marked.gm.graph))
        try_by_value(host, inner, as_args(args), kwargs or {}, marked, inputs)
    except BaseException:
        detach(host)
        raise
    if host is not inner:
        train_with_adapters(inner)
    return model


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
    """Give ``model`` the parameters of ``plans`` and swap the classes of the owners; all or nothing."""
    owners: dict[str, nn.Module] = {}
    for plan in plans:
        owner = model.get_submodule(plan.owner)
        if isinstance(owner, fx.GraphModule):
            raise PlainPathError(
                f"'{plan.owner or 'the model'}' is a graph (fx.GraphModule), whose forward is generated again from it",
                remedy="convert the graph itself: attnres_fx.convert(graph_module, args, ...) rewrites it in place")
        if getattr(owner.__dict__.get("forward"), "__func__", None) is type(owner).forward:
            del owner.__dict__["forward"]  # the class's own, which hooks leave there when they are removed
        if "forward" in owner.__dict__:
            raise PlainPathError(
                f"the forward of '{plan.owner or type(owner).__name__}' is replaced on the instance, so that the rewritten "
                "one would never be called", remedy="convert the model before other tools wrap its forward")
        owners[plan.owner] = owner
    container = new_parameters(plans, dtype, {path: device_of(owner) for path, owner in owners.items()})
    container.train(model.training)
    model.add_module(CONTAINER, container)
    for path, owner in owners.items():
        owner.__dict__[STREAMS] = {plan.name: container.streams[plan.name].plan for plan in plans if plan.owner == path}
        if owner is not model:
            owner.__dict__[ROOT] = model._modules
        owner.__class__ = converted_class(type(owner), True, owner is model)
        for plan in plans:
            if plan.owner == path:
                for site, _ in plan.sites:
                    module = _submodule(owner, site)
                    if module is not None:
                        module.__dict__[SITE] = tuple(dict.fromkeys((*module.__dict__.get(SITE, ()), site)))
                    if module is not None and module is not owner:
                        module.__dict__[PART] = path or type(model).__name__
    if model not in owners.values():
        model.__class__ = converted_class(type(model), False, True)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`."""
    for module in list(model.modules()):
        module.__class__ = original_class(type(module))
        for name in (STREAMS, ROOT, PART, SITE, BY_VALUE, BY_GRAPH, ENTRY, RUNNER):
            module.__dict__.pop(name, None)
    del model._modules[CONTAINER]


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None
