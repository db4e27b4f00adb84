"""The examples run, print what they are there to print, and show what they claim."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from support import handwritten
from support.scripts import ROOT, load_script
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_every_example_is_run_here() -> None:
    covered = {"convert_hugging_face", "own_model", "inference", "save_and_load", "one_line", "demo"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == covered


def test_examples_are_short_and_guarded() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.rstrip().endswith('if __name__ == "__main__":\n    main()'), path.name
        assert path.stem == "demo" or len(text.splitlines()) < 60, path.name


def test_convert_hugging_face_trains_the_queries(capsys: pytest.CaptureFixture[str]) -> None:
    losses = load_script("examples/convert_hugging_face.py").main()
    assert losses[-1] < losses[0] - 0.1 and all(map(math.isfinite, losses))
    assert "passed" in capsys.readouterr().out


def test_own_model_is_converted(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_script("examples/own_model.py").main()
    assert model.attnres.stream.query.shape == (7, 64)
    printed = capsys.readouterr().out
    assert "x + f(x)" in printed and "passed" in printed


@pytest.mark.slow
def test_inference_is_right_at_every_length(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = load_script("examples/inference.py").main()
    assert [output.shape[1] for output in outputs] == [16, 33, 64, 128]
    printed = [line for line in capsys.readouterr().out.splitlines() if "from eager" in line]
    assert len(printed) == 4 and all(float(line.rsplit(" ", 1)[1]) < 1e-4 for line in printed)


def test_save_and_load_is_bit_equal() -> None:
    assert load_script("examples/save_and_load.py").main() == [True, True]


def test_one_line_converts_and_trains(capsys: pytest.CaptureFixture[str]) -> None:
    losses = load_script("examples/one_line.py").main()
    assert losses[-1] < losses[0]
    assert "attnres.stream.query" in capsys.readouterr().out


def test_demo_functions_say_what_they_measure() -> None:
    demo = load_script("examples/demo.py")
    text = demo.standard_library(limit=10_000)
    assert text.shape == (10_000,) and int(text.max()) < 256
    first, again = (demo.batches(text, 3, batch=2, length=16, seed=5) for _ in range(2))
    assert [b.shape for b in first] == [(2, 17)] * 3 and all(map(torch.equal, first, again))
    taken = demo.time_side_by_side({"a": lambda: None, "b": lambda: None}, rounds=4)
    assert {name: len(values) for name, values in taken.items()} == {"a": 4, "b": 4}


# Whose Python runs, in this order.
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("kernels", "files", "debugging", "training")))


def test_the_python_of_the_documents_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def llama() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, use_cache=False, bos_token_id=None, eos_token_id=None))

    blocks = [block for name in DOCUMENTS
              for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)]
    by_hand = handwritten.Network(handwritten.READS[0])
    names = {"model": llama(), "plain_model": llama(), "attnres_model_written_by_hand": by_hand,
             "ids": torch.randint(32, (2, 8)), "directory": tmp_path / "out"}
    for block in blocks:
        exec(block, names)
        if "plain_model" in block:
            names["fast"](names["ids"])
        if "attnres_model_written_by_hand" in block:
            tokens = torch.randint(13, (2, 5))
            torch.testing.assert_close(names["fast"](tokens), by_hand(tokens))
    assert math.isfinite(names["loss"].item()) and names["model"].attnres.stream.query.shape == (5, 16)
    assert names["plain_model"].attnres.stream.query.shape == (5, 16)
    assert torch.equal(names["again"](names["ids"]).logits, names["model"](names["ids"]).logits)
    printed = capsys.readouterr().out
    assert "passed" in printed and "reference" in printed


def test_links_of_the_documents_lead_somewhere() -> None:
    named = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md")
    for path in (*(ROOT / name for name in named), *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"
