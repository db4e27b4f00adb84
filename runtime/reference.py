"""The meaning of the depth mix: argument checks, values and gradients in plain, list-form torch.

Every faster kernel is tested against these functions. They never stack the sources: a source is widened, read and
dropped, so the extra memory is a few rows whatever the number of sources. Only the scalars of a row (one per source and
position) are stacked. Nothing is written in place, so that autograd, forward mode and vmap can follow every step.
Contractions are spelled as multiply and sum, not as matmul, which would follow autocast and TF32 and quietly lose the
precision promised for the statistics.

Notation, for a source v_i [..., d], a query w [d] and a key gain g [d] (ones if absent):

    r_i = rsqrt(mean(v_i^2) + eps)          inverse root mean square of a row
    s_i = r_i <w * g, v_i>                  score
    a_i = softmax over i of (logit_scale * s_i)
    out = output_factor * sum_i a_i val_i   with val_i = v_i, or val_i = r_i v_i * g for normalised values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ._compat import check_type, check_value

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_arguments(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float) -> None:
    """Raise ValueError (shapes, devices, eps) or TypeError (dtypes) for meaningless arguments.

    The comparisons go through ``torch._check_value`` so that symbolic sizes become guards, or run-time assertions where
    they are unknown, instead of failing the trace.
    """
    if _are_plainly_right(sources, query, key_gain, eps):
        return
    check_value(len(sources) > 0, lambda: "attnres::mix needs at least one source, got an empty list")
    first = sources[0]
    check_value(first.ndim > 0, lambda: "attnres::mix: sources[0] is a scalar; a source has the shape [..., d]")
    for position, source in enumerate(sources):
        _check_kind(f"sources[{position}]", source, first.device)
        check_shape(f"sources[{position}]", source, first.shape, "the shape of sources[0]")
    width = first.shape[-1]
    check_value(width > 0, lambda: "attnres::mix: the last dimension of the sources is empty")
    check_value(eps >= 0, lambda: f"attnres::mix: eps must not be negative, got {eps}")

    _check_kind("query", query, first.device)
    check_value(
        query.ndim in (1, 2),
        lambda: f"attnres::mix: query must be [d] or [M, d], got {query.ndim} dimensions, shape {tuple(query.shape)}",
    )
    check_value(query.shape[0] > 0, lambda: f"attnres::mix: query is empty, shape {tuple(query.shape)}")
    check_shape("query", query, (*query.shape[:-1], width), "the width of the sources")
    if key_gain is not None:
        _check_kind("key_gain", key_gain, first.device)
        shape = query.shape if key_gain.ndim == query.ndim else (width,)
        check_shape("key_gain", key_gain, shape, "[d], or the shape of query")


def check_grad(grad: Tensor, sources: Sequence[Tensor], query: Tensor) -> None:
    """Raise ValueError unless grad has the shape of the mix."""
    check_shape("grad", grad, output_shape(sources, query), "the shape of the mix")


def _are_plainly_right(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float) -> bool:
    """Whether the arguments are tensors of known sizes that are certainly valid: the checks of an eager call, at the cost of
    one comparison each. Subclasses may have symbolic sizes, and are checked one size at a time.
    """
    given = [*sources, query] if key_gain is None else [*sources, query, key_gain]
    if not sources or any(type(tensor) is not Tensor and type(tensor) is not Parameter for tensor in given):
        return False
    first = sources[0]
    shape, device, dtype = first.shape, first.device, first.dtype
    own = query.shape
    if len(shape) == 0 or shape[-1] <= 0 or eps < 0 or dtype not in SUPPORTED_DTYPES or len(own) not in (1, 2) or (
            own[-1] != shape[-1] or own[0] <= 0 or query.device != device or query.dtype not in SUPPORTED_DTYPES):
        return False
    if key_gain is not None and (key_gain.shape not in (own, own[-1:]) or key_gain.device != device
                                 or key_gain.dtype not in SUPPORTED_DTYPES):
        return False
    return all(source.shape == shape and source.device == device and (
        source.dtype is dtype or source.dtype in SUPPORTED_DTYPES) for source in sources)


def _check_kind(name: str, tensor: Tensor, device: torch.device) -> None:
    check_type(
        tensor.dtype in SUPPORTED_DTYPES,
        lambda: f"attnres::mix: {name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}",
    )
    check_value(
        tensor.device == device,
        lambda: f"attnres::mix: {name} is on {tensor.device}, sources[0] is on {device}",
    )


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], what: str) -> None:
    """Raise ValueError unless ``tensor`` has the shape; ``what`` says where that comes from."""

    def message() -> str:
        return f"attnres::mix: {name} has the shape {tuple(tensor.shape)}, expected {tuple(shape)} ({what})"

    check_value(tensor.ndim == len(shape), message)
    for size, expected in zip(tensor.shape, shape, strict=True):
        check_value(size == expected, message)


def result_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The promoted dtype of the sources: that of the mix."""
    dtype = sources[0].dtype
    for source in sources[1:]:
        dtype = torch.promote_types(dtype, source.dtype)
    return dtype


def statistics_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 as soon as one source is: the dtype in which everything is computed."""
    return torch.float64 if any(source.dtype == torch.float64 for source in sources) else torch.float32


def output_shape(sources: Sequence[Tensor], query: Tensor) -> tuple[int, ...]:
    """[..., d] for one query, [M, ..., d] for M of them."""
    return (*query.shape[:-1], *sources[0].shape)


def _scores(
    sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The inverse root mean squares r [n, ...] and the scores s [M, n, ...] of all sources."""
    keyed = query.to(dtype) if key_gain is None else query.to(dtype) * key_gain.to(dtype)
    keyed_rows = _rows(keyed).unbind(0)
    inverse_rms = []
    scores = []
    for source in sources:
        wide = source.to(dtype)
        scale = torch.rsqrt(wide.square().mean(-1) + eps)
        inverse_rms.append(scale)
        scores.append(torch.stack([(wide * row).sum(-1) * scale for row in keyed_rows]))
    return torch.stack(inverse_rms), torch.stack(scores, dim=1)


def depth_weights(
    sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float, logit_scale: float
) -> Tensor:
    """The softmax weights, [n, ...] for one query and [M, n, ...] for M."""
    _, scores = _scores(sources, query, key_gain, eps, statistics_dtype(sources))
    weights = torch.softmax(scores * logit_scale, dim=1)
    return weights if query.ndim == 2 else weights.squeeze(0)


def mix_forward(
    sources: Sequence[Tensor],
    query: Tensor,
    key_gain: Tensor | None,
    eps: float,
    logit_scale: float,
    normalize_values: bool,
    output_factor: float,
) -> Tensor:
    """The mix before its rounding: in the statistics' dtype, with any strides."""
    dtype = statistics_dtype(sources)
    if len(sources) == 1 and not normalize_values:
        return (sources[0].to(dtype) * output_factor).expand(output_shape(sources, query))

    inverse_rms, scores = _scores(sources, query, key_gain, eps, dtype)
    coefficients = torch.softmax(scores * logit_scale, dim=1) * output_factor
    if normalize_values:
        coefficients = coefficients * inverse_rms
    rows = coefficients[:, 0].unsqueeze(-1) * sources[0].to(dtype)
    for position, source in enumerate(sources[1:], start=1):
        rows = torch.addcmul(rows, coefficients[:, position].unsqueeze(-1), source.to(dtype))
    if normalize_values and key_gain is not None:
        # The gain is common to all sources, so it is applied once, to their sum.
        rows = rows * _per_query(_rows(key_gain.to(dtype)), rows)
    return rows.reshape(output_shape(sources, query))


def mix_backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    key_gain: Tensor | None,
    eps: float,
    logit_scale: float,
    normalize_values: bool,
    output_factor: float,
) -> list[Tensor]:
    """The gradients of the sources, of the query and, where there is one, of the key gain, before their rounding.

    With G the gradient of the mix times output_factor (and times g for normalised values), u_i = dL/da_i and
    ds_i = logit_scale * a_i (u_i - sum_k a_k u_k), a source receives, summed over the queries,

        raw:         a_i G     + ds_i r_i (w * g) - (ds_i s_i)           r_i^2 / d v_i    with u_i = <G, v_i>
        normalised:  a_i r_i G + ds_i r_i (w * g) - (ds_i s_i + a_i u_i) r_i^2 / d v_i    with u_i = r_i <G, v_i>

    since d r_i / d v_i = -r_i^3 v_i / d. The folded query w * g receives sum_i ds_i r_i v_i, summed over positions.
    """
    dtype = statistics_dtype(sources)
    row_grads = (grad if query.ndim == 2 else grad.unsqueeze(0)).to(dtype) * output_factor
    if len(sources) == 1 and not normalize_values:
        # The only weight is the constant one: neither query nor gain has any influence.
        parameters = [query] if key_gain is None else [query, key_gain]
        return [row_grads.sum(0), *(torch.zeros_like(parameter, dtype=dtype) for parameter in parameters)]

    inverse_rms, scores = _scores(sources, query, key_gain, eps, dtype)
    weights = torch.softmax(scores * logit_scale, dim=1)
    read = Read(inverse_rms, scores, weights, normalize_values)
    pulls = read.pulls(sources, row_grads, key_gain)
    score_grads = logit_scale * weights * (pulls - (weights * pulls).sum(1, keepdim=True))
    return read.gradients(row_grads, sources, query, key_gain, pulls, score_grads)


@dataclass(frozen=True)
class Read:
    """The scalars of one read of n sources by M queries: r [n, ...], s and the weights of the values a [M, n, ...]."""

    inverse_rms: Tensor
    scores: Tensor
    weights: Tensor
    normalize_values: bool

    def pulls(self, sources: Sequence[Tensor], row_grads: Tensor, key_gain: Tensor | None) -> Tensor:
        """u_i = dL/da_i [M, n, ...], for gradients [M, ..., d] of the sum of the values (the gain included)."""
        dtype = self.scores.dtype
        value_grads = self._value_grads(row_grads, key_gain)
        pulls = torch.stack([(value_grads * source.to(dtype)).sum(-1) for source in sources], dim=1)
        return pulls * self.inverse_rms if self.normalize_values else pulls

    def _value_grads(self, row_grads: Tensor, key_gain: Tensor | None) -> Tensor:
        if not self.normalize_values or key_gain is None:
            return row_grads
        return row_grads * _per_query(_rows(key_gain.to(row_grads.dtype)), row_grads)

    def gradients(self, row_grads: Tensor, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None,
                  pulls: Tensor, score_grads: Tensor) -> list[Tensor]:
        """The gradients of the sources, the query and the gain, for given dL/ds_i [M, n, ...]."""
        dtype = self.scores.dtype
        wide_query = _rows(query.to(dtype))
        wide_gain = None if key_gain is None else _rows(key_gain.to(dtype))
        keyed = wide_query if wide_gain is None else wide_query * wide_gain
        value_grads = self._value_grads(row_grads, key_gain)
        key_coefficients = score_grads * self.inverse_rms
        value_coefficients = self.weights
        shrink = score_grads * self.scores
        if self.normalize_values:
            value_coefficients = self.weights * self.inverse_rms
            shrink = shrink + self.weights * pulls
        shrink = shrink.sum(0) * self.inverse_rms.square() / sources[0].shape[-1]

        source_grads: list[Tensor] = []
        # Per query: the gradient of the folded query, and what the values contribute to that of the gain.
        keyed_grads: list[Tensor] = [torch.zeros((), dtype=dtype, device=query.device)] * len(keyed)
        value_gain_grads = keyed_grads.copy()
        for position, source in enumerate(sources):
            wide = source.to(dtype)
            source_grad = -shrink[position].unsqueeze(-1) * wide
            for m, row in enumerate(keyed.unbind(0)):
                key_coefficient = key_coefficients[m, position].unsqueeze(-1)
                value_coefficient = value_coefficients[m, position].unsqueeze(-1)
                source_grad = torch.addcmul(source_grad, value_coefficient, value_grads[m])
                source_grad = torch.addcmul(source_grad, key_coefficient, row)
                keyed_grads[m] = keyed_grads[m] + _sum_positions(key_coefficient * wide)
                if self.normalize_values and wide_gain is not None:
                    value_gain_grads[m] = value_gain_grads[m] + _sum_positions(value_coefficient * wide * row_grads[m])
            source_grads.append(source_grad)

        keyed_grad = torch.stack(keyed_grads)
        if key_gain is None or wide_gain is None:
            return [*source_grads, keyed_grad.reshape(query.shape)]
        gain_grad = keyed_grad * wide_query
        if self.normalize_values:
            gain_grad = gain_grad + torch.stack(value_gain_grads)
        if key_gain.ndim < query.ndim:
            gain_grad = gain_grad.sum(0)
        return [*source_grads, (keyed_grad * wide_gain).reshape(query.shape), gain_grad.reshape(key_gain.shape)]


def phase1(
    sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float, logit_scale: float, normalize_values: bool
) -> tuple[Tensor, Tensor]:
    """Algorithm 1, phase 1, in normalised form: the mixes [M, ..., d] and the log-sum-exp of their logits [M, ...]."""
    _, scores = _scores(sources, query, key_gain, eps, statistics_dtype(sources))
    mixed = mix_forward(sources, query, key_gain, eps, logit_scale, normalize_values, 1.0)
    return mixed, torch.logsumexp(scores * logit_scale, dim=1)


def phase1_backward(
    grads: Tensor, lse_grads: Tensor, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float,
    logit_scale: float, normalize_values: bool,
) -> list[Tensor]:
    """The gradients of phase 1: those of the mixes, and dL/ds_i = logit_scale a_i dL/dlse on top."""
    dtype = statistics_dtype(sources)
    inverse_rms, scores = _scores(sources, query, key_gain, eps, dtype)
    read = Read(inverse_rms, scores, torch.softmax(scores * logit_scale, dim=1), normalize_values)
    row_grads = grads.to(dtype)
    pulls = read.pulls(sources, row_grads, key_gain)
    pull = pulls - (read.weights * pulls).sum(1, keepdim=True) + lse_grads.to(dtype).unsqueeze(1)
    return read.gradients(row_grads, sources, query, key_gain, pulls, logit_scale * read.weights * pull)


def phase2(
    mixed: Tensor, lse: Tensor, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float,
    logit_scale: float, normalize_values: bool, output_factor: float,
) -> Tensor:
    """Algorithm 1, phase 2: the mix of what phase 1 read and of further sources, before its rounding.

    (mixed, lse) is one more source, whose value is known already and whose logit is lse.
    """
    dtype = statistics_dtype((mixed, lse, *sources))
    inverse_rms, scores = _scores(sources, query, key_gain, eps, dtype)
    weights = _joint_weights(lse, scores, logit_scale)
    coefficients = weights[1:] * inverse_rms if normalize_values else weights[1:]
    rows = coefficients[0].unsqueeze(-1) * sources[0].to(dtype)
    for coefficient, source in zip(coefficients[1:], sources[1:]):
        rows = torch.addcmul(rows, coefficient.unsqueeze(-1), source.to(dtype))
    if normalize_values and key_gain is not None:
        rows = rows * key_gain.to(dtype)
    return torch.addcmul(rows, weights[0].unsqueeze(-1), mixed.to(dtype)) * output_factor


def phase2_backward(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, eps: float,
    logit_scale: float, normalize_values: bool, output_factor: float,
) -> list[Tensor]:
    """The gradients of mixed and lse, then those of the sources, the query and the gain, before their rounding."""
    dtype = statistics_dtype((mixed, lse, *sources))
    row_grad = grad.to(dtype) * output_factor
    inverse_rms, scores = _scores(sources, query, key_gain, eps, dtype)
    weights = _joint_weights(lse, scores, logit_scale)
    read = Read(inverse_rms, scores, weights[1:].unsqueeze(0), normalize_values)
    pulls = read.pulls(sources, row_grad.unsqueeze(0), key_gain)
    mixed_pull = (row_grad * mixed.to(dtype)).sum(-1)
    mean = weights[0] * mixed_pull + (read.weights * pulls).sum(1).squeeze(0)
    score_grads = logit_scale * read.weights * (pulls - mean)
    rest = read.gradients(row_grad.unsqueeze(0), sources, query, key_gain, pulls, score_grads)
    return [weights[0].unsqueeze(-1) * row_grad, weights[0] * (mixed_pull - mean), *rest]


def _joint_weights(lse: Tensor, scores: Tensor, logit_scale: float) -> Tensor:
    """[1 + n, ...]: the softmax over the log-sum-exp of phase 1 and the logits of further sources."""
    return torch.softmax(torch.cat([lse.to(scores.dtype).unsqueeze(0), scores[0] * logit_scale]), dim=0)


def _rows(vectors: Tensor) -> Tensor:
    """[d] as [1, d]; [M, d] as it is."""
    return vectors if vectors.ndim == 2 else vectors.unsqueeze(0)


def _per_query(vectors: Tensor, rows: Tensor) -> Tensor:
    """Shape [1, d] or [M, d] vectors so that they broadcast over the positions of rows [M, ..., d]."""
    return vectors.reshape(vectors.shape[0], *(1 for _ in rows.shape[1:-1]), vectors.shape[-1])


def _sum_positions(rows: Tensor) -> Tensor:
    """The sum of [..., d] over everything but the last dimension."""
    return rows.reshape(-1, rows.shape[-1]).sum(0)
