"""The modules that own the parameters of a converted model: one :class:`StreamParameters` a stream."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


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
        self.query = nn.Parameter(torch.zeros(num_layers + 1, width, dtype=dtype, device=device))
        gain = nn.Parameter(torch.ones(num_layers + 1, width, dtype=dtype, device=device)) if key_gain else None
        self.register_parameter("key_gain", gain)
        self.plan = plan

    def extra_repr(self) -> str:
        positions, width = self.query.shape
        return f"{positions - 1} layers, width {width}{'' if self.key_gain is not None else ', no key gain'}"


class AttnRes(nn.Module):
    """What a converted model holds as ``model.attnres``: a :class:`StreamParameters` for each stream, by name."""

    def __init__(self, streams: Mapping[str, StreamParameters]) -> None:
        super().__init__()
        for name, parameters in streams.items():
            self.add_module(name, parameters)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The value itself: a model that calls its children in turn, as ``nn.Sequential`` does, passes through this one."""
        return value

    @property
    def streams(self) -> dict[str, StreamParameters]:
        """The parameters by stream name, in graph order."""
        return {name: child for name, child in self.named_children() if isinstance(child, StreamParameters)}
