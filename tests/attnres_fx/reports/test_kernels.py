"""Which kernels serve what: the table, the option of the backend, and ``attnres doctor``."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from support.passes import applied
from support.reference import NanoGPT
from torch import Tensor

import attnres_fx
import attnres_fx.runtime.mix_norm  # defines the operator
from attnres_fx.cli import commands as cli
from attnres_fx.errors import KernelError, OptionError
from attnres_fx.options import Options
from attnres_fx.passes._compat.dynamo import inner_error
from attnres_fx.passes.lower.select import KERNELS, select_kernels
from attnres_fx.reports.kernels import Kernel, KernelTable
from attnres_fx.runtime.cpu import build, native
from attnres_fx.runtime.mix import MIX, MIX_REFERENCE, mix


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without a compiler, where nothing was built before."""
    monkeypatch.setattr(native, "_state", native.State("not loaded"))
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")


def row(table: KernelTable) -> Kernel:
    return next(row for row in table if row.device == "cpu" and "float32" in row.dtypes)


def test_the_table_is_frozen_and_prints() -> None:
    table = attnres_fx.kernels()
    with pytest.raises(FrozenInstanceError):
        table[0].device = "cuda"  # type: ignore[misc]
    assert {row.implementation for row in table} <= {"native", "reference", "triton"} and all(row.reason for row in table)
    assert "any other" in str(table) and json.dumps(table.to_dict())


@pytest.mark.parametrize("operator", ["mix", "mix_phase1", "mix_phase2", "mix_norm"])
def test_the_table_covers_every_operator(operator: str) -> None:
    """As the dispatcher has it: what is native on the CPU, and that a GPU has a choice of its own."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    rows = [row for row in attnres_fx.kernels() if row.operators == "all" or operator in row.operators.split(", ")]
    assert {row.device for row in rows} == {"cpu", "cuda", "any other"}
    loaded = native.ensure()
    for name in (f"attnres::{operator}", f"attnres::{operator}_backward"):
        assert registered(name, "CPU") == loaded and registered(name, "CUDA")


def test_the_table_follows_the_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(native, "_state", native.State("not loaded"))
    assert (row(attnres_fx.kernels()).implementation, row(attnres_fx.kernels()).reason) == (
        "native", "C++, compiled once at the first call")
    build.library_path().write_bytes(b"library")
    assert row(attnres_fx.kernels()).reason == "C++, compiled once at the first call"  # it is not as it was written
    build.library_path().with_suffix(".sha256").write_text(build._record_of(b"library"))
    assert row(attnres_fx.kernels()).reason == "compiled C++, loaded at the first call"
    monkeypatch.setattr(native, "_state", native.State("unavailable", "the moon is full"))
    assert row(attnres_fx.kernels()).implementation == "reference"
    assert "the moon is full" in row(attnres_fx.kernels()).reason


def test_without_a_compiler_the_table_says_reference(no_compiler: None) -> None:
    assert row(attnres_fx.kernels()).implementation == "reference"
    assert "no C++ compiler" in row(attnres_fx.kernels()).reason


def test_doctor_tells_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    working = native.ensure()
    assert cli.run(["doctor"]) == (0 if working else 1)
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "native kernels:" in text and str(build.cache_directory()) in text
    assert cli.run(["doctor", "--json"]) == (0 if working else 1)
    content = json.loads(capsys.readouterr().out)
    assert content["native"] is working and len(content["kernels"]) == len(attnres_fx.kernels())


def test_doctor_tells_what_is_missing(no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert "no C++ compiler was found" in content["state"] and content["compiler"].startswith("none found")


def test_the_option_is_checked() -> None:
    assert Options().kernels == "auto"
    with pytest.raises(OptionError, match="kernels is 'fast'") as caught:
        Options.from_arguments(None, {"kernels": "fast"})
    assert all(name in str(caught.value) for name in KERNELS)


def converted() -> tuple[NanoGPT, Tensor]:
    torch.manual_seed(0)
    model, ids = NanoGPT(num_sublayers=4), torch.randint(64, (2, 6))
    attnres_fx.convert(model, ids, num_blocks=2)
    torch.nn.init.normal_(model.attnres.stream.query)
    return model, ids


@pytest.mark.parametrize("downstream, schedule, stems", [
    ("aot_eager", "one-pass", ("mix",)), ("inductor", "one-pass", ("mix_norm",)),
    ("inductor", "two-phase", ("mix_phase1", "mix_norm"))])
def test_the_option_chooses_forward_and_backward(downstream: str, schedule: str, stems: tuple[str, ...]) -> None:
    model, ids = converted()
    results = {}
    for kernels, suffix in (("auto", ""), ("reference", "_reference")):
        names = {f"attnres::{stem}{part}{suffix}" for stem in stems for part in ("", "_backward")}
        torch._dynamo.reset()
        options = {"kernels": kernels, "downstream": downstream, "schedule": schedule}
        fast = torch.compile(model, backend="attnres", options=options)
        fast(ids).sum().backward()  # compiles
        model.zero_grad()
        with torch.autograd.profiler.profile() as record:
            loss = fast(ids).square().mean()
            loss.backward()
        ran = {event.name for event in record.function_events if event.name.startswith("attnres::mix")}
        # Under Inductor, what makes a block kept for the backward writes it into an arena.
        assert {name.replace("_into", "") for name in ran} == names
        results[kernels] = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    torch.testing.assert_close(results["auto"], results["reference"], rtol=1e-4, atol=1e-5)


def test_a_mix_in_a_plain_graph_is_chosen_too() -> None:
    sources, query = [torch.randn(2, 8) for _ in range(3)], torch.randn(8)
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(lambda *s: mix(list(s), query) + torch.ops.attnres.mix(list(s), query, None), backend=backend)(*sources)
    before = graphs[0].code
    after = applied(select_kernels, graphs[0], kernels="reference")
    assert graphs[0].code == before and after.code.count("mix_reference") == 2
    targets = [node.target for node in after.graph.nodes if node.op == "call_function"]
    assert targets.count(MIX_REFERENCE) == 2 and MIX not in targets
    assert applied(select_kernels, after, kernels="reference") is after


def test_native_is_refused_where_it_cannot_be(no_compiler: None) -> None:
    model, ids = converted()
    with pytest.warns(native.NativeKernelsWarning), pytest.raises(Exception) as caught:
        torch.compile(model, backend="attnres", options={"kernels": "native"})(ids)
    error = inner_error(caught.value)
    assert isinstance(error, KernelError) and "no C++ compiler" in str(error) and "attnres doctor" in str(error)
