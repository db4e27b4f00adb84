"""A conformance suite for implementations of the depth mix: point it at any callable and see what it gets wrong.

    from attnres_fx.conformance import Implementation, failures
    print(failures(Implementation("mine", my_mix)))          # [] if it conforms

``my_mix(sources, query, key_gain, eps=...)`` takes a list of [..., d] tensors, a query [d] and a key gain ([d] or None)
and returns [..., d]; what else it supports (a logit scale, normalised values, several queries, ...) is declared in the
fields of :class:`Implementation`, and only that is tested. The oracle is written here, in float64: it stacks the sources and
differentiates by autograd, and shares no code with the project. Under pytest, parametrize over ``CHECKS``:

    @pytest.mark.parametrize("check", CHECKS, ids=str)
    def test_mine(check): check.run(Implementation("mine", my_mix))

On the command line it is ``attnres conformance module:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnres_fx.runtime.mix import mix

Mix = Callable[..., Tensor]
HALF = (torch.bfloat16, torch.float16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
OPTIONS = ("logit_scale", "normalize_values", "output_factor")
# Half a unit in the last place of the storage dtype; for the wide dtypes, a few roundings of the statistics.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21, torch.float64: 2.0**-46}


@dataclass(frozen=True)
class Implementation:
    """A mix to be tested, and what it claims to support.

    options: the keyword arguments it takes beside eps, of logit_scale, normalize_values, output_factor.
    dtypes: of the sources. queries: whether a query [M, d] gives M mixes [M, ..., d]. gradients: whether it is
    differentiable. strides: whether sources may be non-contiguous. empty: whether leading dimensions may be empty.
    deterministic: whether the same call gives the same bits twice.
    """

    name: str
    mix: Mix
    options: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    queries: bool = False
    gradients: bool = True
    strides: bool = True
    empty: bool = True
    deterministic: bool = True


@dataclass(frozen=True)
class Case:
    """One call: ``count`` sources of ``shape``, and how they are made."""

    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    queries: int | None = None
    gain: str | None = "same"  # None, "one" ([d]) or "same" (the query's shape)
    layout: str = "dense"  # a key of LAYOUTS
    eps: float = 1e-6
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"n{self.count}", "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += [f"M{self.queries}"] * (self.queries is not None) + [f"gain-{self.gain}"] * (self.gain != "same")
        parts += [self.layout] * (self.layout != "dense") + [f"eps{self.eps}"] * (self.eps != 1e-6)
        return "-".join([*parts, *(f"{key}={value}" for key, value in self.options.items())])


def oracle(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float, logit_scale: float = 1.0,
           normalize_values: bool = False, output_factor: float = 1.0) -> Tensor:
    """Eq. 2-4 of the paper in float64, with the family's options."""
    if query.ndim == 2:
        gains = [None] * len(query) if key_gain is None else list(key_gain.expand_as(query))
        return torch.stack([oracle(sources, q, g, eps, logit_scale, normalize_values, output_factor)
                            for q, g in zip(query, gains, strict=True)])
    values = torch.stack([source.double() for source in sources])
    keys = values / (values.square().mean(-1, keepdim=True) + eps).sqrt()
    if key_gain is not None:
        keys = keys * key_gain.double()
    weights = torch.softmax(logit_scale * (keys * query.double()).sum(-1), dim=0)
    return output_factor * (weights.unsqueeze(-1) * (keys if normalize_values else values)).sum(0)


def _permuted(value: Tensor) -> Tensor:
    """The same values with the leading dimensions in the opposite order in memory."""
    order = [*reversed(range(value.ndim - 1)), value.ndim - 1]
    return value.permute(order).contiguous().permute(order)


def _strided(value: Tensor) -> Tensor:
    """The same values, every second element of a wider row."""
    wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 3), float("nan"))
    wide[..., 1 : 2 * value.shape[-1] : 2] = value
    return wide[..., 1 : 2 * value.shape[-1] : 2]


def _sliced(value: Tensor) -> Tensor:
    """The same values as the middle of wider rows, off any alignment, with poison on both sides."""
    wide = value.new_full((*value.shape[:-1], value.shape[-1] + 7), float("nan"))
    wide[..., 3:-4] = value
    return wide[..., 3:-4]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda value: value,
    "permuted": _permuted,
    "strided": _strided,
    "sliced": _sliced,
    "columns": lambda value: value.mT.contiguous().mT if value.ndim > 1 else value,
    "expanded-rows": lambda value: value[:1].expand(value.shape) if value.ndim > 1 else value,
    "expanded-columns": lambda value: value[..., :1].expand(value.shape),
}


def make(case: Case) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The arguments of a case; the same numbers every time."""
    generator = torch.Generator().manual_seed(case.count * 7919 + sum(case.shape))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sources = [LAYOUTS[case.layout](((0.5 + i % 3) * normal(*case.shape)).to(case.dtype)) for i in range(case.count)]
    width = case.shape[-1]
    parameters = torch.float64 if case.dtype == torch.float64 else torch.float32
    query = (2 * normal(*([case.queries] if case.queries else []), width) / width**0.5).to(parameters)
    if case.gain is None:
        return sources, query, None
    return sources, query, (1 + 0.3 * normal(*(query.shape if case.gain == "same" else (width,)))).to(parameters)


def call(it: Implementation, case: Case, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None) -> Tensor:
    return it.mix(list(sources), query, key_gain, eps=case.eps, **case.options)


def gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        return list(torch.autograd.grad(function(*leaves), leaves, cotangent))


def _hold(condition: bool, message: str) -> None:
    """Raise AssertionError with ``message`` unless the condition holds, however Python was started."""
    if not condition:
        raise AssertionError(message)


def largest(*tensors: Tensor) -> float:
    return max((tensor.detach().double().abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


def check_values(it: Implementation, case: Case) -> None:
    """Shape, dtype and values of the result; the arguments are left alone and the result is new memory."""
    sources, query, key_gain = make(case)
    before = [source.clone() for source in sources]
    got = call(it, case, sources, query, key_gain)
    want = oracle(sources, query, key_gain, case.eps, **case.options)
    _hold(got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    _hold(got.dtype == case.dtype, f"dtype {got.dtype}, expected {case.dtype}")
    error = largest(got.double() - want)
    _hold(error <= 8 * ROUNDING[case.dtype] * largest(want), f"off by {error:.2e}, of {largest(want):.2e}")
    _hold(all(torch.equal(a, b) for a, b in zip(sources, before, strict=True)), "a source was changed")
    _hold(all(got.data_ptr() != source.data_ptr() for source in sources if got.numel()), "the result is a source")


def check_gradients(it: Implementation, case: Case) -> None:
    """All gradients: of every source, the query and the gain, each in the shape and dtype of its tensor."""
    sources, query, key_gain = make(case)
    tensors = [*sources, query] + ([] if key_gain is None else [key_gain])

    def unpacked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: function(list(t[: case.count]), t[case.count], None if key_gain is None else t[-1])

    shape = call(it, case, sources, query, key_gain).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    got = gradients(unpacked(lambda s, q, g: call(it, case, s, q, g)), tensors, cotangent)
    want = gradients(unpacked(lambda s, q, g: oracle(s, q, g, case.eps, **case.options)),
                     [tensor.double() for tensor in tensors], cotangent.double())
    # Rounding is relative to the terms of a gradient, which may cancel (at d = 1 they all do), not to their sum.
    statistics = torch.float64 if case.dtype == torch.float64 else torch.float32
    inverse = [(source.double().square().mean(-1) + case.eps).rsqrt() for source in sources]
    terms = abs(case.options.get("output_factor", 1.0)) * largest(cotangent) * max(cotangent.numel(), 1) ** 0.5
    terms *= (1 + largest(*tensors[case.count:])) ** 2 * (1 + largest(*sources)) * (1 + largest(*inverse))
    names = [*(f"source {i}" for i in range(case.count)), "the query", "the gain"]
    for name, tensor, a, b in zip(names, tensors, got, want):
        _hold(a.shape == tensor.shape, f"the gradient of {name} has the shape {tuple(a.shape)}")
        _hold(a.dtype == tensor.dtype, f"the gradient of {name} is {a.dtype}, not {tensor.dtype}")
        error, bound = largest(a.double() - b), 4 * ROUNDING[statistics] * terms + 2 * ROUNDING[tensor.dtype] * largest(b)
        _hold(error <= bound, f"the gradient of {name} is off by {error:.2e}, of {largest(b):.2e}")


def check_poison(it: Implementation, case: Case) -> None:
    """Memory that was full of NaN just before does not show in the results: every element of every result is written."""
    sources, query, key_gain = make(case)
    want = call(it, case, sources, query, key_gain)
    for _ in range(3):
        # The allocator hands freed blocks of a size out again, so that these are likely to become the results.
        poison = [torch.full_like(want, float("nan")) for _ in range(case.count + 4)]
        del poison
        _hold(torch.equal(call(it, case, sources, query, key_gain), want), "the result depends on what memory held")
        if it.gradients:
            grads = gradients(lambda *s: call(it, case, s, query, key_gain), sources, torch.ones_like(want))
            _hold(all(grad.isfinite().all() for grad in grads), "a gradient is not written everywhere")


def check_changed_inputs(it: Implementation, case: Case) -> None:
    """A second call on the same tensors with other contents sees the other contents."""
    sources, query, key_gain = make(case)
    call(it, case, sources, query, key_gain)
    for number, tensor in enumerate([*sources, query] + ([] if key_gain is None else [key_gain])):
        tensor.mul_(-0.5 - number % 2)
        got, want = call(it, case, sources, query, key_gain), oracle(sources, query, key_gain, case.eps, **case.options)
        _hold(largest(got.double() - want) <= 8 * ROUNDING[case.dtype] * largest(want), f"stale after change {number}")


def check_determinism(it: Implementation, case: Case) -> None:
    """The same bits twice, forward and backward."""
    sources, query, key_gain = make(case)
    tensors = [*sources, query] + ([] if key_gain is None else [key_gain])

    def function(*t: Tensor) -> Tensor:
        return call(it, case, t[: case.count], t[case.count], None if key_gain is None else t[-1])

    first, again = function(*tensors), function(*tensors)
    _hold(torch.equal(first, again), "the result differs between two equal calls")
    if it.gradients:
        runs = [gradients(function, tensors, torch.ones_like(first)) for _ in range(2)]
        _hold(all(torch.equal(a, b) for a, b in zip(*runs)), "a gradient differs between two equal calls")


def check_one_source(it: Implementation, case: Case) -> None:
    """A mix of one source is that source, bit for bit, whatever the query is."""
    sources, query, key_gain = make(case)
    _hold(torch.equal(call(it, case, sources, query, key_gain), sources[0]), "the result is not the source")


def check_zero_row(it: Implementation, case: Case) -> None:
    """A row of zeros has a logit of zero, and NaN only with eps = 0; no other position is touched."""
    sources, query, key_gain = make(case)
    sources[0][0] = 0
    got, want = call(it, case, sources, query, key_gain), oracle(sources, query, key_gain, case.eps)
    _hold(torch.equal(got.isnan(), want.isnan()), "NaN where it does not belong, or none where it does")
    finite = ~want.isnan()
    error = largest(got[finite].double() - want[finite])
    _hold(error <= 8 * ROUNDING[case.dtype] * largest(want[finite]), f"off by {error:.2e} beside a row of zeros")


@dataclass(frozen=True)
class Check:
    """A function above on one case."""

    function: Callable[[Implementation, Case], None]
    case: Case

    def __str__(self) -> str:
        return f"{self.function.__name__.removeprefix('check_')}-{self.case}"

    def applies(self, it: Implementation) -> bool:
        case = self.case
        return (case.dtype in it.dtypes and set(case.options) <= it.options and (it.queries or case.queries is None)
                and (it.strides or case.layout == "dense") and (it.empty or 0 not in case.shape)
                and (it.gradients or self.function is not check_gradients)
                and (it.deterministic or self.function is not check_determinism))

    def run(self, it: Implementation) -> None:
        """Raises AssertionError, or what the implementation raises."""
        self.function(it, self.case)


def _cases() -> Iterator[Case]:
    every = (torch.float32, *HALF, torch.float64)
    yield from (Case(count, (2, 3, 48)) for count in (2, 3, 9, 32, 33, 64, 65, 128))
    yield from (Case(4, shape, dtype) for shape in ((7,), (1, 1), (5, 1), (3, 33), (1, 1000), (2, 3, 1000), (1, 8192))
                for dtype in every)
    yield from (Case(9, (2, 2, 3, 64), dtype, layout=layout) for layout in LAYOUTS if layout != "dense"
                for dtype in (torch.float32, torch.bfloat16))
    yield from (Case(3, shape) for shape in ((0, 8), (2, 0, 8)))
    yield from (Case(9, (40, 96), dtype, gain=None) for dtype in every)
    yield from (Case(3, (5, 20), eps=eps) for eps in (1e-5, 0.1))
    family: list[dict[str, Any]] = [{"logit_scale": 0.25}, {"output_factor": 3.0}, {"normalize_values": True}, {
        "logit_scale": -1.5, "normalize_values": True, "output_factor": 0.5}]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for queries, gain in ((None, "same"), (None, None), (1, "one"), (3, "one"), (3, "same"), (5, None)):
            yield from (Case(5, (2, 3, 40), dtype, queries, gain, options=options) for options in family)
            if queries is not None:
                yield Case(5, (2, 3, 40), dtype, queries, gain)


CHECKS: tuple[Check, ...] = (
    *(Check(function, case) for case in _cases() for function in (check_values, check_gradients)),
    *(Check(function, Case(9, (33, 100), dtype)) for dtype in (torch.float32, torch.bfloat16)
      for function in (check_poison, check_changed_inputs, check_determinism)),
    Check(check_determinism, Case(9, (300, 256))),
    Check(check_one_source, Case(1, (3, 20))), Check(check_one_source, Case(1, (3, 20), torch.bfloat16)),
    Check(check_zero_row, Case(3, (4, 20))), Check(check_zero_row, Case(3, (4, 20), eps=0.0)),
)


def failures(it: Implementation) -> list[tuple[str, str]]:
    """Every check that applies and fails: its name, and the first line of its message."""
    found = []
    for check in CHECKS:
        if check.applies(it):
            try:
                check.run(it)
            except Exception as error:  # an implementation may fail in any way it likes; all of them are findings
                found.append((str(check), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
    return found


def ours() -> Implementation:
    """:func:`attnres_fx.mix`, for which everything is tested."""
    return Implementation("attnres_fx.mix", mix, queries=True, dtypes=tuple(ROUNDING),
                          options=frozenset(OPTIONS))
