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
from attnres_fx.passes import rows

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
        ours = converted(llama(bench, layers, width, dtype), batches[0], layers, 0.2)
        torch._dynamo.reset()
        eager = torch.compile(ours, backend="attnres", options={"downstream": "eager", "kernels": "reference"})
        made[dtype] = ours, batches, [step(ours, eager, ids) for ids in batches]
    for name, settings in OPTIONS:
        for dtype in LIMITS:
            if bench.left() < 20:
                bench.say("skipped", what=f"model {name} {dtype}")
                continue
            with bench.guarded(f"model {name} {dtype}"):
                right = _check_option(bench, *made[dtype], name, settings)
                if name == "default" and not right:
                    with mock.patch.object(rows, "orders_copies", lambda _: False):
                        _check_option(bench, *made[dtype], "default, no loops placed", settings)
        if name == "default" and bench.cuda:
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
    for what, layers, width, batch, tokens, schedule in WHOLE if bench.cuda else TINY:
        if bench.left() < 35:
            bench.say("skipped", what=f"whole {what} {layers} x {width} {schedule}")
            continue
        with bench.guarded(f"whole {what} {layers} x {width} {schedule}"):
            _compare(bench, what, layers, width, batch, tokens, schedule)
        if bench.cuda:
            torch.cuda.empty_cache()


def _compare(bench: Bench, what: str, layers: int, width: int, batch: int, tokens: int, schedule: str) -> None:
    torch._dynamo.reset()
    plain = llama(bench, layers, width, torch.bfloat16)
    ids = torch.randint(0, VOCABULARY, (batch, tokens), device=bench.device)
    ours = converted(plain, ids, 8, 0.02)
    mode: dict[str, Any] = {"mode": "reduce-overhead"} if what == "decode" else {}
    # One way to pass options: a mode stands beside none, so the captured graphs are asked for by Inductor's own setting.
    settings: dict[str, Any] = {"options": {"schedule": schedule, "inductor": {"triton.cudagraphs": what == "decode"}}}
    runs = {"plain": (plain, torch.compile(plain, dynamic=False, **mode)),
            "attnres": (ours, torch.compile(ours, dynamic=False, backend="attnres", **settings))}

    def call(name: str) -> None:
        module, run = runs[name]
        if what == "train":
            module.zero_grad(set_to_none=True)
            run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        else:
            inferred(run, ids)

    first: dict[str, float] = {}
    for name in runs:
        begin = time.monotonic()
        for _ in range(4):
            call(name)
        bench.sync()
        first[name] = time.monotonic() - begin
    turns = ("plain", "attnres", "plain again")
    times: dict[str, list[float]] = {name: [] for name in turns}
    repeats = 10 if what == "decode" else 1
    for number in range(25 if bench.cuda else 3):
        for name in (*turns[number % 3:], *turns[:number % 3]):
            bench.sync()
            begin = time.perf_counter()
            for _ in range(repeats):
                call(name.removesuffix(" again"))
            bench.sync()
            times[name].append((time.perf_counter() - begin) * 1e3 / repeats)
    for name, taken in times.items():
        ratios = [one / other for one, other in zip(taken, times["plain"])]
        bench.say("whole", what=what, layers=layers, d=width, batch=batch, tokens=tokens, schedule=schedule, form=name,
                  ms=round(statistics.median(taken), 3), least=round(min(taken), 3),
                  over_plain=f"{(statistics.median(ratios) - 1) * 100:+.2f} %",
                  first_calls_s=round(first.get(name, 0.0), 1))
    if bench.cuda and what != "decode":
        for name in runs:
            bench.sync()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(name)
            bench.sync()
            bench.say("peak", what=what, d=width, form=name,
                      rows=round((torch.cuda.max_memory_allocated() - before) / (batch * tokens * width * 2), 1))
