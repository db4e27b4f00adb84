"""Unfuse: replace opaque operators that add the stream and a branch, and norm the sum, by the plain addition and norm.

Matches: a call of an operator of any namespace with at least two floating-point tensors of one shape, every result of which
is the sum of some of them, or a layer or RMS norm of that sum over its last dimension (any order of arguments and results,
with or without weight, 1 + weight, bias). Results may be returned, or written over arguments that have no other name. Its
meaning is read off its schema and confirmed by running it on small random CPU tensors, values and gradients; the eps is one
of its float arguments or a usual constant. Replaces with: additions of two tensors, ``rms_norm``, ``layer_norm``. An
operator that cannot run this way, or computes something else, is left alone.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnres_fx.passes._compat.graphs import OpOverload, OpOverloadPacket, plain_torch, schema_of
from attnres_fx.passes._compat.symbols import known_int
from attnres_fx.passes.graph.aliases import changes_of, has_one_name, memory_of
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call
from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of
from attnres_fx.passes.graph.vocabulary import addition_of

aten = torch.ops.aten

# Operators of torch itself mean what the vocabulary says; collectives would wait for other processes.
_NOT_OPAQUE = frozenset({"aten", "prim", "prims", "attnres", "c10d", "_c10d_functional", "c10d_functional", "symm_mem",
                         "fsdp", "_dtensor", "inductor", "rngprims", "profiler", "quantized", "_quantized"})
_USUAL_EPS = (1e-6, 1e-5, 1e-8, 1e-12, 1e-7, 1e-3, torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps, 0.0)
# Small inputs show the eps, large ones that nothing else is added.
_SCALES = (1e-3, 1.0, 1e-6, 1e3)
_WIDEST = 1 << 16
_MOST_SUMMANDS = 4
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class _Call:
    """A call of an opaque operator: its arguments in the order of the schema, and where its results go."""

    node: fx.Node
    target: Any
    arguments: tuple[Any, ...]
    returned: int
    mutated: tuple[int, ...]
    width: int
    alike: tuple[int, ...]
    vectors: tuple[int, ...]

    def tensors(self) -> list[int]:
        return [index for index, given in enumerate(self.arguments) if isinstance(given, fx.Node)]

    def key(self) -> tuple[Any, ...]:
        """What the meaning depends on: equal for the same operator in every layer."""
        given = tuple((value_of(part).dtype, value_of(part).dim()) if isinstance(part, fx.Node) else repr(part)
                      for part in self.arguments)
        return self.target, given, self.alike, self.width


@dataclass(frozen=True)
class _Norm:
    """``kind`` of a sum over its last dimension; ``weight`` and ``bias`` are places in the schema."""

    kind: str
    eps: float
    weight: int | None = None
    offset: bool = False
    bias: int | None = None

    def of(self, total: Tensor, given: Sequence[Any]) -> Tensor:
        centred = total - total.mean(-1, keepdim=True) if self.kind == "layer_norm" else total
        result = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            result = result * (given[self.weight] + 1 if self.offset else given[self.weight])
        return result if self.bias is None else result + given[self.bias]


@dataclass(frozen=True)
class _Meaning:
    """Which arguments are summed, and what each result is: "sum", a norm of it, or None where it is neither."""

    summands: tuple[int, ...]
    results: tuple[_Norm | str | None, ...]


def unfuse(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place; returns the number of calls replaced."""
    meanings: dict[tuple[Any, ...], _Meaning | None] = {}
    order: dict[fx.Node, int] = {}
    replaced = 0
    for node in list(graph.nodes):
        call = _call_of(node)
        if call is None:
            continue
        key = call.key()
        if key not in meanings:
            meanings[key] = _meaning_of(call)
        meaning = meanings[key]
        order = order or {each: index for index, each in enumerate(graph.nodes)}
        if meaning is not None and _can_replace(call, meaning, order):
            _replace(call, meaning, order)
            replaced += 1
    return replaced


def _call_of(node: fx.Node) -> _Call | None:
    """``node`` as a call that may add and norm, judged by its schema and the traced shapes alone."""
    target = node.target
    if node.op != "call_function":
        return None
    if isinstance(target, OpOverloadPacket) and len(target.overloads()) == 1:
        target = getattr(target, target.overloads()[0])
    if not isinstance(target, OpOverload) or target.namespace in _NOT_OPAQUE:
        return None
    schema = schema_of(target)
    if node.is_impure() and not schema.is_mutable:
        return None  # a declared side effect beyond its arguments: it must run as often as the model runs it
    given: list[Any] = []
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            given.append(node.args[index])
        elif argument.name in node.kwargs:
            given.append(node.kwargs[argument.name])
        elif argument.has_default_value():
            given.append(argument.default_value)
        else:
            return None
    plain = (type(None), bool, int, float, str, torch.dtype, torch.device)
    if any(float_tensor(part) is None if isinstance(part, fx.Node) else not isinstance(part, plain) for part in given):
        return None
    if not (schema.returns or schema.is_mutable) or any(str(result.type) != "Tensor" for result in schema.returns):
        return None
    mutated = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    shapes = {index: value_of(part).shape for index, part in enumerate(given) if isinstance(part, fx.Node)}
    for shape in sorted(shapes.values(), key=len, reverse=True):
        alike = tuple(index for index, other in shapes.items() if same_size(other, shape))
        width = known_int(shape[-1]) if len(shape) >= 2 else None
        if 2 <= len(alike) <= _MOST_SUMMANDS and width is not None and 2 <= width <= _WIDEST:
            vectors = tuple(index for index, other in shapes.items() if same_size(other, (width,)))
            if len(alike) + len(vectors) == len(shapes):
                return _Call(node, target, tuple(given), len(schema.returns), mutated, width, alike, vectors)
    return None


def _meaning_of(call: _Call) -> _Meaning | None:
    """What the operator computes on random tensors of the traced dtypes, or None if that is something else."""
    half = (torch.float16, torch.bfloat16)
    traced = {index: value_of(call.arguments[index]).dtype for index in call.tensors()}
    exact = {index: torch.float32 if dtype in half else dtype for index, dtype in traced.items()}
    with plain_torch(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a gradient
        try:
            trials = [_Trial(call, exact, scale, seed) for seed, scale in enumerate(_SCALES)]
            found = _propose(call, trials[0])
            if found is None or not all(trial.agrees(found) for trial in trials) or not _same_gradients(call, exact, found):
                return None
            # In half precision the operator may do something else; it may differ by no more than its rounding.
            if exact != traced and not _Trial(call, traced, 1.0, 9).agrees(found):
                return None
        except Exception:  # any operator may fail on the CPU or on these sizes, with any error: it is left alone
            return None
    return found


class _Trial:
    """One run of the operator: ``given`` are its arguments before, ``results`` what it returns and writes."""

    def __init__(self, call: _Call, dtypes: dict[int, torch.dtype], scale: float, seed: int) -> None:
        self.call = call
        self.given: list[Any] = list(call.arguments)
        self.dtypes = dtypes
        generator = torch.Generator().manual_seed(seed)
        rank = value_of(call.arguments[call.alike[0]]).dim()
        for index, dtype in dtypes.items():
            if index in call.alike:
                drawn = scale * torch.randn((*(2 + i % 2 for i in range(rank - 1)), call.width), generator=generator)
                drawn.view(-1, call.width)[0] = 0
            else:
                drawn = 1 + 0.4 * torch.randn(call.width, generator=generator)
            self.given[index] = drawn.to(dtype)
        copies = [part.clone() if isinstance(part, Tensor) else part for part in self.given]
        with torch.no_grad():
            self.results = run_on(call, copies)

    def agrees(self, meaning: _Meaning) -> bool:
        total = self.total(meaning.summands)
        wide = [part.to(total.dtype) if isinstance(part, Tensor) else part for part in self.given]
        return all(self.near(result, total if isinstance(expected, str) else expected.of(total, wide))
                   for result, expected in zip(self.results, meaning.results) if expected is not None)

    def total(self, summands: Sequence[int]) -> Tensor:
        """The sum, in double precision."""
        return torch.stack([self.given[index].double() for index in summands]).sum(0)

    def near(self, result: Tensor, expected: Tensor) -> bool:
        tolerance = max(_TOLERANCES[dtype] for dtype in (*self.dtypes.values(), result.dtype))
        size = float(expected.abs().max())
        return result.shape == expected.shape and bool(((result.double() - expected).abs() <= tolerance * size).all())


def run_on(call: _Call, given: list[Any]) -> list[Tensor]:
    """The returned tensors of the operator, then those that it writes."""
    made = call.target(*given)
    returned = [] if call.returned == 0 else list(made) if isinstance(made, (tuple, list)) else [made]
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in returned):
        raise TypeError("a result is not a floating-point tensor")
    return [*returned, *(given[index] for index in call.mutated)]


def _propose(call: _Call, trial: _Trial) -> _Meaning | None:
    """The sum, and what every result of one trial is of it."""
    for count in range(2, len(call.alike) + 1):
        for summands in itertools.combinations(call.alike, count):
            total = trial.total(summands)
            results: list[_Norm | str | None] = []
            for result in trial.results:
                norms = (norm for norm in _norms(call) if trial.near(result, norm.of(total, [
                    part.double() if isinstance(part, Tensor) else part for part in trial.given])))
                results.append("sum" if trial.near(result, total) else next(norms, None)
                               if result.shape == total.shape else None)
            if any(result is not None for result in results):
                return _Meaning(summands, tuple(results))
    return None


def _norms(call: _Call) -> Iterator[_Norm]:
    given = [part for part in call.arguments if isinstance(part, float) and 0 <= part < 0.1]
    for eps in dict.fromkeys((*given, *_USUAL_EPS)):
        for kind in ("rms_norm", "layer_norm"):
            for weight in (*call.vectors, None):
                for offset in (False, True) if weight is not None else (False,):
                    for bias in (None, *(index for index in call.vectors if index != weight)):
                        yield _Norm(kind, eps, weight, offset, bias)


def _same_gradients(call: _Call, dtypes: dict[int, torch.dtype], meaning: _Meaning) -> bool:
    """Whether the operator's gradients, if it has any, are those of the plain sum and norm."""
    if call.mutated:
        return True  # a change in place by an opaque operator has no gradient
    trial = _Trial(call, dtypes, 1.0, 5)
    leaves = [trial.given[index].requires_grad_() for index in call.tensors()]
    made = run_on(call, [part.clone() if isinstance(part, Tensor) else part for part in trial.given])
    known = [(result, expected) for result, expected in zip(made, meaning.results) if expected is not None]
    if not any(result.requires_grad for result, _ in known):
        return True
    total = trial.total(meaning.summands)
    plain = [total if isinstance(expected, str) else expected.of(total, trial.given) for _, expected in known]
    weights = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double() for i, p in enumerate(plain)]
    try:
        ours = torch.autograd.grad([result.double() for result, _ in known if result.requires_grad], leaves,
                                   [w for (result, _), w in zip(known, weights) if result.requires_grad], allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return True  # it has no gradient formula, so there is nothing to preserve
    theirs = torch.autograd.grad(plain, leaves, weights, allow_unused=True)
    if all(gradient is None for gradient in ours):
        return True
    return all(a is None and b is None if a is None or b is None else trial.near(10 * a, 10 * b.double())
               for a, b in zip(ours, theirs))


def _can_replace(call: _Call, meaning: _Meaning, order: dict[fx.Node, int]) -> bool:
    """Whether every result that is read is known, and what is written in place is not visible under another name."""
    kinds = meaning.results
    if call.returned == 1 and call.node.users and kinds[0] is None:
        return False
    if call.returned > 1 and any(
            user.target is not operator.getitem or not isinstance(user.args[1], int)
            or (kinds[user.args[1]] is None and user.users) for user in call.node.users):
        return False
    if any(kind is None for kind in kinds[call.returned:]):
        return False
    roots = [memory_of(call.arguments[index]) for index in call.tensors()]
    return not call.mutated or (len(set(roots)) == len(roots) and all(
        has_one_name(call.arguments[index], call.node, order) for index in call.mutated))


def _replace(call: _Call, meaning: _Meaning, order: dict[fx.Node, int]) -> None:
    graph, node = call.node.graph, call.node
    names: dict[int, list[fx.Node]] = {0: [node]} if call.returned == 1 else {}
    for user in node.users if call.returned > 1 else ():
        names.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
    dtypes = [value_of(names[i][0]).dtype if i in names else None for i in range(call.returned)]
    dtypes += [value_of(call.arguments[index]).dtype for index in call.mutated]
    # The readers of each result. An unread result is not made: it would be one more reader of the sum.
    readers = [[(name, user) for name in names.get(i, ()) for user in name.users] for i in range(call.returned)]
    readers += [[(target, user) for user in target.users if order.get(user, -1) > order[node]]
                for target in (call.arguments[index] for index in call.mutated)]
    with graph.inserting_before(node):
        kept = [dtype for dtype, kind in zip(dtypes, meaning.results) if kind == "sum" and dtype is not None]
        total = _sum(call, meaning, kept[0] if kept else None)
        for kind, dtype, reading in zip(meaning.results, dtypes, readers):
            if reading and kind is not None:
                made = _cast(total if isinstance(kind, str) else _norm(call, total, kind), dtype, node)
                for name, user in reading:
                    user.replace_input_with(name, made)
    for each in [name for listed in names.values() for name in listed if name is not node] + [node]:
        graph.erase_node(each)


def _sum(call: _Call, meaning: _Meaning, dtype: torch.dtype | None) -> fx.Node:
    parts = [call.arguments[index] for index in meaning.summands]
    if dtype is not None:
        promoted = value_of(parts[0]).dtype
        for part in parts[1:]:
            promoted = torch.promote_types(promoted, value_of(part).dtype)
        if torch.promote_types(promoted, dtype) != promoted:
            parts[0] = _cast(parts[0], dtype, call.node)
    total = parts[0]
    for part in parts[1:]:
        total = _add(total, part, call.node)
    return total if dtype is None else _cast(total, dtype, call.node)


def _add(left: fx.Node, right: fx.Node, like: fx.Node) -> fx.Node:
    """``left + right``, which is also what plain additions of the two that the model makes beside the norm read."""
    total = insert_call(like.graph, aten.add.Tensor, (left, right), like=like)
    if not changes_of(left) and not changes_of(right):
        for user in list(left.users):
            found = addition_of(user)
            if user is total or found is None or found.alpha != 1 or {found.left, found.right} != {left, right}:
                continue
            first, second = (user, total) if user < total else (total, user)
            if value_of(user).dtype == value_of(total).dtype:
                second.replace_all_uses_with(first)
                like.graph.erase_node(second)
                total = first
    return total


def _norm(call: _Call, total: fx.Node, norm: _Norm) -> fx.Node:
    """The norm of ``total``, in float32 at least and in the wider of its dtype and the weights'."""
    graph, like = call.node.graph, call.node
    vectors = [None if index is None else call.arguments[index] for index in (norm.weight, norm.bias)]
    wide = torch.promote_types(torch.float32, value_of(total).dtype)
    for vector in vectors:
        wide = wide if vector is None else torch.promote_types(wide, value_of(vector).dtype)
    total = _cast(total, wide, like)
    weight, bias = (None if vector is None else _cast(vector, wide, like) for vector in vectors)
    if norm.offset:
        weight = insert_call(graph, aten.add.Tensor, (weight, 1), like=like)
    if norm.kind == "layer_norm":
        return insert_call(graph, aten.layer_norm.default, (total, [call.width], weight, bias, norm.eps), like=like)
    made = insert_call(graph, aten.rms_norm.default, (total, [call.width], weight, norm.eps), like=like)
    return made if bias is None else insert_call(graph, aten.add.Tensor, (made, bias), like=like)


def _cast(node: fx.Node, dtype: torch.dtype | None, like: fx.Node) -> fx.Node:
    if dtype is None or value_of(node).dtype == dtype:
        return node
    return insert_call(node.graph, aten.to.dtype, (node, dtype), like=like)
