"""Launch the Triton kernels for ``attnres::mix_norm`` and its backward, arguments checked in runtime/mix_norm.py.

The kernels are those of the mix: the forward completes the partial sum as it reads it and norms the mix before it stores it;
the backward computes the mix again. Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_fx.runtime.norm import Norm
from attnres_fx.runtime.operators import operator_of
from attnres_fx.runtime.reading import Reading

from .launch import Launched, backward, forward
from .problem import Early, Options, Problem, empty_like, rows_of, scalars_of
from .recipes import device_guard


def mix_norm(
    sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, delta: Tensor | None, *rest: Any,
    normed_out: Tensor | None = None, partial_out: Tensor | None = None, launched: Launched = None,
) -> list[Tensor]:
    """[normed], or [normed, partial] with a delta: [..., d] in the promoted dtype of the rows, and in the last source's.

    rest: the arguments of ``Reading`` from mixed on. The results are written to normed_out and partial_out, contiguous,
    where these are given; partial_out may be the last source's own memory.
    """
    reading = Reading(list(sources), query, key_gain, *rest)
    last = reading.sources[-1]
    normed = torch.empty(last.shape, dtype=reading.dtype, device=last.device) if normed_out is None else normed_out
    made = [normed]
    if delta is not None:
        made.append(empty_like([last])[0] if partial_out is None else partial_out)
    if normed.numel():
        added, formed = (None, None) if delta is None else (rows_of(delta), rows_of(made[1]))
        problem = _problem(reading, [] if added is None else [added])
        with device_guard(normed):
            forward(problem, [rows_of(normed)], delta=added, partial_out=formed, norm=_norm(reading),
                    launched=launched)
    return made


def mix_norm_backward(
    grad: Tensor, partial_grad: Tensor | None, *arguments: Any, launched: Launched = None
) -> list[Tensor]:
    """The norm [..., d] again, then the gradients of ``Reading(*arguments).targets``, each like its tensor.

    grad [..., d] is that of the norm; partial_grad, [..., d] or None, is added to the gradient of the last source.
    """
    reading = Reading(*arguments)
    last = reading.sources[-1]
    if not last.numel() or (len(reading.rows) == 1 and not reading.normalize_values):
        # Nothing to sum, or a constant weight: no row has to be scored.
        made: list[Tensor] = operator_of("mix_norm_backward", "_reference")(grad, partial_grad, *arguments)
        return made
    normed = torch.empty(last.shape, dtype=reading.dtype, device=last.device)
    grads = empty_like(reading.targets)
    found = iter(grads)
    early = None if reading.mixed is None else Early(rows_of(next(found)), next(found).view(-1))
    source_grads = [rows_of(next(found)) for _ in reading.sources]
    query_grad, gain_grad = next(found), None if reading.key_gain is None else next(found)
    row_grad = rows_of(grad)
    prior = None if partial_grad is None else rows_of(partial_grad).contiguous()
    weight_grad, bias_grad = (None if given is None else next(found) for given in (reading.weight, reading.bias))
    with device_guard(last):
        backward(
            _problem(reading, [row_grad]), [row_grad], source_grads, query_grad.unsqueeze(0), gain_grad, early_grads=early,
            priors=[*[None] * (len(source_grads) - 1), prior], norm=_norm(reading), normed=rows_of(normed),
            norm_grads=(weight_grad, bias_grad), launched=launched)
    return [normed, *grads]


def _problem(reading: Reading, others: Sequence[Tensor]) -> Problem:
    """The mix of a reading; ``others`` are further [tokens, d] that the kernels load."""
    early = None
    if reading.mixed is not None and reading.lse is not None:
        early = Early(rows_of(reading.mixed), scalars_of(reading.lse))
    return Problem.of(reading.sources, reading.query, reading.key_gain, Options(*reading.options), others,
                      phase=None if early is None else 2, early=early)


def _norm(reading: Reading) -> Norm:
    """The norm with contiguous parameters, as the kernels read them."""
    weight, bias = (None if given is None else given.contiguous() for given in (reading.weight, reading.bias))
    return Norm(reading.centered, weight, bias, reading.norm_eps)
