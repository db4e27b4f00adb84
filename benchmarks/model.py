"""Whole models side by side, all compiled: plain, converted through the backend ``attnres``, the paper's pseudocode.

One Llama-like model of 8 transformer layers (16 residual additions) in these variants, called in turn in one run:

    plain        torch.compile(model), the residual network
    control      the same compiled function once more: what the machine's noise makes of nothing (A/A)
    attnres      converted (8 blocks), torch.compile(model, backend="attnres")
    unfused      the same with options={"fuse": "never"}: additions, mixes and norms by themselves
    two-phase    the same with options={"schedule": "two-phase"}
    pseudocode   the same network as the paper writes it down, stack and einsum for every mix, torch.compile(model)

Every ratio is to ``plain``: of the minima, of the medians, and the median of the ratios within a round, which other
programs disturb least. A ratio nearer to 1 than the control's is printed as "not resolvable".
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import attnres_fx

LAYERS, BLOCKS, EPS = 8, 8, 1e-6


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = 64
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = (t * cos + torch.cat([-t[..., self.size // 2 :], t[..., : self.size // 2]], -1) * sin for t in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 64 * round(width * 8 / 3 / 64)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(width), Attention(width)
        self.mlp_norm, self.mlp = RMSNorm(width), MLP(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Plain(nn.Module):
    """The residual network: byte vocabulary, so that the layers and not the head are measured."""

    def __init__(self, width: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, 256, bias=False)
        angles = torch.outer(torch.arange(2048.0), 10000.0 ** (-torch.arange(0, 64, 2) / 64)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, (cos, sin) = self.embedding(ids), (table[: ids.shape[1]] for table in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


class Pseudocode(nn.Module):
    """Fig. 2 of the paper around the layers of a plain model: blocks and a partial sum, stacked for each mix."""

    def __init__(self, plain: Plain, query: Tensor, gain: Tensor, num_blocks: int) -> None:
        super().__init__()
        self.plain, self.query, self.gain = plain, nn.Parameter(query.clone()), nn.Parameter(gain.clone())
        self.size = -(-2 * len(plain.layers) // num_blocks)

    def mix(self, blocks: list[Tensor], partial: Tensor | None, position: int) -> Tensor:
        stacked = torch.stack([*blocks, partial] if partial is not None else blocks)
        wide = stacked.float()
        keys = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * self.gain[position]
        weights = torch.einsum("d,nbtd->nbt", self.query[position], keys).softmax(0)
        return torch.einsum("nbt,nbtd->btd", weights, wide).to(stacked.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        plain = self.plain
        x, (cos, sin) = plain.embedding(ids), (table[: ids.shape[1]] for table in (plain.cos, plain.sin))
        blocks, partial = [x], None
        for number in range(2 * len(plain.layers)):
            hidden = self.mix(blocks, partial, number) if number else x
            layer = plain.layers[number // 2]
            if number % 2 == 0:
                output = layer.attention(layer.attention_norm(hidden), cos, sin)
            else:
                output = layer.mlp(layer.mlp_norm(hidden))
            partial = output if partial is None else partial + output
            if (number + 1) % self.size == 0:
                blocks, partial = [*blocks, partial], None
        return plain.head(plain.norm(self.mix(blocks, partial, 2 * len(plain.layers))))


@dataclass(frozen=True)
class Case:
    """One workload."""

    name: str
    width: int
    batch: int
    tokens: int
    dtype: str = "float32"
    training: bool = False
    layers: int = LAYERS


CASES = [
    Case("inference-bf16-1024-1x512", 1024, 1, 512, "bfloat16"),
    Case("inference-bf16-512-4x512", 512, 4, 512, "bfloat16"),
    Case("inference-fp32-1024-1x512", 1024, 1, 512),
    Case("inference-fp32-1024-1x1", 1024, 1, 1),
    Case("training-fp32-512-2x512", 512, 2, 512, training=True),
]
QUICK = [Case("quick-inference", 64, 1, 16, layers=2), Case("quick-training", 64, 1, 16, training=True, layers=2)]


# The variants of a converted model: the options of the backend.
OPTIONS: dict[str, dict[str, Any]] = {"attnres": {}, "unplaced": {"arena": "never"}, "unfused": {"fuse": "never"},
                                       "two-phase": {"schedule": "two-phase"}}
VARIANTS = ("plain", "control", *OPTIONS, "pseudocode")
DEFAULT = ("plain", "control", "attnres", "pseudocode")


@dataclass
class Result:
    """Milliseconds of one variant, the ratios of its minimum and median to those of ``plain``, and the median of the ratios
    within a round."""

    case: str
    variant: str
    first_call_s: float
    min_ms: float
    median_ms: float
    min_ratio: float
    median_ratio: float
    paired_ratio: float
    resolvable: bool
    deviation: float


def build(case: Case, variants: Sequence[str], num_blocks: int = BLOCKS) -> dict[str, nn.Module]:
    """The variants with the same weights, and the same queries where there are queries."""
    torch.manual_seed(0)
    plain = Plain(case.width, case.layers).to(getattr(torch, case.dtype)).train(case.training)
    ids = torch.randint(256, (case.batch, case.tokens))
    converted = attnres_fx.convert(copy.deepcopy(plain), ids, num_blocks=num_blocks, eps=EPS)
    stream = converted.attnres.stream
    nn.init.normal_(stream.query, std=case.width**-0.5)
    models: dict[str, nn.Module] = {"plain": plain}
    # Each a model of its own: torch keeps what it compiled with the model.
    models.update({name: copy.deepcopy(converted) for name in variants if name in OPTIONS})
    if "pseudocode" in variants:
        models["pseudocode"] = Pseudocode(copy.deepcopy(plain), stream.query.detach(), stream.key_gain.detach(), num_blocks)
    return models


def call_of(case: Case, model: nn.Module, compiled: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[], Tensor]:
    """One inference, or one step: forward, backward, and the gradients freed."""

    def infer() -> Tensor:
        with torch.no_grad():
            return compiled(ids)

    def step() -> Tensor:
        logits = compiled(ids)
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
        model.zero_grad(set_to_none=True)
        return logits.detach()

    return step if case.training else infer


def first_call(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of a call that compiles with empty caches, and its result."""
    with fresh_cache():
        begin = time.perf_counter()
        result = call()
        return time.perf_counter() - begin, result


def in_turn(
    calls: dict[str, Callable[[], Tensor]], order: Sequence[str], rounds: int, outputs: dict[str, Tensor]
) -> dict[str, list[float]]:
    """Milliseconds of each of ``calls`` in each round, after one that is not counted; ``outputs`` are the last ones."""
    taken: dict[str, list[float]] = {name: [] for name in order}
    for number in range(rounds + 1):
        start = number % len(order)  # nobody is always first
        for name in [*order[start:], *order[:start]]:
            begin = time.perf_counter()
            outputs[name] = calls[name]()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - begin))
    return taken


def measure(case: Case, rounds: int, variants: Sequence[str] = DEFAULT) -> list[Result]:
    """Compile the variants, then call them in turn."""
    torch._dynamo.reset()
    models = build(case, variants)
    ids = torch.randint(256, (case.batch, case.tokens), generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[], Tensor]] = {}
    first: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for name, model in models.items():
        ours: Any = {"backend": "attnres", "options": OPTIONS[name]} if name in OPTIONS else {}
        calls[name] = call_of(case, model, torch.compile(model, **ours), ids)
        first[name], outputs[name] = first_call(calls[name])
    order = [name for name in VARIANTS if name in models or name == "control"]
    calls["control"], first["control"] = calls["plain"], first["plain"]
    taken = in_turn(calls, order, rounds, outputs)
    return summarize(case, taken, first, outputs)


def summarize(
    case: Case, taken: dict[str, list[float]], first: dict[str, float], outputs: dict[str, Tensor]
) -> list[Result]:
    """Ratios, each held against what the control shows of noise; values, against those of the converted model."""
    plain = taken["plain"]
    ratios = {name: (min(times) / min(plain), statistics.median(times) / statistics.median(plain),
                     statistics.median(one / other for one, other in zip(times, plain, strict=True)))
              for name, times in taken.items()}
    spread = abs(ratios["control"][2] - 1)
    results = []
    for name, times in taken.items():
        clear = name not in ("plain", "control") and abs(ratios[name][2] - 1) > spread
        like = "plain" if name in ("plain", "control") else "attnres"
        ours, theirs = outputs[name].double(), outputs[like].double()
        results.append(Result(case.name, name, first[name], min(times), statistics.median(times), *ratios[name], clear,
                              float((ours - theirs).norm() / theirs.norm())))
    return results


def table_of(results: Sequence[Result]) -> Table:
    table = Table("case", "variant", "first call s", "min ms", "median ms", "min ratio", "median ratio", "paired", "")
    last = results[-1].variant if results else ""
    for result in results:
        verdict = "" if result.resolvable or result.variant in ("plain", "control") else "not resolvable"
        table.add_row(result.case, result.variant, f"{result.first_call_s:.1f}", f"{result.min_ms:.2f}",
                      f"{result.median_ms:.2f}", f"{result.min_ratio:.3f}", f"{result.median_ratio:.3f}",
                      f"{result.paired_ratio:.3f}", verdict, end_section=result.variant == last)
    return table


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="repeatable")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT), help="beside plain and control")
    parser.add_argument("--threads", type=int, help="on a shared machine fewer than its cores disturb less")
    parser.add_argument("--quick", action="store_true", help="two tiny cases, to see that the benchmark runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    cases = QUICK if chosen.quick else [case for case in CASES if chosen.case is None or case.name in chosen.case]
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
               "cpu": torch.backends.cpu.get_cpu_capability(), "rounds": chosen.rounds}
    log = Console(stderr=True, soft_wrap=True, highlight=False)
    log.print("warming up: the first compilation of a process pays for imports and compiler checks")
    first_call(lambda: torch.compile(lambda x: x.sin() + 1)(torch.ones(8)))
    results: list[Result] = []
    for case in cases:
        log.print(f"{case.name} ...")
        results += measure(case, chosen.rounds, ["attnres", *chosen.variants])
        log.print("  " + ", ".join(f"{r.variant} {r.min_ms:.1f} ms" for r in results if r.case == case.name))
    wrong = [r for r in results if r.deviation > (0.05 if "bf16" in r.case else 1e-3)]
    if chosen.json:
        print(json.dumps({"machine": machine, "results": [asdict(result) for result in results]}, indent=2))
    else:
        console = Console(width=120, highlight=False)
        console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
        console.print(table_of(results))
    if wrong:
        sys.exit(f"attnres and another form of the same network differ: {wrong}")
    return results


if __name__ == "__main__":
    main()
