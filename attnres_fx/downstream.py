"""Downstream: the passes over mixes, and the compiler that gets the graph after them."""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

import attnres_fx.passes
import attnres_fx.runtime
from attnres_fx.options import Options
from attnres_fx.passes._compat.graphs import OpOverload, generate_code, trace_structured
from attnres_fx.passes._compat.inductor import GraphPasses, captures_graphs, run_aot_eager, run_inductor
from attnres_fx.passes.pipeline import JOINT, LAST, LOWER, Pass, lowered_within, run, run_in_place
from attnres_fx.runtime.arena import ArenaPool


def compile_downstream(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, before: Sequence[Pass] = ()
) -> Callable[..., Any]:
    """Run ``before`` and the passes over mixes on ``gm``, and hand the result to the compiler that the options name."""
    training = torch.is_grad_enabled() and any(_requires_grad(value) for value in inputs)
    context = options.context(training)
    if before or any(_is_ours(node) for node in gm.graph.nodes):
        if options.memory_budget is None:
            gm = run((*before, *LOWER), gm, context)
        else:
            gm = lowered_within(run(before, gm, context), context, options.memory_budget)
        trace_rewritten(gm)
    ours = any(_is_ours(node) for node in gm.graph.nodes)
    joint = functools.partial(run_in_place, JOINT, context=context)
    match options.downstream:
        case "eager":
            return generate_code(gm).forward
        case "aot_eager":
            return run_aot_eager(gm, inputs, joint if ours else None)
        case _ if not ours:
            return run_inductor(gm, inputs, dict(options.inductor))
    # A checked pass has to run, and not its result be taken from a cache.
    identity = f"{source_hash()} {options.arena} {sorted(options.disable)} {'checked' if context.checks else ''}"
    if options.arena == "never":
        return run_inductor(gm, inputs, dict(options.inductor), GraphPasses(identity, joint))
    last = functools.partial(run_in_place, LAST)
    passes = GraphPasses(
        identity, joint, lambda graph: last(graph, replace(context, training=False)),
        lambda graph, returned: last(graph, replace(context, training=True, returned=returned)))
    compiled = run_inductor(gm, inputs, dict(options.inductor), passes)
    return compiled if training or _captures(options) else _lending(compiled, inputs)


def trace_rewritten(gm: fx.GraphModule) -> None:
    """Keep the graph as it goes downstream, with ``TORCH_TRACE``."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "attnres_rewritten_graph", "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )


def _lending(compiled: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """Lend arenas from a pool of this model's own to every call; it is emptied when the model is gone, which Dynamo's cache
    outlives.
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
    """Whether Inductor replays captured graphs of GPU work, which do not know what holds an arena."""
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
