"""Launch the Triton kernels: the host side of the mix, with the signatures of runtime/mix.py.

Importing this module imports triton. It works on tensors of one device; on the CPU only under ``TRITON_INTERPRET=1``.
Not run on a GPU so far.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from attnres_fx.runtime import reference
from attnres_fx.runtime.errors import KernelError

from . import backward as kernels
from . import configs
from .forward import mix_forward as forward_kernel

_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class Options:
    """The options of a mix, as :func:`attnres_fx.runtime.mix.mix` takes them."""

    eps: float
    logit_scale: float
    normalize_values: bool
    output_factor: float


def rows_of(tensor: Tensor) -> Tensor:
    """[..., d] as [tokens, d] with unit stride along d: a view where strides allow it, else a copy."""
    width = tensor.shape[-1]
    flat = tensor.reshape(-1, width)
    return flat if width == 1 or flat.stride(-1) == 1 else flat.contiguous()


def alignment(width: int, strides: Sequence[int]) -> int:
    """The largest power of two, at most 16, that divides the width and every stride (in elements)."""
    return math.gcd(16, width, *strides)


def warp_size(device: torch.device) -> int:
    """Threads that run in step: 64 on AMD's CDNA, 32 on NVIDIA's and in the interpreter."""
    return 64 if device.type == "cuda" and torch.version.hip is not None else 32


def row_stride(rows: Tensor) -> int:
    """A single row may carry any stride; zero compiles nothing anew."""
    return rows.stride(0) if rows.shape[0] > 1 else 0


def accumulator(sources: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 as soon as one source is."""
    return reference.statistics_dtype(sources)


def chunks(count: int, most: int) -> list[slice]:
    """``count`` items in the fewest runs of at most ``most``, of nearly equal length."""
    runs = math.ceil(count / most)
    bounds = [count * run // runs for run in range(runs + 1)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]


@dataclass(frozen=True)
class Norm:
    """The consumer's norm that a mix of one query is handed on through: kind "rms" or "layer", gain and bias [d] or None."""

    kind: str
    gain: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Problem:
    """The tensors of one mix in the form the kernels take.

    sources [tokens, d] by strides; query [M, d] and gain [d], [M, d] or None, contiguous, in their own dtypes.
    """

    sources: list[Tensor]
    query: Tensor
    gain: Tensor | None
    options: Options
    align: int

    @staticmethod
    def of(
        sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, options: Options,
        other_strides: Sequence[int] = (),
    ) -> Problem:
        """``other_strides`` are those of further tensors that the kernels load by stride."""
        rows = [rows_of(source) for source in sources]
        width = rows[0].shape[-1]
        if width > configs.MAX_WIDTH:
            raise KernelError(
                f"the Triton kernels take rows of at most {configs.MAX_WIDTH} elements, got {width}",
                remedy="compile with options={'kernels': 'reference'}")
        align = alignment(width, [*(row_stride(row) for row in rows), *other_strides])
        return Problem(rows, query.reshape(-1, width).contiguous(),
                       None if key_gain is None else key_gain.contiguous(), options, align)

    @property
    def tokens(self) -> int:
        return self.sources[0].shape[0]

    @property
    def width(self) -> int:
        return self.sources[0].shape[1]

    @property
    def accumulate(self) -> torch.dtype:
        return accumulator(self.sources)

    @property
    def value_gain(self) -> bool:
        return self.options.normalize_values and self.gain is not None

    def stride(self, rows: Tensor) -> int:
        """The distance of rows in the unit of the kernels."""
        return row_stride(rows) // self.align

    def strides(self, part: slice) -> tuple[int, ...]:
        return tuple(self.stride(row) for row in self.sources[part])

    def of_queries(self, part: slice) -> Problem:
        """The same mix for some of its queries."""
        gain = self.gain[part] if self.gain is not None and self.gain.ndim == 2 else self.gain
        return Problem(self.sources, self.query[part], gain, self.options, self.align)

    def constants(self, tile: configs.Tile) -> dict[str, Any]:
        """The compile-time arguments that all kernels over rows share."""
        return {
            "D": self.width, "BLOCK_D": tile.block_d, "BLOCK_T": tile.block_t, "M": len(self.query), "ALIGN": self.align,
            "GAIN_PER_QUERY": self.gain is not None and self.gain.ndim == 2,
            "OUTPUT_FACTOR": self.options.output_factor, "NORMALIZE": self.options.normalize_values,
            "ACC": _ACCUMULATE[self.accumulate], "num_warps": tile.warps}

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised buffer in the dtype of the statistics."""
        return torch.empty(shape, dtype=self.accumulate, device=self.query.device)


def mix(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> Tensor:
    """The mix by the forward kernel: arguments, result and errors of ``attnres::mix``."""
    reference.check_arguments(sources, query, key_gain, options[0])
    output = torch.empty(reference.output_shape(sources, query), dtype=reference.result_dtype(sources),
                         device=query.device)
    if output.numel():
        problem = Problem.of(sources, query, key_gain, Options(*options))
        with device_guard(output):
            forward(problem, output.view(len(problem.query), problem.tokens, problem.width))
    return output


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def forward(
    problem: Problem,
    output: Tensor,
    *,
    delta: Tensor | None = None,
    partial_out: Tensor | None = None,
    norm: Norm | None = None,
) -> None:
    """Write the mix to output [M, tokens, d].

    With delta [tokens, d] the last source is taken as source + delta and stored to partial_out [tokens, d].
    """
    for part in chunks(len(problem.query), configs.forward_queries(problem.width)):
        _forward_group(problem.of_queries(part), output[part], delta, partial_out, norm)


def _forward_group(
    problem: Problem, output: Tensor, delta: Tensor | None, partial_out: Tensor | None, norm: Norm | None
) -> None:
    queries, tokens = len(problem.query), problem.tokens
    tile = configs.forward_tile(problem.width, queries, warp_size(output.device))
    parts = chunks(len(problem.sources), configs.FORWARD_SOURCES)
    state_sums, state_rows = None, None
    if len(parts) > 1:
        state_sums = problem.empty(2, queries, tokens)
        state_rows = problem.empty(queries, tokens, problem.width)
    for part in parts:
        first, last = part is parts[0], part is parts[-1]
        own_norm = norm if last else None
        forward_kernel[(math.ceil(tokens / tile.block_t),)](
            tuple(problem.sources[part]), problem.strides(part), problem.query, problem.gain, output,
            delta if last else None, problem.stride(delta) if last and delta is not None else 0,
            partial_out if last else None,
            own_norm.gain if own_norm else None, own_norm.bias if own_norm else None,
            state_sums, state_rows, tokens,
            **problem.constants(tile), EPS=problem.options.eps, LOGIT_SCALE=problem.options.logit_scale,
            NORM=own_norm.kind if own_norm else "", NORM_EPS=own_norm.eps if own_norm else 0.0,
            GROUP=configs.FORWARD_GROUP, FIRST=first, LAST=last)


def mix_backward(
    grad: Tensor, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """The gradients by the backward kernels: arguments, results and errors of ``attnres::mix_backward``."""
    reference.check_arguments(sources, query, key_gain, options[0])
    reference.check_grad(grad, sources, query)
    targets = [*sources, query] if key_gain is None else [*sources, query, key_gain]
    if not sources[0].numel() or (len(sources) == 1 and not options[2]):
        # Nothing to sum, or a constant weight: no row has to be scored.
        wide = reference.mix_backward(grad, sources, query, key_gain, *options)
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(w) for w, t in zip(wide, targets, strict=True)]
    grads = [torch.empty(target.shape, dtype=target.dtype, device=target.device) for target in targets]
    row_grad = grad.reshape(len(query) if query.ndim == 2 else 1, -1, grad.shape[-1])
    row_grad = row_grad if row_grad.stride(-1) == 1 else row_grad.contiguous()
    problem = Problem.of(sources, query, key_gain, Options(*options), row_grad.stride()[:2])
    count = len(sources)
    with device_guard(query):
        backward(problem, row_grad, [g.view(problem.tokens, problem.width) for g in grads[:count]],
                 grads[count].view(problem.query.shape), grads[count + 1] if key_gain is not None else None)
    return grads


def backward(
    problem: Problem,
    grad: Tensor,
    source_grads: Sequence[Tensor],
    query_grad: Tensor,
    gain_grad: Tensor | None,
    *,
    priors: Sequence[Tensor | None] | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Write the gradients of a mix.

    grad [M, tokens, d] with unit stride along d. source_grads: [tokens, d] each; priors are added to them, each None or
    [tokens, d] (it may be the gradient's own memory: accumulation). query_grad [M, d]; gain_grad as the gain.
    With norm, grad is that of the normalised mix (of one query; the mix is computed again), and the gradients of the
    norm's gain and bias are returned, [d] each in the dtype of the statistics.
    Raises: ValueError for a norm of several queries.
    """
    if norm is not None and len(problem.query) > 1:
        raise ValueError(f"the norm of a mix is that of one query, got {len(problem.query)} queries")
    norm_grads = None
    count, warp = len(problem.sources), warp_size(grad.device)
    if norm is not None and configs.backward_tile(problem.width, count, 1, warp, norm=True) is None:
        grad, norm_grads = _before_norm(problem, grad, norm)
        norm = None
    groups = chunks(len(problem.query), configs.backward_queries(problem.width))
    priors = [None] * len(source_grads) if priors is None else list(priors)
    # Several groups add up in the dtype of the statistics, so that every gradient is rounded once.
    wide = [problem.empty(*g.shape) for g in source_grads] if len(groups) > 1 else list(source_grads)
    gain_parts = []
    for group in groups:
        own = problem.of_queries(group)
        partial, own_norm_grads = _backward_group(own, grad[group], wide, priors, norm)
        norm_grads = norm_grads or own_norm_grads
        if gain_grad is None:
            own_gain_grad = None
        elif gain_grad.ndim == 2:
            own_gain_grad = gain_grad[group]
        else:
            own_gain_grad = gain_grad if len(groups) == 1 else problem.empty(problem.width)
            gain_parts.append(own_gain_grad)
        _reduce(own, partial, query_grad[group], own_gain_grad)
        priors = list(wide)
    if len(groups) > 1:
        for target, total in zip(source_grads, wide, strict=True):
            target.copy_(total)
        if gain_grad is not None and gain_parts:
            gain_grad.copy_(torch.stack(gain_parts).sum(0))
    return norm_grads


def _before_norm(problem: Problem, grad: Tensor, norm: Norm) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The gradient of the mix from that of its norm, and those of the norm's gain and bias, by torch operations."""
    mixed = problem.empty(1, problem.tokens, problem.width)
    forward(problem, mixed)
    if norm.kind == "layer":
        mixed = mixed - mixed.mean(-1, keepdim=True)
    scale = torch.rsqrt(mixed.square().mean(-1, keepdim=True) + norm.eps)
    normed = mixed * scale
    wide = grad.to(problem.accumulate)
    own = wide if norm.gain is None else wide * norm.gain.to(problem.accumulate)
    before = own - normed * (own * normed).mean(-1, keepdim=True)
    if norm.kind == "layer":
        before = before - own.mean(-1, keepdim=True)
    return before * scale, ((wide * normed).sum((0, 1)), wide.sum((0, 1)))


def _backward_group(
    problem: Problem, grad: Tensor, source_grads: Sequence[Tensor], priors: Sequence[Tensor | None], norm: Norm | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Write the gradients of the sources; return the partial rows [programs, 2, M, d] of the parameters' gradients, and
    the gradients of the norm's parameters.
    """
    count, tokens = len(problem.sources), problem.tokens
    tile = configs.backward_tile(problem.width, count, len(problem.query), warp_size(grad.device), norm is not None)
    if tile is None:
        return _backward_split(problem, grad, source_grads, priors), None
    programs = configs.programs(tokens, tile)
    partial = problem.empty(programs, 2, len(problem.query), problem.width)
    norm_partial = problem.empty(programs, 2, problem.width) if norm is not None else None
    kernels.mix_backward[(programs,)](
        grad, *_grad_strides(problem, grad), tuple(problem.sources), problem.strides(slice(None)), problem.query,
        problem.gain, tuple(source_grads), tuple(priors), partial,
        norm.gain if norm is not None else None, norm_partial, tokens, **problem.constants(tile), EPS=problem.options.eps,
        LOGIT_SCALE=problem.options.logit_scale, NORM=norm.kind if norm else "", NORM_EPS=norm.eps if norm else 0.0)
    if norm_partial is None:
        return partial, None
    gain_grad, bias_grad = norm_partial.sum(0).unbind(0)
    return partial, (gain_grad, bias_grad)


def _backward_split(
    problem: Problem, grad: Tensor, source_grads: Sequence[Tensor], priors: Sequence[Tensor | None]
) -> Tensor:
    """The same where the rows of a token do not fit into registers: two sweeps over the sources, any number of them."""
    count, queries, tokens, options = len(problem.sources), len(problem.query), problem.tokens, problem.options
    tile = configs.split_tile(problem.width, queries, warp_size(grad.device))
    scales = problem.empty(count, tokens)
    scores, pulls = problem.empty(queries, count, tokens), problem.empty(queries, count, tokens)
    grad_strides = _grad_strides(problem, grad)
    for part in chunks(count, configs.FORWARD_SOURCES):
        kernels.mix_scores[(math.ceil(tokens / tile.block_t),)](
            grad, *grad_strides, tuple(problem.sources[part]), problem.strides(part), problem.query, problem.gain,
            scales, scores, pulls, part.start, count, tokens, **problem.constants(tile), EPS=options.eps)

    weights = torch.softmax(scores * options.logit_scale, dim=1)
    score_grads = options.logit_scale * weights * (pulls - (weights * pulls).sum(1, keepdim=True))
    shrinks = score_grads * scores
    values = weights
    if options.normalize_values:
        shrinks = shrinks + weights * pulls
        values = weights * scales
    shrinks = shrinks.sum(0) * scales.square() / problem.width
    keys = score_grads * scales

    programs = configs.programs(tokens, tile)
    parts = chunks(count, configs.split_sources(problem.width, queries))
    partial = problem.empty(len(parts) * programs, 2, queries, problem.width)
    for index, part in enumerate(parts):
        kernels.mix_source_grads[(programs,)](
            grad, *grad_strides, tuple(problem.sources[part]), problem.strides(part), problem.query, problem.gain,
            tuple(source_grads[part]), tuple(priors[part]), partial[index * programs : (index + 1) * programs],
            values, keys, shrinks, part.start, count, tokens, **problem.constants(tile))
    return partial


def _grad_strides(problem: Problem, grad: Tensor) -> tuple[int, int]:
    return grad.stride(1) // problem.align, grad.stride(0) // problem.align


def _reduce(problem: Problem, partial: Tensor, query_grad: Tensor, gain_grad: Tensor | None) -> None:
    """Add up the partial rows and write the gradients of query and gain."""
    block = configs.REDUCE_COLUMNS
    kernels.reduce_parameter_grads[(math.ceil(problem.width / block),)](
        partial, len(partial), problem.query, problem.gain, query_grad, gain_grad, D=problem.width, BLOCK_D=block,
        BLOCK_P=configs.REDUCE_ROWS, M=len(problem.query),
        GAIN_PER_QUERY=problem.gain is not None and problem.gain.ndim == 2, VALUE_GAIN=problem.value_gain,
        ACC=_ACCUMULATE[problem.accumulate], num_warps=configs.REDUCE_WARPS)
