"""Launch the Triton kernels: the host side of the mix, with the signatures of runtime/mix.py.

Importing this module imports triton. It works on tensors of one device; on the CPU only under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from attnres_fx.runtime import reference
from attnres_fx.runtime.norm import Norm

from . import backward as kernels
from . import configs
from .again import mix_backward_again
from .forward import mix_forward as forward_kernel
from .norms import norm_backward
from .problem import (
    ACCUMULATE,
    Early,
    Options,
    Problem,
    chunks,
    empty_like,
    launch_options,
    programs_of,
    rows_of,
    warp_size,
)
from .recipes import BackwardLaunch, ForwardLaunch, Launch, device_guard

NormGrads = tuple[Tensor | None, Tensor | None]  # where the gradients of a norm's weight and bias go, [d] each
Incoming = tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]  # per query: gradients of the mix and of its log-sum-exp
# Here and below: where a list is given as ``launched``, the launches that can be repeated for a similar call are added to
# it. Where a call takes others as well, or copies a tensor for the kernels, it adds an entry None.
Launched = list[Launch | None] | None


def mix(
    sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any, mixed_out: Tensor | None = None,
    launched: Launched = None,
) -> Tensor:
    """The mix by the forward kernel: arguments, result and errors of ``attnres::mix``.

    Written to ``mixed_out``, if that is given: contiguous, of the result's shape and dtype, which the caller has checked.
    """
    reference.check_arguments(sources, query, key_gain, options[0])
    output = mixed_out
    if output is None:
        output = torch.empty(reference.output_shape(sources, query), dtype=reference.result_dtype(sources),
                             device=query.device)
    if output.numel():
        problem = Problem.of(sources, query, key_gain, Options(*options))
        with device_guard(output):
            forward(problem, output.view(problem.queries, problem.tokens, problem.width).unbind(0), launched=launched)
    return output


def forward(
    problem: Problem,
    outputs: Sequence[Tensor],
    *,
    lses: Sequence[Tensor] | None = None,
    delta: Tensor | None = None,
    partial_out: Tensor | None = None,
    norm: Norm | None = None,
    launched: Launched = None,
) -> None:
    """Write the mixes to outputs, M of [tokens, d], and the log-sum-exp of their logits to lses, M of [tokens].

    With delta [tokens, d] the last source is taken as source + delta and stored to partial_out [tokens, d], which may be the
    last source's own memory. With norm, of contiguous weight and bias, outputs receive the normalised mix. All that is
    written is contiguous.
    """
    most = configs.forward_queries(problem.width, problem.element, problem.options.normalize_values)
    for part in chunks(problem.queries, most):
        own_lses = None if lses is None else tuple(lses[part])
        made = _forward_group(problem.of_queries(part), tuple(outputs[part]), own_lses, delta, partial_out, norm)
        if launched is not None:
            launched.extend(made)


def _forward_group(
    problem: Problem, outputs: tuple[Tensor, ...], lses: tuple[Tensor, ...] | None, delta: Tensor | None,
    partial_out: Tensor | None, norm: Norm | None,
) -> list[ForwardLaunch]:
    queries, tokens, made = problem.queries, problem.tokens, []
    plan = configs.forward_plan(problem.shape("forward", norm is not None))
    parts = chunks(len(problem.sources), configs.forward_sources(problem.phase))
    state_sums, state_rows = None, None
    if len(parts) > 1:
        state_sums = problem.empty(2, queries, tokens)
        state_rows = problem.empty(queries, tokens, problem.width)
    for part in parts:
        first, last = part is parts[0], part is parts[-1]
        own_norm = norm if last else None
        programs = programs_of(tokens, plan, problem.query.device) if plan.stages else math.ceil(tokens / plan.tile.block_t)
        early_mixed, early_stride, early_lse = problem.early_arguments(last)
        launch = ForwardLaunch(
            forward_kernel[(programs,)], problem.strides(problem.sources[part]), early_stride,
            problem.stride(delta) if last and delta is not None else 0, tokens,
            {**problem.constants(plan.tile, plan.registers), "EPS": problem.options.eps,
             "LOGIT_SCALE": problem.options.logit_scale, **_norm_constants(own_norm), "GROUP": plan.group, "FIRST": first,
             "LAST": last, "TOGETHER": plan.together, "STAGES": plan.stages})
        launch(tuple(problem.sources[part]), problem.query, problem.gain, outputs, lses if last else None,
               (early_mixed, early_lse), delta if last else None, partial_out if last else None, _parameters(own_norm),
               (state_sums, state_rows))
        made.append(launch)
    return made


def mix_backward(
    grad: Tensor, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any,
    launched: Launched = None,
) -> list[Tensor]:
    """The gradients by the backward kernels: arguments, results and errors of ``attnres::mix_backward``."""
    reference.check_arguments(sources, query, key_gain, options[0])
    reference.check_grad(grad, sources, query)
    targets = [*sources, query] if key_gain is None else [*sources, query, key_gain]
    if not sources[0].numel() or (len(sources) == 1 and not options[2]):
        # Nothing to sum, or a constant weight: no row has to be scored.
        wide = reference.mix_backward(grad, sources, query, key_gain, *options)
        return [target.copy_(own) for target, own in zip(empty_like(targets), wide, strict=True)]
    grads = empty_like(targets)
    row_grads = [rows_of(own) for own in (grad if query.ndim == 2 else grad.unsqueeze(0)).unbind(0)]
    problem = Problem.of(sources, query, key_gain, Options(*options), row_grads)
    count = len(sources)
    with device_guard(query):
        backward(problem, row_grads, [rows_of(g) for g in grads[:count]], grads[count].view(problem.query.shape),
                 grads[count + 1] if key_gain is not None else None, launched=launched)
    return grads


def backward(
    problem: Problem,
    grads: Sequence[Tensor],
    source_grads: Sequence[Tensor],
    query_grad: Tensor,
    gain_grad: Tensor | None,
    *,
    lse_grads: Sequence[Tensor] | None = None,
    early_grads: Early | None = None,
    priors: Sequence[Tensor | None] | None = None,
    norm: Norm | None = None,
    normed: Tensor | None = None,
    norm_grads: NormGrads = (None, None),
    launched: Launched = None,
) -> None:
    """Write the gradients of a mix.

    grads: M of [tokens, d] with unit stride along d; lse_grads: M of [tokens], of the log-sum-exp that the forward gave.
    source_grads: [tokens, d] each; priors are added to them, each None or [tokens, d] (it may be the gradient's own
    memory: accumulation). query_grad [M, d]; gain_grad as the gain. early_grads: those of the problem's early mix.
    With norm, grads is that of the normalised mix (of one query; the mix is computed again, and its norm written to normed
    [tokens, d] where that is given), and the gradients of its weight and bias are written to norm_grads, [d] each or None.
    Raises: ValueError for a norm of several queries.
    """
    if norm is not None and problem.queries > 1:
        raise ValueError(f"the norm of a mix is that of one query, got {problem.queries} queries")
    if norm is not None and _again(problem, norm) is None and problem.backward_tile(norm) is None:
        grads = [_before_norm(problem, grads[0], norm, normed, norm_grads)]
        norm, norm_grads = None, (None, None)
        if launched is not None:
            launched.append(None)
    groups = chunks(problem.queries, configs.backward_queries(problem.width))
    priors = [None] * len(source_grads) if priors is None else list(priors)
    # Several groups add up in the dtype of the statistics, so that every gradient is rounded once.
    wide = [problem.empty(*g.shape) for g in source_grads] if len(groups) > 1 else list(source_grads)
    gain_parts = []
    for group in groups:
        own = problem.of_queries(group)
        incoming = tuple(grads[group]), None if lse_grads is None else tuple(lse_grads[group])
        if gain_grad is None:
            own_gain_grad = None
        elif gain_grad.ndim == 2:
            own_gain_grad = gain_grad[group]
        else:
            own_gain_grad = gain_grad if len(groups) == 1 else problem.empty(problem.width)
            gain_parts.append(own_gain_grad)
        launch = _backward_launch(own, incoming[0], norm)
        if launch is None:
            partial = _backward_split(own, incoming, wide, priors, early_grads)
            _reduction(own)(partial, partial.shape[0], own.query, own.gain, query_grad[group], own_gain_grad, None, None,
                            None, **_reduce_constants(own))
        else:
            launch(incoming[0], tuple(own.sources), own.query, own.gain, tuple(wide), query_grad[group], own_gain_grad,
                   tuple(priors), incoming[1], _early(own.early), _early(early_grads), _parameters(norm),
                   normed if norm else None, norm_grads)
        if launched is not None:
            launched.append(launch)
        priors = list(wide)
    if len(groups) > 1:
        for target, total in zip(source_grads, wide, strict=True):
            target.copy_(total)
        if gain_grad is not None and gain_parts:
            gain_grad.copy_(torch.stack(gain_parts).sum(0))


def _again(problem: Problem, norm: Norm | None) -> configs.Plan | None:
    """The plan of ``mix_backward_again``, where that is what runs: it was measured, or the rows do not fit."""
    shape = problem.shape("backward", norm is not None)
    if configs.measured(shape) is None and problem.backward_tile(norm) is not None:
        return None
    return configs.again_plan(shape)


def _before_norm(
    problem: Problem, grad: Tensor, norm: Norm, normed: Tensor | None, norm_grads: NormGrads
) -> Tensor:
    """The gradient of the mix, which is computed again, from that of its norm; those of weight and bias are written."""
    mixed = problem.empty(problem.tokens, problem.width)
    forward(problem, [mixed])
    tile = configs.norm_tile(problem.width, warp_size(mixed.device))
    programs = configs.programs(problem.tokens, tile)
    shape = _norm_partial(problem, norm, programs)
    norm_partial = None if shape is None else problem.empty(*shape)
    norm_backward[(programs,)](
        grad, problem.stride(grad), mixed, norm.weight, norm.bias, normed, norm_partial, problem.tokens, D=problem.width,
        BLOCK_D=tile.block_d, BLOCK_T=tile.block_t, ALIGN=problem.align, **_norm_constants(norm),
        ACC=ACCUMULATE[problem.accumulate], **launch_options(tile, mixed.device))
    if norm_partial is not None:
        for target, total in zip(norm_grads, norm_partial.sum(0).unbind(0)):
            if target is not None:
                target.copy_(total)
    return mixed


def _norm_constants(norm: Norm | None) -> dict[str, Any]:
    """The norm as compile-time arguments."""
    if norm is None:
        return {"NORM": "", "NORM_EPS": 0.0}
    return {"NORM": "layer" if norm.centered else "rms", "NORM_EPS": norm.eps}


def _parameters(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias."""
    return (None, None) if norm is None else (norm.weight, norm.bias)


def _early(early: Early | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if early is None else (early.mixed, early.lse)


def _norm_partial(problem: Problem, norm: Norm | None, programs: int) -> tuple[int, ...] | None:
    """The shape of the sums over tokens of weight and bias, [programs, 2, d]; None where the norm has neither."""
    if norm is None or (norm.weight is None and norm.bias is None):
        return None
    return programs, 2, problem.width


def _backward_launch(problem: Problem, grads: tuple[Tensor, ...], norm: Norm | None) -> BackwardLaunch | None:
    """By the kernel that holds the rows of a token or the one that reads them again from the cache; None where neither can.
    It leaves partial rows [programs, 2, M, d] of the parameters' gradients, and [programs, 2, d] of the norm's.
    """
    plan = _again(problem, norm)
    tile = problem.backward_tile(norm) if plan is None else plan.tile
    if tile is None:
        return None
    if plan is None:
        programs = configs.programs(problem.tokens, tile)
        registers = configs.backward_registers(tile, problem.width, len(problem.sources), problem.options.normalize_values,
                                               problem.element, grads[0].element_size(), triton.__version__)
        constants = problem.constants(tile, registers)
    else:
        programs = programs_of(problem.tokens, plan, problem.query.device)
        constants = {**problem.constants(tile, plan.registers), "GROUP": plan.group, "TOGETHER": plan.together}
        for name in ("M", "GAIN_PER_QUERY", "NORMALIZE"):
            del constants[name]
    kernel = kernels.mix_backward if plan is None else mix_backward_again
    return BackwardLaunch(
        kernel[(programs,)], plan is not None, problem.strides(grads), problem.strides(problem.sources),
        problem.early_arguments()[1], problem.tokens,
        {**constants, "EPS": problem.options.eps, "LOGIT_SCALE": problem.options.logit_scale, **_norm_constants(norm)},
        (programs, 2, problem.queries, problem.width), _norm_partial(problem, norm, programs), problem.accumulate,
        _reduction(problem), _reduce_constants(problem))


def _backward_split(
    problem: Problem, incoming: Incoming, source_grads: Sequence[Tensor], priors: Sequence[Tensor | None],
    early_grads: Early | None,
) -> Tensor:
    """The same where the rows of a token do not fit into registers: two sweeps over the sources, any number of them.

    An early mix is read by the first launch of each sweep. It is the last entry of the scalars: of scale one, no score.
    """
    grads, lse_grads = incoming
    count, queries, tokens, options = len(problem.sources), problem.queries, problem.tokens, problem.options
    tile = configs.split_tile(problem.width, queries, warp_size(problem.query.device))
    entries = count if problem.early is None else count + 1
    scales = problem.empty(entries, tokens)
    scores, pulls = problem.empty(queries, entries, tokens), problem.empty(queries, entries, tokens)
    for part in chunks(count, configs.score_sources(problem.width)):
        kernels.mix_scores[(math.ceil(tokens / tile.block_t),)](
            grads, problem.strides(grads), tuple(problem.sources[part]), problem.strides(problem.sources[part]),
            problem.query, problem.gain, *problem.early_arguments(part.start == 0)[:2], scales, scores, pulls, part.start,
            entries, tokens, **problem.constants(tile), EPS=options.eps)
    if problem.early is not None:
        scales[count] = 1
        scores[:, count] = 0

    logits = scores * options.logit_scale
    if problem.early is not None:
        logits[:, count] = problem.early.lse
    weights = torch.softmax(logits, dim=1)
    mean_pulls = (weights * pulls).sum(1, keepdim=True)
    if lse_grads is not None:
        mean_pulls -= torch.stack(lse_grads).unsqueeze(1)
    logit_grads = weights * (pulls - mean_pulls)
    if early_grads is not None:
        early_grads.lse.copy_(logit_grads[0, count])
    score_grads = options.logit_scale * logit_grads
    shrinks = score_grads * scores
    values = weights
    if options.normalize_values:
        shrinks = shrinks + weights * pulls
        values = weights * scales
    shrinks = shrinks.sum(0) * scales.square() / problem.width
    keys = score_grads * scales

    programs = configs.programs(tokens, tile)
    parts = chunks(count, configs.split_sources(problem.width, queries, problem.element, problem.phase,
                                               problem.options.normalize_values))
    partial = problem.empty(len(parts) * programs, 2, queries, problem.width)
    for index, part in enumerate(parts):
        kernels.mix_source_grads[(programs,)](
            grads, problem.strides(grads), tuple(problem.sources[part]), problem.strides(problem.sources[part]),
            problem.query, problem.gain, tuple(source_grads[part]), tuple(priors[part]),
            early_grads.mixed if early_grads and index == 0 else None,
            partial[index * programs : (index + 1) * programs], values, keys, shrinks, part.start, entries, tokens,
            **problem.constants(tile))
    return partial


def _reduction(problem: Problem) -> Any:
    """The kernel that adds up partial rows and writes the gradients of query, gain, and the norm's weight and bias."""
    return kernels.reduce_parameter_grads[(math.ceil(problem.width / configs.REDUCE_COLUMNS),)]


def _reduce_constants(problem: Problem) -> dict[str, Any]:
    return {"D": problem.width, "BLOCK_D": configs.REDUCE_COLUMNS, "BLOCK_P": configs.REDUCE_ROWS, "M": problem.queries,
            "GAIN_PER_QUERY": problem.gain is not None and problem.gain.ndim == 2, "VALUE_GAIN": problem.value_gain,
            "ACC": ACCUMULATE[problem.accumulate], "num_warps": configs.REDUCE_WARPS}
