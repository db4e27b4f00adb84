"""Of ``gpu.py``: values, gradients and bits of the operators, against Eq. 5-6 in float64, written here once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_tools import Bench, problem, relative
from torch import Tensor

import attnres_fx

OPTIONS = (1e-6, 1.0, False, 1.0)  # eps, logit scale, no normalised values, output factor
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Sources, tokens and width: one row, odd widths, many rows, wide rows, more sources than a launch takes.
SHAPES = ((2, 1, 64), (5, 37, 1000), (9, 512, 1024), (9, 129, 2304), (9, 64, 4096), (9, 300, 7168), (5, 700, 7168),
          (3, 33, 8192), (9, 2000, 2048), (17, 128, 1024), (12, 64, 7168), (33, 64, 1024), (64, 16, 512), (128, 8, 256))

NORM_SHAPES = ((9, 300, 2048), (9, 150, 7168), (4, 65, 1024), (5, 33, 1000))


def mix64(sources: Sequence[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """Eq. 5-6 in float64."""
    rows = torch.stack([source.double() for source in sources])
    keys = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)
    weights = (keys * (query.double() * gain.double())).sum(-1).softmax(0)
    return (weights.unsqueeze(-1) * rows).sum(0)


def norm64(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The norm that reads a mix: of root mean square, or a layer norm where there is a bias."""
    if bias is not None:
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:], weight, bias, 1e-6)
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6) * weight


def gradients(function: Callable[..., Any], given: Sequence[Tensor], grads: Sequence[Tensor], wide: bool) -> list[Tensor]:
    """Results and gradients of a function of tensors; in float64 if ``wide``."""
    leaves = [(each.double() if wide else each).detach().requires_grad_() for each in given]
    made = function(*leaves)
    made = [made] if isinstance(made, Tensor) else list(made)
    return [*(each.detach() for each in made),
            *torch.autograd.grad(made, leaves, [grad.to(each.dtype) for grad, each in zip(grads, made)])]


def check(bench: Bench, kind: str, ours: Callable[..., Any], exact: Callable[..., Any], given: Sequence[Tensor],
          grads: Sequence[Tensor], **words: Any) -> None:
    """Say how far results and gradients are from those in float64, and whether a second call gives the same bits."""
    dtype = given[0].dtype
    want = gradients(exact, given, grads, wide=True)
    got, again = (gradients(ours, given, grads, wide=False) for _ in range(2))
    errors = [relative(one, other) for one, other in zip(got, want)]
    same = all(torch.equal(one, other) for one, other in zip(got, again))
    results = len(errors) - len(given)
    bench.say(kind, **words, dtype=str(dtype).removeprefix("torch."), out=f"{max(errors[:results]):.1e}",
              grads=f"{max(errors[results:]):.1e}", same_bits=same, ok=max(errors) < LIMITS[dtype] and same)


def values(bench: Bench) -> None:
    """Every operator forward and backward, at many shapes; and a row behind 2^31 elements."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for count, tokens, width in SHAPES if bench.cuda else SHAPES[:2]:
            if bench.wanted not in str(dtype):
                continue
            if bench.left() < 5:
                bench.say("skipped", what=f"values {count} x {tokens} x {width} {dtype}")
                continue
            *given, grad = problem(bench, count, tokens, width, dtype)
            shape = {"sources": count, "tokens": tokens, "d": width}
            with bench.guarded(f"values {shape} {dtype}"):
                check(bench, "values", lambda *rows: attnres_fx.mix(list(rows[:-2]), rows[-2], rows[-1]),
                      lambda *rows: mix64(rows[:-2], rows[-2], rows[-1]), given, [grad], **shape)
    for layer in (False, True):
        for count, tokens, width in NORM_SHAPES if bench.cuda else ((3, 5, 64),):
            if bench.wanted not in "norm":
                continue
            with bench.guarded(f"mix_norm {count} {width}"):
                _check_norm(bench, count, tokens, width, layer)
    if bench.wanted in "phases":
        with bench.guarded("phases"):
            _check_phases(bench)
    properties = torch.cuda.get_device_properties(0) if bench.cuda else None
    if properties is not None and properties.total_memory > 60e9 and bench.wanted in "far":
        with bench.guarded("values_64bit"):
            _check_far_rows(bench)


def _check_norm(bench: Bench, count: int, tokens: int, width: int, layer: bool) -> None:
    """The addition, the mix and its norm in one, as models have it."""
    *sources, query, gain, grad = problem(bench, count, tokens, width, torch.bfloat16)
    delta, weight = (0.3 * grad).flip(0), gain.flip(0)
    bias = [query] if layer else []
    operator = torch.ops.attnres.mix_norm

    def ours(*rows: Tensor) -> Any:
        *head, delta_, query_, gain_, weight_ = rows[:-1] if layer else rows
        return operator(list(head), query_, gain_, delta_, None, None, weight_, rows[-1] if layer else None, *OPTIONS, layer,
                        1e-6)

    def exact(*rows: Tensor) -> Any:
        *head, delta_, query_, gain_, weight_ = rows[:-1] if layer else rows
        partial = head[-1] + delta_
        # What is stored is read: the sum is rounded first, and its gradient goes on as if it were not.
        partial = partial + (partial.to(torch.bfloat16).double() - partial).detach()
        return norm64(mix64([*head[:-1], partial], query_, gain_), weight_, rows[-1] if layer else None), partial

    check(bench, "mix_norm", ours, exact, [*sources, delta, query, gain, weight, *bias], [grad, grad.flip(1)], sources=count,
          tokens=tokens, d=width, norm="layer" if layer else "rms")


def _check_phases(bench: Bench) -> None:
    """Phase 1 for three queries, and phase 2 on from one of them, against the whole mix."""
    for width in (1024, 7168) if bench.cuda else (64,):
        *sources, query, gain, _ = problem(bench, 7, 65, width, torch.bfloat16)
        queries = torch.stack([query, query.flip(0), -query])
        mixed = torch.ops.attnres.mix_phase1(sources[:5], queries, gain, *OPTIONS[:3])
        again = [torch.ops.attnres.mix_phase2(mixed[m], mixed[3 + m], sources[5:], queries[m], gain, *OPTIONS)
                 for m in range(3)]
        errors = [relative(again[m], mix64(sources, queries[m], gain)) for m in range(3)]
        bench.say("phases", d=width, out=f"{max(errors):.1e}", ok=max(errors) < 2e-2)


def _check_far_rows(bench: Bench) -> None:
    """Offsets of 64 bits: rows past 2^31 elements."""
    tokens, width = 2**21 + 3, 1024
    base = torch.randn(64, width, device=bench.device, dtype=torch.bfloat16)
    far = base.repeat(tokens // 64 + 1, 1)[:tokens]
    zeros = torch.zeros_like(far)
    query, gain = torch.randn(width, device=bench.device) * 0.05, torch.ones(width, device=bench.device)
    deviation = relative(attnres_fx.mix([far, zeros], query, gain)[-64:], mix64([far[-64:], zeros[-64:]], query, gain))
    bench.say("values_64bit", elements=tokens * width, last_rows=f"{deviation:.1e}", ok=deviation < 2e-2)
