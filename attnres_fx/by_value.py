"""Run a converted model by value: its streams are :class:`attnres_fx.runtime.stream.Stream` objects between the layers.

The way for calls of which no whole graph can be had: hooks between layers that move weights (fully_shard, offloading),
code that leaves the graph (host routing, caches in pages, messages), transforms of torch.func. The owner of a stream runs
its own forward; the outermost module below it that holds the first layer receives the stream in place of the embedding b_0.
At the end every layer must have been passed, or the call raises.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_fx.converted import ROOT, STREAMS, is_converted_class
from attnres_fx.passes._compat.distributed import in_parallel, is_tensor_parallel, not_in_buckets
from attnres_fx.passes._compat.dynamo import (
    graphs_being_traced,
    has_backward_hooks,
    has_compiled_parts,
    is_traced,
    outside_graphs,
)
from attnres_fx.passes._compat.graphs import pytree
from attnres_fx.passes.find.additions import starts_of
from attnres_fx.passes.findings import Marked
from attnres_fx.passes.rewrite.match import markers_of
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.reduction import refuse_unreduced
from attnres_fx.runtime._compat import in_backward, inside_autograd_function
from attnres_fx.runtime.errors import ShardedStreamError, SplitStreamError
from attnres_fx.runtime.marker import WITNESS
from attnres_fx.runtime.parameters import CONTAINER, AttnRes, stream_parameters, streams_of
from attnres_fx.runtime.passage import Passage
from attnres_fx.runtime.stream import BY_GRAPH, BY_VALUE, ENTRY, Stream

log = logging.getLogger(__name__)
UNTOUCHED = "_attnres_untouched"  # on an exception that ended a run by value: whether no layer had run yet


@dataclass
class Run:
    """One call of an owner: its plans by the module that is handed b_0, query and key gain of each, and what has begun.

    ``trains``: it was called with gradients; ``inside``: within a torch.autograd.Function.
    """

    trains: bool
    inside: bool
    waiting: dict[int, StreamPlan]
    parameters: dict[str, tuple[Tensor, Tensor | None]]
    passages: dict[str, Passage]


class Caller:
    """The owner that called the module in which its stream begins. Copies and files keep none."""

    def __init__(self, owner: nn.Module | None = None, name: str = "") -> None:
        self._owner, self.name = None if owner is None else weakref.ref(owner), name

    def owner(self) -> nn.Module | None:
        return None if self._owner is None else self._owner()

    def __reduce__(self) -> tuple[Any, ...]:
        return Caller, ()


_RUNS: ContextVar[tuple[Run, ...]] = ContextVar("attnres_runs", default=())


def is_running() -> bool:
    """Whether a converted model is running by value in this context."""
    return bool(_RUNS.get())


def runs_by_value(module: nn.Module) -> bool:
    """Whether this call of the owner ``module`` runs by value.

    While a compiler traces, only if no whole graph of it could be had. In eager code, if it was run so when it was
    converted or its layers are compiled one by one; unless only a graph can serve the call.
    """
    if BY_VALUE in module.__dict__:
        return not torch.compiler.is_exporting()
    if is_traced() or BY_GRAPH in module.__dict__ or not can_run(module):
        return False
    if not all(plan.trial == "" for plan in _plans(module).values()):
        return has_compiled_parts(module)
    # Of weights that are divided among processes only a graph shows whether each of them holds the whole stream.
    divided = torch.is_grad_enabled() and in_parallel() and is_tensor_parallel(module)
    return not divided or has_compiled_parts(module)


def switch(module: nn.Module, cause: Exception) -> None:
    """Have the owner ``module`` run by value from now on, since no whole graph of it can be had for the given ``cause``."""
    module.__dict__[BY_VALUE] = str(cause).splitlines()[0]
    log.warning("%s runs by value from now on, layer by layer, and not as one graph: %s. Its numbers are the same; the norm "
                "behind a mix is fused with it only in pieces that are compiled", type(module).__name__,
                module.__dict__[BY_VALUE])


def ways_of(model: nn.Module) -> dict[str, str]:
    """How each stream of a converted ``model`` runs when the model is called eagerly, and why, by its name."""
    found = {}
    for owner in model.modules():
        for name, plan in _plans(owner).items() if STREAMS in owner.__dict__ else ():
            if BY_VALUE in owner.__dict__:
                found[name] = f"by value, compiled too: {owner.__dict__[BY_VALUE]}"
            elif BY_GRAPH in owner.__dict__:
                found[name] = f"as one graph: {owner.__dict__[BY_GRAPH]}"
            else:
                found[name] = plan.way
    return found


def can_run(module: nn.Module) -> bool:
    """Whether every stream that ``module`` owns can be run by value."""
    return all(plan.additions is not None and not plan.trial and _entry(module, plan) is not None
               for plan in _plans(module).values())


def is_untouched(error: Exception) -> bool:
    """Whether no layer of any stream had run, and nothing had been read from one, when a run by value raised ``error``."""
    return bool(getattr(error, UNTOUCHED, False))


@outside_graphs
def run_by_value(module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``base.forward`` of the owner ``module``, its streams as values. Raises SplitStreamError, SitesChangedError."""
    run = _opened(module)
    try:
        with _running(run), not_in_buckets():
            outputs = base.forward(module, *args, **kwargs)
    except Exception as error:
        setattr(error, UNTOUCHED, not any(passage.was_read or passage.reached for passage in run.passages.values()))
        raise
    return _closed(run, outputs)


@torch.compiler.disable
def _opened(module: nn.Module) -> Run:
    """A run of the owner ``module``, with the modules that are handed b_0 made ready for it."""
    waiting, parameters = {}, {}
    for plan in _plans(module).values():
        entry = _entry(module, plan)
        if entry is None:
            raise SplitStreamError(f"stream '{plan.name}' begins in no module below '{type(module).__name__}'",
                                   remedy="leave the layers of the model where they were when it was converted")
        if torch.is_grad_enabled():
            _refuse_backward_hooks(module, plan)
        kind: Any = type(entry)
        entry.__class__ = entry_class(kind)
        entry.__dict__[ENTRY] = Caller(module, plan.name)
        waiting[id(entry)] = plan
        parameters[plan.name] = _parameters(module, plan)
    return Run(torch.is_grad_enabled(), torch.is_grad_enabled() and inside_autograd_function(), waiting, parameters, {})


def _refuse_backward_hooks(owner: nn.Module, plan: StreamPlan) -> None:
    """Raise SplitStreamError if a module that is handed the stream has hooks on its backward, which would find no tensor."""
    for path in dict.fromkeys(path for path, _ in plan.sites):
        module = owner
        for part in path.split("."):
            module = module._modules.get(part, module)  # type: ignore[assignment]
            if module is not owner and has_backward_hooks(module):
                raise SplitStreamError(
                    f"'{path}' has a hook on its backward, which is never called where stream '{plan.name}' is a value",
                    remedy="register the hook on a module within the branches, or on a parameter")


def _parameters(owner: nn.Module, plan: StreamPlan) -> tuple[Tensor, Tensor | None]:
    """Query and key gain as they are at the root now, in the grad mode of the call."""
    children: Mapping[str, Any] = owner.__dict__.get(ROOT, owner._modules)
    parameters = stream_parameters(children, plan.name, owner.__dict__[STREAMS][plan.name])
    if torch.is_grad_enabled() and in_parallel():
        refuse_unreduced({f"{kind} of stream '{plan.name}'": value for kind, value in parameters.named_parameters()})
        if parameters.query.requires_grad and is_tensor_parallel(owner):
            raise ShardedStreamError(
                f"the weights around stream '{plan.name}' are divided among processes, and only a whole graph shows whether "
                "each of them holds the whole stream: otherwise the gradients of its queries would be those of a share",
                remedy="let the model be captured as one graph (fullgraph=True names what breaks it), or freeze the "
                       "parameters of model.attnres")
    # By a call, so that the hooks of other tools run, which may have to bring the weights first.
    container = children[CONTAINER]
    found: tuple[Tensor, Tensor | None] = container(plan.name) if isinstance(container, AttnRes) else parameters()
    return found


@torch.compiler.disable
def _closed(run: Run, outputs: Any) -> Any:
    """``outputs`` with what is read in place of streams; every layer of every stream must have been passed."""
    own = run.passages.values()  # and not those of a run around this one

    def read(leaf: Any) -> Any:
        if isinstance(leaf, Stream):
            return leaf.value() if leaf.passage in own else leaf
        if is_dataclass(leaf) and not isinstance(leaf, type):  # one that pytrees do not know
            for name in (field.name for field in fields(leaf)):
                if pytree.tree_any(lambda part: isinstance(part, Stream), getattr(leaf, name, None)):
                    object.__setattr__(leaf, name, pytree.tree_map(read, getattr(leaf, name)))
        return leaf

    if not isinstance(outputs, Tensor):
        outputs = pytree.tree_map(read, outputs)
    for plan in run.waiting.values():
        passage = run.passages.get(plan.name)
        if passage is None:
            raise SplitStreamError(f"this call did not reach the first layer of stream '{plan.name}'",
                                   remedy="call the model as it was converted")
        passage.check_complete()
        passage.over = True
    return outputs


@contextmanager
def _running(run: Run) -> Iterator[None]:
    token = _RUNS.set((*_RUNS.get(), run))
    try:
        yield
    finally:
        _RUNS.reset(token)


@functools.cache
def _plan(text: str) -> StreamPlan:
    return StreamPlan.from_json(text)


def _plans(module: nn.Module) -> dict[str, StreamPlan]:
    return {name: _plan(text) for name, text in module.__dict__[STREAMS].items()}


def _entry(owner: nn.Module, plan: StreamPlan) -> nn.Module | None:
    """The module below ``owner`` that is handed b_0, as it is there now; None if there is none."""
    if plan.start is None:
        return None
    try:
        return owner.get_submodule(plan.start[0])
    except AttributeError:
        return None


@contextmanager
def witnessed(model: nn.Module, plans: Sequence[StreamPlan]) -> Iterator[None]:
    """Have the modules that lead from the owner of each stream to its first layer note, in the graph that is traced
    meanwhile, which tensors they are handed.
    """
    handles = []
    for plan in plans:
        module, path = model.get_submodule(plan.owner), ""
        for part in plan.sites[0][0].split("."):
            module = module._modules.get(part)  # type: ignore[assignment]
            if module is None:
                break
            path = f"{path}.{part}" if path else part
            hook = functools.partial(_note, plan.name, path, plan.width)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(stream: str, path: str, width: int, module: nn.Module, args: Any, kwargs: Any) -> None:
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] == width:
            WITNESS(value, f"{stream}|{path}|{key}")


def record_starts(model: nn.Module, marked: Marked, witnesses: Sequence[tuple[str, fx.Node]]) -> None:
    """Complete the plans of a converted ``model`` with the modules that are handed b_0."""
    for assignment in marked.assignments:
        plan = assignment.plan
        places = [place.split("|") for place in starts_of(assignment.stream, witnesses)]
        start = next(((path, key) for name, path, key in places if name == plan.name), None)
        if start is not None:
            record(model, replace(plan, start=start))
        elif plan.trial is None:
            record(model, replace(plan, trial="its embedding is handed to no module that holds the first layer"))


def record(model: nn.Module, plan: StreamPlan) -> None:
    """Have ``plan`` take the place of the plan of that name in the converted ``model``."""
    streams = streams_of(model) or {}
    streams[plan.name].plan = plan.to_json()
    model.get_submodule(plan.owner).__dict__[STREAMS][plan.name] = plan.to_json()


@functools.cache
def entry_class(base: Any) -> Any:
    """A subclass of ``base`` whose instances begin a stream when the owner that runs calls them."""
    if "_attnres_entry_of" in base.__dict__:
        return base

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if ENTRY in self.__dict__ and not (torch.compiler.is_dynamo_compiling() and _in_one_graph()):
            args, kwargs = _begin(self, args, kwargs)
        return base.__call__(self, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        """As an instance of ``base``: a copy is made ready by the first run of its own owner."""
        if is_converted_class(base):
            return base.__reduce_ex__(self, protocol)
        return base.__new__, (base,), dict(self.__dict__)

    return type(base.__name__, (base,), {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "_attnres_entry_of": base, "__call__": __call__, "__reduce_ex__": __reduce_ex__})


@torch.compiler.assume_constant_result
def _in_one_graph() -> bool:
    """Whether the code that asks is being traced into a graph in which its streams are marked already."""
    return any(markers_of(graph) for graph in graphs_being_traced())


@torch.compiler.disable
def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``module`` with the stream in place of the embedding b_0, if it is where one begins."""
    runs = _RUNS.get()
    run = runs[-1] if runs and id(module) in runs[-1].waiting else _again(module) if in_backward() else None
    if run is None:
        return args, kwargs
    plan = run.waiting[id(module)]
    assert plan.start is not None
    key: Any = plan.start[1]
    if int(key) >= len(args) if key.isdigit() else key not in kwargs:  # then it was given by position, or by name
        names = list(inspect.signature(module.forward).parameters)
        if key.isdigit() and int(key) < len(names):
            key = names[int(key)]
        elif not key.isdigit() and key in names:
            key = str(names.index(key))
    given = kwargs.get(key) if not key.isdigit() else args[int(key)] if int(key) < len(args) else None
    if isinstance(given, Stream):
        return args, kwargs
    if not isinstance(given, Tensor) or plan.name in run.passages:
        what = "a tensor in place of the stream" if isinstance(given, Tensor) else "other arguments than at its conversion"
        raise SplitStreamError(
            f"a {type(module).__name__}, in which stream '{plan.name}' begins, was called with {what}",
            remedy="hand the hidden states from layer to layer as they are, and call the model as it was converted")
    stream = _begun(run, plan, given)
    if key.isdigit():
        return (*args[:int(key)], stream, *args[int(key) + 1:]), kwargs
    return args, {**kwargs, key: stream}


def _again(module: nn.Module) -> Run | None:
    """A run for the stream that begins in ``module``, of which a checkpoint around it computes the beginning again."""
    caller = module.__dict__[ENTRY]
    owner = caller.owner()
    if owner is None:
        return None
    plan = _plans(owner)[caller.name]
    return Run(True, False, {id(module): plan}, {plan.name: _parameters(owner, plan)}, {})


def _begun(run: Run, plan: StreamPlan, embedding: Tensor) -> Stream:
    """The stream at position 0."""
    assert plan.additions is not None
    if hasattr(embedding, "placements"):
        raise ShardedStreamError(
            f"stream '{plan.name}' is a distributed tensor, for which no mix is defined",
            remedy="keep local tensors on the stream: use_local_output=True in the plan of the layers that write to it")
    query, key_gain = run.parameters[plan.name]
    passage = Passage(plan.name, plan.boundaries, [path for path, _ in plan.sites], plan.additions, plan.eps,
                      plan.mix_scale == "sum")
    passage.trains = run.trains and (query.requires_grad or embedding.requires_grad)
    passage.inside = run.inside
    passage.over = in_backward()
    run.passages[plan.name] = passage
    # Its memory may be used again by the module that made it, as it may after the first addition.
    first = embedding if embedding.requires_grad else embedding.clone()
    return Stream(query, key_gain, (first,), None, passage, 0, embedding.new_empty(0))
