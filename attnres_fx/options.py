"""The options of ``torch.compile(model, backend="attnres", options={...})``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.lower.fuse import FUSIONS
from attnres_fx.passes.lower.schedule import SCHEDULES
from attnres_fx.passes.lower.select import KERNELS
from attnres_fx.passes.memory.budget import parse_budget
from attnres_fx.passes.pipeline import ALL
from attnres_fx.passes.rewrite.plan import MIX_SCALES
from attnres_fx.runtime.errors import OptionError

DOWNSTREAMS = ("inductor", "aot_eager", "eager")
ARENAS = ("auto", "never")


@dataclass(frozen=True)
class Options:
    """The options of the backend.

    num_blocks, layers_per_block, mix_scale, eps: as in :func:`attnres_fx.convert`, for the one-line form, which converts a
        plain model while it is compiled. In a converted model they are fixed; other values are an error.
    downstream: what compiles the rewritten graph: "inductor", or for debugging "aot_eager" or "eager".
    inductor: configuration patches handed on to Inductor.
    schedule: how mixes read their sources: "auto", in two phases where that moves fewer bytes (the debugging downstreams
        read in one pass); "one-pass", always; "two-phase", wherever consecutive mixes have sources in common.
    fuse: whether a mix is fused with the norm that is its only reader and with the addition before it: "auto", under
        Inductor; "always", also under the debugging downstreams; "never".
    arena: whether Inductor's code lets the rows of attention residuals share planned memory: "auto", where possible;
        "never".
    memory_budget: bytes that the planned rows of attention residuals may take in a call of the compiled sizes, as text
        ("512MB", "1.5GiB") or as a number of bytes per token. Counted are blocks, partial sums, the results of phase 1 and
        mixes; in training, those that are kept, and their gradients. A budget limits how many queries one phase 1 serves; it
        never changes the blocks. If no schedule fits, a MemoryBudgetError states the smallest budget that would.
    kernels: what computes the mixes: "auto", the table of :func:`attnres_fx.kernels`; "native", an error where the native
        kernels are not available; "reference", plain torch operations; "triton", which runs on GPUs, and on the CPU only in
        Triton's interpreter.
    disable: names of passes that are left out, to find the one at fault; attnres_fx.passes.pipeline lists them.
    check_passes: check every pass against its contract after it ran, to find a fault: the graph is sound, new nodes have
        values, and a second run changes nothing.
    """

    num_blocks: int | None = None
    layers_per_block: int | None = None
    mix_scale: str | None = None
    eps: float | None = None
    downstream: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "auto"
    fuse: str = "auto"
    kernels: str = "auto"
    arena: str = "auto"
    memory_budget: str | int | None = None
    disable: Sequence[str] = ()
    check_passes: bool = False

    @staticmethod
    def from_arguments(mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """Options from what ``torch.compile`` passes. Raises OptionError, with the nearest name for an unknown key."""
        given = dict(options or {})
        known = [entry.name for entry in fields(Options)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise OptionError(f"unknown option '{key}'", remedy=f"{hint}known options are: {', '.join(known)}")
        result = Options(**given)
        result._check()
        if mode is not None and mode != "default":
            from attnres_fx.passes._compat.inductor import mode_options

            result = Options(**{**given, "inductor": {**mode_options(mode), **result.inductor}})
        return result

    def _check(self) -> None:
        if self.downstream not in DOWNSTREAMS:
            raise OptionError(f"downstream is {self.downstream!r}", remedy=f"give one of {', '.join(DOWNSTREAMS)}")
        for name, known in (("kernels", KERNELS), ("schedule", SCHEDULES), ("fuse", FUSIONS),
                            ("arena", ARENAS)):
            given = getattr(self, name)
            if given not in known:
                near = difflib.get_close_matches(str(given), known, n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise OptionError(f"{name} is {given!r}", remedy=f"{hint}give one of {', '.join(known)}")
        if self.memory_budget is not None:
            parse_budget(self.memory_budget, tokens=1)
        if self.mix_scale is not None and self.mix_scale not in MIX_SCALES:
            raise OptionError(f"mix_scale is {self.mix_scale!r}", remedy="give 'paper' or 'sum'")
        names = [each.name for each in ALL if not each.needed]
        for given in [self.disable] if isinstance(self.disable, str) else self.disable:
            if given not in names or isinstance(self.disable, str):
                raise OptionError(f"disable is {self.disable!r}", remedy=f"give a list of names from {', '.join(names)}")
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor is {self.inductor!r}", remedy="give a dictionary of Inductor's options")
        for name in ("num_blocks", "layers_per_block"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} is {value!r}", remedy="give a whole number of 1 or more")
        if self.eps is not None and not (isinstance(self.eps, (int, float)) and self.eps > 0):
            raise OptionError(f"eps is {self.eps!r}", remedy="give a small positive number")

    def context(self, training: bool) -> Context:
        """The context of the passes. Where "auto" may choose, the debugging downstreams run what is nearest to the
        rewrite.
        """
        plain = self.downstream != "inductor"
        own = Context(training=training, kernels=self.kernels, disabled=frozenset(self.disable),
                      schedule="one-pass" if self.schedule == "auto" and plain else self.schedule,
                      fuse=self.fuse == "always" or (self.fuse == "auto" and not plain))
        return replace(own, checks=True) if self.check_passes else own

    def conversion(self) -> dict[str, Any]:
        """The keyword arguments of :func:`attnres_fx.convert` that were given."""
        names = ("num_blocks", "layers_per_block", "mix_scale", "eps")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
