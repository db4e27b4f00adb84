"""Programs of ``torch.export`` (``.pt2``): load, rewrite, export again, verify.

A program is a graph already, so that nothing is traced. The parameters go into the graph by the marker, as in a traced
model, and the passes are the same. Opening a ``.pt2`` may run what is pickled in it: open only files that you trust.
"""

from __future__ import annotations

import inspect
import json
import logging
import operator
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from attnres_fx.conversion import plan_streams
from attnres_fx.files import PLAN_FILE, first_line, json_text, whole_file
from attnres_fx.passes._compat import fake_mode_of
from attnres_fx.passes.graph import copy_graph_module, finish, insert_call, value_of
from attnres_fx.passes.lower import assign, lower_marked, markers_of
from attnres_fx.passes.normalize import normalize_graph
from attnres_fx.passes.oracle import OracleInterpreter, mix_by_definition
from attnres_fx.passes.plan import StreamPlan
from attnres_fx.passes.rewrite import Assignment
from attnres_fx.passes.vocabulary import argument, is_mix
from attnres_fx.persistence import aliases_of, check_description, description_of, same_memory, tie
from attnres_fx.runtime.errors import AlreadyConvertedError, CheckpointFileError, LoweringError, OptionError
from attnres_fx.runtime.marker import ENTER
from attnres_fx.runtime.mix import MIX
from attnres_fx.runtime.parameters import AttnRes, StreamParameters
from attnres_fx.verification import Verification, deviation

_EXPORTED_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Program:
    """An opened ``.pt2``: its module (tied parameters tied), its example inputs; if converted, also its plans.

    ``preserving`` tells whether a converted program's plain network had scale-invariant readers alone.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plans: tuple[StreamPlan, ...] = ()
    preserving: bool = True


def load_program(path: Path) -> tuple[ExportedProgram, dict[str, Any], tuple[StreamPlan, ...]]:
    """The program in ``path``, and if it is converted its ``attnres.json`` and plans. Raises CheckpointFileError."""
    if not path.is_file():
        raise CheckpointFileError(f"there is no file '{path}'")
    if not zipfile.is_zipfile(path):
        raise CheckpointFileError(f"'{path}' is no .pt2 archive of torch.export (not a zip file)",
                                  remedy="it is truncated or of another format; write it with torch.export.save")
    extra = {PLAN_FILE: ""}
    try:
        with _quiet():
            program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # torch.export raises whatever its parts raise on a damaged archive
        raise CheckpointFileError(f"'{path}' cannot be read as a program of torch.export: {first_line(error)}",
                                  remedy="write it with torch.export.save of this version of torch") from error
    if not extra[PLAN_FILE]:
        return program, {}, ()
    try:
        content = json.loads(extra[PLAN_FILE])
    except ValueError as error:
        raise CheckpointFileError(f"the {PLAN_FILE} in '{path}' is not readable JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointFileError(f"the {PLAN_FILE} in '{path}' holds no JSON object")
    description, plans = check_description(content, f"{path}:{PLAN_FILE}")
    return program, description, tuple(plans)


def open_program(path: Path) -> Program:
    """The program in ``path``, ready to be inspected, rewritten and verified."""
    program, description, plans = load_program(path)
    args, kwargs = program.example_inputs or ((), {})
    with _quiet():
        module = program.module(check_guards=False)
    retie(module)
    return Program(module, tuple(args), dict(kwargs), plans, bool(description.get("function_preserving", True)))


def load_module(path: Path, device: torch.device | str | None = None) -> nn.Module:
    """The callable module of the program in ``path``, converted or not, tied parameters tied again."""
    program, *_ = load_program(path)
    if device is not None:
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, torch.device(device))
    with _quiet():
        module = program.module()
    retie(module)
    return module


def retie(module: nn.Module) -> None:
    """Make parameters over the same memory the same object: export and its files keep the memory and lose the identity."""
    named = {name: p for name, p in module.named_parameters(remove_duplicate=False) if same_memory(p) is not None}
    tie(module, aliases_of(named))


def plan_program(program: Program, **options: Any) -> list[StreamPlan]:
    """The plans that a conversion of ``program`` with ``options`` of :func:`attnres_fx.convert` would fix."""
    if program.plans or any(is_mix(node) for node in program.module.graph.nodes):
        raise AlreadyConvertedError("this program is converted already", remedy="transform the program of the plain model")
    copy = copy_graph_module(program.module)
    return plan_streams(copy, copy, **options)


def mark_program(program: Program, plans: Sequence[StreamPlan], param_dtype: torch.dtype | None = None) -> fx.GraphModule:
    """A copy of the program's graph with new parameters at ``attnres`` and a marker for each plan."""
    gm = copy_graph_module(program.module)
    dtype = param_dtype or (torch.float64 if _dtypes(gm) == {torch.float64} else torch.float32)
    device = next((p.device for p in gm.parameters()), torch.device("cpu"))
    container = AttnRes({
        plan.name: StreamParameters(plan.num_layers, plan.width, plan.to_json(), key_gain=plan.key_gain, dtype=dtype,
                                    device=device) for plan in plans})
    gm.add_module("attnres", container)
    mode = fake_mode_of(value_of(node) for node in gm.graph.nodes)
    first = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for plan in plans:
        parameters = container.streams[plan.name]
        nodes = []
        with gm.graph.inserting_before(first):
            for name in ("query", "key_gain"):
                tensor = getattr(parameters, name)
                if tensor is None:
                    nodes.append(None)
                    continue
                node = gm.graph.get_attr(f"attnres.{plan.name}.{name}")
                node.meta["val"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
                nodes.append(node)
            marker = gm.graph.call_function(ENTER, (nodes[0], nodes[1], plan.to_json()))
            marker.meta["val"] = nodes[0].meta["val"].new_empty(()) if nodes[0] is not None else None
    return finish(gm)


def rewrite_program(marked: fx.GraphModule) -> fx.GraphModule:
    """The rewritten module of a marked one; it shares all parameters, also those that no node reads."""
    rewritten, _ = lower_marked(marked)
    _adopt(rewritten, marked)
    return rewritten


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the parameters and buffers of ``old`` that copying the graph left behind."""
    have = {name for name, _ in [*new.named_parameters(remove_duplicate=False), *new.named_buffers(remove_duplicate=False)]}
    for table, named in (("_parameters", old.named_parameters), ("_buffers", old.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            if name in have:
                continue
            path, _, leaf = name.rpartition(".")
            owner = new
            for part in path.split(".") if path else ():
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            getattr(owner, table)[leaf] = tensor


def transform(program: Program, out: Path, *, overwrite: bool = False, **options: Any) -> list[StreamPlan]:
    """Rewrite ``program`` and write it to ``out``, whole or not at all; returns the plans.

    Dynamic dimensions stay dynamic. Raises what :func:`attnres_fx.convert` raises, and LoweringError if the rewritten
    program cannot be exported.
    """
    if out.suffix != ".pt2":
        raise OptionError(f"'{out}' does not end in .pt2, and the source is a .pt2 program", remedy="name the output x.pt2")
    _need_inputs(program)
    param_dtype = options.pop("param_dtype", None)
    plans = plan_program(program, **options)
    marked = mark_program(program, plans, param_dtype)
    rewritten = rewrite_program(marked)
    preserving = all(assignment.stream.function_preserving for assignment in _assignments(marked))
    specs = dynamic_shapes(program.module, program.args, program.kwargs)
    try:
        with _quiet():
            exported = torch.export.export(rewritten, program.args, program.kwargs, dynamic_shapes=specs, strict=False)
    except Exception as error:  # whatever torch.export raises, it means that no file is written
        raise LoweringError(f"the rewritten program cannot be exported: {first_line(error)}",
                            remedy="convert the model itself and export it afterwards") from error
    lost = _lost_dimensions(program.module, exported)
    if lost:
        raise LoweringError(f"the rewritten program would fix dynamic dimension {lost}",
                            remedy="export the plain model with example sizes of 2 or more in its dynamic dimensions")
    query = next(iter(rewritten.get_submodule("attnres").parameters()))
    content = {**description_of(plans, str(query.dtype).removeprefix("torch."), "ExportedProgram"),
               "function_preserving": preserving, "aliases": aliases_of(exported.state_dict)}
    with whole_file(out, overwrite=overwrite) as partial, _quiet():
        torch.export.save(exported, partial, extra_files={PLAN_FILE: json_text(content)})
    return plans


def dynamic_shapes(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The ``dynamic_shapes`` under which ``module`` was exported, from the symbolic sizes of its placeholders."""
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(leaves):
        raise LoweringError(f"the program has {len(inputs)} inputs and {len(leaves)} example inputs")
    specs = [_spec(value_of(node)) if isinstance(leaf, torch.Tensor) else None for node, leaf in zip(inputs, leaves)]
    spec_args, spec_kwargs = pytree.tree_unflatten(specs, structure)
    bound = inspect.signature(module.forward).bind(*spec_args, **spec_kwargs)
    return dict(bound.arguments)


def _spec(value: Any) -> dict[int, Any] | None:
    found = {}
    for dim, size in enumerate(getattr(value, "shape", ())):
        if isinstance(size, torch.SymInt):
            bounds = size.node.shape_env.bound_sympy(size.node.expr) if size.node.shape_env is not None else None
            limits = {}
            if bounds is not None and bounds.lower.is_finite and int(bounds.lower) > 1:
                limits["min"] = int(bounds.lower)
            if bounds is not None and bounds.upper.is_finite and int(bounds.upper) < 2**31:
                limits["max"] = int(bounds.upper)
            found[dim] = Dim.AUTO(**limits) if limits else Dim.AUTO
    return found or None


def _lost_dimensions(module: fx.GraphModule, exported: ExportedProgram) -> str:
    names = set(exported.graph_signature.user_inputs)
    after = [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    before = [node for node in module.graph.nodes if node.op == "placeholder"]
    for old, new in zip(before, after):
        sizes = zip(getattr(value_of(old), "shape", ()), getattr(value_of(new), "shape", ()))
        for dim, (was, now) in enumerate(sizes):
            if isinstance(was, torch.SymInt) and isinstance(now, int):
                return f"{dim} of '{old.name}' to {now}"
    return ""


def verify_program(program: Program, *, seed: int = 0, **options: Any) -> Verification:
    """Both oracles of :func:`attnres_fx.verify` for a program; a plain one is converted in memory with ``options``.

    A program that is rewritten already no longer holds the plain network; its mixes are replaced by the sums of their
    sources to give it back, and recomputed one by one by definition, so that its blocks are taken from the file.
    """
    _need_inputs(program)
    generator = torch.Generator().manual_seed(seed)
    if program.plans:
        rewritten, plain, plans = program.module, _unmixed(program.module), list(program.plans)
    else:
        plans = plan_program(program, **options)
        marked = mark_program(program, plans)
        rewritten, plain = rewrite_program(marked), program.module
    at_zero, at_random = _values(rewritten, generator)

    def run(call: Callable[..., Any], module: nn.Module, values: Mapping[str, torch.Tensor]) -> Any:
        inputs = pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (program.args, program.kwargs))
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _swapped(module, values):
            torch.manual_seed(seed)
            return call(*inputs[0], **inputs[1])

    zero = deviation(run(rewritten, rewritten, at_zero), run(plain, plain, {}))
    preserving, notes = program.preserving, ["the program is rewritten already: its blocks are taken from the file"]
    if program.plans:
        interpreter: fx.Interpreter = _ByDefinition(rewritten)
        owner = rewritten
    else:
        assignments = _assignments(marked)
        preserving, notes = all(a.stream.function_preserving for a in assignments), []
        parameters = [(a.stream, a.plan, at_random[f"attnres.{a.plan.name}.query"],
                       at_random.get(f"attnres.{a.plan.name}.key_gain")) for a in assignments]
        for marker in markers_of(marked):
            marked.graph.erase_node(marker)
        interpreter, owner = OracleInterpreter(finish(marked), parameters), marked
    random = deviation(run(rewritten, rewritten, at_random), run(_interpreted(interpreter), owner, at_random))
    tolerance = max(_EXPORTED_TOLERANCE.get(dtype, 1e-4) for dtype in _dtypes(program.module) or {torch.float32})
    paper = any(plan.mix_scale == "paper" for plan in plans)
    return Verification.of(zero, random, tolerance, paper, preserving, notes)


def _assignments(marked: fx.GraphModule) -> list[Assignment]:
    """The streams of a marked graph with their plans; the graph is normalized on the way."""
    normalize_graph(marked.graph)
    return assign(marked)


def _interpreted(interpreter: fx.Interpreter) -> Callable[..., Any]:
    graph = interpreter.module.graph  # type: ignore[union-attr]

    def call(*args: Any, **kwargs: Any) -> Any:
        flat = graph._codegen.process_inputs(*args, **kwargs)  # type: ignore[union-attr]
        return graph._codegen.process_outputs(interpreter.run(*flat, enable_io_processing=False))  # type: ignore[union-attr]

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
    schema = MIX._schema.arguments
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
    from torch.nn.utils import stateless

    own = {name for name, _ in module.named_parameters()}
    with stateless._reparametrize_module(module, {k: v for k, v in values.items() if k in own}):
        yield


def _dtypes(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for name, p in module.named_parameters() if p.is_floating_point() and not name.startswith("attnres.")}


def _need_inputs(program: Program) -> None:
    if not program.args and not program.kwargs:
        raise CheckpointFileError("the .pt2 program holds no example inputs",
                                  remedy="save it with torch.export.save right after torch.export.export")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from printing tracebacks of errors that are translated here, and advice on its own use."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
