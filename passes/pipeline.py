"""The passes of the compiler, in the order in which they run, and what runs them.

A pass has one signature, ``run(graph, context) -> changes``: it changes the graph in place and returns how many places it
changed. It reads nothing but its graph and its context, and keeps nothing between calls. Its new nodes have values and a
module stack (:func:`attnres_fx.passes.graph.edit.insert_call`), and a second run changes nothing. A new pass is a function
and a line of the tables below.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from attnres_fx.passes._compat.graphs import OpOverload, schema_of, trace_structured
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import copy_graph_module, keep_unread, remove_dead
from attnres_fx.passes.lower.fuse import fuse_mixes
from attnres_fx.passes.lower.recomputation import forget_recomputation
from attnres_fx.passes.lower.reread import reread_norms
from attnres_fx.passes.lower.schedule import schedule_mixes
from attnres_fx.passes.lower.select import select_kernels
from attnres_fx.passes.lower.share import share_mixes
from attnres_fx.passes.memory.budget import TILES, first_that_fits, parse_budget
from attnres_fx.passes.memory.layout import plan_layout
from attnres_fx.passes.memory.lifetimes import lifetimes
from attnres_fx.passes.memory.place import place_rows
from attnres_fx.passes.memory.steps import steps_of_graph
from attnres_fx.passes.prepare.encoder_layer import expand_encoder_layers
from attnres_fx.passes.prepare.injections import add_injections
from attnres_fx.passes.prepare.inline import inline
from attnres_fx.passes.prepare.normalize import normalize
from attnres_fx.passes.prepare.unfuse import unfuse
from attnres_fx.passes.recognize.replace import recognize
from attnres_fx.passes.rewrite.rewrite import rewrite_streams
from attnres_fx.runtime.errors import LoweringError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One pass: its name, as in logs and ``options={"disable": [...]}``, and its function.

    ``needed``: later steps require it, so it cannot be left out.
    """

    name: str
    run: Callable[[fx.Graph, Context], int]
    needed: bool = False


@dataclass(frozen=True)
class Done:
    """A pass that has run: how long it took, and how many places it changed; None where it was left out."""

    name: str
    seconds: float
    changes: int | None


# A traced graph is brought into the form in which streams and hand-written mixes are found.
PREPARE = (
    Pass("prepare.inline", inline),
    Pass("prepare.encoder_layers", expand_encoder_layers),
    Pass("prepare.unfuse", unfuse),
    Pass("prepare.normalize", normalize),
    Pass("prepare.injections", add_injections),
)
# What a model spells out by hand becomes the operator.
RECOGNIZE = (Pass("recognize.mixes", recognize),)
# The streams of converted models become Attention Residuals.
REWRITE = (
    Pass("rewrite.streams", rewrite_streams, needed=True),
    Pass("rewrite.remove_dead", lambda graph, context: remove_dead(graph)),
)
# Mixes, wherever they come from, are brought into the form in which they run.
LOWER = (
    Pass("lower.recomputation", forget_recomputation),
    Pass("lower.share", share_mixes),
    Pass("lower.schedule", schedule_mixes),
    Pass("lower.fuse", fuse_mixes),
    Pass("lower.select", select_kernels),
)
# On the joint graph of AOTAutograd, before it is cut into forward and backward.
JOINT = (Pass("lower.reread", reread_norms),)
# On the graph of a call without a backward, or of the forward of a training step, when all other passes have run.
LAST = (Pass("memory.place", place_rows),)

ALL = (*PREPARE, *RECOGNIZE, *REWRITE, *LOWER, *JOINT, *LAST)


def run(passes: Sequence[Pass], gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """``gm`` after ``passes``: what :func:`run_on_copy` gives, or ``gm`` itself if none of them changed anything."""
    copy, done = run_on_copy(passes, gm, context)
    return copy if any(one.changes for one in done) else gm


def run_on_copy(passes: Sequence[Pass], gm: fx.GraphModule, context: Context) -> tuple[fx.GraphModule, tuple[Done, ...]]:
    """A copy of ``gm`` after ``passes``, lint-clean and with code of its own, and what each of them did.

    Dynamo's own graph must never be changed: it is used again after the backend returns.

    Raises: LoweringError if ``context.checks`` and a pass breaks its contract; whatever the passes raise.
    """
    copy = copy_graph_module(gm)
    keep_unread(copy.graph)
    done = run_in_place(passes, copy.graph, context)
    copy.graph.lint()
    copy.recompile()
    return copy, done


def run_in_place(passes: Sequence[Pass], graph: fx.Graph, context: Context) -> tuple[Done, ...]:
    """Run ``passes`` on ``graph`` itself, without code generation; returns what each of them did.

    With ``TORCH_LOGS=attnres_fx`` the list is logged; with ``TORCH_TRACE`` the graph is kept after each pass that changed
    something.
    """
    done = []
    for number, each in enumerate(passes, start=1):
        if each.name in context.disabled and not each.needed:
            done.append(Done(each.name, 0.0, None))
            continue
        before = frozenset(graph.nodes) if context.checks else frozenset()
        start = time.perf_counter()
        changes = each.run(graph, context)
        done.append(Done(each.name, time.perf_counter() - start, changes))
        if context.checks:
            _check(each, graph, context, before)
        if changes:
            _trace(graph, f"attnres_{number}_{each.name.replace('.', '_')}")
    if log.isEnabledFor(logging.INFO):
        for number, one in enumerate(done, start=1):
            log.info("%2d %-22s %8.3f ms  %s", number, one.name, one.seconds * 1e3,
                     "left out" if one.changes is None else f"{one.changes} changes")
    return tuple(done)


def lowered_within(gm: fx.GraphModule, context: Context, budget: str | int) -> fx.GraphModule:
    """``gm`` after the passes of ``LOWER``, whose rows stay within a memory budget, and which moves fewest bytes of those.

    The schedule that moves fewest bytes comes first; each next one serves fewer queries per phase 1, which needs fewer rows
    and may read blocks more often. The blocks are part of the model's definition and never change. ``budget``: text as
    "512MB" for a call of the traced sizes, or bytes for each of its tokens.

    Raises: MemoryBudgetError, with the smallest budget that would do, if no schedule fits; OptionError if the budget is not
    valid.
    """
    return first_that_fits(_candidates(gm, context, budget))


def _candidates(
    gm: fx.GraphModule, context: Context, budget: str | int
) -> Iterator[tuple[fx.GraphModule, int, int | None]]:
    """A graph for each query tile that makes a difference, the largest tile first, with the bytes it holds and may hold."""
    seen = set()
    for tile in TILES:
        candidate = run(LOWER, gm, replace(context, most_queries=tile))
        code = str(candidate.graph)
        if code not in seen:
            seen.add(code)
            steps, tokens = steps_of_graph(candidate)
            held = plan_layout(lifetimes(steps, context.training), tokens).arena
            yield candidate, held, parse_budget(budget, max(tokens.values(), default=1))


def _check(each: Pass, graph: fx.Graph, context: Context, before: frozenset[fx.Node]) -> None:
    """Check a pass that has just run against its contract; see the first lines of this file."""
    graph.lint()
    bare = [node.name for node in graph.nodes if node not in before and node.op.startswith("call_")
            and "val" not in node.meta and "example_value" not in node.meta and _returns(node)]
    if bare:
        raise LoweringError(f"the pass '{each.name}' made nodes without a value: {', '.join(bare[:4])}")
    again = each.run(graph, context)
    if again:
        raise LoweringError(f"a second run of the pass '{each.name}' changed the graph in {again} places")


def _returns(node: fx.Node) -> bool:
    """Whether a call may give anything: an operator that only changes its arguments has no value, traced or not."""
    return not isinstance(node.target, OpOverload) or bool(schema_of(node.target).returns)


def _trace(graph: fx.Graph, name: str) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"},
                     payload_fn=lambda: graph.python_code("self").src)
