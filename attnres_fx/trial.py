"""Try a freshly converted model by value: it must give what its rewritten graph gives, or it stays with the graph."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_fx.by_value import can_run, record
from attnres_fx.converted import STREAMS, plans_of
from attnres_fx.passes._compat.distributed import in_parallel
from attnres_fx.passes._compat.graphs import pytree
from attnres_fx.passes.findings import Marked
from attnres_fx.planning import weight_dtypes
from attnres_fx.runtime._compat import times_written
from attnres_fx.runtime.errors import AttnResError
from attnres_fx.runtime.parameters import AttnRes
from attnres_fx.runtime.stream import BY_VALUE, Stream
from attnres_fx.verification.verdict import deviation, tolerance_for, trial_values

log = logging.getLogger(__name__)
_SEED = 0


def try_by_value(
    host: nn.Module, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], marked: Marked, inputs: Sequence[Any]
) -> None:
    """Note in the plans of the converted ``host`` whether it runs by value on ``model(*args, **kwargs)``.

    With random queries and gains, in which a layer at another place shows, and with gradients where they are enabled,
    since functions of autograd are handed tensors only; ``marked`` is its graph on ``inputs``. The plans stay as they are
    if the trial says nothing: if the call cannot be copied, or if the model is in training and the numbers differ, which
    may be its random layers.

    Raises: what the rewriting of ``marked`` raises.
    """
    rewritten = marked.rewritten()
    owners = [module for module in model.modules() if STREAMS in module.__dict__]
    if not all(can_run(owner) for owner in owners):
        return
    with _as_before(model):
        _fill_randomly(model)
        for owner in owners:
            owner.__dict__[BY_VALUE] = True
        found = _tried(model, args, kwargs, rewritten, inputs)
    if found is not None:
        for plan in plans_of(host):
            record(host, replace(plan, trial=found))


def _tried(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rewritten: fx.GraphModule, inputs: Sequence[Any]
) -> str | None:
    """What the plans are to say of the trial."""
    try:
        given, values = _copied((tuple(args), dict(kwargs))), _copied(list(inputs))
        with torch.no_grad():
            expected = _with_seed(model, lambda: rewritten(*values))
    except Exception as error:
        _warn(f"its graph cannot be run on copies of the inputs: {_line(error)}")
        return None
    try:
        # Parameters that no wrapper of several processes knows yet are refused where they would be trained.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not in_parallel()):
            outputs = _with_seed(model, lambda: model(*given[0], **given[1]))
    except AttnResError as error:
        return str(error).splitlines()[0]
    except Exception as error:
        if Stream.__name__ in str(error):
            return _line(error)
        _warn(_line(error))
        return None
    difference = _difference(outputs, [*pytree.tree_leaves(expected), *values])
    if difference <= tolerance_for(weight_dtypes(model)):
        return ""
    differs = f"its outputs differ from those of its graph by {difference:.1e}"
    if not model.training:
        return differs
    _warn(f"{differs}, in training")
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _warn(why: str) -> None:
    """Of a trial that tells nothing: called eagerly the model tries its graph first, and by value where that breaks."""
    log.warning("whether the model runs by value could not be tried: %s. Called eagerly it runs as one graph, where one can "
                "be had", why)


def _difference(outputs: Any, candidates: Sequence[Any]) -> float:
    """The largest deviation of a tensor in ``outputs`` from the nearest of its shape among ``candidates``."""
    largest = 0.0
    for ours in pytree.tree_leaves(outputs):
        if isinstance(ours, Tensor) and ours.is_floating_point() and not ours.is_meta:
            theirs = [candidate.detach() for candidate in candidates if isinstance(candidate, Tensor)
                      and candidate.shape == ours.shape and candidate.is_floating_point()]
            largest = max(largest, min((deviation(ours.detach(), each) for each in theirs), default=0.0))
    return largest


@torch.no_grad()
def _fill_randomly(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(_SEED)
    for module in model.modules():
        if isinstance(module, AttnRes):
            for name, parameter in module.named_parameters():
                _, random = trial_values(name.rsplit(".", 1)[-1], parameter, generator)
                parameter.copy_(random)


def _copied(value: Any) -> Any:
    """``value`` with copies of its tensors and of all else that a call may change; modules and parameters as they are."""
    return pytree.tree_map(
        lambda leaf: leaf if isinstance(leaf, (nn.Module, nn.Parameter)) else leaf.detach().clone()
        if isinstance(leaf, Tensor) else copy.deepcopy(leaf), value)


def _with_seed(model: nn.Module, call: Callable[[], Any]) -> Any:
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(index for index in devices if index is not None)):
        torch.manual_seed(_SEED)
        return call()


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Put classes, attributes, buffers and the parameters of the streams back afterwards."""
    modules = [(module, type(module), _contents(module.__dict__)) for module in model.modules()]
    held = (*model.buffers(), *(p for module in model.modules() if isinstance(module, AttnRes) for p in module.parameters()))
    tensors = [tensor for tensor in held if not tensor.is_inference()]  # into which nothing else may write
    values = [(tensor.detach().clone(), times_written(tensor)) for tensor in tensors]
    try:
        yield
    finally:
        for module, cls, contents in modules:
            module.__class__ = cls
            for holder, kept in contents:
                _put_back(holder, kept)
        with torch.no_grad():
            for tensor, (value, version) in zip(tensors, values):
                if times_written(tensor) != version:
                    tensor.copy_(value)


def _contents(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    """``attributes`` and the lists, dictionaries and sets among them, each with a shallow copy."""
    holders = [attributes, *(value for value in attributes.values() if type(value) in (dict, OrderedDict, list, set))]
    return [(holder, copy.copy(holder)) for holder in holders]


def _put_back(holder: Any, kept: Any) -> None:
    if isinstance(holder, list):
        holder[:] = kept
    elif isinstance(holder, set):
        holder.clear()
        holder.update(kept)
    else:
        for name in [name for name in holder if name not in kept]:
            del holder[name]
        for name, value in kept.items():
            if name not in holder or holder[name] is not value:
                holder[name] = value
