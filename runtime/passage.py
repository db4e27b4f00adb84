"""The way of one stream through its layers in one call, which a run by value is held to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .errors import Place, SplitStreamError


class Passage:
    """One way of a stream through its layers: what a conversion fixed, and how far this call has come.

    ``boundaries`` are the positions at which blocks close, ``sites`` the path of the module in which each layer ends,
    ``additions`` the number of additions to the stream in each layer. Not a dataclass: tools that look into dataclasses for
    tensors have nothing to look for here.
    """

    def __init__(
        self, name: str, boundaries: Sequence[int], sites: Sequence[str], additions: Sequence[int], eps: float, summed: bool
    ) -> None:
        self.name, self.boundaries, self.sites, self.additions = name, tuple(boundaries), tuple(sites), tuple(additions)
        self.eps, self.summed = eps, summed
        self.trains = False  # whether gradients are to come through the stream
        self.inside = False  # whether all of the call is within a torch.autograd.Function
        self.reached = 0  # layers passed
        self.was_read = False
        self.over = False  # whether the call has returned: what comes later is recomputed for a backward

    @property
    def num_layers(self) -> int:
        """L of the paper."""
        return self.boundaries[-1]

    def check_complete(self) -> None:
        """Raise SplitStreamError unless every layer was passed."""
        if self.reached != self.num_layers:
            raise SplitStreamError(
                f"this call passed {self.reached} of the {self.num_layers} layers of stream '{self.name}'; the next one, in "
                f"'{self.sites[self.reached] or 'the owner itself'}', was not reached, or its addition did not see the "
                "stream", place=Place(module=self.sites[self.reached]),
                remedy="call the model as it was converted: no layer drop or early exit, and no hook that replaces the "
                "hidden states between layers by a tensor of its own")


def running_module() -> nn.Module | None:
    """The innermost module whose method is running."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Reading the variables of a frame copies them all: not those of our own.
        if code.co_argcount and code.co_varnames[0] == "self" and code.co_filename not in _OWN:
            this = frame.f_locals.get("self")
            if isinstance(this, nn.Module):
                return this
        frame = frame.f_back  # type: ignore[assignment]
    return None


_OWN = frozenset(str(Path(__file__).with_name(name)) for name in ("passage.py", "stream.py"))
