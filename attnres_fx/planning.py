"""Make the plans of the streams to convert from what was found in a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from attnres_fx.passes.find.detect import hidden_layers
from attnres_fx.passes.find.obstacles import Obstacle, absence
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.findings import Findings
from attnres_fx.passes.graph.nodes import place_of, stack_paths
from attnres_fx.passes.rewrite.partition import partition
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.passes.rewrite.sites import common_path, identity_of, relative_sites, sites_of, tracer_path
from attnres_fx.runtime.errors import (
    HandWrittenMixError,
    HiddenLayersError,
    NoStreamError,
    OptionError,
)
from attnres_fx.runtime.parameters import CONTAINER, AttnRes


def weight_dtypes(model: nn.Module) -> set[torch.dtype]:
    """The floating-point dtypes of the model's own parameters."""
    return {parameter.dtype for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not name.startswith(f"{CONTAINER}.")}


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of new parameters: float64 for a model of float64 parameters, else float32."""
    return torch.float64 if weight_dtypes(model) == {torch.float64} else torch.float32


def plan_streams(
    found: Findings,
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
    """The plans of the streams to convert, from what was found in its graph; raises what :func:`convert` raises."""
    if found.mixes and not any(isinstance(stream.refusal(), HandWrittenMixError) for stream in found.streams):
        raise HandWrittenMixError(
            "the model spells attention residuals out already, and is not converted a second time",
            place=place_of(found.mixes[0].node), remedy="compile the model as it is")
    if not found.streams:
        refuse_hidden(found.gm.graph)
        raise NoStreamError(f"no residual stream was found in the model: {absence(found.gm.graph)}",
                            remedy="attention residuals need additions x + f(x) around the layers of a transformer")
    owners = [owner_of(stream, model) for stream in found.streams]
    named = named_streams(found.streams, owners)
    chosen = _choose(named, streams)
    plans: list[StreamPlan] = []
    for stream, (owner, spelled) in zip(named, owners):
        if stream.name not in chosen:
            continue
        closing = partition(stream.num_layers, num_blocks=num_blocks, layers_per_block=layers_per_block,
                            boundaries=_boundaries_of(stream, boundaries, len(chosen)))
        additions = found.additions(stream)
        plan = StreamPlan(
            name=stream.name, owner=owner, num_layers=stream.num_layers, width=stream.width, boundaries=closing,
            sites=_sites_below(stream, model, owner, spelled), eps=float(eps), mix_scale=mix_scale, key_gain=key_gain,
            additions=None if isinstance(additions, str) else additions,
            trial=additions if isinstance(additions, str) else None)
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
    keys = [identity_of(stack_paths(layer.node)[-1][0]) for layer in stream.layers]
    if not all(key in names for key in keys):
        return relative_sites(stream, spelled)
    return sites_of([names[key] for key in keys])


def refuse_hidden(graph: fx.Graph) -> None:
    """Refuse a graph all of whose layers are hidden in bodies that detection does not enter: it is not a plain network."""
    hidden = hidden_layers(graph)
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
    # For a model that spells attention residuals out, this is the error, whatever else its weighted sums look like.
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
        raise OptionError("boundaries are one list, but the model has several streams",
                          remedy="give a dictionary from stream name to its boundaries")
    return boundaries


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
            if str(id(module)) == identity_of(key):
                return name, spelled
    return spelled, spelled


def named_streams(streams: Sequence[Stream], owners: Sequence[tuple[str, str]]) -> tuple[Stream, ...]:
    """The streams with names: "stream" where there is one, else the last named component of their owner's path."""
    if len(streams) == 1:
        return (replace(streams[0], name="stream"),)
    taken: dict[str, int] = {}
    named = []
    for stream, (path, _) in zip(streams, owners):
        parts = [part for part in path.split(".") if part and not part.isdigit()]
        base = parts[-1] if parts and parts[-1].isidentifier() else "stream"
        if hasattr(AttnRes, base):
            base = f"{base}_stream"
        taken[base] = taken.get(base, 0) + 1
        named.append(replace(stream, name=base if taken[base] == 1 else f"{base}_{taken[base]}"))
    return tuple(named)
