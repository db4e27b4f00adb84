"""Every touch of Dynamo's private interfaces: what it traces, what it refuses, what it reports.

Written against torch 2.11 to 2.15. ``tests/passes/_compat/test_dynamo.py`` holds one test for each.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn

from attnres_fx.runtime.marker import ENTER


def compile_whole(function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None,
                  limit: int | None = None) -> Callable[..., Any]:
    """``torch.compile`` of one whole graph, with a recompile limit that is not shared with other functions."""
    compile_: Any = torch.compile  # its published signature does not list isolate_recompiles
    known = inspect.signature(torch.compile).parameters
    wanted = {"recompile_limit": limit, "isolate_recompiles": True}
    own = {name: value for name, value in wanted.items() if name in known}
    compiled: Callable[..., Any] = compile_(function, backend=backend, fullgraph=True, dynamic=dynamic, **own)
    if limit is None or "recompile_limit" in known:
        return compiled

    @functools.wraps(compiled)
    def limited(*args: Any, **kwargs: Any) -> Any:  # torch 2.11 has one limit for all functions
        with torch._dynamo.config.patch(recompile_limit=limit):
            return compiled(*args, **kwargs)

    return limited


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


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` kept out of graphs: it runs in Python, and what it calls is compiled as ever."""
    kept: Callable[..., Any] = torch._dynamo.disable(function, recursive=False)
    return kept


def has_compiled_parts(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called on a part of ``module``."""
    return any(part._compiled_call_impl is not None for part in module.modules() if part is not module)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a hook on its backward was registered on ``module`` itself."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


# Dynamo's settings for one trace apply to the whole process: one thread traces at a time.
_TRACING = threading.RLock()
_CAPTURED: ContextVar[bool] = ContextVar("captured", default=False)


@contextmanager
def tracing_alone() -> Iterator[None]:
    """Keep Dynamo quiet and unlimited while this thread traces; other threads wait with their traces."""
    with _TRACING, quiet_dynamo(), unlimited_compiles(), without_messages():
        token = _CAPTURED.set(True)
        try:
            yield
        finally:
            _CAPTURED.reset(token)


_SILENT = frozenset({print, warnings.warn, *(getattr(logging.Logger, level) for level in (
    "debug", "info", "warning", "error", "exception", "critical", "log"))})


def without_messages() -> Any:
    """Have Dynamo pass over what is printed, warned and logged, instead of breaking a graph for it."""
    config: Any = torch._dynamo.config
    ignored = "ignore_logging_functions" if hasattr(config, "ignore_logging_functions") else "ignore_logger_methods"
    return config.patch({ignored: {*getattr(config, ignored), *_SILENT}})


def is_message_break(error: BaseException) -> bool:
    """Whether a graph broke because the model warned, logged or printed."""
    messages = r"`_warnings\.warn`|qualname: warn,|logging\.Logger method|builtin operator `print`"
    return is_graph_break(error) and re.search(messages, str(error)) is not None


def pass_over_requires_grad() -> None:
    """Have Dynamo pass over ``requires_grad_()`` of values computed within a graph that is captured, or that holds a marker.

    Hooks call it on the embeddings of a frozen model, so that layers checkpointed the old way see an input with a gradient.
    Within one graph nothing depends on it, and Dynamo breaks the graph for it: its only effect would be the gradient of such
    a value, which is out of reach after the call.
    """
    from torch._dynamo.variables.tensor import TensorVariable

    original = TensorVariable.method_requires_grad_
    if hasattr(original, "passed_over"):
        return

    @functools.wraps(original)
    def method_requires_grad_(self: Any, tx: Any, requires_grad: Any = True) -> Any:
        asked = requires_grad if isinstance(requires_grad, bool) else requires_grad.as_python_constant()
        if asked and not self.source and (_CAPTURED.get() or any(
                node.target is ENTER for node in tx.output.root_tracer.graph.nodes)):
            return self
        return original(self, tx, requires_grad)

    method_requires_grad_.passed_over = True  # type: ignore[attr-defined]
    TensorVariable.method_requires_grad_ = method_requires_grad_
    table = getattr(TensorVariable, "tp_methods", {})  # where torch 2.15 looks methods up
    if "requires_grad_" in table:
        table["requires_grad_"] = type(table["requires_grad_"])(method_requires_grad_)


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
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return isinstance(error, (exc.Unsupported, exc.UserError, exc.InternalTorchDynamoError, GuardOnDataDependentSymNode))


def is_model_failure(error: BaseException) -> bool:
    """Whether an operation of the model itself failed on the traced inputs."""
    from torch._dynamo import exc

    uncaught = isinstance(error, exc.Unsupported) and str(error).startswith("Observed exception")
    return uncaught or isinstance(error, (exc.TorchRuntimeError, exc.ObservedException))


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

    No backend gets such a frame: it runs eagerly, and Dynamo compiles what it calls, piece by piece. What remains is its
    record in the counters, and the frame itself on the stack.
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


@contextmanager
def quiet_dynamo() -> Iterator[None]:
    """Keep Dynamo from printing its own account of an error that we catch and translate."""

    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor", "torch._subclasses")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def recompile_limit() -> int:
    """The number of kinds of calls that a function is compiled for."""
    return int(torch._dynamo.config.recompile_limit)


def unlimited_compiles() -> Any:
    """Lift Dynamo's limits on compiling one code object again: tracing keeps nothing, so no count can do harm."""
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


def graphs_being_traced() -> list[fx.Graph]:
    """The graph that Dynamo is tracing, with those of the functions within it that get graphs of their own."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return [tracer.graph for tracer in InstructionTranslator.current_tx().output.tracers]
    except (AttributeError, RuntimeError):
        return []


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
    gives up, so that it runs in Python and no backend sees it: (the frame, why, ``file:line``, the backend's settings).
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
