"""Verification of ``torch.export`` programs: both oracles, for plain and for rewritten ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from attnres_fx.exported import (
    Program,
    mark_program,
    need_inputs,
    plan_program,
    rewrite_program,
    weight_dtypes,
)
from attnres_fx.passes._compat import codegen_of, pytree, schema_of
from attnres_fx.passes.finish import finish
from attnres_fx.passes.graph import copy_graph_module, insert_call
from attnres_fx.passes.lower import assign, markers_of, prepare
from attnres_fx.passes.oracle import OracleInterpreter, mix_by_definition
from attnres_fx.passes.partition import sources_at
from attnres_fx.passes.plan import StreamPlan
from attnres_fx.passes.vocabulary import argument, is_mix
from attnres_fx.runtime.errors import CheckpointFileError
from attnres_fx.runtime.mix import MIX
from attnres_fx.verification import Verification, deviation

# As in attnres_fx.verification: what rounding explains, by the dtype of the model.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def verify_program(program: Program, *, seed: int = 0, **options: Any) -> Verification:
    """Both oracles of :func:`attnres_fx.verify` for a program; a plain one is converted in memory with ``options``.

    A program that is rewritten already no longer holds the plain network. Its mixes are replaced by the sums of their
    sources to give it back, recomputed one by one by definition, and held to the plan in the file.
    """
    need_inputs(program)
    generator = torch.Generator().manual_seed(seed)
    if program.plans:
        check_mixes(program.module, program.plans)
        rewritten, plain, plans = program.module, _unmixed(program.module), list(program.plans)
    else:
        plans = plan_program(program, **options)
        marked = mark_program(program, plans)
        rewritten, plain = rewrite_program(marked), program.module
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
        sums = _as_sums(rewritten)
        zero_sum = deviation(run(sums, sums, at_zero), expected)
    preserving, notes = program.preserving, ["the program is rewritten already: its mixes are held to the plan in the file"]
    if program.plans:
        interpreter: fx.Interpreter = _ByDefinition(rewritten)
        owner = rewritten
    else:
        marked = prepare(marked)
        assignments = assign(marked)
        preserving, notes = all(a.stream.function_preserving for a in assignments), []
        parameters = [(a.stream, a.plan, at_random[f"attnres.{a.plan.name}.query"],
                       at_random.get(f"attnres.{a.plan.name}.key_gain")) for a in assignments]
        for marker in markers_of(marked):
            marked.graph.erase_node(marker)
        interpreter, owner = OracleInterpreter(finish(marked), parameters), marked
    random = deviation(run(rewritten, rewritten, at_random), run(_interpreted(interpreter), owner, at_random))
    tolerance = max(_TOLERANCE.get(dtype, 1e-4) for dtype in weight_dtypes(program.module) or {torch.float32})
    return Verification.of(zero, zero_sum, random, tolerance, preserving or not paper, notes)


def _as_sums(gm: fx.GraphModule) -> fx.GraphModule:
    """The rewritten network with every mix multiplied by its number of sources, as under ``mix_scale="sum"``."""
    gm = copy_graph_module(gm)
    for node in gm.graph.nodes:
        if is_mix(node):
            *others, _ = _mix_arguments(node, node.args)
            node.args, node.kwargs = (*others, float(len(others[0]))), {}
    return finish(gm)


def check_mixes(gm: fx.GraphModule, plans: Sequence[StreamPlan]) -> None:
    """Hold the mixes of a rewritten program to its plans: row, number of sources, eps and output factor of each.

    Raises: CheckpointFileError if the program is not what its plans say.
    """
    by_query = {f"attnres.{plan.name}.query": plan for plan in plans}
    seen: list[tuple[str, int]] = []
    for node in gm.graph.nodes:
        if not is_mix(node):
            continue
        sources, _, _, eps, *_, factor = _mix_arguments(node, node.args)
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


def row_of(mix: fx.Node) -> tuple[str, int]:
    """(path of the stacked query, row) that a mix of a rewritten program reads; an empty path if it reads none."""
    row: Any = argument(mix, 1, "query")
    rows: Any = row.args[0] if isinstance(row, fx.Node) and row.target is operator.getitem else None
    stacked = rows.args[0] if isinstance(rows, fx.Node) else None
    return (str(stacked.target), int(row.args[1])) if isinstance(stacked, fx.Node) else ("", 0)


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
        sources, query, gain, eps, *_, factor = _mix_arguments(n, self.fetch_args_kwargs_from_env(n)[0])
        each = tuple(range(1, len(sources)))
        return (mix_by_definition(list(sources), each, query, gain, eps) * factor).to(sources[0].dtype)


def _mix_arguments(node: fx.Node, given: Sequence[Any]) -> tuple[Any, ...]:
    """The seven arguments of a mix; a serialized graph leaves out those that have their default value."""
    schema = schema_of(MIX).arguments
    values = [*given, *(argument.default_value for argument in schema[len(given):])]
    for index, described in enumerate(schema):
        if described.name in node.kwargs:
            values[index] = node.kwargs[described.name]
    return tuple(values)


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
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if name.endswith(".query"):
            zero[name], random[name] = torch.zeros_like(parameter), noise * (2.0 / parameter.shape[-1] ** 0.5)
        else:
            zero[name], random[name] = torch.ones_like(parameter), 1 + 0.3 * noise
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
