"""Reduction: whether the wrapper that adds up gradients over processes knows the parameters of a converted model.

DistributedDataParallel and FSDP reduce the gradients of the parameters that they found when they were put around a model.
A parameter that they ignore, or that was added later, keeps in every process the gradient of that process's own samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnres_fx.passes._compat.distributed import calling_modules, in_parallel, reduces, wrapper_name
from attnres_fx.passes.rewrite.match import markers_of
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.runtime.errors import UnreducedGradientsError


def stream_inputs(gm: fx.GraphModule) -> dict[int, str]:
    """The inputs of a graph with markers that are parameters of attention residuals: their indices, and descriptions."""
    numbers = {node: number for number, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    found = {}
    for marker in markers_of(gm.graph):
        for node, kind in zip(marker.args, ("query", "key_gain")):
            if node in numbers:
                plan = StreamPlan.from_json(str(marker.args[2]))
                found[numbers[node]] = f"{kind} of stream '{plan.name}'"
    return found


def hold_to_reduction(compiled: Callable[..., Any], parameters: Mapping[int, str]) -> Callable[..., Any]:
    """``compiled``, every call of which raises UnreducedGradientsError if a wrapper around it, on the stack of the caller,
    adds up gradients over processes and would leave out one of the inputs that ``parameters`` numbers.
    """
    if not torch.is_grad_enabled() or not torch.distributed.is_available():
        return compiled

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        if in_parallel():
            refuse_unreduced({name: args[number] for number, name in parameters.items()})
        return compiled(*args)

    return call


def refuse_unreduced(parameters: Mapping[str, Tensor]) -> None:
    """Raise UnreducedGradientsError for the first of the trained ``parameters`` that every wrapper in sight leaves out."""
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    wrappers = calling_modules() if trained else []
    for name, parameter in trained.items():
        known = [(wrapper, reduces(wrapper, parameter)) for wrapper in wrappers]
        leaving = [wrapper_name(wrapper) for wrapper, reduced in known if reduced is False]
        if leaving and not any(reduced for _, reduced in known):
            raise UnreducedGradientsError(
                f"the gradient of the {name} would not be added up over the processes: {leaving[0]} around the model "
                "does not know this parameter, because it was set to ignore it or was put around the model before its "
                "conversion",
                remedy="convert the model before it is wrapped, wrap the whole of it, and let no parameter of model.attnres "
                       "be ignored; or freeze them: model.attnres.requires_grad_(False)")
