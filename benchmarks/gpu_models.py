"""Of ``gpu.py``: a small Llama under every option against eager reference kernels, and whole models beside plain ones."""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from gpu_tools import Bench, relative
from torch import Tensor, nn

import attnres_fx
from attnres_fx.passes.memory import rows

VOCABULARY = 2048
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 6e-2}
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("default", {}),
    ("reduce-overhead", {"mode": "reduce-overhead"}),
    ("two-phase", {"options": {"schedule": "two-phase"}}),
    ("dynamic", {"dynamic": True}),
    ("fuse never", {"options": {"fuse": "never"}}),
    ("arena never", {"options": {"arena": "never"}}),
    ("arena and fuse never", {"options": {"arena": "never", "fuse": "never"}}),
)
OURS = ("mix_forward", "mix_backward_again", "mix_backward", "mix_scores", "norm_backward", "mix_source_grads",
        "reduce_parameter_grads")
# What is run, transformer layers, width, batch, tokens, schedule.
WHOLE = (("train", 16, 2048, 1, 4096, "auto"), ("infer", 16, 2048, 1, 4096, "auto"), ("decode", 16, 2048, 1, 1, "auto"),
         ("infer", 16, 2048, 1, 4096, "one-pass"), ("train", 16, 2048, 1, 4096, "two-phase"))
TINY = (("infer", 2, 64, 1, 16, "auto"), ("train", 2, 64, 1, 16, "auto"))


def llama(bench: Bench, layers: int, width: int, dtype: torch.dtype) -> nn.Module:
    """A Llama of Hugging Face transformers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(width // 128, 1)
    config = LlamaConfig(hidden_size=width, intermediate_size=-(-8 * width // 3 // 256) * 256, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, vocab_size=VOCABULARY, use_cache=False)
    return LlamaForCausalLM(config).to(bench.device, dtype)


def converted(plain: nn.Module, ids: Tensor, blocks: int, spread: float) -> nn.Module:
    """A converted copy, with random queries."""
    model = attnres_fx.convert(copy.deepcopy(plain), (), {"input_ids": ids, "use_cache": False}, num_blocks=blocks)
    with torch.no_grad():
        for name, parameter in model.attnres.named_parameters():
            if "query" in name:
                parameter.normal_(0, spread)
    return model


def step(model: nn.Module, run: Callable[..., Any], ids: Tensor) -> list[Tensor]:
    """Logits and all gradients of a training step."""
    model.zero_grad(set_to_none=True)
    made = run(input_ids=ids, labels=ids, use_cache=False)
    made.loss.backward()
    return [made.logits.detach().clone(),
            *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@torch.no_grad()
def inferred(run: Callable[..., Any], ids: Tensor) -> Tensor:
    logits: Tensor = run(input_ids=ids, use_cache=False).logits.clone()
    return logits


def model(bench: Bench) -> None:
    """Every option, in inference and in training, against the converted model on the reference kernels, eagerly.

    Two batches of different content take turns, as memory that is used again shows in the second at the earliest. The
    default comes first in both dtypes.
    """
    layers, width, batch, tokens = (4, 512, 4, 96) if bench.cuda else (2, 64, 2, 8)
    batches = [torch.randint(0, VOCABULARY, (batch, tokens), device=bench.device) for _ in range(2)]
    made = {}
    for dtype in LIMITS:
        if bench.wanted and bench.wanted.endswith("float32") != (dtype == torch.float32):
            continue
        ours = converted(llama(bench, layers, width, dtype), batches[0], layers, 0.2)
        torch._dynamo.reset()
        eager = torch.compile(ours, backend="attnres", options={"downstream": "eager", "kernels": "reference"})
        made[dtype] = ours, batches, [step(ours, eager, ids) for ids in batches]
    for name, settings in OPTIONS:
        for dtype in LIMITS:
            if bench.wanted not in ("", f"{name} {str(dtype).removeprefix('torch.')}"):
                continue
            if bench.left() < 20:
                bench.say("skipped", what=f"model {name} {dtype}")
                continue
            with bench.guarded(f"model {name} {dtype}"):
                right = _check_option(bench, *made[dtype], name, settings)
                if name == "default" and not right:
                    with mock.patch.object(rows, "orders_copies", lambda _: False):
                        _check_option(bench, *made[dtype], "default, no loops placed", settings)
        if name == "default" and bench.cuda and bench.wanted in "streams":
            with bench.guarded("streams"):
                _check_streams(bench, *made[torch.bfloat16])


def _check_option(bench: Bench, ours: nn.Module, batches: list[Tensor], wants: list[list[Tensor]], name: str,
                  settings: dict[str, Any]) -> bool:
    torch._dynamo.reset()
    run = torch.compile(ours, backend="attnres", **settings)
    began = time.monotonic()
    inference = max(relative(inferred(run, ids), want[0]) for _ in range(3) for ids, want in zip(batches, wants))
    errors = [[relative(one, other) for one, other in zip(step(ours, run, ids), want)]
              for _ in range(3) for ids, want in zip(batches, wants)]
    again = max(relative(inferred(run, ids), want[0]) for ids, want in zip(batches, wants))
    out, grads = max(each[0] for each in errors), max(max(each[1:]) for each in errors)
    dtype = next(ours.parameters()).dtype
    right = max(inference, out, again) < LIMITS[dtype] and grads < 10 * LIMITS[dtype]
    bench.say("model", dtype=str(dtype).removeprefix("torch."), what=name, infer=f"{inference:.1e}", train=f"{out:.1e}",
              grads=f"{grads:.1e}", infer_again=f"{again:.1e}", seconds=round(time.monotonic() - began, 1),
              ok=right)
    return right


def _check_streams(bench: Bench, ours: nn.Module, batches: list[Tensor], wants: list[list[Tensor]]) -> None:
    """Two threads at once, each on a stream of its own, which must not share memory of a call."""
    torch._dynamo.reset()
    run = torch.compile(ours, backend="attnres")
    inferred(run, batches[0])
    bench.sync()
    found: list[float] = []

    def work(ids: Tensor, want: list[Tensor]) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(10):
                found.append(relative(inferred(run, ids), want[0]))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, wants)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.say("streams", calls=len(found), out=f"{max(found, default=1.0):.1e}",
              ok=len(found) == 20 and max(found) < LIMITS[torch.bfloat16])


def graphs(bench: Bench) -> None:
    """mode="reduce-overhead": a whole forward in one graph, replayed with other inputs, and the time of its Python."""
    width, tokens = (1024, 64) if bench.cuda else (64, 8)
    plain = llama(bench, 8 if bench.cuda else 2, width, torch.bfloat16)
    batches = [torch.randint(0, VOCABULARY, (1, tokens), device=bench.device) for _ in range(3)]
    ours = converted(plain, batches[0], 8, 0.02)
    torch._dynamo.reset()
    wants = [inferred(torch.compile(ours, backend="attnres", options={"downstream": "eager", "kernels": "reference"}), ids)
             for ids in batches]
    for mode in ("reduce-overhead", "default"):
        with bench.guarded(f"graphs {mode}"):
            torch._dynamo.reset()
            run = torch.compile(ours, backend="attnres", mode=mode)
            error = max(relative(inferred(run, ids), want) for _ in range(4) for ids, want in zip(batches, wants))
            bench.sync()
            begin = time.perf_counter()
            for _ in range(20):
                inferred(run, batches[0])
            bench.sync()
            bench.say("graphs", mode=mode, out=f"{error:.1e}", ms=round((time.perf_counter() - begin) * 50, 3),
                      ok=error < LIMITS[torch.bfloat16])


def whole(bench: Bench) -> None:
    """Whole models, plain and converted, compiled, in turn: milliseconds, ratio and peak memory."""
    _each_whole(bench, _compare, 20)


def compile_whole(bench: Bench) -> None:
    """Call each of them twice: so their kernels are in the caches."""
    def call(bench: Bench, *case: Any) -> None:
        began = time.monotonic()
        Whole(bench, *case).warm(bench, 2)
        bench.say("compiled", what=case[0], d=case[2], schedule=case[-1], seconds=round(time.monotonic() - began, 1))

    _each_whole(bench, call, 5)


def _each_whole(bench: Bench, run: Callable[..., None], least: float) -> None:
    for what, *sizes in WHOLE if bench.cuda else TINY:
        if bench.wanted not in what:
            continue
        name = f"whole {what} {' x '.join(str(size) for size in sizes)}"
        if bench.left() < least:
            bench.say("skipped", what=name)
            continue
        with bench.guarded(name):
            run(bench, what, *sizes)
        if bench.cuda:
            torch.cuda.empty_cache()


class Whole:
    """A model, plain and converted, both compiled."""

    def __init__(self, bench: Bench, what: str, layers: int, width: int, batch: int, tokens: int, schedule: str) -> None:
        torch._dynamo.reset()
        self.what = what
        plain = llama(bench, layers, width, torch.bfloat16)
        self.ids = torch.randint(0, VOCABULARY, (batch, tokens), device=bench.device)
        ours = converted(plain, self.ids, 8, 0.02)
        mode: dict[str, Any] = {"mode": "reduce-overhead"} if what == "decode" else {}
        # One way to pass options: a mode stands beside none, so the captured graphs are asked for by Inductor's own setting.
        settings: dict[str, Any] = {"options": {"schedule": schedule, "inductor": {"triton.cudagraphs": what == "decode"}}}
        self.runs = {"plain": (plain, torch.compile(plain, dynamic=False, **mode)),
                     "attnres": (ours, torch.compile(ours, dynamic=False, backend="attnres", **settings))}

    def call(self, name: str) -> None:
        module, run = self.runs[name]
        if self.what == "train":
            module.zero_grad(set_to_none=True)
            run(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        else:
            inferred(run, self.ids)

    def warm(self, bench: Bench, calls: int) -> dict[str, float]:
        """Seconds that the first calls take."""
        first: dict[str, float] = {}
        for name in self.runs:
            if bench.left() < 3:
                raise TimeoutError(f"no time to compile '{name}'")
            begin = time.monotonic()
            for _ in range(calls):
                self.call(name)
            bench.sync()
            first[name] = time.monotonic() - begin
        return first


def _compare(bench: Bench, what: str, layers: int, width: int, batch: int, tokens: int, schedule: str) -> None:
    pair = Whole(bench, what, layers, width, batch, tokens, schedule)
    first = pair.warm(bench, 4)
    turns = ("plain", "attnres", "plain again")
    times: dict[str, list[float]] = {name: [] for name in turns}
    hosts: dict[str, list[float]] = {name: [] for name in turns}
    repeats = 10 if what == "decode" else 1
    for number in range(25 if bench.cuda else 3):
        if bench.left() < 1 and number >= 3:
            break
        for name in (*turns[number % 3:], *turns[:number % 3]):
            bench.sync()
            begin = time.perf_counter()
            for _ in range(repeats):
                pair.call(name.removesuffix(" again"))
            issued = time.perf_counter()
            bench.sync()
            times[name].append((time.perf_counter() - begin) * 1e3 / repeats)
            hosts[name].append((issued - begin) * 1e3 / repeats)
    for name, taken in times.items():
        ratios = [one / other for one, other in zip(taken, times["plain"])]
        host = hosts[name]
        bench.say("whole", what=what, layers=layers, d=width, batch=batch, tokens=tokens, schedule=schedule, form=name,
                  ms=round(statistics.median(taken), 3), least=round(min(taken), 3),
                  over_plain=f"{(statistics.median(ratios) - 1) * 100:+.2f} %", host_ms=round(statistics.median(host), 3),
                  host_least=round(min(host), 3), first_calls_s=round(first.get(name, 0.0), 1))
    for name in pair.runs:
        if what != "decode":
            _account(bench, pair, name)
        if bench.cuda and what != "decode":
            bench.sync()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            pair.call(name)
            bench.sync()
            bench.say("peak", what=what, d=width, form=name,
                      rows=round((torch.cuda.max_memory_allocated() - before) / (batch * tokens * width * 2), 1))


def _account(bench: Bench, pair: Whole, name: str) -> None:
    """Where the time of a call goes: the device's by kinds of kernels, and how many of them; each of ours by name."""
    if not bench.cuda:
        return
    with bench.guarded(f"account {name}"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            pair.call(name)
            bench.sync()
        kinds: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            kernel = event.name
            kind = next((found for found in OURS if found in kernel), None)
            kind = kind or ("inductor" if kernel.startswith("triton_") else "memory" if kernel.startswith("Mem") else
                            "attention" if "flash" in kernel or "fmha" in kernel or "attention" in kernel else "products")
            taken = kinds.setdefault(kind, [0.0, 0.0])
            taken[0] += event.device_time / 1e3
            taken[1] += 1
        bench.say("account", what=pair.what, form=name, ms=round(sum(each[0] for each in kinds.values()), 3),
                  kinds={kind: f"{taken:.3f} ms of {int(count)}" for kind, (taken, count) in sorted(kinds.items())})
