"""Models that are graphs already: ``fx.GraphModule`` of ``torch.fx.symbolic_trace``, ``torch.export`` or ``make_fx``.

Such a model is its graph, so converting it rewrites the graph itself, in place: whatever runs, copies, recompiles or traces
the module afterwards finds the mixes. No class is swapped and no marker is left.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from attnres_fx.converted import GRAPH_PLANS
from attnres_fx.formats.program import Program, mark_program, plan_program, rewrite_program
from attnres_fx.passes._compat.graphs import codegen_of, propagate_fake, pytree
from attnres_fx.passes.findings import find_marked
from attnres_fx.passes.graph.edit import copy_graph_module
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.record import Record, note
from attnres_fx.passes.graph.vocabulary import is_mix
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.passes.rewrite.positions import row_of
from attnres_fx.runtime.errors import TracingError
from attnres_fx.runtime.parameters import AttnRes


def program_of(
    gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], plans: Sequence[StreamPlan] = ()
) -> Program:
    """A copy of ``gm`` whose nodes carry traced values, with its inputs, as the passes for programs take it.

    Raises: TracingError if the graph fails on these inputs.
    """
    copy = copy_graph_module(gm)
    if type(codegen_of(copy.graph)) is not fx.graph.CodeGen and all(
            value_of(node) is not None for node in copy.graph.nodes if node.op == "placeholder"):
        # From torch.export: it comes with traced values, and its inputs are flattened by its own rules.
        return Program(copy, tuple(args), dict(kwargs), tuple(plans))
    for node in copy.graph.nodes:
        for key in ("val", "example_value"):
            node.meta.pop(key, None)
    try:
        bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TracingError(f"the inputs do not fit the graph: {error}",
                           remedy="give the arguments that the traced module takes") from error
    bound.apply_defaults()
    try:
        propagate_fake(copy, bound.args)
    except Exception as error:  # an operation of the model may raise anything
        raise TracingError(f"the graph fails on these inputs: {type(error).__name__}: {str(error).splitlines()[0]}",
                           remedy="check that the module runs on them: shapes, dtypes and devices") from error
    return Program(copy, bound.args, {}, tuple(plans))


def convert_graph(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], *,
                  param_dtype: torch.dtype | None = None, **options: Any) -> None:
    """Rewrite the graph of ``gm`` in place; the work of :func:`attnres_fx.convert` where the model is a graph."""
    program = program_of(gm, args, kwargs)
    marked = mark_program(program, plan_program(program, **options), param_dtype)
    rewritten = rewrite_program(find_marked(marked), marked)
    container = marked.get_submodule("attnres")
    assert isinstance(container, AttnRes)
    container.train(gm.training)
    gm.add_module("attnres", container)
    gm.meta[GRAPH_PLANS] = [parameters.plan for parameters in container.streams.values()]
    gm.graph = rewritten.graph


def recorded(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a rewritten graph in which every mix records its stream and position, and the values of its inputs.

    They are read off the rows that the mixes take: what a pass noted on a node is lost when the graph is traced again.
    """
    program = program_of(gm, args, kwargs)
    for node in program.module.graph.nodes:
        if is_mix(node):
            query, position = row_of(node)
            note(node, Record("mix", query.removeprefix("attnres.").removesuffix(".query"), position))
    return program.module, pytree.tree_leaves((program.args, program.kwargs))
