"""The ``torch.compile`` backend "attnres": rewrite what is converted, convert what is plain, hand the rest on.

Registered by the entry point group ``torch_dynamo_backends`` alone, so that ``torch.compile(model, backend="attnres")``
works without an import.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import attnres_fx.passes
import attnres_fx.runtime
from attnres_fx.one_line import convert_while_compiling, refuse_given_up
from attnres_fx.options import Options
from attnres_fx.passes._compat import (
    GraphPasses,
    OpOverload,
    captures_graphs,
    run_aot_eager,
    run_inductor,
    trace_structured,
)
from attnres_fx.passes._dynamo import watch_given_up_frames
from attnres_fx.passes.arena import place_rows_for_backward, place_rows_of_call
from attnres_fx.passes.fit import schedule_within
from attnres_fx.passes.fuse import fuse_mixes
from attnres_fx.passes.inline import holds_checkpoint, without_recomputation
from attnres_fx.passes.lower import lower_marked, markers_of, prepare
from attnres_fx.passes.partition import partition
from attnres_fx.passes.plan import StreamPlan
from attnres_fx.passes.recognize import Recognized, recognize
from attnres_fx.passes.reread import reread_norms
from attnres_fx.passes.schedule import schedule_mixes
from attnres_fx.passes.select import select_kernels
from attnres_fx.passes.transforms import refusal_of_transform
from attnres_fx.reduction import hold_to_reduction, stream_inputs
from attnres_fx.runtime.arena import ArenaPool
from attnres_fx.runtime.errors import AttnResError, OptionError

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
    fused, and nothing is converted. A graph with residual streams and neither belongs to a plain model, which is converted
    while it is being compiled (the one-line form). Any other graph goes to Inductor as it is.

    Raises: AttnResError of the kind that names the cause; Dynamo wraps it in its BackendCompilerFailed.
    """
    chosen = Options.from_arguments(mode, options)
    if markers_of(gm):
        try:
            return _compile_marked(gm, example_inputs, chosen)
        except Exception as error:
            refusal = None if isinstance(error, AttnResError) else refusal_of_transform(gm.graph)
            if refusal is None:
                raise
            raise refusal from error
    working = prepare(gm)
    mixes = recognize(working)
    if mixes:
        _record_mixes(working, mixes)
        return compile_downstream(working, example_inputs, chosen)
    convert_while_compiling(gm, working, chosen)
    return compile_downstream(gm, example_inputs, chosen)


def _compile_marked(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    rewritten, plans = lower_marked(gm)
    for plan in plans:
        _check_fixed(plan, options)
    _record(rewritten, plans)
    return hold_to_reduction(compile_downstream(rewritten, inputs, options), stream_inputs(gm))


def compile_downstream(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Hand a graph, with the schedule and the kernels that the options name, to the compiler that they name."""
    wished = "one-pass" if options.schedule == "auto" and options.downstream != "inductor" else options.schedule
    training = torch.is_grad_enabled() and any(_requires_grad(value) for value in inputs)
    if not training and holds_checkpoint(gm):
        gm = without_recomputation(gm)
    fuses = options.fuse == "always" or (options.fuse == "auto" and options.downstream == "inductor")
    if options.memory_budget is not None and any(_is_ours(node) for node in gm.graph.nodes):
        gm = schedule_within(gm, wished, training, options.memory_budget, fuse_mixes if fuses else lambda given: given)
    else:
        gm = schedule_mixes(gm, wished, training)
        gm = fuse_mixes(gm) if fuses else gm
    gm = select_kernels(gm, options.kernels)
    ours = any(_is_ours(node) for node in gm.graph.nodes)
    match options.downstream:
        case "eager":
            return gm.forward
        case "aot_eager":
            return run_aot_eager(gm, inputs, reread_norms if ours else None)
        case _ if not ours:
            return run_inductor(gm, inputs, dict(options.inductor))
        case _ if options.arena == "never":
            return run_inductor(gm, inputs, dict(options.inductor), GraphPasses(source_hash(), reread_norms))
    passes = GraphPasses(f"{source_hash()} arena", reread_norms, place_rows_of_call, place_rows_for_backward)
    compiled = run_inductor(gm, inputs, dict(options.inductor), passes)
    return compiled if training or _captures(options) else _lending(compiled, inputs)


def _lending(compiled: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """Lend arenas from a pool of its own to every call; it is emptied when the model is gone, which Dynamo's cache outlives.
    """
    pool = ArenaPool()
    parameter = next((value for value in inputs if isinstance(value, torch.nn.Parameter)), None)
    if parameter is not None:
        weakref.finalize(parameter, _clear, weakref.ref(pool))

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        with pool.lending():
            return compiled(*args)

    return call


def _clear(pool: weakref.ref[ArenaPool]) -> None:
    found = pool()
    if found is not None:
        found.clear()


def _captures(options: Options) -> bool:
    """Whether Inductor replays graphs of a GPU's work, which know nothing of who holds an arena."""
    return bool(options.inductor.get("triton.cudagraphs", captures_graphs()))


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "attnres"


@functools.cache
def source_hash() -> str:
    """A hash of this package's own files: torch's caches see neither what its passes do nor what its operators compute."""
    digest = hashlib.sha256()
    for package in (attnres_fx, attnres_fx.passes, attnres_fx.runtime):
        for file in sorted(Path(package.__path__[0]).rglob("*")):
            if file.suffix in (".py", ".h", ".cpp"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _check_fixed(plan: StreamPlan, options: Options) -> None:
    """N and S are the model's meaning: options may repeat them and never change them."""
    given = options.conversion()
    blocks = {key: given[key] for key in ("num_blocks", "layers_per_block") if key in given}
    wrong: list[str] = [key for key in ("eps", "mix_scale") if key in given and given[key] != getattr(plan, key)]
    if blocks and partition(plan.num_layers, **blocks) != plan.boundaries:
        wrong.extend(blocks)
    if wrong:
        raise OptionError(
            f"the model was converted with other values of {', '.join(wrong)} (stream '{plan.name}': blocks close at "
            f"{list(plan.boundaries)}, mix_scale '{plan.mix_scale}', eps {plan.eps})",
            remedy="leave these options out, or convert a plain model anew")


def _record(gm: fx.GraphModule, plans: Sequence[StreamPlan]) -> None:
    """Tell torch's own logs what was done (``TORCH_LOGS="attnres_fx"``, ``TORCH_TRACE``)."""
    for plan in plans:
        log.info("rewrote stream '%s': %d layers in %d blocks, mix_scale %s", plan.name, plan.num_layers,
                 plan.num_blocks, plan.mix_scale)
    _trace(gm)


def _record_mixes(gm: fx.GraphModule, mixes: Sequence[Recognized]) -> None:
    log.info("recognised %d hand-written mixes of up to %d sources", len(mixes), max(mix.num_sources for mix in mixes))
    _trace(gm)


def _trace(gm: fx.GraphModule) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "attnres_rewritten_graph", "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )


# A frame that Dynamo gives up is handed to nobody, and a model may consist of such frames alone.
watch_given_up_frames(attnres, refuse_given_up)
