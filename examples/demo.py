"""The demonstration behind ``make demo``: convert a Llama of Hugging Face, train it compiled, and time it.

The model has 8 transformer layers of width 256 and random weights; the text is Python's own standard library, byte by
byte. Nothing is downloaded. Every number that is printed is measured in this run.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import attnres_fx
from attnres_fx.converted import plans_of
from attnres_fx.reports.streams import blocks_table, mixes_table, streams_table

BATCH, LENGTH = 4, 128


class Step(NamedTuple):
    """One training step: the loss before its update, and the norm of all queries after it."""

    loss: float
    query_norm: float


def build_model(layers: int = 8, width: int = 256, seed: int = 0) -> nn.Module:
    """A Llama over bytes, with the random weights that Hugging Face gives it."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH, use_cache=False,
        bos_token_id=None, eos_token_id=None)
    return transformers.LlamaForCausalLM(config)


def standard_library(limit: int = 1 << 20) -> Tensor:
    """The first ``limit`` bytes of the sources of Python's standard library, in the order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8).long()


def batches(text: Tensor, steps: int, batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """Batches of token ids, [batch, length + 1], cut from ``text`` at random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - length, (steps, batch), generator=generator)
    return [torch.stack([text[start : start + length + 1] for start in row.tolist()]) for row in starts]


def train(
    model: nn.Module, data: Sequence[Tensor], lr: float = 1e-3, options: Mapping[str, Any] | None = None,
    each: Callable[[int, Step], None] | None = None,
) -> list[Step]:
    """Train a converted ``model`` on next-byte prediction, compiled by the backend ``attnres``, one step per batch."""
    compiled = torch.compile(model, backend="attnres", options=dict(options or {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    queries = [parameters.query for parameters in model.attnres.streams.values()]
    history = []
    for number, tokens in enumerate(data, start=1):
        logits = compiled(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norm = torch.linalg.vector_norm(torch.stack([query.detach().norm() for query in queries]))
        history.append(Step(loss.item(), norm.item()))
        if each is not None:
            each(number, history[-1])
    return history


def time_side_by_side(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turn so that a busy machine affects all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(rounds + 2):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if number >= 2:  # the first calls compile and warm up
                    taken[name].append(1e3 * (time.perf_counter() - begin))
    return taken


def times_table(taken: Mapping[str, Sequence[float]], base: str) -> Table:
    """A table of minimum, median and their ratios to ``base``."""
    table = Table("compiled forward", "min ms", "median ms", "min ratio", "median ratio")
    low, middle = min(taken[base]), statistics.median(taken[base])
    for name, values in taken.items():
        table.add_row(name, f"{min(values):.2f}", f"{statistics.median(values):.2f}",
                      f"{min(values) / low:.3f}", f"{statistics.median(values) / middle:.3f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="transformer layers, two residual additions each")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each compiled forward")
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    started = time.perf_counter()

    model = build_model(chosen.layers, chosen.width, chosen.seed)
    plain = copy.deepcopy(model)
    text = standard_library()
    data = batches(text, chosen.steps, seed=chosen.seed)
    example = data[0][:, :-1]
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"LlamaForCausalLM, {chosen.layers} layers of width {chosen.width}, {count / 1e6:.1f} M parameters; "
                  f"text: {len(text):,} bytes of Python's standard library\n")

    console.print("[bold]1. The residual streams in the traced graph[/bold]")
    console.print(streams_table(attnres_fx.analyze(model, example).streams))

    attnres_fx.convert(model, example, num_blocks=chosen.blocks)
    plans = plans_of(model)
    console.print(f"\n[bold]2. Converted: convert(model, ids, num_blocks={chosen.blocks})[/bold]")
    console.print(blocks_table(plans))
    console.print(mixes_table(plans))

    console.print("\n[bold]3. Zero queries compute the plain model[/bold]")
    console.print(str(attnres_fx.verify(model, example[:2])))
    exact = attnres_fx.convert(copy.deepcopy(plain), example, num_blocks=chosen.blocks, mix_scale="sum")
    console.print(f"with mix_scale='sum' the deviation is {float(attnres_fx.verify(exact, example[:2])):.1e}")

    console.print(f"\n[bold]4. {chosen.steps} training steps under torch.compile(model, backend='attnres')[/bold]")
    table = Table("step", "loss", "norm of the queries", "seconds")
    marks = [time.perf_counter()]
    with console.status("compiling forward and backward"):
        history = train(model, data, chosen.lr, each=lambda number, step: marks.append(time.perf_counter()))
    for number, (step, begin, end) in enumerate(zip(history, marks, marks[1:]), start=1):
        table.add_row(str(number), f"{step.loss:.4f}", f"{step.query_norm:.4f}", f"{end - begin:.2f}")
    console.print(table)

    console.print(f"\n[bold]5. Compiled forward, {example.shape[0]} x {example.shape[1]} tokens, "
                  f"{torch.get_num_threads()} threads[/bold]")
    base = "plain, Inductor"
    calls = {base: torch.compile(plain.eval()), "converted, attnres": torch.compile(model.eval(), backend="attnres")}
    calls["plain once more"] = calls[base]  # what noise makes of nothing
    bound = {name: (lambda call=call: call(example)) for name, call in calls.items()}
    console.print(times_table(time_side_by_side(bound, chosen.rounds), base))
    console.print(f"{chosen.rounds} calls of each, in turn. Done in {time.perf_counter() - started:.0f} s; "
                  "a second run finds Inductor's kernels in its cache.")


if __name__ == "__main__":
    main()
