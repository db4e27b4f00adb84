"""Fit: schedule the mixes of a graph so that the rows of attention residuals stay within a memory budget.

The schedule that moves fewest bytes comes first; each next one serves fewer queries by a phase 1, which holds fewer rows and
may read blocks more often. Blocks and layers a block are the model's meaning and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from attnres_fx.passes.budget import TILES, parse_budget, too_small
from attnres_fx.passes.layout import plan_layout
from attnres_fx.passes.lifetimes import lifetimes
from attnres_fx.passes.schedule import schedule_mixes
from attnres_fx.passes.steps import steps_of_graph


def schedule_within(
    gm: fx.GraphModule, wished: str, training: bool, budget: str | int, fuse: Callable[[fx.GraphModule], fx.GraphModule]
) -> fx.GraphModule:
    """The graph, scheduled as by :func:`schedule_mixes` and handed through ``fuse``, that fits and moves fewest bytes.

    ``budget``: text as "512MB" for a call of the traced sizes, or bytes for each of its tokens.

    Raises: MemoryBudgetError, with the least that would do, if no schedule fits; OptionError if the budget is none.
    """
    least = None
    allowed = 0
    for candidate in _candidates(gm, wished, training, fuse):
        steps, tokens = steps_of_graph(candidate)
        allowed = parse_budget(budget, max(tokens.values(), default=1))
        held = plan_layout(lifetimes(steps, training), tokens).arena
        if held <= allowed:
            return candidate
        least = held if least is None else min(least, held)
    assert least is not None
    raise too_small(allowed, least)


def _candidates(
    gm: fx.GraphModule, wished: str, training: bool, fuse: Callable[[fx.GraphModule], fx.GraphModule]
) -> Iterator[fx.GraphModule]:
    """A graph for each query tile that makes a difference, the largest tile first."""
    seen = set()
    for most in TILES:
        scheduled = schedule_mixes(gm, wished, training, most)
        code = str(scheduled.graph)
        if code not in seen:
            seen.add(code)
            yield fuse(scheduled)
