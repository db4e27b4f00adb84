"""Of ``gpu.py``: the speed of one mix beside a copy, beside other forms of it and beside other packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_tools import Bench, copy_speed, microseconds, problem, sets_of
from torch import Tensor

import attnres_fx

# Sources, tokens, width.
# What is known least comes first.
SHAPES = ((5, 128, 7168), (9, 4096, 2048), (9, 8192, 7168), (5, 1024, 7168), (9, 4096, 4096), (9, 16384, 1024), (2, 1, 7168),
          (9, 128, 7168), (17, 8192, 2048), (49, 2048, 1024))
WITH_PEERS = SHAPES[:1]


def list_form(sources: Sequence[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """The mix in plain torch without a stack: what a compiler can make one loop of."""
    wide = [source.float() for source in sources]
    keyed = query.float() * gain.float()
    logits = [(row * keyed).sum(-1, keepdim=True) * torch.rsqrt(row.square().mean(-1, keepdim=True) + 1e-6) for row in wide]
    peak = logits[0]
    for logit in logits[1:]:
        peak = torch.maximum(peak, logit)
    powers = [torch.exp(logit - peak) for logit in logits]
    out = wide[0] * powers[0]
    total = powers[0]
    for row, power in zip(wide[1:], powers[1:]):
        out, total = out + row * power, total + power
    return (out / total).to(sources[0].dtype)


def peers(query: Tensor, gain: Tensor) -> dict[str, Callable[[Sequence[Tensor]], Tensor]]:
    """Other packages that are installed, by name, as functions of the sources. In the dtype of the sources."""
    found: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {}
    q, g = query.bfloat16(), gain.bfloat16()
    folded = (query * gain).bfloat16()
    try:
        from fla.ops.attnres import fused_attnres
        found["fla"] = lambda sources: fused_attnres(q, list(sources), g, rms_eps=1e-6)
    except Exception as error:
        print(f"no fla: {error}")
    try:
        import attnres
        found["fast-attnres"] = lambda sources: attnres.attnres(list(sources), folded, eps=1e-6)
    except Exception as error:
        print(f"no fast-attnres: {error}")
    return found


def mix(bench: Bench) -> None:
    """Microseconds and share of a copy's speed: forward, forward and backward; far from the cache, and near."""
    speed = copy_speed(bench)
    for count, tokens, width in SHAPES if bench.cuda else ((3, 32, 256),):
        if bench.left() < 8:
            bench.say("skipped", what=f"mix {count} x {tokens} x {width}")
            continue
        with bench.guarded(f"mix {count} x {tokens} x {width}"):
            _measure(bench, speed, count, tokens, width)
        if bench.cuda:
            torch.cuda.empty_cache()


def _measure(bench: Bench, speed: float, count: int, tokens: int, width: int) -> None:
    row = tokens * width * 2
    sets = [problem(bench, count, tokens, width, torch.bfloat16, seed) for seed in range(sets_of(bench, (count + 1) * row))]
    query, gain = sets[0][count:count + 2]
    torch._dynamo.reset()
    listed = torch.compile(list_form, dynamic=False)
    forms: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
        "attnres": lambda sources: attnres_fx.mix(list(sources), query, gain),
        "list, inductor": lambda sources: listed(list(sources), query, gain)}
    if (count, tokens, width) in WITH_PEERS:
        forms |= peers(query, gain)

    def say(kind: str, form: str, moved: int, calls: Sequence[Callable[[], Any]]) -> None:
        with bench.guarded(f"{kind} {form}"):
            taken, how = microseconds(bench, calls)
            bench.say(kind, form=form, sources=count, tokens=tokens, d=width, us=round(taken, 2), how=how,
                      GB_s=round(moved / taken / 1e3), share_of_copy=round(moved / taken / 1e3 / speed, 3))

    with torch.no_grad():
        for name, form in forms.items():
            calls = [lambda form=form, each=each: form(each[:count]) for each in sets]
            say("forward", name, (count + 1) * row, calls)
            if len(sets) > 1 and name == "attnres":
                say("forward, near", name, (count + 1) * row, calls[:1])
    leaves = [[each.detach().requires_grad_() for each in one[:count]] for one in sets]
    parameters = [each.detach().requires_grad_() for each in (query, gain)]
    query, gain = parameters
    for name in ("attnres", "list, inductor"):
        calls = [lambda form=forms[name], own=own, one=one: torch.autograd.grad(form(own), [*own, *parameters], one[-1])
                 for own, one in zip(leaves, sets)]
        say("forward+backward", name, (3 * count + 2) * row, calls)
