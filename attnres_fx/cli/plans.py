"""What the command line plans for an opened source: the plans recorded in it, or those that a conversion would fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from attnres_fx.analysis import report_of
from attnres_fx.cli.opened import Source
from attnres_fx.conversion import attach
from attnres_fx.converted import plans_of
from attnres_fx.errors import NoStreamError, OptionError
from attnres_fx.formats.program import mark_program
from attnres_fx.passes.findings import Findings, find
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.rewrite.partition import sources_at
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.planning import parameter_dtype, plan_streams
from attnres_fx.reports.streams import Report


@dataclass(frozen=True)
class Planned:
    """What was found in a source, the report on it, and the plans that it has or that a conversion would give it."""

    found: Findings
    report: Report
    plans: tuple[StreamPlan, ...]


def plan_source(
    opened: Source, num_blocks: int | None, layers_per_block: int | None, streams: list[str] | None, mix_scale: str
) -> Planned:
    """What is found in the source, and its plans; none where no stream can be converted and none was asked for.

    Raises: NoStreamError without streams and mixes; OptionError for options of blocks that are fixed; as ``plan_streams``.
    """
    found = find(traced(opened))
    report = report_of(found, opened.model)
    if opened.converted:
        refuse_plan_options(num_blocks, layers_per_block, streams)
        return Planned(found, report, tuple(opened.program.plans if opened.program is not None else plans_of(opened.model)))
    if not report.streams and not report.mixes:
        raise NoStreamError(f"no residual stream was found in the model: {report.seen}",
                            remedy="attention residuals need additions x + f(x) around the layers of a transformer")
    chosen = streams if streams is not None else [stream.name for stream in report.streams if stream.convertible]
    if not chosen and streams is None:
        return Planned(found, report, ())
    plans = plan_streams(found, opened.model, num_blocks=num_blocks, layers_per_block=layers_per_block, streams=chosen,
                         mix_scale=mix_scale)
    return Planned(found, report, tuple(plans))


def traced(opened: Source) -> fx.GraphModule:
    """The graph of the source as it is."""
    if opened.program is not None:
        return opened.program.module
    return capture(opened.model, opened.args, opened.kwargs)[0]


def marked(opened: Source, plans: Sequence[StreamPlan]) -> fx.GraphModule:
    """The graph of the source with markers, converted in memory if it is not.

    Raises: NoStreamError without plans; OptionError for a converted program.
    """
    refuse_without(plans, "no rewritten graph to show", "leave out --graph and --dot to see the reasons")
    if opened.program is not None:
        if opened.converted:
            raise OptionError("a converted .pt2 has only the rewritten graph, and nothing to compare it with",
                              remedy="inspect the plain program with --graph")
        return mark_program(opened.program, list(plans))
    if not opened.converted:
        attach(opened.model, list(plans), parameter_dtype(opened.model))
    return capture(opened.model, opened.args, opened.kwargs)[0]


def refuse_plan_options(*given: Any) -> None:
    """Raises: OptionError if any option of blocks or streams is given, for a source whose blocks are fixed."""
    if any(value is not None for value in given):
        raise OptionError("the source is converted already, and its blocks are fixed",
                          remedy="leave out --num-blocks, --layers-per-block and --streams")


def refuse_without(plans: Sequence[StreamPlan], what: str, remedy: str) -> None:
    """Raises: NoStreamError without plans; ``what`` names what is missing."""
    if not plans:
        raise NoStreamError(f"no stream of the source can be converted, so there is {what}", remedy=remedy)


def summary(plans: Sequence[StreamPlan]) -> str:
    """One line on all plans."""
    return "; ".join(
        f"stream '{plan.name}': {plan.num_layers} layers of width {plan.width} in {plan.num_blocks} blocks, "
        f"{plan.num_layers} mixes ({plan.mix_scale})" for plan in plans)


def plan_json(plan: StreamPlan) -> dict[str, Any]:
    """A plan as in JSON, with the sources of each mix."""
    mixes = []
    for position in range(1, plan.num_layers + 1):
        found = sources_at(plan.boundaries, position)
        mixes.append({"position": position, "blocks": found.blocks + 1, "partial": found.partial})
    return {**asdict(plan), "mixes": mixes}
