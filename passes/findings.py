"""Findings: what a graph contains, found once and handed on to planning, rewriting, verification and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from attnres_fx.passes.find.additions import additions_of, overwritten
from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.find.streams import Stream, moved
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import copy_with_nodes, remove_dead
from attnres_fx.passes.pipeline import PREPARE, RECOGNIZE, run_on_copy
from attnres_fx.passes.recognize.replace import Recognized, recognized
from attnres_fx.passes.rewrite.match import Assignment, markers_of, match
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.passes.rewrite.rewrite import rewrite


@dataclass(frozen=True)
class Findings:
    """A prepared graph in which the mixes that were spelled out are nodes, its residual streams, and those mixes.

    ``gm`` is only read: to change it, take a copy. ``overwritten`` are the places where an addition in place
    changes what is read later.
    """

    gm: fx.GraphModule
    streams: tuple[Stream, ...]
    mixes: tuple[Recognized, ...]
    overwritten: frozenset[str] = frozenset()

    def additions(self, stream: Stream) -> tuple[int, ...] | str:
        """For each layer of ``stream`` the additions to it, or why the stream cannot be run by value."""
        return additions_of(stream, self.overwritten)


def find(gm: fx.GraphModule, context: Context | None = None) -> Findings:
    """What is found in ``gm``, the graph of a plain model. ``gm`` stays unchanged."""
    prepared, _ = run_on_copy((*PREPARE, *RECOGNIZE), gm, context or Context())
    return Findings(prepared, detect(prepared.graph), tuple(recognized(prepared.graph)), overwritten(gm.graph))


@dataclass(frozen=True)
class Marked:
    """A prepared graph of a converted model, its markers still in place, and the stream that each of them marks.

    ``gm`` is only read; :meth:`plain` and :meth:`rewritten` are made from copies of it.
    """

    gm: fx.GraphModule
    assignments: tuple[Assignment, ...]

    def plain(self) -> Marked:
        """The plain residual network: the same without its markers, and the streams in it."""
        gm, assignments = self._copy()
        for marker in markers_of(gm.graph):
            gm.graph.erase_node(marker)
        gm.recompile()
        return Marked(gm, assignments)

    def rewritten(self, plan: Callable[[StreamPlan], StreamPlan] = lambda plan: plan) -> fx.GraphModule:
        """The network of Attention Residuals, with ``plan(p)`` in place of each stream's plan p."""
        gm, assignments = self._copy()
        rewrite(gm.graph, [replace(assignment, plan=plan(assignment.plan)) for assignment in assignments])
        remove_dead(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return gm

    def _copy(self) -> tuple[fx.GraphModule, tuple[Assignment, ...]]:
        gm, copies = copy_with_nodes(self.gm)
        return gm, tuple(
            replace(assignment, stream=moved(assignment.stream, copies), query=copies[assignment.query],
                    key_gain=None if assignment.key_gain is None else copies[assignment.key_gain])
            for assignment in self.assignments)


def find_marked(gm: fx.GraphModule, context: Context | None = None) -> Marked:
    """What is found in ``gm``, the graph of a converted model with its markers. ``gm`` stays unchanged.

    Raises: what :func:`attnres_fx.passes.rewrite.match.match` raises.
    """
    prepared, _ = run_on_copy(PREPARE, gm, context or Context())
    return Marked(prepared, match(prepared.graph))
