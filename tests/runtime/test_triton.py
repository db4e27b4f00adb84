"""The Triton kernels: their values in the interpreter, their binaries, and what is said where they cannot run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from support import models
from torch import Tensor

import attnres_fx
from attnres_fx import errors
from attnres_fx.cli import commands as cli
from attnres_fx.errors import AttnResError, OptionError
from attnres_fx.options import Options
from attnres_fx.runtime import mix_norm, operators, phases

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
COMPILED = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with the packages and modules of this one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1",
                   **variables}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("file, chosen", [
    ("triton", "not slow"), pytest.param("triton", "slow", marks=pytest.mark.slow), ("phases", "not slow"),
    ("mix_norm", "not slow"), pytest.param("mix_norm", "slow", marks=pytest.mark.slow), ("into", "not slow"),
    ("recipes", "not slow")])
def test_in_the_interpreter(file: str, chosen: str) -> None:
    """All of interpreted_*.py: Triton reads the variable when it is first imported, hence the process."""
    file = str(HERE / f"interpreted_{file}.py")
    ran = python("-m", "pytest", "-o", "pythonpath=", "-m", chosen, file, TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    print(ran.stdout)


def test_importing_the_package_does_not_import_triton() -> None:
    code = ("import sys; sys.modules['triton'] = None; import attnres_fx, attnres_fx.backend, torch; "
            "print(attnres_fx.mix([torch.ones(2), torch.zeros(2)], torch.zeros(2)).tolist())")
    ran = python("-c", code)
    assert ran.stdout.strip() == "[0.5, 0.5]", ran.stderr


@COMPILED
def test_refused_on_a_cpu() -> None:
    ids = models.token_ids()
    converted = attnres_fx.convert(models.nanogpt(4), (ids,), num_blocks=2)
    compiled = torch.compile(converted, backend="attnres", options={"kernels": "triton"})
    with pytest.raises(Exception, match=r"(?s)no compiler for the CPU.*TRITON_INTERPRET=1") as caught:
        compiled(ids)
    assert "kernels" in str(caught.value)


@COMPILED
def test_the_phases_are_refused_on_a_cpu() -> None:
    row = torch.ones(2, 4)
    parts = phases.PHASE1([row], row, None)
    for call in (lambda: phases.PHASE1_TRITON([row], row, None),
                 lambda: phases.PHASE2_TRITON(parts[0], parts[2], [row], row[0], None)):
        with pytest.raises(errors.KernelError, match="no compiler for the CPU"):
            call()


@COMPILED
def test_mix_norm_is_refused_on_a_cpu() -> None:
    row = torch.ones(2, 4)
    tensors, options = ([row], row[0], None, None, None, None, None), (1e-6, 1.0, False, 1.0, False, 1e-6)
    for call in (lambda: mix_norm.MIX_NORM_TRITON(*tensors, None, *options),
                 lambda: mix_norm.MIX_NORM_BACKWARD_TRITON(row, None, *tensors, *options)):
        with pytest.raises(errors.KernelError, match="no compiler for the CPU"):
            call()


@pytest.mark.parametrize("serves", [False, True])
def test_what_operators_run_on_a_gpu(serves: bool) -> None:
    """The choice that is registered for GPUs, taken by hand: Triton where it serves, else the reference."""

    def serve(rows: Sequence[Tensor]) -> bool:
        return serves and rows[0].shape[-1] == 4

    row = torch.ones(2, 4)
    for first in (row, [row]):
        assert operators.on_gpu(lambda *_: True, lambda *_: False, serve, first, None) is serves


def test_the_option() -> None:
    with pytest.raises(OptionError, match="did you mean 'triton'"):
        Options.from_arguments(None, {"kernels": "tritn"})
    assert Options.from_arguments(None, {}).kernels == "auto"


def test_reference_by_name_gives_what_auto_gives() -> None:
    ids = models.token_ids()
    # In float64, so that two orders of summation agree: "auto" may be the native kernels.
    converted = attnres_fx.convert(models.nanogpt(4).double(), (ids,), num_blocks=2)
    grads = []
    for kernels in ("auto", "reference"):
        torch.compiler.reset()
        compiled = torch.compile(converted, backend="attnres", options={"kernels": kernels, "downstream": "aot_eager"})
        output = compiled(ids)
        grads.append(torch.autograd.grad(output.square().sum(), list(converted.parameters()), allow_unused=True))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


# Binaries


def _check(row: dict[str, object]) -> None:
    assert row["spills"] == 0, row
    assert row["load_bytes"] == 16, row
    assert row["registers"] <= (512 if str(row["target"]).startswith("hip") else 255), row
    # At least eight warps (four of AMD's, which are twice as wide) can be resident at once.
    assert row["programs"] * row["warps"] >= (4 if str(row["target"]).startswith("hip") else 8), row


def test_registers_are_told_where_a_compiler_takes_them() -> None:
    """As the table of binaries is compiled, so a launch on such a device asks for."""
    from attnres_fx.runtime.triton import cases, configs, problem

    tile = configs.Tile(8192, 1, 16)
    assert problem.launch_options(tile, torch.device("cuda")) == {"num_warps": 16, "maxnreg": 128}
    assert problem.launch_options(tile, torch.device("cpu")) == {"num_warps": 16}
    case = next(c for c in cases.cases() if c.name == "mix_backward" and c.width == 1024 and c.count == 9)
    given, most = (case.tile(32), 1024, 9, False, 2, 2), configs.most_registers(case.tile(32))
    assert case.arguments(32).registers == configs.backward_registers(*given, version("triton"))
    assert configs.backward_registers(*given, "3.7.1") < configs.backward_registers(*given, "3.9.0") == most


@COMPILED
def test_the_table_of_binaries(capsys: pytest.CaptureFixture[str]) -> None:
    """One configuration of each kernel by the command line; the others are compiled by the slow test."""
    assert cli.run(["kernels", "--target", "cuda:90", "--width", "1024", "--brief", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == {
        "mix_forward", "mix_backward", "mix_backward_again", "norm_backward", "mix_scores", "mix_source_grads",
        "reduce_parameter_grads"}
    for row in rows:
        assert {"name", "config", "registers", "spills", "shared_bytes", "load_bytes"} <= set(row)
        _check(row)


@COMPILED
@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
def test_a_binary_of_the_other_targets(target: str) -> None:
    from attnres_fx.runtime.triton import again, aot, backward, cases

    _check(aot.compile_case(cases.Case("mix_backward", backward.mix_backward, 1024, 9), target).to_dict())
    if target.startswith("cuda"):
        _check(aot.compile_case(cases.Case("mix_backward_again", again.mix_backward_again, 4096, 9), target).to_dict())


@COMPILED
@pytest.mark.parametrize("phase, kernel, count, queries", [
    ("phase 1", "mix_forward", 9, 4), ("phase 2", "mix_forward", 1, 1), ("phase 1", "mix_backward", 4, 2),
    ("phase 2", "mix_backward", 2, 1), ("phase 2", "mix_source_grads", 2, 1), ("phase 2 delta rms", "mix_forward", 1, 1),
    ("rms", "mix_backward", 4, 1), ("phase 2 layer", "mix_backward", 2, 1), ("layer", "norm_backward", 1, 1)])
def test_a_binary_of_the_phases_and_of_norms(phase: str, kernel: str, count: int, queries: int) -> None:
    from attnres_fx.runtime.triton import aot, backward, cases, forward

    features = tuple(re.findall(r"phase \d|\w+", phase))
    case = cases.Case(kernel, getattr(backward, kernel, forward.mix_forward), 1024, count, queries, features=features)
    assert phase in case.config
    _check(aot.compile_case(case, "cuda:90").to_dict())


@COMPILED
@pytest.mark.binaries
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_every_binary(target: str) -> None:
    from attnres_fx.runtime.triton import aot

    for case in aot.table(target):
        _check(aot.compile_case(case, target).to_dict())


def test_the_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    if INTERPRETED:
        assert cli.run(["kernels", "--target", "cuda:90"]) == 2
        return
    assert cli.run(["kernels", "--target", "cuda:90", "--width", "64", "--brief"]) == 0
    printed = capsys.readouterr().out
    assert "registers" in printed
    assert "not run on a GPU" in printed


def test_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "--target", "cuda:7"]) == 2
    assert "cuda:90" in capsys.readouterr().err


def test_errors_are_of_the_family() -> None:
    assert issubclass(attnres_fx.errors.KernelError, AttnResError)
