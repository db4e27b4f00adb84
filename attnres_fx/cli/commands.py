"""The command line: ``attnres inspect``, ``attnres plan``, ``attnres transform``, ``attnres verify``,
``attnres doctor``, ``attnres kernels``, ``attnres conformance``.

Nothing heavy is imported before a command runs, so that help appears at once. Results go to stdout; whatever a user's code
prints goes to stderr. Exit codes: 0 success; 1 a check failed; 2 bad input or a refused model, with a one-line message.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from attnres_fx.cli.opened import Source

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Turn a PyTorch transformer into an Attention-Residuals model: inspect it, transform it, verify the result.")

_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's UsageError, wherever this typer keeps click

_SOURCE_HELP = (
    "A Hugging Face checkpoint directory (config.json and safetensors); or a .pt2 file of torch.export (open only "
    "files that you trust: reading one may run code); or package.module:factory or path/to/file.py:factory, where "
    "factory() returns the model, (model, args) or (model, args, kwargs).")

SourceName = Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE_HELP)]
# What can be checked of an option is checked here, before anything is opened or traced.
NumBlocks = Annotated[int | None, typer.Option(
    "--num-blocks", min=1, help="The largest number of blocks; 8 if nothing is given.")]
LayersPerBlock = Annotated[int | None, typer.Option(
    "--layers-per-block", min=1, help="Layers per block; 1 is Full AttnRes.")]
Streams = Annotated[str | None, typer.Option("--streams", help="Names of streams, comma-separated; all if not given.")]
MixScale = Annotated[Literal["paper", "sum"], typer.Option(
    "--mix-scale", help="'paper', the mean; or 'sum', to start exactly.")]
Eps = Annotated[float, typer.Option("--eps", min=0, help="Epsilon of the key norm.")]
Training = Annotated[bool, typer.Option("--training", help="Plan memory for a training step, not for inference.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


@app.command()
def inspect(
    source: SourceName,
    num_blocks: NumBlocks = None,
    layers_per_block: LayersPerBlock = None,
    streams: Streams = None,
    mix_scale: MixScale = "paper",
    graph: Annotated[bool, typer.Option("--graph", help="Print the rewritten graph as Python code.")] = False,
    dot: Annotated[Path | None, typer.Option("--dot", help="Write a drawing, before and after, as DOT text.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens per call, for bytes moved and held.")] = 4096,
    memory: Annotated[bool, typer.Option("--memory", help="Print the memory plan, one line per buffer.")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw the memory plan as SVG.")] = None,
    training: Training = False,
    as_json: Json = False,
) -> None:
    """Show residual streams, blocks and mixes, and with --memory the rows that they keep in memory.

    For a plain SOURCE, the blocks and mixes are those that a conversion would give; only --dot and --svg write files.
    """
    from attnres_fx.cli import plans as source_plans
    from attnres_fx.reports import graphs
    from attnres_fx.reports.streams import blocks_table, mixes_table, render, schedule_table, schedules

    opened = _open(source, num_blocks, layers_per_block)
    converted = opened.converted  # before --graph converts a plain model in memory
    planned = source_plans.plan_source(opened, num_blocks, layers_per_block, _names(streams), mix_scale)
    report, plans = planned.report, planned.plans
    content: dict[str, Any] = {"source": source, "kind": opened.kind, "converted": converted, **report.to_dict(),
                               "plans": [source_plans.plan_json(plan) for plan in plans],
                               "schedule": schedules(plans, tokens)}
    held = None
    if memory or svg is not None or training:
        from attnres_fx.reports.drawing import draw
        from attnres_fx.reports.memory import buffers_json, buffers_table, plan_graph_memory, plan_memory, summary

        if not plans and report.mixes:
            held = plan_graph_memory(planned.found.gm, tokens, training)
        else:
            source_plans.refuse_without(plans, "no memory to plan", "leave out --memory, --svg and --training")
            held = plan_memory(plans, tokens, training=training)
        content["memory"] = buffers_json(held)
        if svg is not None:
            _write(svg, draw(held, source))
    if graph or dot is not None:
        if not plans and report.mixes:
            gm = planned.found.gm
            content["code"], drawing = graphs.readable_code(gm), graphs.dot_of_mixes(gm, source)
        else:
            pair = graphs.before_and_after(source_plans.marked(opened, plans))
            content["code"], drawing = graphs.readable_code(pair.after), graphs.dot(pair, source)
        if dot is not None:
            _write(dot, drawing)
    if as_json:
        _print_json(content)
        return
    print(report)
    if plans:
        heading = "converted:" if converted else "a conversion would give:"
        moved = f"bytes that the mixes move, per token ({tokens:,} tokens in bfloat16 on a GPU):"
        print("\n" + render(f"{heading} {source_plans.summary(plans)}", blocks_table(plans), mixes_table(plans), moved,
                            schedule_table(plans, tokens)))
    if held is not None:
        print("\n" + render(buffers_table(held), summary(held)))
    if graph:
        print("\n" + content["code"])
    for path in (dot, svg):
        if path is not None:
            print(f"\nwrote {path}")


@app.command()
def plan(
    source: SourceName,
    tokens: Annotated[str, typer.Option(
        "--tokens", help="Tokens of the sequence: a number, or one per stream, as in encoder=1500,decoder=448.")] = "4096",
    dtype: Annotated[Literal["bf16", "fp16", "fp32", "fp64", "bfloat16", "float16", "float32", "float64"], typer.Option(
        "--dtype", help="The dtype of the streams.")] = "bf16",
    chunk: Annotated[int | None, typer.Option("--chunk", min=1, help="Prefill reads this many tokens at once.")] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="This many devices share the tokens of a call.")] = 1,
    num_blocks: NumBlocks = None,
    layers_per_block: LayersPerBlock = None,
    streams: Streams = None,
    mix_scale: MixScale = "paper",
    schedule: Annotated[Literal["auto", "one-pass", "two-phase"], typer.Option(
        "--schedule", help="How mixes read their sources.")] = "auto",
    memory_budget: Annotated[str | None, typer.Option(
        "--memory-budget", help="What one device may use: '512MB', '0.5GiB', or a number alone, bytes per token.")] = None,
    training: Training = False,
    as_json: Json = False,
) -> None:
    """Show how much memory the rows of attention residuals take, without running SOURCE.

    A budget limits how many queries phase 1 serves at once; it never changes the blocks. Exit code 2 if none fits.
    """
    from attnres_fx.cli import plans as source_plans
    from attnres_fx.passes.memory.budget import parse_budget
    from attnres_fx.reports.memory import plan_memory, scopes_table, tiles_table, tokens_text
    from attnres_fx.reports.streams import render

    numbers = _tokens(tokens)
    budget = int(memory_budget) if memory_budget is not None and memory_budget.isdecimal() else memory_budget
    if budget is not None:
        parse_budget(budget, tokens=1)
    opened = _open(source, num_blocks, layers_per_block)
    planned = source_plans.plan_source(opened, num_blocks, layers_per_block, _names(streams), mix_scale)
    report, plans = planned.report, planned.plans
    remedy = "attnres inspect --memory plans the mixes that it spells out" if report.mixes else "attnres inspect says why"
    source_plans.refuse_without(plans, "no memory to plan", remedy)
    held = plan_memory(plans, numbers, dtype=dtype, chunk=chunk, devices=devices, training=training,
                       schedule=schedule, memory_budget=budget)
    if as_json:
        _print_json({"source": source, "kind": opened.kind, "converted": opened.converted,
                     "plans": [source_plans.plan_json(found) for found in plans], **held.to_dict()})
        return
    purpose, chosen = "a training step" if training else "inference", held.scopes[-1]
    print(render(source_plans.summary(plans), f"rows of attention residuals, {purpose}, {held.dtype}, schedule {schedule}:",
                 scopes_table(held), f"by the query tile, {chosen.name} ({tokens_text(chosen.tokens)} tokens):",
                 tiles_table(held)))


@app.command()
def transform(
    source: SourceName,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The directory, or .pt2 file, to write.")],
    num_blocks: NumBlocks = None,
    layers_per_block: LayersPerBlock = None,
    streams: Streams = None,
    mix_scale: MixScale = "paper",
    eps: Eps = 1e-6,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier output.")] = False,
    guard: Annotated[bool, typer.Option("--guard/--no-guard", help=(
        "With --no-guard the Hugging Face checkpoint is kept byte for byte: transformers then loads OUT as the "
        "plain model, without a warning."))] = True,
    as_json: Json = False,
) -> None:
    """Convert SOURCE and write it to OUT.

    OUT is written whole or not at all. For a Hugging Face directory, OUT is the same checkpoint with attnres.json and
    attnres.safetensors beside it, and marked, so that from_pretrained refuses to read it as the plain model.
    Read OUT back with attnres_fx.load.
    """
    from attnres_fx.cli import plans as source_plans
    from attnres_fx.conversion import convert
    from attnres_fx.converted import plans_of
    from attnres_fx.errors import AlreadyConvertedError, OptionError
    from attnres_fx.formats import directory as persistence
    from attnres_fx.formats import huggingface as pretrained
    from attnres_fx.formats import program as exported
    from attnres_fx.formats.files import check_directory
    from attnres_fx.reports.streams import blocks_table, render

    if Path(source).is_dir():
        here, there = Path(source).resolve(), out.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise OptionError(f"the output '{out}' and the source '{source}' lie within each other",
                              remedy="give a directory elsewhere")
    if out.suffix != ".pt2":
        check_directory(out, overwrite=force)
    opened = _open(source, num_blocks, layers_per_block)
    if opened.converted:
        raise AlreadyConvertedError(f"'{source}' is converted already", remedy="transform the plain model")
    options: dict[str, Any] = {"num_blocks": num_blocks, "layers_per_block": layers_per_block, "mix_scale": mix_scale,
                               "eps": eps, "streams": _names(streams)}
    if opened.program is not None:
        plans = exported.transform(opened.program, out, overwrite=force, **options)
    else:
        if out.suffix == ".pt2":
            raise OptionError(f"'{out}' ends in .pt2, but '{source}' is not a program", remedy="name a directory")
        model = convert(opened.model, opened.args, opened.kwargs, **options)
        plans = plans_of(model)
        if opened.kind == "huggingface":
            pretrained.write_beside(Path(source), out, model, overwrite=force, guard=guard)
        else:
            persistence.save(model, out, overwrite=force)
    if as_json:
        _print_json({"source": source, "kind": opened.kind, "output": str(out),
                     "plans": [source_plans.plan_json(plan) for plan in plans]})
        return
    print(render(source_plans.summary(plans), blocks_table(plans)))
    print(f"\nwrote {out}")
    if opened.kind == "huggingface" and not guard:
        print("transformers loads it as the plain model, attnres_fx.load as the converted one")


@app.command()
def verify(
    source: SourceName,
    num_blocks: NumBlocks = None,
    layers_per_block: LayersPerBlock = None,
    streams: Streams = None,
    mix_scale: MixScale = "paper",
    eps: Eps = 1e-6,
    as_json: Json = False,
) -> None:
    """Check that SOURCE computes what it should.

    With zero queries it must match the plain network, with random ones the paper's definition. A plain SOURCE is converted
    in memory first. Exit code 1 if a check fails.
    """
    from attnres_fx.cli import plans as source_plans
    from attnres_fx.conversion import convert
    from attnres_fx.verification import models as verification
    from attnres_fx.verification.programs import verify_program

    opened = _open(source, num_blocks, layers_per_block)
    options: dict[str, Any] = {"num_blocks": num_blocks, "layers_per_block": layers_per_block, "mix_scale": mix_scale,
                               "eps": eps, "streams": _names(streams)}
    if opened.converted:
        source_plans.refuse_plan_options(num_blocks, layers_per_block, streams)
    if opened.program is not None:
        result = verify_program(opened.program, **({} if opened.converted else options))
    else:
        if not opened.converted:
            convert(opened.model, opened.args, opened.kwargs, **options)
        result = verification.verify(opened.model, opened.args, opened.kwargs)
    if as_json:
        _print_json({"source": source, "kind": opened.kind, "converted": opened.converted,
                     "zero_query": result.zero_query, "random_query": result.random_query,
                     "tolerance": result.tolerance, "exact_start": result.exact_start, "passed": result.passed,
                     "notes": list(result.notes)})
    else:
        print(result)
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show which kernels will be used here, and why; build the native ones if necessary. Exit code 1 if they do not work."""
    from attnres_fx.reports.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        _print_json(diagnosis.to_dict())
    else:
        print(diagnosis)
    raise typer.Exit(0 if diagnosis.native else 1)


@app.command()
def kernels(
    target: Annotated[str, typer.Option("--target", help="cuda:80, cuda:90, cuda:100 or hip:gfx942.")] = "cuda:90",
    width: Annotated[int | None, typer.Option("--width", help="Only the kernels of this width.")] = None,
    brief: Annotated[bool, typer.Option("--brief", help="One configuration of each kernel and width.")] = False,
    as_json: Json = False,
) -> None:
    """Compile the Triton kernels for a GPU, which need not be present, and show what they use.

    All configurations take minutes if Triton's cache is empty.
    """
    from attnres_fx.reports.binaries import compile_table, table

    rows = compile_table(target, width, brief)
    print(json.dumps(rows, indent=2) if as_json else table(rows, target))


@app.command()
def conformance(
    function: Annotated[str, typer.Argument(metavar="FUNCTION", help=(
        "package.module:function or path/to/file.py:function, called as function(sources, query, key_gain, eps=...); "
        "attnres_fx.mix if not given."))] = "",
    options: Annotated[str, typer.Option(
        "--options", help="Which of logit_scale, normalize_values and output_factor it takes, comma-separated.")] = "",
    dtypes: Annotated[str, typer.Option(
        "--dtypes", help="The dtypes of sources it takes, comma-separated.")] = "float32,bfloat16,float16",
    queries: Annotated[bool, typer.Option("--queries", help="It takes several queries at once, [M, d].")] = False,
    gradients: Annotated[bool, typer.Option("--gradients/--no-gradients", help="It is differentiable.")] = True,
    strides: Annotated[bool, typer.Option("--strides/--no-strides", help="Sources may be non-contiguous.")] = True,
    empty: Annotated[bool, typer.Option("--empty/--no-empty", help="Sources may have no rows.")] = True,
    deterministic: Annotated[bool, typer.Option(
        "--deterministic/--no-deterministic", help="The same call gives the same bits.")] = True,
    as_json: Json = False,
) -> None:
    """Check an implementation of the depth mix against its definition in float64: values, gradients, strides, dtypes.

    What it does not claim to support is not tested. Exit code 1 if a check fails.
    """
    from attnres_fx.conformance import CHECKS, DTYPES, OPTIONS, Implementation, failures, ours
    from attnres_fx.errors import OptionError

    it = ours()
    if function:
        from attnres_fx.cli.opened import function_named

        for given, known in ((options, OPTIONS), (dtypes, DTYPES)):
            unknown = [name for name in _names(given) or () if name not in known]
            if unknown:
                raise OptionError(f"'{unknown[0]}' is not known", remedy=f"give some of {', '.join(known)}")
        it = Implementation(
            function, function_named(function), frozenset(_names(options) or ()),
            tuple(DTYPES[name] for name in _names(dtypes) or ()), queries, gradients, strides, empty, deterministic)
    applying = sum(check.applies(it) for check in CHECKS)
    found = failures(it)
    if as_json:
        _print_json({"function": it.name, "checks": applying, "failures": [
            {"check": check, "said": said} for check, said in found]})
    else:
        for check, said in found:
            print(f"{check}: {said}")
        print(f"{it.name}: {applying - len(found)} of {applying} checks passed, {len(CHECKS) - applying} do not apply")
    raise typer.Exit(1 if found else 0)


def _open(source: str, num_blocks: int | None, layers_per_block: int | None) -> Source:
    """Open the source, unless the options contradict each other; what its code prints is not a result."""
    from attnres_fx.cli.opened import open_source
    from attnres_fx.passes.rewrite.partition import partition

    partition(1, num_blocks=num_blocks, layers_per_block=layers_per_block)
    with contextlib.redirect_stdout(sys.stderr):
        return open_source(source)


def _names(streams: str | None) -> list[str] | None:
    return None if streams is None else [name.strip() for name in streams.split(",") if name.strip()]


def _write(path: Path, text: str) -> None:
    from attnres_fx.formats.files import whole_file

    with whole_file(path, overwrite=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _tokens(text: str) -> int | dict[str, int]:
    """The value of --tokens: a number, or numbers by the names of streams."""
    from attnres_fx.errors import OptionError

    parts = [part.partition("=")[::2] for part in text.split(",")]
    numbers = [int(count or name) if (count or name).strip().isdecimal() else 0 for name, count in parts]
    if min(numbers) > 0:
        if text.count("=") == len(parts):
            return {name.strip(): number for (name, _), number in zip(parts, numbers, strict=True)}
        if len(parts) == 1:
            return numbers[0]
    raise OptionError(f"--tokens is '{text}'", remedy="give a whole number of 1 or more, or one for each stream as "
                                                      "--tokens encoder=1500,decoder=448")


def _print_json(content: dict[str, Any]) -> None:
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in content.items()}
    print(json.dumps(finite, indent=2))


def _fail(message: str) -> int:
    line = " ".join(re.sub(r"[.\s]*\n\s*What to do:", ". What to do:", message).split())
    print(f"attnres: {line}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, advice or warnings from the libraries below: stderr is for our one line."""
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
                        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"), ("HF_HUB_OFFLINE", "1")):
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    command = typer.main.get_command(app)
    with _quiet():
        try:
            given = list(sys.argv[1:] if arguments is None else arguments)
            result = command.main(args=given or ["--help"], prog_name="attnres",
                                  standalone_mode=False)
            return result if isinstance(result, int) else 0
        except _USAGE_ERROR as error:
            return _fail(error.format_message())
        except (KeyboardInterrupt, typer.Abort):
            return 130
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (the reader has gone; say nothing at exit)
            return 0
        except Exception as error:  # a refusal is one line; so is a fault, unless the traceback is requested
            from attnres_fx.runtime.errors import AttnResError

            if os.environ.get("ATTNRES_TRACEBACK"):
                raise
            if isinstance(error, AttnResError):
                return _fail(str(error))
            return _fail(f"{type(error).__name__}: {error} (set ATTNRES_TRACEBACK=1 for the traceback)")


def main() -> NoReturn:
    """The console command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
