"""``attnres plan`` and ``attnres inspect --memory``: sizes, budgets, tables and drawings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from attnres_fx.cli.commands import run

OWN = "support.checkpoint_models:own_with_inputs"
WIDE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(7168), nn.Linear(7168, 2), nn.Linear(2, 7168)
    def forward(self, x):
        return x + self.down(self.up(self.norm(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(Block() for _ in range(16)), nn.RMSNorm(7168)
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

def build():
    with torch.device("meta"):
        return Net(), (torch.empty(1, 4, 7168),)
"""
Attnres = Callable[..., tuple[int, str, str]]


@pytest.fixture
def attnres(capsys: pytest.CaptureFixture[str]) -> Attnres:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the paper's width, without any weights: nothing of it is run."""
    path = tmp_path_factory.mktemp("wide") / "wide.py"
    path.write_text(WIDE)
    return f"{path}:build"


def test_the_papers_numbers_come_out(wide: str, attnres: Attnres) -> None:
    """Section 5 of the paper: 15 GB for 128K tokens and 8 blocks at width 7168, 1.9 GB on each of 8 devices, and below
    0.3 GB there with chunks of 16K; with a budget of 0.3 GB all that is held fits."""
    arguments = ("plan", wide, "--tokens", 131072, "--dtype", "bf16", "--chunk", 16384, "--devices", 8, "--schedule",
                 "two-phase")
    content = json.loads(attnres(*arguments, "--memory-budget", "0.3GB", "--json")[1])
    assert content["plans"][0]["boundaries"] == list(range(2, 17, 2))
    sequence, sharded, chunk = content["scopes"]
    assert [scope["tokens"] for scope in content["scopes"]] == [131072, 16384, 2048]
    assert [round(scope["blocks"] / 1e9, 2) for scope in content["scopes"]] == [15.03, 1.88, 0.23]
    assert chunk["planned"] < 0.3e9 < chunk["naive"]
    assert sequence["planned"] == 8 * sharded["planned"] == 64 * chunk["planned"]
    assert all(1 <= scope["ratio"] <= 1.05 for scope in content["scopes"])
    code, shown, err = attnres(*arguments, "--memory-budget", "0.3GB")
    assert (code, err) == (0, "")
    told = ("15.0 GB", "1.88 GB", "235 MB", "131,072", "chosen", "over the budget", "8 blocks, 16 mixes")
    assert all(text in shown for text in told), shown


def test_a_budget_chooses_the_tile_and_never_the_blocks(wide: str, attnres: Attnres) -> None:
    arguments = ("plan", wide, "--tokens", 4096, "--schedule", "two-phase", "--layers-per-block", 8, "--json")
    free = json.loads(attnres(*arguments)[1])
    least = min(tile["planned"] for tile in free["tiles"])
    tight = json.loads(attnres(*arguments, "--memory-budget", f"{least}B")[1])
    assert free["tile"] > 1 == tight["tile"]
    assert tight["scopes"][-1]["planned"] == least <= tight["memory_budget"] == least
    assert free["plans"] == tight["plans"]
    assert least % 4096 == 0
    assert json.loads(attnres(*arguments, "--memory-budget", least // 4096)[1]) == tight
    code, out, err = attnres(*arguments, "--memory-budget", f"{least - 1}B")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert f"the least possible is {least:,} bytes" in err and "What to do: give" in err


def test_every_stream_has_its_own_length(attnres: Attnres) -> None:
    """Of an encoder and a decoder of width 32 in two blocks each; the lengths come in any order."""
    def planned(tokens: object, *more: object) -> list[dict[str, Any]]:
        code, out, err = attnres("plan", "support.models:_t5", "--num-blocks", 2, "--tokens", tokens, *more, "--json")
        assert (code, err) == (0, "")
        scopes: list[dict[str, Any]] = json.loads(out)["scopes"]
        return scopes

    (apart,) = planned("decoder=448,encoder=1500")
    assert apart["tokens"] == {"encoder": 1500, "decoder": 448}
    assert apart["blocks"] == 2 * 32 * 2 * (1500 + 448)
    (short,), (long,) = planned(448), planned("encoder=1500,decoder=1500")
    assert long == planned(1500)[0] and long["tokens"] == 1500
    # The decoder's rows lie where the encoder's have been, and are shorter here.
    assert short["planned"] < apart["planned"] == long["planned"] and apart["naive"] < long["naive"]
    assert apart["lower_bound"] <= apart["planned"] <= 1.05 * apart["lower_bound"]
    sequence, shared, chunk = planned("encoder=1500,decoder=448", "--chunk", 1000, "--devices", 2)
    assert sequence == apart
    assert shared["tokens"] == {"encoder": 750, "decoder": 224} and chunk["tokens"] == {"encoder": 500, "decoder": 224}
    shown = attnres("plan", "support.models:_t5", "--tokens", "encoder=1500,decoder=448")[1]
    assert "encoder 1,500" in shown


@pytest.mark.parametrize("tokens, told", [
    ("encoder=5", "each of encoder, decoder"), ("encoder=5,decoder=6,vision=7", "encoder, decoder"), ("1,2", "--tokens"),
    ("encoder=0,decoder=2", "--tokens"), ("encoder=many", "--tokens"), ("", "--tokens"), ("-4", "--tokens")])
def test_lengths_that_make_no_sense(tokens: str, told: str, attnres: Attnres) -> None:
    code, out, err = attnres("plan", "support.models:_t5", "--tokens", tokens)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and told in err


@pytest.mark.parametrize("arguments, told", [
    (["--memory-budget", "much"], "512MB"), (["--dtype", "int8"], "bf16"), (["--schedule", "best"], "two-phase"),
    (["--training", "--chunk", "4"], "for prefill"), (["--tokens", "0"], "--tokens"), (["--streams", "other"], "other")])
def test_bad_arguments_are_one_line(arguments: list[str], told: str, attnres: Attnres) -> None:
    code, out, err = attnres("plan", OWN, *arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and told in err


def test_training_holds_more_and_wider_elements_too(attnres: Attnres) -> None:
    def planned(*more: object) -> int:
        content = json.loads(attnres("plan", OWN, "--schedule", "one-pass", *more, "--json")[1])
        size: int = content["scopes"][-1]["planned"]
        return size

    assert planned("--dtype", "fp32") == planned("--dtype", "float32") == 2 * planned()
    assert planned("--training") > planned()
    assert "a training step" in attnres("plan", OWN, "--training")[1]


def test_inspect_prints_the_plan(attnres: Attnres) -> None:
    code, out, err = attnres("inspect", OWN, "--num-blocks", 2, "--memory", "--tokens", 100)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.count("│") == 8]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["b_0"] == ["block", "32", "0", "0", "0", "10"]
    assert by_name["b_1"][2:4] == by_name["partial 1"][2:4]
    assert by_name["partial 3"][0] == "partial" and len(by_name) == 9
    assert "planned 12.8 kB in 4 slots, lower bound 12.8 kB, ratio 1.000" in out
    content = json.loads(attnres("inspect", OWN, "--num-blocks", 2, "--memory", "--tokens", 100, "--training", "--json")[1])
    memory = content["memory"]
    assert memory["training"] and memory["forward_steps"] == 12
    assert max(buffer["last"] for buffer in memory["buffers"]) == 23
    assert "memory" not in json.loads(attnres("inspect", OWN, "--json")[1])


@pytest.mark.parametrize("training", [False, True])
def test_the_drawing_has_a_bar_for_every_buffer(training: bool, tmp_path: Path, attnres: Attnres) -> None:
    path = tmp_path / "plan.svg"
    more = ["--training"] if training else []
    content = json.loads(attnres("inspect", OWN, "--num-blocks", 2, "--svg", path, *more, "--json")[1])
    root = Xml.parse(path).getroot()
    bars = {title.text.split(" (")[0]: bar for bar in root.iter("{http://www.w3.org/2000/svg}rect")
            for title in bar.iter("{http://www.w3.org/2000/svg}title") if title.text}
    buffers = {buffer["name"]: buffer for buffer in content["memory"]["buffers"]}
    assert bars.keys() == buffers.keys()
    first, last = bars["b_0"], bars["mix 4"]
    unit = float(first.attrib["width"]) / (buffers["b_0"]["last"] - buffers["b_0"]["first"] + 1)
    for name, bar in bars.items():  # columns are steps, rows are slots
        buffer = buffers[name]
        assert float(bar.attrib["width"]) == pytest.approx((buffer["last"] - buffer["first"] + 1) * unit, rel=1e-3)
        assert float(bar.attrib["x"]) - float(first.attrib["x"]) == pytest.approx(buffer["first"] * unit, rel=1e-3)
    rows = {name: float(bar.attrib["y"]) for name, bar in bars.items()}
    assert len(set(rows.values())) == len({buffer["slot"] for buffer in buffers.values()})
    assert (rows["b_1"] == rows["partial 1"]) == (not training) and float(last.attrib["x"]) > float(first.attrib["x"])
    text = " ".join(found.text or "" for found in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "layer 1 layer 2 layer 3 layer 4" in text and ("the backward shaded" in text) == training
    code, out, _ = attnres("inspect", OWN, "--svg", path)
    assert code == 0 and f"wrote {path}" in out


def test_names_of_sources_are_escaped(tmp_path: Path, attnres: Attnres) -> None:
    folder = tmp_path / "a & b <c>"
    folder.mkdir()
    (folder / "own.py").write_text("from support.checkpoint_models import own_with_inputs\n")
    assert attnres("inspect", f"{folder}/own.py:own_with_inputs", "--svg", tmp_path / "plan.svg")[0] == 0
    assert any("a & b <c>" in (found.text or "") for found in Xml.parse(tmp_path / "plan.svg").getroot().iter())


def test_a_model_that_spells_its_mixes_out_is_planned_from_its_graph(tmp_path: Path, attnres: Attnres) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom support import handwritten\n\n\ndef build():\n"
        "    read = next(read for read in handwritten.READS if read.name == 'paper')\n"
        "    return handwritten.Network(read, block=2), (torch.zeros(2, 5, dtype=torch.long),)\n")
    code, out, err = attnres("inspect", f"{tmp_path / 'own.py'}:build", "--memory", "--svg", tmp_path / "plan.svg")
    assert (code, err) == (0, "")
    found = re.search(r"planned ([\d.]+) \w+ in (\d+) slots, .*ratio 1\.0", out)
    assert found is not None and int(found.group(2)) > 2
    assert (tmp_path / "plan.svg").is_file()


def test_what_has_no_streams_has_no_plan(tmp_path: Path, attnres: Attnres) -> None:
    (tmp_path / "post.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    return nn.TransformerEncoderLayer(8, 2, dropout=0.0, batch_first=True), torch.zeros(1, 3, 8)\n")
    for command in (["plan"], ["inspect", "--memory"]):
        code, out, err = attnres(command[0], f"{tmp_path / 'post.py'}:build", *command[1:])
        assert (code, out) == (2, "") and "no memory to plan" in err
