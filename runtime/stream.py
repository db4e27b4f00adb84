"""The residual stream as a value: Attention Residuals where no graph of the whole model can be had.

A :class:`Stream` stands for the hidden states between the layers of a converted model. Adding a layer's output to it gives
the stream after that layer (Eq. 5); reading it by any other operation gives the mix of its position (Eq. 6), in the place
of the sum that the plain network has there. Layers, norms and attention stay as they are.

Which additions are layers is what the conversion recorded: so many additions a layer, each in its module. One that has no
place there raises. What only passes the stream on (a reshape, a cast, a copy) gives the stream again.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._compat import OpOverload, OpOverloadPacket, inside_autograd_function, saved_tensor_hooks
from .errors import SitesChangedError, SplitStreamError
from .mix import MIX
from .passage import Passage, running_module

BY_VALUE = "_attnres_by_value"  # on an owner that runs by value
BY_GRAPH = "_attnres_by_graph"  # on an owner that does not, since a call of it could not
ENTRY = "_attnres_entry"  # on the module that is handed b_0: which owner called it last
SITE = "_attnres_site"  # on a module in which layers end: their paths below the owner of the stream


@dataclass(eq=False, repr=False)
class Step:
    """A pass-through on the stream: ``function(value, *args, **kwargs)``, and how a term is brought back before it."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    undo: Callable[[Tensor], Tensor] | None  # None: the layout stays


@dataclass(eq=False, repr=False)
class Stream:
    """The stream at ``position`` layers.

    ``query`` and ``key_gain`` [L+1, d] are the parameters of this call. ``blocks`` are the embedding b_0 and the complete
    blocks, ``partial`` the sum of the block that is open, all of one shape [..., d]. ``like`` is an empty tensor of the
    dtype that the plain sum has here: what casts all tensors of a dataclass casts it too. ``steps`` lead from the layout of
    b_0 to the one in which the stream is handed on. ``terms`` is the sum of what the layer under way has added so far, by
    ``added`` additions.

    A dataclass, since fully_shard looks into dataclasses for what needs a gradient.
    """

    query: Tensor
    key_gain: Tensor | None
    blocks: tuple[Tensor, ...]
    partial: Tensor | None
    passage: Passage
    position: int
    like: Tensor
    steps: tuple[Step, ...] = ()
    terms: Tensor | None = None
    added: int = 0

    # ------------------------------------------------------------------------------------------------------------ reading
    def value(self) -> Tensor:
        """What a reader of this position reads: the mix, brought forward through ``steps``; one for all its readers."""
        if torch.compiler.is_dynamo_compiling():
            return self._read()
        self._check_gradient()
        key = (saved_tensor_hooks(),) if torch.is_grad_enabled() else None
        kept = self.__dict__.get("_kept")
        if kept is not None and kept[0] == key:
            found: Tensor = kept[1]
            return found
        made = self._read()
        self.__dict__["_kept"] = key, made
        return made

    def _read(self) -> Tensor:
        value = self._mix()
        if not torch.compiler.is_dynamo_compiling():
            self.passage.was_read = True
        if self.terms is not None:
            value = value + self.terms
        for step in self.steps:
            value = step.function(value, *step.args, **step.kwargs)
        return value

    def _mix(self) -> Tensor:
        """Eq. 6."""
        if self.position == 0:
            return self.blocks[0]
        sources = [*self.blocks] if self.partial is None else [*self.blocks, self.partial]
        gain = None if self.key_gain is None else self.key_gain[self.position]
        factor = float(len(sources)) if self.passage.summed else 1.0
        mixed: Tensor = MIX(sources, self.query[self.position], gain, self.passage.eps, 1.0, False, factor)
        return mixed if mixed.dtype == self.like.dtype else mixed.to(self.like.dtype)

    # ------------------------------------------------------------------------------------------------------------- adding
    def plus(self, term: Tensor) -> Stream:
        """The stream after the addition of ``term``: Eq. 5 if it completes a layer."""
        passage, position = self.passage, self.position + 1
        if not torch.compiler.is_dynamo_compiling():
            self._check_place(position)
            self._check_gradient()
        if not passage.over and passage.reached >= position:
            raise SitesChangedError(
                f"stream '{passage.name}' is continued twice from {self.position} layers on",
                remedy="call the model as it was converted")
        if position > passage.num_layers:
            raise SitesChangedError(f"something is added to stream '{passage.name}' after its last layer",
                                    remedy="call the model as it was converted")
        dtype = torch.promote_types(self.dtype, term.dtype)
        like = self.like if dtype == self.like.dtype else self.like.to(dtype)
        layout = tuple(step for step in self.steps if step.undo is not None)
        if layout or term.shape != self.blocks[0].shape:
            term = term.expand(self.shape)
        for step in reversed(layout):
            term = step.undo(term)  # type: ignore[misc]
        terms = term if self.terms is None else self.terms + term
        self.__dict__.pop("_kept", None)
        if self.added + 1 < passage.additions[position - 1]:
            return replace(self, terms=terms, added=self.added + 1, like=like, steps=layout)
        if self.partial is not None:
            partial = self.partial + terms
        elif terms.dtype == dtype and not terms.requires_grad:
            partial = terms.clone()  # whose memory the layer may use again, as it may after x + terms; autograd would notice
        else:
            partial = terms.to(dtype)
        passage.reached = position
        closes = position in passage.boundaries
        return Stream(self.query, self.key_gain, (*self.blocks, partial) if closes else self.blocks,
                      None if closes else partial, passage, position, like, layout)

    def plus_in_place(self, term: Tensor) -> Stream:
        """``x += term``: whoever holds this object reads the sum."""
        after = self.plus(term)
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(after, name))
        return self

    def _check_place(self, position: int) -> None:
        """Raise unless the module that runs is the one in which the layer ends at ``position``."""
        passage = self.passage
        running = running_module()
        marked = () if running is None else running.__dict__.get(SITE, ())
        if position > passage.num_layers or passage.sites[position - 1] not in marked:
            expected = "none" if position > passage.num_layers else f"'{passage.sites[position - 1] or 'the owner itself'}'"
            raise SitesChangedError(
                f"stream '{passage.name}' is added to in a {type(running).__name__} after {self.position} layers, where the "
                f"conversion recorded no layer (the next: {expected})", remedy="call the model as it was converted, and "
                "leave the hidden states between layers as they are; if the layers of the model changed, convert it again")

    def _check_gradient(self) -> None:
        """Raise where the gradient of the stream would be lost: within a function whose input it is no tensor of, or behind
        layers that have run without one.
        """
        passage = self.passage
        if not passage.trains:
            return
        if not passage.inside and inside_autograd_function():
            raise SplitStreamError(
                f"stream '{passage.name}' is read or added to within a torch.autograd.Function, which could not return its "
                "gradient", remedy="checkpoint with use_reentrant=False; hand a function of your own a tensor, the result "
                "of an operation on the hidden states such as x.clone()")
        latest = self.blocks[-1] if self.partial is None else self.partial
        if self.position > 1 and torch.is_grad_enabled() and not latest.requires_grad:
            raise SplitStreamError(
                f"the layers of stream '{passage.name}' before position {self.position} have run without gradients, and "
                "what follows is to have them", remedy="freeze parameters with requires_grad_(False) instead of running "
                "layers under torch.no_grad(); checkpoint with use_reentrant=False")

    # -------------------------------------------------------------------------------------------------------- as a tensor
    @property
    def shape(self) -> torch.Size:
        return self.value().shape if any(step.undo is not None for step in self.steps) else self.blocks[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.value().dtype if self.steps else self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device

    @property
    def requires_grad(self) -> bool:
        return any(source.requires_grad for source in (*self.blocks, self.partial, self.query) if source is not None)

    @property
    def data(self) -> Tensor:
        return self.value().data

    @property
    def grad(self) -> Tensor | None:
        return self.value().grad

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_") and callable(getattr(Tensor, name, None)):
            raise _written(self, name)
        return getattr(self.value(), name)

    def __repr__(self) -> str:
        return f"<stream '{self.passage.name}' after {self.position} of {self.passage.num_layers} layers>"

    def __add__(self, other: Any) -> Any:
        return _added(self, other)

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Any:
        return self.plus_in_place(other) if _is_term(other) else _added(self, other)

    def add(self, other: Any, *, alpha: Any = 1) -> Any:
        return _added(self, other, alpha)

    def add_(self, other: Any, *, alpha: Any = 1) -> Any:
        if not _is_term(other):
            raise _written(self, "add_")
        return self.plus_in_place(other if alpha == 1 else other * alpha)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "") if _is_of_torch(function) else ""
        if name in _ADDITIONS and not kwargs.keys() - {"alpha", "input", "self", "other"}:
            left = args[0] if args else kwargs.get("input", kwargs.get("self"))
            right = args[1] if len(args) > 1 else kwargs.get("other")
            alpha = kwargs.get("alpha", 1)
            if isinstance(left, Stream):
                if name in _IN_PLACE:
                    return left.add_(right, alpha=alpha)
                return _added(left, right, alpha)
            if alpha == 1 and isinstance(left, Tensor) and _is_term(left) and isinstance(right, Stream):
                return right.plus(left)
        if name == "dropout" and args and isinstance(args[0], Stream) and not _active(*args[1:], **kwargs):
            return args[0]
        if name in _THROUGH and args and isinstance(args[0], Stream):
            return _through(args[0], name, function, args[1:], kwargs)
        if args and isinstance(args[0], Stream) and ((name[-1:] == "_" != name[-2:-1]) or name in _WRITES):
            raise _written(args[0], name)
        return function(*read(args), **read(kwargs))


def read(value: Any) -> Any:
    """``value`` with what is read in place of every stream in it, in lists, tuples and dictionaries too."""
    if isinstance(value, Stream):
        return value.value()
    if type(value) in (list, tuple):
        return type(value)([read(item) for item in value])
    if type(value) is dict:
        return {key: read(item) for key, item in value.items()}
    return value


_ADDITIONS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
_IN_PLACE = frozenset({"add_", "__iadd__"})
_WRITES = frozenset({"__setitem__"})
_SETTINGS = (torch.dtype, bool, type(None), torch.memory_format)
_FIXED = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type_as"})
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"})
_PERMUTES = frozenset({"transpose", "swapaxes", "swapdims", "t", "permute", "movedim", "moveaxis"})
_THROUGH = _CASTS | _RESHAPES | _PERMUTES | {"clone", "contiguous"}


def _is_of_torch(function: Any) -> bool:
    """Whether ``function`` is torch's own: an operator of another library may be called "add", too."""
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        return str(function).startswith("aten.")
    return str(getattr(function, "__module__", None) or "torch").split(".")[0] == "torch"


def _is_term(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _added(stream: Stream, other: Any, alpha: Any = 1) -> Any:
    if isinstance(other, (int, float)) and other == 0:  # sum([...]) starts from it
        return stream
    if _is_term(other):
        return stream.plus(other if alpha == 1 else other * alpha)
    if isinstance(other, Stream):
        raise SitesChangedError(f"stream '{stream.passage.name}' is added to stream '{other.passage.name}'",
                                remedy="call the model as it was converted")
    return torch.add(stream.value(), other, alpha=alpha)


def _active(p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and p > 0


def _through(stream: Stream, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stream handed on by a pass-through."""
    if not stream.steps and stream.like.dtype == _FIXED.get(name) and not args and not kwargs:
        return stream if stream.terms is None else function(stream.value())
    args, kwargs = read(args), read(kwargs)
    if stream.terms is not None:
        return function(stream.value(), *args, **kwargs)
    if name == "clone":
        return replace(stream)  # which may be added to in place, and the stream not
    if name == "contiguous":
        return stream
    if name in _CASTS:
        dtype, device = _cast(function, stream.dtype, stream.device, args, kwargs)
        if device != stream.device or not dtype.is_floating_point:
            return function(stream.value(), *args, **kwargs)
        return stream if dtype == stream.dtype else _stepped(stream, Step(function, args, kwargs, None))
    before = stream.shape
    undo: Callable[[Tensor], Tensor]
    if name in _RESHAPES:
        like = name in ("view_as", "reshape_as")
        after = args[0].shape if like else function(torch.empty(before, device="meta"), *args, **kwargs).shape
        if after == before:
            return stream

        def undo(term: Tensor) -> Tensor:
            return term.reshape(before)
    else:
        order = function(torch.empty(tuple(range(2, len(before) + 2)), device="meta"), *args, **kwargs).shape
        back = [[size - 2 for size in order].index(dim) for dim in range(len(before))]

        def undo(term: Tensor) -> Tensor:
            return term.permute(back)
    return _stepped(stream, Step(function, args, kwargs, undo))


def _cast(
    function: Any, dtype: torch.dtype, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.dtype, torch.device]:
    """What the cast ``function`` makes of a tensor of ``dtype`` on ``device``."""
    if torch.compiler.is_dynamo_compiling() or not all(isinstance(value, _SETTINGS) for value in (*args, *kwargs.values())):
        probe = function(torch.empty(0, dtype=dtype, device=device), *args, **kwargs)
        return probe.dtype, probe.device
    return _known_cast(function, dtype, device, args, tuple(kwargs.items()))


@functools.lru_cache(maxsize=1024)
def _known_cast(
    function: Any, dtype: torch.dtype, device: torch.device, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> tuple[torch.dtype, torch.device]:
    probe = function(torch.empty(0, dtype=dtype, device=device), *args, **dict(kwargs))
    return probe.dtype, probe.device


def _stepped(stream: Stream, step: Step) -> Stream:
    return replace(stream, steps=(*stream.steps, step))


def _written(stream: Stream, name: str) -> SitesChangedError:
    return SitesChangedError(f"'{name}' writes into stream '{stream.passage.name}', which is no addition of a layer",
                             remedy="write into a copy of the hidden states")


def _reading(name: str) -> Callable[..., Any]:
    function = getattr(operator, name, None)

    def method(self: Stream, *args: Any) -> Any:
        return (function or getattr(Tensor, name))(self.value(), *read(args))

    method.__name__ = name
    return method


def _passing(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def method(self: Stream, *args: Any, **kwargs: Any) -> Any:
        return _through(self, name, function, args, kwargs)

    method.__name__ = name
    return method


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: Stream, *args: Any) -> Any:
        raise _written(self, name)

    method.__name__ = name
    return method


def _methods() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in ("sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow"):
        yield f"__{name}__", _reading(f"__{name}__")
        yield f"__r{name}__", _reading(f"__r{name}__")
        yield f"__i{name}__", _refusing(f"__i{name}__")
    for name in ("neg", "pos", "abs", "invert", "getitem", "lt", "le", "gt", "ge", "eq", "ne"):
        yield f"__{name}__", _reading(f"__{name}__")
    for name in ("len", "iter", "bool", "float", "int", "index", "contains", "array"):
        yield f"__{name}__", _reading(f"__{name}__")
    yield "__setitem__", _refusing("__setitem__")
    for name in _THROUGH:
        yield name, _passing(name)


for _name, _method in _methods():
    setattr(Stream, _name, _method)
Stream.__hash__ = object.__hash__  # type: ignore[method-assign]
