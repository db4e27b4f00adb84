"""Verification of ``torch.export`` programs: both oracles, for plain and for rewritten ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from attnres_fx.formats.program import (
    Program,
    mark_program,
    need_inputs,
    plan_program,
    rewrite_program,
)
from attnres_fx.passes._compat.graphs import codegen_of, pytree
from attnres_fx.passes.findings import Marked, find_marked
from attnres_fx.passes.graph.edit import copy_graph_module, finish, insert_call
from attnres_fx.passes.graph.vocabulary import argument, is_mix
from attnres_fx.passes.rewrite.oracle import OracleInterpreter, mix_by_definition
from attnres_fx.passes.rewrite.partition import sources_at
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.passes.rewrite.positions import row_of
from attnres_fx.planning import weight_dtypes
from attnres_fx.runtime.errors import CheckpointFileError
from attnres_fx.verification.verdict import (
    Verification,
    as_sums,
    deviation,
    mix_arguments,
    parameters_of,
    tolerance_for,
    trial_values,
)


def verify_program(program: Program, *, seed: int = 0, **options: Any) -> Verification:
    """Both oracles of :func:`attnres_fx.verify` for a program; a plain one is converted in memory with ``options``.

    A program that is already rewritten no longer contains the plain network. It is recovered by replacing the mixes with the
    sums of their sources; the mixes are recomputed one by one by definition, and checked against the plan in the file.
    """
    need_inputs(program)
    generator = torch.Generator().manual_seed(seed)
    found: Marked | None = None
    if program.plans:
        check_mixes(program.module, program.plans)
        rewritten, plain, plans = program.module, _unmixed(program.module), list(program.plans)
    else:
        plans = plan_program(program, **options)
        marked = mark_program(program, plans)
        found = find_marked(marked)
        rewritten, plain = rewrite_program(found, marked), program.module
    at_zero, at_random = _values(rewritten, generator)

    def run(call: Callable[..., Any], module: nn.Module, values: Mapping[str, torch.Tensor]) -> Any:
        inputs = pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v,
                                 (program.args, program.kwargs))
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _swapped(module, values):
            torch.manual_seed(seed)
            return call(*inputs[0], **inputs[1])

    expected = run(plain, plain, {})
    zero = zero_sum = deviation(run(rewritten, rewritten, at_zero), expected)
    paper = any(plan.mix_scale == "paper" for plan in plans)
    if paper:
        sums = as_sums(rewritten)
        zero_sum = deviation(run(sums, sums, at_zero), expected)
    preserving, notes = program.preserving, ["the program is rewritten already; its mixes are checked against its plan"]
    if found is None:
        interpreter: fx.Interpreter = _ByDefinition(rewritten)
        owner = rewritten
    else:
        unmarked = found.plain()
        preserving, notes = all(a.stream.function_preserving for a in unmarked.assignments), []
        interpreter = OracleInterpreter(
            unmarked.gm, parameters_of(unmarked, lambda node: at_random[str(node.target)]))
        owner = unmarked.gm
    random = deviation(run(rewritten, rewritten, at_random), run(_interpreted(interpreter), owner, at_random))
    tolerance = tolerance_for(weight_dtypes(program.module))
    return Verification.of(zero, zero_sum, random, tolerance, preserving or not paper, notes)


def check_mixes(gm: fx.GraphModule, plans: Sequence[StreamPlan]) -> None:
    """Check the mixes of a rewritten program against its plans: row, number of sources, eps and output factor of each.

    Raises: CheckpointFileError if the program does not match its plans.
    """
    by_query = {f"attnres.{plan.name}.query": plan for plan in plans}
    seen: list[tuple[str, int]] = []
    for node in gm.graph.nodes:
        if not is_mix(node):
            continue
        sources, _, _, eps, *_, factor = mix_arguments(node, node.args)
        query, position = row_of(node)
        plan = by_query.get(query)
        if plan is None:
            raise CheckpointFileError(f"the mix '{node.name}' in the program reads no row of a recorded query")
        expected = (len(sources_at(plan.boundaries, position)), plan.eps, plan.output_factor(position))
        if (len(sources), eps, factor) != expected:
            raise CheckpointFileError(
                f"the mix '{node.name}' in the program has {len(sources)} sources, eps {eps} and factor {factor}; at "
                f"position {position} of stream '{plan.name}' the plan has {expected[0]}, {expected[1]} and {expected[2]}")
        seen.append((plan.name, position))
    wanted = [(plan.name, position) for plan in plans for position in range(1, plan.num_layers + 1)]
    if sorted(seen) != sorted(wanted):
        raise CheckpointFileError(f"the program has mixes at {len(set(seen))} of the {len(wanted)} positions of its plan")


def _interpreted(interpreter: fx.Interpreter) -> Callable[..., Any]:
    codegen: Any = codegen_of(interpreter.graph)

    def call(*args: Any, **kwargs: Any) -> Any:
        flat = pytree.tree_leaves((args, kwargs))
        return codegen.process_outputs(interpreter.run(*flat, enable_io_processing=False))

    return call


class _ByDefinition(fx.Interpreter):
    """Runs a rewritten graph with each mix computed by definition, from elementary operations."""

    def run_node(self, n: fx.Node) -> Any:
        if not is_mix(n):
            return super().run_node(n)
        sources, query, gain, eps, *_, factor = mix_arguments(n, self.fetch_args_kwargs_from_env(n)[0])
        each = tuple(range(1, len(sources)))
        return (mix_by_definition(list(sources), each, query, gain, eps) * factor).to(sources[0].dtype)


def _unmixed(gm: fx.GraphModule) -> fx.GraphModule:
    """The plain residual network of a rewritten one: every mix is the sum of its sources."""
    plain = copy_graph_module(gm)
    for node in list(plain.graph.nodes):
        if not is_mix(node):
            continue
        sources = argument(node, 0, "sources")
        with plain.graph.inserting_before(node):
            total = sources[0]
            for source in sources[1:]:
                total = insert_call(plain.graph, operator.add, (total, source), like=node)
        node.replace_all_uses_with(total)
        plain.graph.erase_node(node)
    return finish(plain)


def _values(gm: fx.GraphModule, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(zero queries and unit gains, random ones) for the parameters at ``attnres``."""
    zero, random = {}, {}
    for name, parameter in gm.named_parameters():
        if not name.startswith("attnres."):
            continue
        zero[name], random[name] = trial_values(name.rpartition(".")[2], parameter, generator)
    return zero, random


@contextmanager
def _swapped(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Other values for some parameters of ``module``, for a while."""
    kept = []
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        table = module.get_submodule(path)._parameters
        kept.append((table, leaf, table[leaf]))
        table[leaf] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        for table, leaf, parameter in kept:
            table[leaf] = parameter
