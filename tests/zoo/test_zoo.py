"""The zoo: every architecture is found, converted exactly, compiled and trained, or refused for its own reason."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.comparison import REFERENCE, agree, check_both, disturbed, trained
from support.ways import by_graph, owners_of
from support.zoo_cases import ZOO, ZooCase

import attnres_fx
from attnres_fx.analysis import report_of
from attnres_fx.by_value import can_run
from attnres_fx.converted import plans_of
from attnres_fx.errors import StreamRefusedError
from attnres_fx.passes.findings import find
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.reports.memory import plan_memory
from attnres_fx.runner import RUNNER

pytestmark = pytest.mark.zoo

ROWS: list[tuple[str, ...]] = []
BEGIN, END = "<!-- support table, written by make support -->", "<!-- end of the support table -->"


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what was found, and the rate of conversion in each family, when all is done."""
    ROWS.clear()
    yield
    path = request.config.getoption("--support-table", default=None)
    if path is not None:
        write_support_table(Path(path))
    from rich.console import Console
    from rich.table import Table

    shown = Table("case", "tracer", "streams found", "expected", "converted", "deviation or reason", "seconds")
    for row in ROWS:
        shown.add_row(*row)
    rates = Table("family", "rewritable cases converted", "other cases converted or refused for their own reason")
    for family in sorted({case.family for case in ZOO.values()}):
        names = [name for name, case in ZOO.items() if case.family == family]
        good = {row[0] for row in ROWS if row[4] == "yes"}
        rewritable = [name for name in names if ZOO[name].rewritable]
        others = [name for name in names if not ZOO[name].rewritable]
        refused = {row[0] for row in ROWS if row[4] == "refused"}
        rates.add_row(family, f"{sum(n in good for n in rewritable)} of {len(rewritable)}",
                      f"{sum(n in good | refused for n in others)} of {len(others)}")
    Console(width=160, force_terminal=False).print("\n", shown, rates)


def write_support_table(path: Path) -> None:
    """Put what this run found between the markers of a Markdown file."""
    seen: dict[str, dict[str, str]] = {}
    for name, tracer, found, _, converted, outcome, _ in ROWS:
        row = seen.setdefault(name, {"tracers": "", "layers": found})
        if converted == "-":
            row["tracers"] += f"{', ' if row['tracers'] else ''}{tracer}"
        elif converted == "refused":
            row["result"] = f"refused: {outcome}"
        else:
            deviation, mode = outcome.rsplit("; ", 1)[0].split(" ", 1)
            row["result"] = f"converted, eagerly {outcome.rsplit('; ', 1)[1]}"
            row["sum" if "sum" in mode else "paper"] = max(row.get("sum" if "sum" in mode else "paper", ""), deviation,
                                                          key=lambda text: float(text or 0))
    lines = ["| model | family | layers of its streams | found by | norms | result | at zero queries: sum, paper |",
             "|---|---|---|---|---|---|---|"]
    for name, row in seen.items():
        case = ZOO[name]
        deviations = f"{row['sum']}, {row['paper']}{'' if case.rewritable else ' (not preserving)'}" if "sum" in row else ""
        lines.append(f"| {name} | {case.family} | {row['layers'].strip('[]')} | {row['tracers']} | {case.placement} | "
                     f"{row.get('result', '')} | {deviations} |")
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    assert END in rest, f"{path} has no line {END}"
    path.write_text("\n".join([before + BEGIN, *lines, END]) + rest.partition(END)[2], encoding="utf-8")


def record(name: str, tracer: str, found: Any, converted: str, outcome: str, started: float) -> None:
    ROWS.append((name, tracer, str(found), str(list(ZOO[name].layers)), converted, outcome, f"{time.time() - started:.1f}"))


def facts(case: ZooCase, report: Any) -> None:
    assert sorted(stream.num_layers for stream in report.streams) == sorted(case.layers)
    assert {stream.norm_placement for stream in report.streams} == {case.placement}
    assert all(stream.function_preserving == case.rewritable for stream in report.streams)
    assert all(stream.convertible == case.convertible for stream in report.streams)


@pytest.mark.parametrize("name", list(ZOO))
def test_analyze(name: str) -> None:
    torch._dynamo.reset()
    case, started = ZOO[name], time.time()
    model, args, kwargs = case.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = attnres_fx.analyze(model, args, kwargs)
    facts(case, report)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    record(name, "dynamo", [s.num_layers for s in report.streams], "-", report.streams[0].norm_placement, started)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", list(ZOO))
def test_analyze_exported(name: str, strict: bool) -> None:
    torch._dynamo.reset()
    case, started = ZOO[name], time.time()
    model, args, kwargs = case.build()
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=strict)
    report = report_of(find(program.module(check_guards=False)))  # type: ignore[arg-type]
    facts(case, report)
    record(name, "strict export" if strict else "export", [s.num_layers for s in report.streams], "-",
           report.streams[0].norm_placement, started)


def elsewhere(condition: bool) -> Any:
    """Marks of what ``make test-many`` runs: the same code, met by the other combinations of the same model."""
    return pytest.mark.many if condition else ()


@pytest.mark.parametrize(("num_blocks", "mix_scale"), [
    pytest.param(blocks, scale, id=f"{'blocks' if blocks == 2 else 'full'}-{scale}",
                 marks=elsewhere((blocks == 2) != (scale == "paper")))
    for blocks in (2, 99) for scale in ("paper", "sum")])
@pytest.mark.parametrize("name", list(ZOO))
def test_convert(name: str, num_blocks: int, mix_scale: str) -> None:
    torch._dynamo.reset()
    case, started = ZOO[name], time.time()
    built = case.build()
    if mix_scale == "paper":
        models.set_norm_eps(built[0])
        built = models.to_dtype(built, torch.float64)
    model, args, kwargs = built
    with torch.no_grad():
        plain = models.tensors_of(model(*args, **kwargs))
    if not case.convertible:
        with pytest.raises(StreamRefusedError, match=case.refusal):
            attnres_fx.convert(model, args, kwargs, num_blocks=num_blocks, mix_scale=mix_scale)
        assert not hasattr(model, "attnres")
        record(name, "dynamo", list(case.layers), "refused", case.refusal, started)
        return
    attnres_fx.convert(model, args, kwargs, num_blocks=num_blocks, mix_scale=mix_scale)
    with torch.no_grad():
        deviation = models.relative(models.tensors_of(model(*args, **kwargs)), plain)
    if case.rewritable or mix_scale == "sum":
        assert deviation <= (1e-6 if mix_scale == "paper" else 1e-5)
    check_memory_plans(model)
    if num_blocks == 2:
        assert attnres_fx.verify(model, args, kwargs).passed
    record(name, "dynamo", [s.query.shape[0] - 1 for s in model.attnres.streams.values()], "yes",
           f"{deviation:.0e} ({mix_scale}, {'full' if num_blocks == 99 else '2 blocks'}); "
           f"{'by value' if ZOO[name].by_value else 'as one graph'}", started)
    if num_blocks == 2 and mix_scale == "paper":
        check_by_value(name, model, args, kwargs)


@pytest.mark.many
@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.convertible and case.by_value])
def test_layers_compiled_one_by_one(name: str) -> None:
    """Results and all gradients are those of the graph, in a model of float64."""
    torch._dynamo.reset()
    built = ZOO[name].build()
    models.set_norm_eps(built[0])
    model, args, kwargs = models.to_dtype(built, torch.float64)
    if ZOO[name].family == "state space":  # which are traced token by token
        args = (args[0][:, :5],)
    attnres_fx.convert(model, args, kwargs, num_blocks=2)
    disturbed(model)
    with by_graph(model):
        expected = trained(model, model, *args, **kwargs)
    for plan in plans_of(model):
        assert plan.start is not None
        depth = len(plan.start[0].split("."))
        for path in {".".join(site.split(".")[:depth]) for site, _ in plan.sites}:
            model.get_submodule(plan.owner).get_submodule(path).compile(
                backend="attnres", options={"downstream": "aot_eager"})
    # Norms that compute in float32 round in another order.
    agree(trained(model, model, *args, **kwargs), expected, 1e-6)


def check_by_value(name: str, model: Any, args: Any, kwargs: Any) -> None:
    """Called eagerly it runs by value, and results and all gradients are those of the graph, in float64."""
    if ZOO[name].family == "state space":  # which are traced token by token
        args = (args[0][:, :5],)
    disturbed(model)
    served = [can_run(owner) for owner in owners_of(model)]
    assert served and all(each == ZOO[name].by_value for each in served), [plan.trial for plan in plans_of(model)]
    found = trained(model, model, *args, **kwargs)
    assert all((RUNNER in owner.__dict__) != ZOO[name].by_value for owner in owners_of(model))
    with by_graph(model):
        expected = trained(model, model, *args, **kwargs)
    # A part of some models computes in float32.
    agree(found, expected, 1e-10 if all(value.dtype == torch.float64 for value in expected.values()) else 1e-6)


def check_memory_plans(model: Any) -> None:
    """Of a call and of a training step, in one pass and in two phases: within 5 percent of what lives at once."""
    plans = [StreamPlan.from_json(parameters.plan) for parameters in model.attnres.streams.values()]
    for training, schedule in itertools.product((False, True), ("one-pass", "two-phase")):
        layout = plan_memory(plans, 512, training=training, schedule=schedule).choice.layout
        assert 0 < layout.lower_bound <= layout.arena <= 1.05 * layout.lower_bound, (training, schedule, layout.ratio)


@pytest.mark.parametrize(("name", "num_blocks"), [
    pytest.param(name, blocks, id=f"{name}-{'blocks' if blocks == 3 else 'full'}",
                 marks=elsewhere((index % 2 == 0) == (blocks == 3)))
    for index, name in enumerate(name for name, case in ZOO.items() if case.convertible) for blocks in (3, 99)])
def test_compiled(name: str, num_blocks: int) -> None:
    """With all defaults (Inductor, arena, fusion): values, and all gradients of a training step, are the reference's."""
    torch._dynamo.reset()
    model, args, kwargs = ZOO[name].build()
    if ZOO[name].family == "state space":  # which are traced token by token
        args = (args[0][:, :5],)
    attnres_fx.convert(model, args, kwargs, num_blocks=num_blocks)
    disturbed(model)
    # Whole, as it was converted: where a model indexes by a mask, a compilation in parts would break there.
    fast = torch.compile(model, backend="attnres", fullgraph=True)
    slow = torch.compile(model, backend="attnres", fullgraph=True, options=REFERENCE)
    check_both(model, fast, fast, slow, args, kwargs, bound=1e-4)
