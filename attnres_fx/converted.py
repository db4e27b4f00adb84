"""What a converted model carries: marks on its modules, generated classes in place of the user's, its plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from attnres_fx.passes._compat.dynamo import (
    unwrap,
)
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.runtime.errors import (
    NotConvertedError,
)
from attnres_fx.runtime.parameters import AttnRes, StreamParameters, streams_of

STREAMS = "_attnres_streams"  # on an owner: the plans of its streams, by name; their parameters are at the root only
# On an owner that is not the root: the dictionary of the root's children. The root itself would lend its parts other names
# in a traced graph.
ROOT = "_attnres_root_modules"
PART = "_attnres_part_of"  # on a module that holds layers: the path of its stream's owner
GRAPH_PLANS = "attnres_plans"  # in the meta of a rewritten graph module, whose copies keep no class of ours: its plans


def is_converted_class(cls: type) -> bool:
    """Whether ``cls`` was generated here."""
    return "_attnres_base" in cls.__dict__


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The user's class behind a generated one; any other class itself."""
    return cls.__dict__.get("_attnres_base", cls)


def plans_of(model: nn.Module) -> list[StreamPlan]:
    """The plans of a converted model, in graph order. Raises NotConvertedError."""
    inner = unwrap(model)
    streams = streams_of(inner)
    if isinstance(inner, fx.GraphModule) and GRAPH_PLANS in inner.meta:
        return [StreamPlan.from_json(text) for text in inner.meta[GRAPH_PLANS]]
    if streams is None:
        raise NotConvertedError("this model is not converted", remedy="call attnres_fx.convert(model, args, ...) first")
    return [StreamPlan.from_json(parameters.plan) for parameters in streams.values()]


def new_parameters(plans: Sequence[StreamPlan], dtype: torch.dtype, devices: Mapping[str, torch.device]) -> AttnRes:
    """The parameters of the streams in ``plans``: zero queries and unit gains, on the device of each stream's owner."""
    return AttnRes({
        plan.name: StreamParameters(plan.num_layers, plan.width, plan.to_json(), key_gain=plan.key_gain, dtype=dtype,
                                    device=devices[plan.owner]) for plan in plans})


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters, the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
