"""The benchmark runs, its variants compute the same, and its verdicts are sound. No timing is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.scripts import load_script

import attnres_fx


def test_verdict_is_held_against_the_control() -> None:
    model = load_script("benchmarks/model.py")
    case = model.Case("made up", 64, 1, 1)
    outputs = dict.fromkeys(("plain", "control", "attnres", "pseudocode"), torch.ones(3))
    first = dict.fromkeys(outputs, 1.0)
    taken = {"plain": [10.0, 11.0], "control": [10.5, 11.2], "attnres": [10.2, 11.1], "pseudocode": [15.0, 16.0]}
    results = {result.variant: result for result in model.summarize(case, taken, first, outputs)}
    assert results["pseudocode"].resolvable and not results["attnres"].resolvable
    assert results["pseudocode"].min_ratio == pytest.approx(1.5)
    assert results["plain"].median_ratio == 1.0


def test_variants_compute_the_same() -> None:
    model = load_script("benchmarks/model.py")
    for case in model.QUICK:
        variants = model.build(case, model.DEFAULT)
        ids = torch.randint(256, (2, 7))
        torch.testing.assert_close(variants["attnres"](ids), variants["pseudocode"](ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    load_script("benchmarks/model.py").main(
        ["--quick", "--rounds", "2", "--json", "--variants", "unfused", "two-phase", "pseudocode"])
    content = json.loads(capsys.readouterr().out)
    assert len(content["results"]) == 12 and content["machine"]["rounds"] == 2
    assert {result["variant"] for result in content["results"]} == {
        "plain", "control", "attnres", "unfused", "two-phase", "pseudocode"}
    assert all(result["min_ms"] > 0 and result["deviation"] < 1e-3 for result in content["results"])


def test_the_list_form_of_the_mix_benchmark_computes_the_mix() -> None:
    mix = load_script("benchmarks/mix.py")
    case = mix.make_case(5, 48, torch.float32, False, 0)
    query, gain = torch.randn(48), torch.rand(48)
    torch.testing.assert_close(mix.list_form(case.sets[0], query, gain), attnres_fx.mix(case.sets[0], query, gain))


@pytest.mark.slow
def test_mix_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    load_script("benchmarks/mix.py").main(["--quick", "--rounds", "2", "--json"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert {result["variant"] for result in results} == {"native", "control", "roofline", "inductor", "reference", "eager"}
    assert len(results) == 4 * 5 + 4


@pytest.mark.slow
def test_a_training_step_keeps_no_more_rows_than_the_paper_says() -> None:
    """Over the plain network: N + 2 rows between forward and backward, 2N + 4 at the peak of a step."""
    memory = load_script("benchmarks/memory.py")
    blocks = 3
    plain, attnres = memory.compare(3, blocks, 64, 64, ["attnres"])
    assert (plain.variant, attnres.variant) == ("plain", "attnres")
    assert attnres.kept_for_backward <= plain.kept_for_backward + blocks + 2
    assert attnres.step_peak <= plain.step_peak + 2 * blocks + 4
    # Beside the arena, two numbers a token of a norm that Inductor computes before the first mix.
    assert attnres.inference_peak <= plain.inference_peak + attnres.arena + 2 / 64
    assert 0 < attnres.arena <= blocks + 2


def test_what_a_call_holds_is_counted() -> None:
    memory = load_script("benchmarks/memory.py")

    def call() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(3000)
        del second
        return first

    result, held = memory.held(call)
    assert result.shape == (1000,) and (held.kept, held.peak) == (4000, 16000)


def test_the_variants_of_the_mix_norm_benchmark_compute_the_same() -> None:
    benchmark = load_script("benchmarks/mix_norm.py")
    rows, vectors = [torch.randn(5, 48) for _ in range(10)], [torch.randn(48) for _ in range(3)]
    torch.testing.assert_close(*(form(rows[:-1], rows[-1], *vectors) for form in (benchmark.fused, benchmark.parts)))


@pytest.mark.slow
def test_mix_norm_benchmark_runs() -> None:
    results = load_script("benchmarks/mix_norm.py").main(["--quick"])
    assert [len(taken) for _, taken in results] == [3] * 4
    assert all(time > 0 for _, taken in results for times in taken.values() for time in times)


def test_the_traffic_of_a_mix_is_counted() -> None:
    """One pass reads each source once and writes one row. In a process of its own: Triton is an interpreter there."""
    script = Path(__file__).parent.parent / "benchmarks" / "kernel_traffic.py"
    done = subprocess.run([sys.executable, str(script), "--sources", "2", "9", "--width", "64", "--tokens", "32", "--json"],
                          capture_output=True, text=True, timeout=300, check=True)
    content = json.loads(done.stdout)
    for count, (forward, backward) in content["rows"]["attnres_fx"].items():
        assert forward == int(count) + 1
        assert 2 * int(count) + 1 < backward < 2 * int(count) + 2  # the sources and a gradient, as many gradients; sums
    assert content["network"]["paper, two phases"] == 5.5
    assert 5.5 < content["network"]["two phases"] < content["network"]["one pass"]


def test_the_script_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    """Its checks of values, which hold on a CPU, too; a section that is not known fails alone; results line by line."""
    rows = load_script("benchmarks/gpu.py").main(["--device", "cpu", "--out", str(tmp_path), "--only", "values,none"])
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in written] == [row["kind"] for row in rows]
    checked = [row for row in written if "ok" in row]
    assert len(checked) > 8 and all(row["ok"] for row in checked)
    assert [row["what"] for row in written if row["kind"] == "FAILED"] == ["none"]


def test_checks_run_in_processes_of_their_own(tmp_path: Path) -> None:
    """Their results are taken over, and where each ended is said."""
    rows = load_script("benchmarks/gpu.py").main(["--device", "cpu", "--out", str(tmp_path), "--only", "parallel=phases"])
    assert [row["kind"] for row in rows] == ["machine", "phases", "job", "section"]
    assert all(row.get("ok", True) for row in rows) and rows[1]["job"] == "values=phases"


def test_plans_to_search_are_lines_of_the_table() -> None:
    """What is found on a GPU is printed as the table of configurations is written."""
    search = load_script("benchmarks/gpu_search.py")
    from attnres_fx.runtime.triton.configs import Plan, Tile

    for case in search.CASES:
        found = list(search.plans(case))
        assert found and len(set(found)) == len(found)
        for plan in found:
            assert eval(search._words(plan), {"Plan": Plan, "Tile": Tile}) == plan
            assert plan.tile.block_d >= case.width and plan.tile.warps * 32 * (plan.registers or 32) <= 65536


@pytest.mark.slow
def test_the_account_of_a_call_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    account = load_script("benchmarks/account.py")
    account.main(["--quick", "--rounds", "1", "--variants", "attnres", "--json"])
    rows = json.loads(capsys.readouterr().out)
    found = {(row["case"], row["variant"], row["kind"]): row["microseconds"] for row in rows}
    for case in ("quick-inference", "quick-training"):
        assert found[case, "plain", "mixes"] == 0 < found[case, "attnres", "mixes"]
        for variant in ("plain", "attnres"):
            assert found[case, variant, "matrix products"] > 0
            kinds = [key for key in found if key[:2] == (case, variant) and key[2] != "whole call"]
            assert sum(found[key] for key in kinds) == pytest.approx(found[case, variant, "whole call"])


def test_the_benchmark_of_running_by_value_runs() -> None:
    """It checks by itself that all converted variants compute the same."""
    command = [sys.executable, "benchmarks/by_value.py", "--quick", "--ways", "eager", "--rounds", "1"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    assert run.stdout.count("by value") == 2
