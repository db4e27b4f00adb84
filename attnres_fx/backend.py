"""The ``torch.compile`` backend "attnres": rewrite what is converted, convert what is plain, hand the rest on.

Registered by the entry point group ``torch_dynamo_backends`` alone, so that ``torch.compile(model, backend="attnres")``
works without an import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from attnres_fx.by_value import can_run, is_running, switch
from attnres_fx.converted import STREAMS
from attnres_fx.downstream import compile_downstream
from attnres_fx.one_line import convert_while_compiling, refuse_given_up
from attnres_fx.options import Options
from attnres_fx.passes._compat.dynamo import compiling_frame, graph_break_reason, restart_tracing, watch_given_up_frames
from attnres_fx.passes.findings import find
from attnres_fx.passes.pipeline import PREPARE, REWRITE
from attnres_fx.passes.rewrite.match import markers_of, plans_of_markers
from attnres_fx.passes.rewrite.partition import partition
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.passes.rewrite.transforms import refusal_of_transform
from attnres_fx.reduction import hold_to_reduction, stream_inputs
from attnres_fx.runtime.errors import AttnResError, GraphBreakError, OptionError, SplitStreamError

log = logging.getLogger(__name__)


def attnres(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph of Dynamo.

    A graph of a converted model is rewritten. In a graph that spells attention residuals out, the mixes are recognised and
    fused, and nothing is converted. A graph that has residual streams and neither of these belongs to a plain model, which
    is converted while it is being compiled (the one-line form). Any other graph goes to Inductor as it is.

    Raises: AttnResError of the kind that names the cause; Dynamo wraps it in its BackendCompilerFailed.
    """
    chosen = Options.from_arguments(mode, options)
    if markers_of(gm.graph):
        try:
            return _compile_marked(gm, example_inputs, chosen)
        except Exception as error:
            if isinstance(error, (GraphBreakError, SplitStreamError)):
                _run_by_value(gm, error)
            refusal = None if isinstance(error, AttnResError) else refusal_of_transform(gm.graph)
            if refusal is None:
                raise
            raise refusal from error
    if is_running():  # a piece of a converted model, whose streams pass through it as values
        return compile_downstream(gm, example_inputs, chosen)
    found = find(gm, chosen.context(training=False))
    if found.mixes:
        log.info("recognised %d hand-written mixes of up to %d sources", len(found.mixes),
                 max(mix.num_sources for mix in found.mixes))
        return compile_downstream(found.gm, example_inputs, chosen)
    convert_while_compiling(gm, found, chosen)
    return compile_downstream(gm, example_inputs, chosen)


def _compile_marked(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    for plan in plans_of_markers(gm.graph):
        _check_fixed(plan, options)
        log.info("rewriting stream '%s': %d layers in %d blocks, mix_scale %s", plan.name, plan.num_layers, plan.num_blocks,
                 plan.mix_scale)
    return hold_to_reduction(compile_downstream(gm, inputs, options, (*PREPARE, *REWRITE)), stream_inputs(gm))


def _run_by_value(gm: fx.GraphModule, error: AttnResError) -> None:
    """Where a break cuts the streams that ``gm`` marks, have their owners run by value, and trace the frame again."""
    frame = compiling_frame()
    if graph_break_reason(gm) is None or frame is None:
        return
    plans = {str(marker.args[2]) for marker in markers_of(gm.graph)}
    owners = [part for module in frame.modules for part in module.modules()
              if plans & set(part.__dict__.get(STREAMS, {}).values())]
    if owners and all(can_run(owner) for owner in owners):
        for owner in owners:
            switch(owner, error)
        restart_tracing("attnres_fx runs the model by value")


def _check_fixed(plan: StreamPlan, options: Options) -> None:
    """N and S are part of the model's definition: options may repeat them but never change them."""
    given = options.conversion()
    blocks = {key: given[key] for key in ("num_blocks", "layers_per_block") if key in given}
    wrong: list[str] = [key for key in ("eps", "mix_scale") if key in given and given[key] != getattr(plan, key)]
    if blocks and partition(plan.num_layers, **blocks) != plan.boundaries:
        wrong.extend(blocks)
    if wrong:
        raise OptionError(
            f"the model was converted with other values of {', '.join(wrong)} (stream '{plan.name}': blocks close at "
            f"{list(plan.boundaries)}, mix_scale '{plan.mix_scale}', eps {plan.eps})",
            remedy="leave these options out, or convert a plain model again")


# Dynamo hands a frame that it gives up to no backend, and a model may consist only of such frames.
watch_given_up_frames(attnres, refuse_given_up)
