"""Programs of ``torch.export`` (``.pt2``): load, rewrite, export again.

A program is already a graph, so nothing is traced. The parameters enter the graph through the marker, as in a traced model,
and the passes are the same. Opening a ``.pt2`` may run what is pickled in it: open only files that you trust.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from attnres_fx.converted import device_of, new_parameters
from attnres_fx.formats.description import (
    PREFIX,
    aliases_of,
    check_description,
    check_digest,
    description_of,
    same_memory,
    signed,
    tie,
)
from attnres_fx.formats.files import PLAN_FILE, first_line, json_text, whole_file
from attnres_fx.passes._compat.graphs import fake_mode_of, generate_code, pytree
from attnres_fx.passes.findings import Marked, find, find_marked
from attnres_fx.passes.graph.edit import copy_graph_module, finish
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.vocabulary import is_mix
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.planning import parameter_dtype, plan_streams
from attnres_fx.runtime.errors import AlreadyConvertedError, CheckpointFileError, LoweringError, OptionError
from attnres_fx.runtime.marker import ENTER
from attnres_fx.runtime.parameters import CONTAINER


@dataclass(frozen=True)
class Program:
    """An opened ``.pt2``: its module (tied parameters tied), its example inputs; if converted, also its plans.

    ``preserving``: whether a converted program's plain network had only scale-invariant readers.
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
        raise CheckpointFileError(f"'{path}' is not a .pt2 archive of torch.export (not a zip file)",
                                  remedy="it is truncated or of another format; write it with torch.export.save")
    extra = {PLAN_FILE: ""}
    try:
        with _quiet():
            program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # torch.export raises whatever its parts raise on a damaged archive
        told = first_line(error)
        why = f": {told}" if "check the warnings above" not in told else ""  # the warnings are a traceback, kept quiet
        raise CheckpointFileError(f"'{path}' cannot be read as a program of torch.export{why}",
                                  remedy="write it with torch.export.save of this version of torch") from error
    if not extra[PLAN_FILE]:
        return program, {}, ()
    try:
        content = json.loads(extra[PLAN_FILE])
    except ValueError as error:
        raise CheckpointFileError(f"the {PLAN_FILE} in '{path}' is not readable JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointFileError(f"the {PLAN_FILE} in '{path}' is a {type(content).__name__}, not a JSON object")
    description, plans = check_description(content, f"{path}:{PLAN_FILE}")
    check_digest(description, _own(program), f"{path}:{PLAN_FILE}")
    return program, description, tuple(plans)


def _own(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The parameters of attention residuals in a program."""
    return {key: value for key, value in program.state_dict.items() if key.startswith(PREFIX)}


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
    """Make parameters over the same memory the same object: exported files keep the memory, not the identity."""
    named = {name: p for name, p in module.named_parameters(remove_duplicate=False) if same_memory(p) is not None}
    tie(module, aliases_of(named))


def plan_program(program: Program, **options: Any) -> list[StreamPlan]:
    """The plans that a conversion of ``program`` with ``options`` of :func:`attnres_fx.convert` would fix."""
    if program.plans or any(is_mix(node) for node in program.module.graph.nodes):
        raise AlreadyConvertedError("this program is converted already",
                                    remedy="transform the program of the plain model")
    return plan_streams(find(program.module), program.module, **options)


def mark_program(
    program: Program, plans: Sequence[StreamPlan], param_dtype: torch.dtype | None = None
) -> fx.GraphModule:
    """A copy of the program's graph with new parameters at ``attnres`` and a marker for each plan."""
    gm = copy_graph_module(program.module)
    device = device_of(gm)
    container = new_parameters(plans, param_dtype or parameter_dtype(gm), {plan.owner: device for plan in plans})
    gm.add_module(CONTAINER, container)
    mode = fake_mode_of(value_of(node) for node in gm.graph.nodes)
    first = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for plan in plans:
        parameters = container.streams[plan.name]
        nodes: list[fx.Node | None] = []
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
            assert nodes[0] is not None
            marker.meta["val"] = nodes[0].meta["val"].new_empty(())
            marker.meta["nn_module_stack"] = _stack_of(gm, plan.owner)
    return finish(gm)


def _stack_of(gm: fx.GraphModule, owner: str) -> dict[str, Any]:
    """The module stack down to ``owner``, as if its forward had called the marker."""
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [entry[0] for entry in stack.values()]
        if owner in paths:
            return dict(list(stack.items())[: paths.index(owner) + 1])
    return {}


def rewrite_program(found: Marked, marked: fx.GraphModule) -> fx.GraphModule:
    """The rewritten module of ``marked``, in which ``found`` was found; it shares all parameters, also those that no node
    reads.
    """
    rewritten = generate_code(found.rewritten())
    _adopt(rewritten, marked)
    return rewritten


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the parameters and buffers of ``old`` that copying the graph left behind."""
    have = {name for named in (new.named_parameters, new.named_buffers) for name, _ in named(remove_duplicate=False)}
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
        raise OptionError(f"'{out}' does not end in .pt2, and the source is a .pt2 program",
                          remedy="name the output x.pt2")
    need_inputs(program)
    param_dtype = options.pop("param_dtype", None)
    plans = plan_program(program, **options)
    marked = mark_program(program, plans, param_dtype)
    found = find_marked(marked)
    rewritten = rewrite_program(found, marked)
    preserving = all(assignment.stream.function_preserving for assignment in found.assignments)
    specs = dynamic_shapes(program.module, program.args, program.kwargs)
    try:
        with _quiet():
            exported = torch.export.export(rewritten, program.args, program.kwargs, dynamic_shapes=specs, strict=False)
    except Exception as error:  # whatever torch.export raises, no file is written then
        raise LoweringError(f"the rewritten program cannot be exported: {first_line(error)}",
                            remedy="convert the model itself and export it afterwards") from error
    lost = _lost_dimensions(program.module, exported)
    if lost:
        raise LoweringError(f"the rewritten program would fix dynamic dimension {lost}",
                            remedy="export the plain model with example sizes of 2 or more in its dynamic dimensions")
    query = next(iter(rewritten.get_submodule("attnres").parameters()))
    content = {**description_of(plans, str(query.dtype).removeprefix("torch."), "ExportedProgram"),
               "function_preserving": preserving, "aliases": aliases_of(exported.state_dict)}
    content = signed(content, _own(exported))
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
            if bounds is not None and bounds.lower.is_Integer and int(bounds.lower) > 1:
                limits["min"] = int(bounds.lower)
            if bounds is not None and bounds.upper.is_Integer and int(bounds.upper) < 2**31:
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


def need_inputs(program: Program) -> None:
    """Refuse a program without example inputs."""
    if not program.args and not program.kwargs:
        raise CheckpointFileError("the .pt2 program has no example inputs",
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
