"""Of ``gpu.py``: the fastest way of every kernel over rows, as lines of the table of ``runtime/triton/configs.py``.

Candidates are compiled by processes of their own, before they are timed here; each is held to float64 before it counts. What
was found fastest serves the sections that come after this one.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from gpu_tools import Bench, copy_speed, microseconds, problem, relative, sets_of
from gpu_values import OPTIONS, mix64, norm64
from torch import Tensor

from attnres_fx.runtime.triton import configs
from attnres_fx.runtime.triton.configs import Plan, Tile

LIMIT = 1e-2  # of bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel on one shape. kind: as in the table, "forward", "backward", or with " norm": addition and norm within."""

    kind: str
    count: int
    tokens: int
    width: int

    @property
    def norm(self) -> bool:
        return self.kind.endswith("norm")

    @property
    def rows(self) -> int:
        """Rows that have to be read or written for a token."""
        forward = self.count + 1 + 2 * self.norm
        return forward if self.kind.startswith("forward") else 2 * self.count + 1 + 2 * self.norm


# The most telling first.
CASES = (
    Case("forward", 9, 8192, 7168), Case("backward", 9, 8192, 7168), Case("backward norm", 9, 4096, 2048),
    Case("forward norm", 9, 4096, 2048), Case("forward", 5, 128, 7168), Case("backward", 5, 128, 7168),
    Case("forward norm", 9, 1, 2048), Case("forward", 9, 8192, 2048), Case("backward", 9, 8192, 2048),
    Case("forward", 5, 1024, 7168), Case("forward norm", 9, 8192, 1024), Case("backward norm", 9, 8192, 1024),
    Case("backward norm", 9, 4096, 7168), Case("forward norm", 9, 4096, 7168), Case("forward", 9, 4096, 4096),
    Case("backward", 9, 4096, 4096), Case("forward norm", 9, 4096, 4096), Case("backward norm", 9, 4096, 4096),
    Case("forward", 9, 16384, 1024), Case("backward", 9, 16384, 1024), Case("forward", 9, 128, 7168))
TINY = (Case("forward", 3, 4, 64), Case("backward norm", 3, 4, 64))


# Elements of a row that a thread holds, sources at once, stages; for rows of 7168, narrower ones, and few tokens.
FORWARD = {
    "wide": ((32, 3, 2), (32, 5, 0), (32, 3, 0), (16, 5, 0), (16, 3, 2)),
    "narrow": ((16, 3, 0), (16, 5, 0), (8, 5, 0), (8, 9, 0), (8, 3, 0), (16, 3, 2), (16, 3, 3)),
    "few": ((16, 5, 0), (16, 9, 0), (8, 5, 0), (8, 9, 0), (16, 3, 0), (32, 5, 0), (4, 9, 0)),
}
# Elements, sources at once, and how many registers a thread may use.
BACKWARD = {
    "wide": ((32, 2, 248), (32, 1, 255), (16, 1, 128), (16, 2, 128)),
    "narrow": ((16, 3, 255), (16, 2, 255), (16, 3, 168), (16, 2, 168), (8, 3, 128), (8, 2, 128), (32, 2, 255), (8, 3, 168)),
    "few": ((16, 1, 128), (16, 2, 128), (32, 2, 248), (32, 1, 255)),
}


def plans(case: Case, cuda: bool = True) -> list[Plan]:
    """Candidates, the likeliest first, each once."""
    return list(dict.fromkeys(_plans(case, cuda)))


def _plans(case: Case, cuda: bool) -> Iterator[Plan]:
    block = configs.next_power_of_two(case.width)
    place = "few" if case.tokens <= 256 else "wide" if case.width > 4096 else "narrow"
    forward = case.kind.startswith("forward")
    for elements, group, third in (FORWARD if forward else BACKWARD)[place]:
        warps = max(1, block // (32 * elements))
        stages, registers = (third, None) if forward else (0, third)
        threads = 32 * warps
        if warps > 32 or threads * (registers or 0) > 65536:
            continue
        resident = max(1, min(16, 65536 // (threads * (registers or (255 if elements == 32 else 128)))))
        yield Plan(Tile(block, 1, warps), min(group, case.count), 8 if warps > 1 else 1, stages if cuda else 0,
                   resident if stages or not forward else 1, registers)


def operator(case: Case, given: Sequence[Tensor]) -> Callable[[], Any]:
    """A call of the kernels. given: the sources, query, gain and a gradient, which also serves as what is added."""
    from attnres_fx.runtime.triton import launch
    from attnres_fx.runtime.triton import launch_norm as fused

    *sources, query, gain, grad = given
    rest = (None, None, gain, None, *OPTIONS, False, 1e-6)
    if case.kind == "forward":
        return lambda: [launch.mix(sources, query, gain, *OPTIONS)]
    if case.kind == "backward":
        return lambda: launch.mix_backward(grad, sources, query, gain, *OPTIONS)
    if case.kind == "forward norm":
        return lambda: fused.mix_norm(sources, query, gain, grad, *rest)
    return lambda: fused.mix_norm_backward(grad, grad, sources, query, gain, *rest)


def expected(case: Case, given: Sequence[Tensor]) -> list[Tensor]:
    """The same in float64, some tokens at a time; rows rounded to float32 for the memory."""
    *sources, query, gain, grad = given
    rows: list[list[Tensor]] = []
    totals: list[Tensor] = []
    for start in range(0, case.tokens, 512):
        part = [each[start:start + 512].double() for each in (*sources, grad)]
        leaves = [each.clone().requires_grad_() for each in (*part[:-1], query.double(), gain.double(), gain.double())]
        *own, q, g, weight = leaves
        with torch.enable_grad():
            if case.kind == "forward norm":
                own = [*own[:-1], (own[-1] + part[-1]).to(sources[0].dtype).double()]
            made = mix64(own, q, g)
            made = norm64(made, weight, None) if case.norm else made
            if case.kind.startswith("forward"):
                found = [made.detach(), *([own[-1]] if case.norm else [])]
                sums: list[Tensor] = []
            else:
                grads = list(torch.autograd.grad(made, [*own, q, g, weight][:len(own) + 2 + case.norm], part[-1]))
                if case.norm:
                    grads[len(own) - 1] += part[-1]
                found = [*([made.detach()] if case.norm else []), *grads[:len(own)]]
                sums = grads[len(own):]
        rows.append([each.detach().float() for each in found])
        totals = [one + other for one, other in zip(totals, sums)] if totals else sums
    return [*(torch.cat(parts) for parts in zip(*rows)), *totals]


def chosen(plan: Plan | None) -> Any:
    """While this is entered the launcher follows a plan; None: the table as it is."""
    return mock.patch.object(configs, "measured", configs.measured if plan is None else lambda _: plan)


class Compiling:
    """A kernel that is compiled and not run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.kernel.run, grid=grid, warmup=True)


def compile_plan(case: Case, plan: Plan | None) -> str:
    """In a process of its own: leave what a call needs in Triton's cache. What went wrong, or nothing."""
    from attnres_fx.runtime.triton import launch

    tokens = 1 if case.tokens == 1 else 16
    rows = [torch.empty(tokens, case.width, dtype=torch.bfloat16, device="cuda") for _ in range(case.count + 1)]
    given = [*rows[:-1], *(torch.empty(case.width, device="cuda") for _ in range(2)), rows[-1]]
    names = ("forward_kernel", "mix_backward_again", "norm_backward")
    kernels = {name: Compiling(getattr(launch, name)) for name in names}
    others = {name: Compiling(getattr(launch.kernels, name)) for name in (
        "mix_backward", "mix_scores", "mix_source_grads", "reduce_parameter_grads")}
    try:
        with chosen(plan), mock.patch.multiple(launch, **kernels), \
                mock.patch.multiple(launch.kernels, **others), torch.no_grad():
            operator(case, given)()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def search(bench: Bench) -> None:
    """Time every candidate of every case, and print the fastest as a line of the table."""
    speed = copy_speed(bench)
    cases = CASES if bench.cuda else TINY
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        waiting = {case: [(plan, pool.submit(compile_plan, case, plan) if bench.cuda else None)
                          for plan in (None, *plans(case, bench.cuda))] for case in cases}
        for case in cases:
            if bench.left() < 6:
                bench.say("skipped", what=f"search {case}")
                continue
            with bench.guarded(f"search {case}"):
                _search_case(bench, case, waiting[case], speed)
            if bench.cuda:
                torch.cuda.empty_cache()
        for futures in waiting.values():
            for _, future in futures:
                if future is not None:
                    future.cancel()


def _search_case(bench: Bench, case: Case, candidates: Sequence[tuple[Plan | None, Any]], speed: float) -> None:
    moved = case.rows * case.tokens * case.width * 2
    sets = [problem(bench, case.count, case.tokens, case.width, torch.bfloat16, seed)
            for seed in range(sets_of(bench, moved))]
    want = expected(case, sets[0])
    taken: dict[Plan | None, float] = {}
    wrong = 0
    # Where not even the kernel as it is can be compiled over there, candidates are compiled here.
    trusted = bench.cuda and not _fault(candidates[0][1], 30)
    # The first of a case came out up to a fifth slower than the same kernel later: it is timed once more, last.
    for plan, future in (*candidates, candidates[0]):
        if bench.left() < 4:
            break
        fault = _fault(future, max(bench.left(), 1)) if trusted else ""
        if fault:
            bench.say("refused", case=f"{case.kind} {case.count} {case.tokens} {case.width}", plan=_words(plan), why=fault)
            continue
        try:
            with chosen(plan), torch.no_grad():
                errors = [relative(one, other) for one, other in zip(operator(case, sets[0])(), want, strict=True)]
                if not max(errors) < LIMIT:
                    wrong += 1
                    bench.say("WRONG", case=str(case), plan=_words(plan), errors=[f"{error:.1e}" for error in errors],
                              ok=False)
                    continue
                now, how = microseconds(bench, [operator(case, each) for each in sets], rounds=4)
                taken[plan] = min(taken.get(plan, now), now)
        except Exception as error:
            bench.say("refused", case=f"{case.kind} {case.count} {case.tokens} {case.width}", plan=_words(plan),
                      why=f"{type(error).__name__}: {str(error)[:200]}")
            continue
        bench.say("search", what=case.kind, sources=case.count, tokens=case.tokens, d=case.width, plan=_words(plan),
                  us=round(now, 2), how=how, share_of_copy=round(moved / taken[plan] / 1e3 / speed, 3))
    if not taken:
        return
    best = min(taken, key=lambda plan: taken[plan])
    line = None if best is None else (
        f'("{case.kind}", {case.width}, 1, {case.count}, {case.tokens}, {_words(best)}),')
    bench.say("best", what=case.kind, sources=case.count, tokens=case.tokens, d=case.width, us=round(taken[best], 2),
              table=round(taken.get(None, float("nan")), 2), tried=len(taken), wrong=wrong,
              share_of_copy=round(moved / taken[best] / 1e3 / speed, 3), line=line)
    if best is not None and bench.cuda:
        _adopt(case, best)


def _fault(future: Any, seconds: float) -> str:
    """Why a plan could not be compiled, once that is known; nothing if it could."""
    try:
        return str(future.result(timeout=seconds))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _words(plan: Plan | None) -> str:
    """A plan as it stands in the table."""
    if plan is None:
        return "the table"
    rest = f", {plan.registers}" if plan.registers else ""
    tile = f"Tile({plan.tile.block_d}, {plan.tile.block_t}, {plan.tile.warps})"
    return f"Plan({tile}, {plan.group}, {plan.together}, {plan.stages}, {plan.resident}{rest})"


def _adopt(case: Case, best: Plan) -> None:
    """Let the sections that follow use what was found: for as many tokens and fewer, and the last of a width for all."""
    major = torch.cuda.get_device_capability()[0]
    own = (case.kind, case.width, 1, case.count, case.tokens, best)
    entries = [own, *(line for line in configs.MEASURED.get(major, ()) if line[:2] != own[:2] or line[4] < 1 << 40)]
    entries.sort(key=lambda entry: (entry[4], entry[3]))
    last = {(kind, width): tokens for kind, width, _, _, tokens, _ in entries}
    configs.MEASURED[major] = tuple(
        (kind, width, least, most, 1 << 40 if tokens == last[kind, width] else tokens, plan)
        for kind, width, least, most, tokens, plan in entries)
