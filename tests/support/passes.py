"""Single passes, and parts of the pipeline, as tests run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import finish
from attnres_fx.passes.pipeline import PREPARE, Pass, run, run_on_copy
from attnres_fx.passes.recognize import replace
from attnres_fx.passes.recognize.replace import Recognized, recognized
from attnres_fx.passes.rewrite import rewrite as rewriting
from attnres_fx.passes.rewrite.match import Assignment

Run = Callable[[fx.Graph, Context], int]


def applied(single: Run, gm: fx.GraphModule, **context: Any) -> fx.GraphModule:
    """A copy of ``gm`` after one pass; ``gm`` itself if it changed nothing."""
    return run((Pass(single.__name__, single),), gm, Context(**context))


def in_place(single: Run, gm: fx.GraphModule, **context: Any) -> fx.GraphModule:
    """``gm`` after one pass on it, with new code."""
    single(gm.graph, Context(**context))
    return finish(gm)


def prepared(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` in which streams and mixes are found."""
    return run_on_copy(PREPARE, gm, Context())[0]


def recognize(gm: fx.GraphModule, inputs: Any = None) -> list[Recognized]:
    """The mixes that the pass finds in ``gm``, which they are put into."""
    known = {mix.node for mix in recognized(gm.graph)}
    in_place(replace.recognize, gm)
    return [mix for mix in recognized(gm.graph) if mix.node not in known]


def rewrite(gm: fx.GraphModule, assignments: Sequence[Assignment]) -> fx.GraphModule:
    """``gm`` after the rewrite of the assigned streams, with new code."""
    rewriting.rewrite(gm.graph, assignments)
    return finish(gm)
