"""What a graph is compiled for, in the form that every pass receives."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

# If set to 1, every pass is checked after it ran, as in tests or when looking for a fault.
CHECKS_VARIABLE = "ATTNRES_CHECK_PASSES"


def _checks() -> bool:
    return os.environ.get(CHECKS_VARIABLE, "0") not in ("", "0")


@dataclass(frozen=True)
class Context:
    """The facts that decide what passes do; a pass reads only these and its graph.

    ``training``: the graph is differentiated. ``schedule``: "auto", by bytes moved; "one-pass"; "two-phase", wherever mixes
    have sources in common. ``most_queries``: how many queries one phase 1 may serve; None is the schedule's own limit.
    ``fuse``: mixes are fused with the norms that read them. ``kernels``: "auto", "native", "reference" or "triton".
    ``returned``: of the forward graph of a training step, how many of its outputs come before those that are kept for the
    backward; None for a call without a backward. ``disabled``: names of passes that are left out. ``checks``: every pass is
    checked after it ran (see :func:`attnres_fx.passes.pipeline.run`).
    """

    training: bool = False
    schedule: str = "auto"
    most_queries: int | None = None
    fuse: bool = True
    kernels: str = "auto"
    returned: int | None = None
    disabled: frozenset[str] = frozenset()
    checks: bool = field(default_factory=_checks)
