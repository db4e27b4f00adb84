"""The modules that own the parameters of a converted model: one :class:`StreamParameters` per stream.

They are at the root of the model as ``model.attnres``, and only there: whatever is there when the model runs is read, even a
copy that another tool has put in their place for training.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnres_fx.runtime.errors import ReplacedParametersError

CONTAINER = "attnres"  # the name of the parameters at the root


class StreamParameters(nn.Module):
    """The pseudo-queries and key gains of one stream.

    ``query`` [L+1, d] starts at zero (uniform weights, section 5 of the paper), ``key_gain`` [L+1, d] at one, or is None.
    Row p belongs to position p; row 0 is never read, since position 0 has one source. ``plan`` is the plan of the stream
    as JSON, which travels with the parameters into every traced graph.
    """

    def __init__(
        self, num_layers: int, width: int, plan: str, *, key_gain: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_layers + 1, width, dtype=dtype, device=device))
        gain = nn.Parameter(torch.empty(num_layers + 1, width, dtype=dtype, device=device)) if key_gain else None
        self.register_parameter("key_gain", gain)
        self.plan = plan
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set queries to zero and gains to one: tools call this on every module that was built without memory."""
        with torch.no_grad():
            self.query.zero_()
            gain = self._parameters["key_gain"]
            if gain is not None:
                gain.fill_(1)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query and key gain. A call, so that hooks that bring the weights run; copies, since they may take them away."""
        gain: Any = self.key_gain
        return self.query.clone(), None if gain is None else gain.clone()

    def extra_repr(self) -> str:
        positions, width = self.query.shape
        return f"{positions - 1} layers, width {width}{'' if self.key_gain is not None else ', no key gain'}"


class AttnRes(nn.Module):
    """What a converted model holds as ``model.attnres``: a :class:`StreamParameters` for each stream, by name."""

    def __init__(self, streams: Mapping[str, StreamParameters]) -> None:
        super().__init__()
        for name, parameters in streams.items():
            self.add_module(name, parameters)
        self._warned = False

    def reset_parameters(self) -> None:
        """:meth:`StreamParameters.reset_parameters` of every stream."""
        for parameters in self.streams.values():
            parameters.reset_parameters()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As for every module, with a warning if PEFT collects what to save of an adapter, and would leave trained queries
        out. What it trains under ``modules_to_save`` is a copy of this module, which it does save.
        """
        prefix = str(kwargs.get("prefix", ""))
        apart = any(part in prefix for part in ("modules_to_save.", "original_module."))
        if not apart and not self._warned and any(p.requires_grad for p in self.parameters()) and _saves_an_adapter():
            self._warned = True
            warnings.warn("PEFT saves this adapter without the queries of model.attnres, which are being trained: give the "
                          "adapter's configuration modules_to_save=['attnres'], or freeze them, or save them yourself",
                          stacklevel=2)
        return super().state_dict(*args, **kwargs)

    def forward(self, value: Any) -> Any:
        """Of the name of a stream, its query and key gain.

        Anything else is returned: a model that calls its children in turn, as ``nn.Sequential`` does, passes through it.
        """
        return self.streams[value]() if isinstance(value, str) else value

    @property
    def streams(self) -> dict[str, StreamParameters]:
        """The parameters by stream name, in graph order."""
        return {name: child for name, child in self.named_children() if isinstance(child, StreamParameters)}


def stream_parameters(root: Mapping[str, Any], name: str, plan: str) -> StreamParameters:
    """What is at the root now for the stream ``name``, held to its ``plan`` (JSON); ``root`` are the root's children.

    Raises: ReplacedParametersError if nothing is there, or the parameters of another plan.
    """
    parameters = getattr(root.get(CONTAINER), name, None)
    if parameters is None:
        raise ReplacedParametersError(
            f"the converted model no longer has parameters for its stream '{name}': there is nothing at attnres.{name}",
            remedy="leave model.attnres where convert put it, or put a module of its kind in its place")
    if getattr(parameters, "plan", None) != plan:
        raise ReplacedParametersError(
            f"what is at attnres.{name} belongs to another conversion: its plan is not the one of this model",
            remedy="put in their place the parameters of a model that was converted in the same way")
    found: StreamParameters = parameters
    return found


def streams_of(model: Any) -> dict[str, StreamParameters] | None:
    """The parameters at ``model``, by stream name; None if it is not a converted model."""
    streams = getattr(getattr(model, CONTAINER, None), "streams", None)
    ours = isinstance(streams, dict) and all(isinstance(each, StreamParameters) for each in streams.values())
    return streams if ours else None


def _saves_an_adapter() -> bool:
    """Whether the caller is PEFT collecting what to save of an adapter; not of a copy that it trains."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("peft."):
            return frame.f_code.co_name == "get_peft_model_state_dict"
        frame = frame.f_back
    return False
