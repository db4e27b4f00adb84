"""Every touch of torch's private interfaces, in one file; ``tests/passes/test_compat.py`` holds one test for each.

Written against torch 2.13. A new torch release is supported when these tests pass on it.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn

from attnres_fx.runtime.marker import ENTER

# Dead-code elimination must keep the marker, or other backends would run the plain network without a word.
fx.node.has_side_effect(ENTER)

_MODULE_ATTRIBUTES = ("_param_name_to_source", "compile_subgraph_reason", "_backend_id")


def carry_dynamo_metadata(old: fx.GraphModule, new: fx.GraphModule, mapping: dict[fx.Node, fx.Node]) -> None:
    """Copy what ``Graph.graph_copy`` loses: the sources of placeholders and Dynamo's attributes of the module."""
    for before, after in mapping.items():
        if before.op == "placeholder" and hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    for name in _MODULE_ATTRIBUTES:
        if hasattr(old, name):
            value = getattr(old, name)
            setattr(new, name, dict(value) if isinstance(value, dict) else value)


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The fake-tensor mode that the values belong to, or None when they are real tensors."""
    from torch._subclasses.fake_tensor import FakeTensor

    for value in values:
        while isinstance(value, (tuple, list)) and value:
            value = value[0]  # the values of one node share a mode; looking at all would be quadratic in large tuples
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def propagate_fake(gm: fx.GraphModule, args: Sequence[Any]) -> None:
    """Give every node of ``gm`` its fake value as ``meta["val"]``; sizes of inputs other than 0 and 1 stay symbolic.

    Each size is a symbol of its own: two sizes that are equal in these inputs alone must not be taken for one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(duck_shape=False))
    FakeTensorProp(gm, mode).propagate(*args)


@dataclass(frozen=True)
class GraphPasses:
    """Passes for Inductor to run, before those that others have asked for.

    ``joint`` runs on the joint graph of AOTAutograd; ``call`` on the graph of a call without a backward, when all others are
    done; ``forward`` likewise on the forward of a training step, with the number of its outputs that are not kept for the
    backward. ``identity`` stands for them, and for everything else that the graph alone does not tell, in the keys of
    torch's caches.
    """

    identity: str
    joint: Callable[[fx.Graph], None]
    call: Callable[[fx.Graph], None] | None = None
    forward: Callable[[fx.Graph, int], None] | None = None


def run_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], passes: GraphPasses | None = None
) -> Callable[..., Any]:
    """Hand a graph to Inductor with configuration patches, and passes of our own."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import (
        CustomGraphPass,
        CustomInferenceAwareGraphPass,
        get_custom_graph_passes,
    )

    if passes is None:
        return compile_fx(gm, list(inputs), config_patches=patches or None)
    identity, joint, call, forward = passes.identity, passes.joint, passes.call, passes.forward

    class JointPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            joint(graph)

        def uuid(self) -> str:
            return identity

    class LastPass(CustomInferenceAwareGraphPass):
        def __call__(self, graph: fx.Graph, is_inference: bool) -> None:
            if is_inference and call is not None:
                call(graph)
            elif not is_inference and forward is not None and not _is_backward_graph(graph):
                metadata = torch._guards.TracingContext.get().fw_metadata
                assert metadata is not None
                visible = graph.output_node().meta.get("user_visible_output_idxs", ())
                if all(index < metadata.num_forward for index in visible):  # else it is the body of another operator
                    forward(graph, metadata.num_forward)

        def uuid(self) -> str:
            return identity

    ours = {"joint_custom_pre_pass": JointPass(), "post_grad_custom_post_pass": LastPass()}
    for name, own in ours.items():
        theirs = get_custom_graph_passes(patches.get(name, getattr(torch._inductor.config, name)))
        patches = {**patches, name: [own, *theirs]}
    return compile_fx(gm, list(inputs), config_patches=patches)


def _is_backward_graph(graph: fx.Graph) -> bool:
    """Whether AOTAutograd made a graph of the backward: only there are there gradients among the inputs."""
    return any(node.op == "placeholder" and str(node.target).startswith("tangents_") for node in graph.nodes)


def input_symbols(graph: fx.Graph) -> set[Any]:
    """The symbols of sizes that the inputs of a graph give, as numbers or as sizes of tensors."""
    found = set()
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.add(size.node.expr)
    return found


def symbols_of(number: Any) -> set[Any]:
    """The symbols in a number; none in an integer."""
    return set(number.node.expr.free_symbols) if isinstance(number, torch.SymInt) else set()


def tunes_products() -> bool:
    """Whether Inductor chooses among kernels of its own for products of matrices, and joins to them what follows."""
    config = torch._inductor.config
    return bool(config.max_autotune or config.max_autotune_gemm)


_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
                       torch.ops.aten.baddbmm.default, torch.ops.aten.convolution.default})


def runs_in_place_order(target: Any) -> bool:
    """Whether Inductor surely computes an operator where it stands in the graph, from inputs that are stored by then.

    Loops over elements it computes where somebody needs their result, as part of what needs it, and may do so twice.
    """
    from torch._inductor.lowering import fallbacks, lowerings

    if not isinstance(target, torch._ops.OpOverload):
        return False
    own = target.namespace == "attnres" or target in _PRODUCTS or target is torch.ops.aten.copy_.default
    return own or target in fallbacks or target not in lowerings


def numbers_as_nodes(graph: fx.Graph) -> Callable[[Any], Any]:
    """Makes arguments of nodes from numbers: integers stay, symbolic ones become nodes that compute them from the inputs."""
    from torch.fx.experimental.proxy_tensor import py_sym_types
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    place = placeholders[-1].next if placeholders else next(iter(graph.nodes))
    tracer = fx.proxy.GraphAppendingTracer(graph)
    known: dict[Any, Any] = {}

    for node in placeholders:
        if isinstance(node.meta.get("val"), py_sym_types):
            known.setdefault(node.meta["val"].node.expr, fx.Proxy(node, tracer))
    for node in placeholders:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and size.node.expr not in known:
                with graph.inserting_before(place):
                    read = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                read.meta["val"] = size
                known[size.node.expr] = fx.Proxy(read, tracer)

    def as_argument(number: Any) -> Any:
        if not isinstance(number, torch.SymInt) or number.node.expr.is_number:
            return int(number)
        if number.node.expr not in known:
            before = place.prev
            with graph.inserting_before(place):
                made = sympy_interp(OptimizedPythonReferenceAnalysis, known, number.node.expr)
            node = before.next
            while node is not place:
                node.meta["val"] = node.target(*fx.map_arg(node.args, lambda arg: arg.meta["val"]))
                node = node.next
            known[number.node.expr] = made
        return known[number.node.expr].node

    return as_argument


def run_aot_eager(
    gm: fx.GraphModule, inputs: Sequence[Any], joint_pass: Callable[[fx.Graph], None] | None = None
) -> Callable[..., Any]:
    """Run a graph through AOTAutograd with the min-cut partitioner, and its two halves eagerly."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._functorch.aot_autograd import aot_module_simplified

    def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        if joint_pass is not None:
            joint_pass(joint.graph)
        halves: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(joint, *args, **kwargs)
        return halves

    return aot_module_simplified(gm, list(inputs), fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition)


def is_backward_node(node: fx.Node) -> bool:
    """Whether AOTAutograd traced a node of a joint graph in the backward."""
    return bool(node.meta.get("partitioner_tag") == "is_backward")


def mark_backward(node: fx.Node) -> None:
    """Say that a node is of the backward, as AOTAutograd says it."""
    node.meta["partitioner_tag"] = "is_backward"


def sort_topologically(graph: fx.Graph) -> None:
    """Put the nodes of a graph in an order in which each comes after its inputs, changing as little as possible."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def compile_whole(function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None,
                  limit: int | None = None) -> Callable[..., Any]:
    """``torch.compile`` of one whole graph, with a recompile limit that is not shared with other functions."""
    compile_: Any = torch.compile  # its published signature does not list isolate_recompiles
    compiled: Callable[..., Any] = compile_(
        function, backend=backend, fullgraph=True, dynamic=dynamic, recompile_limit=limit, isolate_recompiles=True)
    return compiled


def is_traced() -> bool:
    """Whether a compiler traces the code that asks: Dynamo, or torch.export in this thread.

    ``torch.compiler.is_compiling`` is true in every thread while one of them compiles something.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    keys = torch._C._TorchDispatchModeKey
    modes = (torch._C._get_dispatch_mode(keys.PROXY), torch._C._get_dispatch_mode(keys.FAKE),
             torch._C._get_dispatch_mode(keys.FUNCTIONAL), torch._ops._get_dispatch_mode_pre_dispatch(keys.PROXY))
    return torch.compiler.is_compiling() and any(mode is not None for mode in modes)


# What Dynamo is told for the time of one trace holds for the whole process: one thread traces at a time.
_TRACING = threading.RLock()


@contextmanager
def tracing_alone() -> Iterator[None]:
    """Keep Dynamo quiet and unlimited while this thread traces; other threads wait with their traces."""
    with _TRACING, quiet_dynamo(), unlimited_compiles():
        yield


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` wrapper."""
    from torch._dynamo.eval_frame import OptimizedModule

    return model._orig_mod if isinstance(model, OptimizedModule) else model


def inner_error(error: BaseException) -> BaseException:
    """The exception that a backend raised, out of the wrapper that Dynamo puts around it."""
    from torch._dynamo.exc import BackendCompilerFailed

    while isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    return error


def is_graph_break(error: BaseException) -> bool:
    """Whether Dynamo refused to capture the whole graph (``fullgraph=True``)."""
    from torch._dynamo import exc

    return isinstance(error, (exc.Unsupported, exc.UserError, exc.InternalTorchDynamoError))


def is_model_failure(error: BaseException) -> bool:
    """Whether an operation of the model itself failed on the traced inputs."""
    from torch._dynamo import exc

    return isinstance(error, (exc.TorchRuntimeError, exc.ObservedException))


def is_recompile_limit(error: BaseException) -> bool:
    """Whether Dynamo gave up because one function was compiled too often."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return isinstance(error, FailOnRecompileLimitHit)


def graph_break_reason(gm: fx.GraphModule) -> tuple[str, str] | None:
    """(reason, ``file:line``) if this graph ended in a graph break, else None."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return None
    stack = getattr(reason, "user_stack", None) or []
    where = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
    return str(reason.reason), where


def skipped_frame() -> tuple[str, str] | None:
    """(reason, ``file:line`` of the function) of a calling frame that Dynamo gave up: a graph break within its loop.

    Nobody is handed such a frame: it runs eagerly, and Dynamo compiles what it calls, piece by piece. What remains is its
    record among the counters, and the frame itself on the stack of whoever is called now.
    """
    from torch._dynamo.utils import counters

    frame = sys._getframe(1)
    running = set()
    while frame is not None:
        code = frame.f_code
        running.add(f"frame skipped: {code.co_name} ({code.co_filename} line {code.co_firstlineno})")
        frame = frame.f_back  # type: ignore[assignment]
    for text in reversed(counters["unimplemented"]):
        if "graph break in loop" in text:
            found = next((entry for entry in running if entry in text), None)
            if found is not None:
                file, line = found.split(" (", 1)[1].rstrip(")").rsplit(" line ", 1)
                return text.splitlines()[0], f"{file}:{line}"
    return None


def install_output_capture(model: nn.Module, kwargs: Mapping[str, Any], error: BaseException | None = None) -> bool:
    """Install the hooks behind ``output_hidden_states`` and its kin, if the call asks for them, or if the tracer says by
    ``error`` that something within the model does; whether there is anything to install that was not there.

    transformers installs them under a lock at the first such call, and Dynamo cannot trace a lock.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
        return False
    asked = any(name.startswith("output_") and value for name, value in kwargs.items()) if error is None else (
        is_graph_break(error) and str(capturing.__file__) in str(error))
    mark = "_output_capturing_hooks_installed"
    found = [module for module in model.modules() if _captures(type(module), capturing.__file__)] if asked else []
    missing = [module for module in found if not getattr(module, mark, False)]
    for module in missing:
        capturing.maybe_install_capturing_hooks(module)
    return bool(missing)


def _captures(cls: type, file: str | None) -> bool:
    """Whether the forward of ``cls`` is wrapped by the capture; hooks of an outer model would record a second time."""
    function = getattr(cls, "forward", None)
    while function is not None:
        if getattr(getattr(function, "__code__", None), "co_filename", "") == file:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


@contextmanager
def quiet_dynamo() -> Iterator[None]:
    """Keep Dynamo from printing its own account of an error that we catch and translate."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def unlimited_compiles() -> Any:
    """Lift Dynamo's limits on compiling one code object again: tracing keeps nothing, so no count can grow harmful."""
    return torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)


@dataclass(frozen=True)
class Frame:
    """The Python frame that Dynamo is compiling: the modules it can name, its own ``self``, whether it is a resumption, and
    its function, as "name (file:line)".
    """

    modules: list[nn.Module]
    this: nn.Module | None
    resumed: bool
    code: str


def compiling_frame() -> Frame | None:
    """The frame whose graph the backend was called with; None outside of a compilation by Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except (AttributeError, RuntimeError):
        return None
    return _frame_of(output.root_tx.f_code, dict(output.local_scope), output.global_scope)


def _frame_of(code: types.CodeType, local: Mapping[str, Any], scope: Mapping[str, Any]) -> Frame:
    this = local.get(code.co_varnames[0]) if code.co_argcount else None
    named = [*local.values(), *(scope[name] for name in code.co_names if name in scope)]
    for value in list(named):
        cells = getattr(value, "__closure__", None) or ()
        named += [cell.cell_contents for cell in cells]
        named.append(getattr(value, "__self__", None))
    modules = [value for value in named if isinstance(value, nn.Module)]
    method = getattr(type(this), "forward", None)
    own = isinstance(this, nn.Module) and (code.co_name == "forward" or getattr(method, "__code__", None) is code)
    return Frame(modules, this if own else None, "torch_dynamo_resume" in code.co_name,
                 f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})")


Report = Callable[[Frame, str, str, Mapping[str, Any]], None]


def watch_given_up_frames(backend: Callable[..., Any], report: Report) -> None:
    """Have ``report`` called with every frame of a module's own forward that Dynamo was to compile with ``backend`` and
    gives up, so that it runs in Python and no backend hears of it: (the frame, why, ``file:line``, the backend's settings).
    An error that it raises is raised to the caller.

    Such a frame is the outermost one: of those that it calls, which are tried on their own, nothing is reported.
    """
    from torch._dynamo.callback import callback_handler

    def at_end(_: Any) -> None:
        error, attempt = sys.exc_info()[1], sys._getframe(1)
        while attempt is not None and not (attempt.f_code.co_name == "_compile" and "compiler_fn" in attempt.f_locals):
            attempt = attempt.f_back  # type: ignore[assignment]
        if attempt is None or not isinstance(error, torch._dynamo.exc.Unsupported) or attempt.f_locals.get("one_graph"):
            return
        found = attempt.f_locals
        settings = getattr(found["compiler_fn"], "__dict__", {})
        if settings.get("compiler_fn") is not backend:
            return
        frame = _frame_of(found["code"], found["locals"], found["globals"])
        if frame.this is None or runs_within_a_module(frame.this):
            return
        stack = list(getattr(error, "real_stack", None) or ())
        where = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        try:
            report(frame, str(cause).splitlines()[0], where, settings.get("kwargs", {}))
        except Exception as refusal:
            _leave_callbacks(callback_handler)
            raise torch._dynamo.exc.BackendCompilerFailed(backend, refusal, None) from None

    callback_handler.end_callbacks = _KeptCallbacks(callback_handler.end_callbacks, at_end)


class _KeptCallbacks(list[Any]):
    """Dynamo's list of callbacks, with one that ``torch._dynamo.reset`` does not take away."""

    def __init__(self, given: Iterable[Any], kept: Any) -> None:
        super().__init__([*given, kept])
        self._kept = kept

    def clear(self) -> None:
        self[:] = [self._kept]


def _leave_callbacks(handler: Any) -> None:
    """Count down what Dynamo counts up for the time of a compilation: an error in a callback would leave it as it is."""
    name = "_CompilationCallbackHandler__pending_callbacks_counter"
    setattr(handler, name, getattr(handler, name) - 1)


def runs_within_a_module(this: nn.Module | None) -> bool:
    """Whether this is called while the forward of a module runs, other than ``this`` and torch's own wrappers."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(owner, nn.Module) and owner is not this and not type(owner).__module__.startswith(
                ("torch.nn.parallel", "torch.distributed")):
            return True
        frame = frame.f_back
    return False


def restart_tracing(reason: str) -> NoReturn:
    """Make Dynamo trace the frame again from its start, after the modules it reads were changed. Never returns."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import InstructionTranslator

    InstructionTranslator.current_tx().output.root_tx.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Real tensors and plain operators whatever modes, subclasses or autocast are active around; gradients recorded."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction(), torch.enable_grad(), \
            torch.autocast("cpu", enabled=False):
        yield


def known_int(size: Any) -> int | None:
    """The number that a symbolic size has become since it was traced, without a guard; None while it is free."""
    return int(size) if isinstance(size, int) else size.node.maybe_as_int()


def hinted(number: Any, unknown: float = 8) -> Any:
    """The traced number behind a symbolic one, without a guard on it; ``unknown`` for a size known only at run time."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat)):
        return number
    node: Any = number.node
    return unknown if node.hint is None else node.hint
