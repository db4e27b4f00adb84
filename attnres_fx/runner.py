"""How a converted model runs: the generated classes, and the eager call through the rewritten graph.

The lowest module that owns all additions of a stream gets a generated subclass of its class, with the same name and
signature. While a compiler traces, its forward calls the marker and then the original forward; called eagerly, it runs the
same through a cached compiled function whose backend rewrites the graph and runs it eagerly.
"""

from __future__ import annotations

import functools
import logging
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_fx.by_value import can_run, is_untouched, run_by_value, runs_by_value, switch
from attnres_fx.converted import ROOT, STREAMS
from attnres_fx.passes._compat.dynamo import (
    compile_whole,
    inner_error,
    is_message_break,
    is_recompile_limit,
    is_traced,
    recompile_limit,
    without_messages,
)
from attnres_fx.passes._compat.graphs import generate_code
from attnres_fx.passes._compat.inductor import run_aot_eager
from attnres_fx.passes._compat.transformers import (
    install_output_capture,
    is_capture_break,
    is_collector_break,
    output_collector,
)
from attnres_fx.passes.graph.capture import translate
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.lower.recomputation import holds_checkpoint
from attnres_fx.passes.pipeline import PREPARE, REWRITE, run
from attnres_fx.passes.rewrite.match import markers_of
from attnres_fx.reduction import hold_to_reduction, stream_inputs
from attnres_fx.runtime._compat import times_written
from attnres_fx.runtime.errors import (
    AttnResError,
    GraphBreakError,
    PartOfConvertedError,
    PlainPathError,
    SitesChangedError,
    SplitStreamError,
)
from attnres_fx.runtime.marker import ENTER
from attnres_fx.runtime.parameters import stream_parameters
from attnres_fx.runtime.stream import BY_GRAPH, BY_VALUE, Stream

log = logging.getLogger(__name__)

RUNNER = "_attnres_runner"
_COLLECTED = "_attnres_collected"  # on an owner within which hooks collect outputs for a model around it
_SPEAKS = "_attnres_speaks"  # on an owner whose forward warns, logs or prints
# How many kinds of calls (train and eval, with and without grad, a cache, labels ...) an uncompiled model may see. Dynamo's
# own limit, 8, is meant for functions that can fall back to running as they are.
KINDS_OF_CALLS = 64
_MAKING = threading.Lock()


def run_rewritten(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """The backend of the eager call: rewrite the graph and run it as it is."""
    if not markers_of(gm.graph):  # as where DistributedDataParallel has the graph cut into buckets
        raise SplitStreamError("a graph of a converted model has no marker: it is a part of a larger one",
                               remedy="have the model captured whole: torch._dynamo.config.optimize_ddp = False")
    rewritten = generate_code(run((*PREPARE, *REWRITE), gm, Context()))
    # Run eagerly, the tags of a checkpointed layer mean nothing: only AOTAutograd's partitioner recomputes by them.
    recomputed = torch.is_grad_enabled() and holds_checkpoint(rewritten.graph)
    return hold_to_reduction(run_aot_eager(rewritten, inputs) if recomputed else rewritten.forward, stream_inputs(gm))


def enter_streams(module: nn.Module, within: bool = False) -> None:
    """Call the marker for every stream that ``module`` owns, with the parameters that are at the root now; ``within``: from
    within its old forward. Raises ReplacedParametersError.
    """
    for name, plan in module.__dict__[STREAMS].items():
        parameters = stream_parameters(module.__dict__.get(ROOT, module._modules), name, plan)
        ENTER(parameters.query, parameters.key_gain, plan, within)


def _runner(module: nn.Module, base: type[nn.Module]) -> Callable[..., Any]:
    cached: Callable[..., Any] | None = module.__dict__.get(RUNNER)
    if cached is None:
        with _MAKING:  # one for all threads, or each would compile its own
            cached = module.__dict__.get(RUNNER) or _made_runner(base)
            module.__dict__[RUNNER] = cached
    return cached


def _made_runner(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.forward

    def marked(self: nn.Module, collector: Any, *args: Any, **kwargs: Any) -> Any:
        if collector is None:
            enter_streams(self)
            return original(self, *args, **kwargs)
        variable, collected = collector
        token = variable.set(collected)
        enter_streams(self)
        outputs = original(self, *args, **kwargs)
        variable.reset(token)
        return outputs

    # The recompile limit is per code object: each model gets its own.
    own = types.FunctionType(marked.__code__.replace(), marked.__globals__, "forward", None, marked.__closure__)
    return compile_whole(own, run_rewritten, dynamic=None, limit=max(KINDS_OF_CALLS, recompile_limit()))


def _run(module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], retries: int = 3) -> Any:
    for name, plan in module.__dict__[STREAMS].items():  # what cannot be read raises here, and not within the tracer
        stream_parameters(module.__dict__.get(ROOT, module._modules), name, plan)
    install_output_capture(module, kwargs)
    try:
        collector = output_collector() if module.__dict__.get(_COLLECTED) else None
        with without_messages() if module.__dict__.get(_SPEAKS) else nullcontext():
            return _runner(module, base)(module, collector, *args, **kwargs)
    except Exception as error:
        inner = inner_error(error)
        if retries and _mended(module, kwargs, error):
            return _run(module, base, args, kwargs, retries - 1)
        if isinstance(inner, SplitStreamError) and can_run(module):
            return _run_split(module, base, args, kwargs, inner)
        if isinstance(inner, AttnResError):
            raise inner from None
        translated = translate(error) if not is_recompile_limit(error) else SitesChangedError(
            "the converted model was retraced too often, each time for a new kind of inputs or module states",
            remedy="call it with fewer kinds of inputs, or raise torch._dynamo.config.recompile_limit")
        if isinstance(translated, (GraphBreakError, SitesChangedError)) and can_run(module):
            switch(module, translated)
            return run_by_value(module, base, args, kwargs)
        if translated is error:
            raise
        raise translated from error


def _run_either_way(module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By value; or by its graph, if the first thing that ``module`` does with a stream needs a tensor.

    What ran before that runs again: not if it has written into a buffer, as a norm over batches does in training.
    """
    drawn, written = (_random_state(), _writes(module)) if module.training else (None, [])
    try:
        return run_by_value(module, base, args, kwargs)
    except Exception as error:
        if BY_VALUE in module.__dict__ or not is_untouched(error) or not _is_of_streams(error):
            raise
        if module.training and _writes(module) != written:
            raise
        cause = error
    if drawn is not None:
        _set_random_state(drawn)
    result = _run(module, base, args, kwargs)
    if BY_VALUE not in module.__dict__:
        module.__dict__[BY_GRAPH] = str(cause).splitlines()[0]
        log.warning("%s runs as one graph from now on, called eagerly too: %s", type(module).__name__,
                    module.__dict__[BY_GRAPH])
    return result


RandomState = tuple[Tensor, Tensor | None]


def _random_state() -> RandomState:
    """The state of torch's random numbers, on the CPU and on the current CUDA device if there is one in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _writes(module: nn.Module) -> list[int]:
    """How often each buffer of ``module`` was written into."""
    return [times_written(buffer) for buffer in module.buffers()]


def _set_random_state(state: RandomState) -> None:
    """Have torch draw again what it drew after :func:`_random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _is_of_streams(error: Exception) -> bool:
    """Whether ``error`` may come from a stream in the place of a tensor."""
    return isinstance(error, AttnResError) or (
        isinstance(error, (TypeError, ValueError, AttributeError, RuntimeError)) and Stream.__name__ in str(error))


def _run_split(
    module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], cause: SplitStreamError
) -> Any:
    """By value, where a graph holds only a part of a stream: because it was cut up, or because layers are missing."""
    try:
        result = run_by_value(module, base, args, kwargs)
    except AttnResError:
        raise cause from None
    switch(module, cause)
    return result


def _mended(module: nn.Module, kwargs: dict[str, Any], error: Exception) -> bool:
    """Whether the graph of ``module`` broke for an avoidable reason, which the next attempt then avoids: hooks that are
    installed at the first call, hooks that collect for a model around this one, a message. Another thread may be first.
    """
    if is_message_break(error):
        if not module.__dict__.get(_SPEAKS):
            module.__dict__[_SPEAKS] = True
            warnings.warn(f"the forward of {type(module).__name__} warns, logs or prints. It runs as one graph, in which "
                          "those messages are passed over", stacklevel=4)
        return True
    if is_collector_break(error):
        module.__dict__[_COLLECTED] = True
        return True
    install_output_capture(module, kwargs, error)
    return is_capture_break(error)


def converted_class(base: type[nn.Module], owns: bool, root: bool) -> type[nn.Module]:
    """A subclass of ``base`` for an owner of streams (``owns``), for the root of a converted model, or for both.

    The same arguments give the same class.
    """
    key: Any = base
    return _generated_class(key, owns, root)


@functools.cache
def _generated_class(base: Any, owns: bool, root: bool) -> type[nn.Module]:
    namespace: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__,
                                 "__doc__": base.__doc__, "_attnres_base": base}

    if owns:
        @functools.wraps(base.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_traced():
                if runs_by_value(self):
                    return run_by_value(self, base, args, kwargs)
                enter_streams(self)
                return base.forward(self, *args, **kwargs)
            if torch.jit.is_tracing():
                raise PlainPathError("torch.jit cannot trace a converted model, whose streams it does not know",
                                     remedy="compile it with torch.compile(model, backend='attnres')")
            return _run_either_way(self, base, args, kwargs) if runs_by_value(self) else _run(self, base, args, kwargs)

        namespace["forward"] = forward

    def __getstate__(self: nn.Module) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop(RUNNER, None)
        return state

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base, owns, root), self.__getstate__()

    namespace["__getstate__"], namespace["__reduce_ex__"] = __getstate__, __reduce_ex__

    if hasattr(base, "save_pretrained"):
        def save_pretrained(self: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            from attnres_fx.formats.huggingface import save_converted

            if not root:
                raise PartOfConvertedError(
                    f"'{base.__name__}' is a part of a converted model, whose parameters are at the root",
                    remedy="call save_pretrained on the whole model")
            return save_converted(self, base, save_directory, *args, **kwargs)

        namespace["save_pretrained"] = functools.wraps(base.save_pretrained)(save_pretrained)

    return type(base.__name__, (base,), namespace)


def _rebuild(base: type[nn.Module], owns: bool, root: bool) -> nn.Module:
    """An empty instance for ``pickle`` and ``copy``."""
    cls = converted_class(base, owns, root)
    return cls.__new__(cls)
