"""Launch the Triton kernels for the two phases of Algorithm 1: the operators of runtime/phases.py, arguments checked there.

Phase 1 is the mix that also stores the log-sum-exp of its logits; phase 2 is the mix with one more source, whose value and
logit phase 1 left. Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_fx.runtime import reference

from .launch import Launched, backward, forward
from .problem import Early, Options, Problem, empty_like, rows_of, scalars_of
from .recipes import device_guard


def mix_phase1(
    sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float, logit_scale: float,
    normalize_values: bool, *, mixed_out: Sequence[Tensor] | None = None, lse_out: Sequence[Tensor] | None = None,
    launched: Launched = None,
) -> list[Tensor]:
    """The mixes, M of [..., d] in the promoted dtype of the sources, and the log-sum-exp of their logits, M of [...] in
    that of the statistics. Written to mixed_out and lse_out, contiguous, if these are given.
    """
    shape, device = sources[0].shape, query.device
    if mixed_out is None:
        mixed_out = [torch.empty(shape, dtype=reference.result_dtype(sources), device=device) for _ in query]
    if lse_out is None:
        lse_out = [torch.empty(shape[:-1], dtype=reference.statistics_dtype(sources), device=device) for _ in query]
    if sources[0].numel():
        problem = Problem.of(sources, query, key_gain, Options(eps, logit_scale, normalize_values, 1.0), phase=1)
        with device_guard(query):
            forward(problem, [rows_of(rows) for rows in mixed_out], lses=[lse.view(-1) for lse in lse_out],
                    launched=launched)
    return [*mixed_out, *lse_out]


def mix_phase1_backward(
    grads: Sequence[Tensor], sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float,
    logit_scale: float, normalize_values: bool,
) -> list[Tensor]:
    """The gradients of the sources, the query [M, d] and the gain, from those of the M mixes and the M log-sum-exps."""
    targets = empty_like([*sources, query] if key_gain is None else [*sources, query, key_gain])
    if not sources[0].numel():
        return [target.zero_() for target in targets]
    row_grads = [rows_of(grad) for grad in grads[: len(query)]]
    problem = Problem.of(sources, query, key_gain, Options(eps, logit_scale, normalize_values, 1.0), row_grads, phase=1)
    count = len(sources)
    with device_guard(query):
        backward(problem, row_grads, [rows_of(target) for target in targets[:count]], targets[count],
                 None if key_gain is None else targets[count + 1],
                 lse_grads=[scalars_of(grad) for grad in grads[len(query) :]])
    return targets


def mix_phase2(
    mixed: Tensor, lse: Tensor, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float,
    logit_scale: float, normalize_values: bool, output_factor: float, *, mixed_out: Tensor | None = None,
    launched: Launched = None,
) -> Tensor:
    """The mix [..., d] of what phase 1 left of a query [d] and of further sources, in the promoted dtype of all rows.

    Written to ``mixed_out``, contiguous, if that is given.
    """
    output = mixed_out
    if output is None:
        output = torch.empty(mixed.shape, dtype=reference.result_dtype([mixed, *sources]), device=mixed.device)
    if output.numel():
        problem = Problem.of(sources, query, key_gain, Options(eps, logit_scale, normalize_values, output_factor),
                             phase=2, early=Early(rows_of(mixed), scalars_of(lse)))
        with device_guard(output):
            forward(problem, [rows_of(output)], launched=launched)
    return output


def mix_phase2_backward(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float,
    logit_scale: float, normalize_values: bool, output_factor: float,
) -> list[Tensor]:
    """The gradients of mixed and lse, then those of the sources, the query [d] and the gain."""
    targets = empty_like([mixed, lse, *sources, query] if key_gain is None else [mixed, lse, *sources, query, key_gain])
    if not mixed.numel():
        return [target.zero_() for target in targets]
    row_grad = rows_of(grad)
    problem = Problem.of(sources, query, key_gain, Options(eps, logit_scale, normalize_values, output_factor), [row_grad],
                         phase=2, early=Early(rows_of(mixed), scalars_of(lse)))
    mixed_grad, lse_grad, *others = targets
    count = len(sources)
    with device_guard(grad):
        backward(problem, [row_grad], [rows_of(target) for target in others[:count]], others[count].unsqueeze(0),
                 None if key_gain is None else others[count + 1],
                 early_grads=Early(rows_of(mixed_grad), lse_grad.view(-1)))
    return targets
