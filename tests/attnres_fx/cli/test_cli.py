"""The command line: results on stdout, one line on stderr for whatever is wrong, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_models import checkpoint, ids, own_model

import attnres_fx
from attnres_fx.cli.commands import run

pytest.importorskip("transformers")

OWN = "support.checkpoint_models:own_with_inputs"


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def attnres(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("hf") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("bert", tmp_path_factory.mktemp("hf") / "bert")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "own.pt2"
    torch.export.save(torch.export.export(own_model(), (ids(),), strict=False), path)
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    path = tmp_path_factory.mktemp("converted") / "llama"
    assert run(["transform", str(llama), "-o", str(path), "--num-blocks", "2"]) == 0
    return path


def console(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "attnres_fx.cli", *arguments], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment}, check=False)


def test_help_is_light() -> None:
    code = ("import sys; from attnres_fx.cli.commands import run; assert run(['--help']) == 0; "
            "assert run(['verify', '--help']) == 0;"
            "heavy = {'torch', 'transformers', 'networkx', 'safetensors'} & set(sys.modules); assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("inspect", "transform", "verify", ".pt2", "you trust"))
    seconds = []
    for _ in range(3):  # the least of three: the machine may be busy
        start = time.perf_counter()
        assert console("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


def test_the_console_command_keeps_to_its_streams(tmp_path: Path) -> None:
    bad = console("verify", str(tmp_path / "nothing"))
    assert (bad.returncode, bad.stdout) == (2, "") and len(bad.stderr.splitlines()) == 1
    tests = Path(__file__).parents[2]  # after the checkout, lest the folder tests/attnres_fx pass for the package
    good = console("inspect", OWN, "--json", NO_COLOR="1", PYTHONPATH=f"{tests.parent}{os.pathsep}{tests}")
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["streams"][0]["num_layers"] == 4


def test_inspect_shows_streams_blocks_and_mixes(llama: Path, attnres: Callable[..., Result]) -> None:
    shown = attnres("inspect", llama, "--num-blocks", 2)
    assert shown.code == 0 and shown.err == ""
    assert "a conversion would give: stream 'stream': 4 layers of width 32 in 2 blocks, 4 mixes (paper)" in shown.out
    assert "b_2" in shown.out and "function-preserving" in shown.out and "\x1b" not in shown.out


def test_inspect_json(llama: Path, attnres: Callable[..., Result]) -> None:
    content = json.loads(attnres("inspect", llama, "--layers-per-block", 3, "--json").out)
    assert (content["kind"], content["converted"], content["mixes"]) == ("huggingface", False, [])
    assert content["streams"][0]["norm_placement"] == "pre" and content["streams"][0]["convertible"]
    assert content["plans"][0]["boundaries"] == [3, 4]
    assert content["plans"][0]["mixes"][0] == {"position": 1, "blocks": 1, "partial": True}


def test_inspect_shows_the_bytes_of_each_choice(llama: Path, attnres: Callable[..., Result]) -> None:
    arguments = ("inspect", llama, "--layers-per-block", 1)
    rows = json.loads(attnres(*arguments, "--json").out)["schedule"]
    layers = json.loads(attnres(*arguments, "--json").out)["plans"][0]["num_layers"]
    for training in (False, True):
        covered = [p for row in rows if row["training"] == training for p in range(row["first"], row["last"] + 1)]
        assert covered == list(range(1, layers + 1))
    assert all(row["chosen"] <= row["one_pass"] for row in rows)
    assert any(row["prefix"] and row["chosen"] < row["one_pass"] for row in rows)
    assert not any(row["prefix"] for row in json.loads(attnres(*arguments, "--tokens", 1, "--json").out)["schedule"])
    shown = attnres(*arguments, "--tokens", 512).out
    assert "512 tokens" in shown
    assert "sources in common" in shown


def test_inspect_of_a_converted_model_shows_its_plan(converted: Path, attnres: Callable[..., Result]) -> None:
    content = json.loads(attnres("inspect", converted, "--json").out)
    assert content["converted"] and content["plans"][0]["boundaries"] == [2, 4]
    assert "converted: stream 'stream'" in attnres("inspect", converted).out
    assert attnres("inspect", converted, "--num-blocks", 3).code == 2


def test_inspect_explains_what_cannot_be_converted(bert: Path, attnres: Callable[..., Result]) -> None:
    shown = attnres("inspect", bert)
    assert shown.code == 0 and "post-norm" in shown.out and "would give" not in shown.out


def test_the_graph_as_code_and_drawing(program: Path, tmp_path: Path, attnres: Callable[..., Result]) -> None:
    for source in (OWN, program):
        shown = attnres("inspect", source, "--num-blocks", 2, "--graph", "--dot", tmp_path / "g.dot")
        assert shown.code == 0 and shown.err == "" and "a conversion would give" in shown.out
        code = shown.out[shown.out.index("def forward("):shown.out.index("wrote")]
        assert len(re.findall(r"torch\.ops\.attnres\.mix\(.*# mix: position \d of 'stream', [23] sources", code)) == 4
        assert "# blocks.0" in code and "b_0" not in code
        compile(code, "graph", "exec")  # it is Python
        drawing = (tmp_path / "g.dot").read_text()
        assert drawing.count("subgraph cluster_") == 2 and drawing.count("{") == drawing.count("}")
        edges = re.findall(r'"(after\.stream\.s\d)" -> "after\.stream\.m4"', drawing)
        assert edges == ["after.stream.s0", "after.stream.s2", "after.stream.s4"]
        assert '[label="3: blocks.2.down"' in drawing or '[label="3: blocks.2' in drawing


def test_transform_marks_its_copy_of_the_checkpoint(
    llama: Path, converted: Path, tmp_path: Path, attnres: Callable[..., Result]
) -> None:
    import transformers

    with pytest.raises((ValueError, OSError), match=r"attnres_fx\.load"):
        transformers.AutoModelForCausalLM.from_pretrained(converted)
    done = attnres("transform", llama, "-o", tmp_path / "bare", "--num-blocks", 2, "--no-guard")
    assert done.code == 0 and "transformers loads it as the plain model" in done.out
    names = {path.name for path in llama.iterdir()}
    assert {path.name for path in (tmp_path / "bare").iterdir()} == names | {"attnres.json", "attnres.safetensors"}
    assert all((tmp_path / "bare" / name).read_bytes() == (llama / name).read_bytes() for name in names)
    assert not hasattr(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare"), "attnres")
    given = torch.randint(3, 20, (2, 5))
    logits = []
    for directory in (converted, tmp_path / "bare"):
        model = attnres_fx.load(directory)
        assert model.attnres.stream.query.shape == (5, 32)
        logits.append(model(given, use_cache=False).logits)
        assert attnres("verify", directory).code == 0
    assert torch.equal(*logits)


def test_transform_of_a_program_and_of_ones_own_model(
    program: Path, tmp_path: Path, attnres: Callable[..., Result]
) -> None:
    done = attnres("transform", program, "-o", tmp_path / "out.pt2", "--mix-scale", "sum", "--num-blocks", 2)
    assert done.code == 0 and done.err == "" and "out.pt2" in done.out
    assert torch.allclose(attnres_fx.load(tmp_path / "out.pt2")(ids()), own_model()(ids()), atol=1e-5)
    done = attnres("transform", OWN, "-o", tmp_path / "own", "--json", "--mix-scale", "sum")
    assert json.loads(done.out)["plans"][0]["num_layers"] == 4
    assert torch.allclose(attnres_fx.load(tmp_path / "own", model=own_model)(ids()), own_model()(ids()), atol=1e-5)
    assert attnres("inspect", tmp_path / "out.pt2").code == 0
    assert attnres("verify", tmp_path / "out.pt2").code == 0


def test_transform_overwrites_only_its_own_and_only_if_told(tmp_path: Path, attnres: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    assert attnres("transform", OWN, "-o", out).code == 0
    again = attnres("transform", OWN, "-o", out, "--num-blocks", 2)
    assert again.code == 2 and "--force" in again.err
    assert attnres("transform", OWN, "-o", out, "--num-blocks", 2, "--force").code == 0
    assert json.loads((out / "attnres.json").read_text())["streams"][0]["boundaries"] == [2, 4]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    assert attnres("transform", OWN, "-o", tmp_path / "mine", "--force").code == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_verify_reports_and_fails(attnres: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(attnres("verify", OWN, "--mix-scale", "sum", "--json").out)
    assert content["passed"] and content["zero_query"] < 1e-5 and content["random_query"] < 1e-4
    from attnres_fx.passes.rewrite.plan import StreamPlan

    monkeypatch.setattr(StreamPlan, "output_factor", lambda self, position: 1.1)
    failed = attnres("verify", OWN, "--mix-scale", "sum")
    assert failed.code == 1 and "FAILED" in failed.out and failed.err == ""


def damaged(make: Callable[[Path], None]) -> Callable[[Path, Path], Path]:
    """A copy of a good checkpoint that ``make`` spoils."""

    def build(good: Path, tmp_path: Path) -> Path:
        target = tmp_path / "damaged"
        target.mkdir()
        for file in good.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        make(target)
        return target

    return build


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = {**json.loads((directory / "config.json").read_text()), **changes}
        (directory / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def drop_key(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def pickled(name: str, content: Callable[[], object], legacy: bool = False) -> Callable[[Path, Path], Path]:
    def build(_: Path, tmp_path: Path) -> Path:
        torch.save(content(), tmp_path / name, _use_new_zipfile_serialization=not legacy)
        return tmp_path / name

    return build


def pickles_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(own_model().state_dict(), directory / "pytorch_model.bin")


def factory(text: str, name: str = "factory") -> Callable[[Path, Path], str]:
    def build(_: Path, tmp_path: Path) -> str:
        (tmp_path / "user.py").write_text(f"import torch\nfrom torch import nn\n{text}\n")
        return f"{tmp_path / 'user.py'}:{name}"

    return build


def written(name: str, content: bytes) -> Callable[[Path, Path], Path]:
    def build(_: Path, tmp_path: Path) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return build


def foreign_zip(_: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("a", "b")
    return tmp_path / "x.pt2"


def truncated_program(_: Path, tmp_path: Path) -> Path:
    torch.export.save(torch.export.export(own_model(), (ids(),), strict=False), tmp_path / "x.pt2")
    cut(tmp_path / "x.pt2")
    return tmp_path / "x.pt2"


BAD = {
    "missing": (lambda good, tmp: tmp / "nothing", "nothing'. What to do: give a Hugging Face checkpoint directory"),
    "truncated weights": (damaged(lambda d: cut(d / "model.safetensors")), "not a complete safetensors file"),
    "no weights": (damaged(lambda d: (d / "model.safetensors").unlink()), "has no weights"),
    "pickled weights": (damaged(pickles_only), "save_pretrained"),
    "corrupted config": (damaged(lambda d: cut(d / "config.json")), "not readable JSON"),
    "config of a list": (damaged(lambda d: (d / "config.json").write_text("[]")), "not an object"),
    "no config": (damaged(lambda d: (d / "config.json").unlink()), "no config.json"),
    "unknown architecture": (damaged(config(architectures=["NoSuchLM"])), "'NoSuchLM'"),
    "no architecture": (damaged(config(architectures=None)), "names no architecture"),
    "architecture is no model": (damaged(config(architectures=["LlamaConfig"])), "'LlamaConfig'"),
    "another width": (damaged(config(hidden_size=48)), "asks for [64, 48]"),
    "nonsense in the config": (damaged(config(hidden_size="wide")), "hidden_size"),
    "more layers than weights": (damaged(config(num_hidden_layers=3)), "lack 9 keys"),
    "a key missing": (damaged(drop_key), "'model.norm.weight'"),
    "broken plan": (damaged(lambda d: (d / "attnres.json").write_text("{")), "attnres.json"),
    "plan without parameters": (
        damaged(lambda d: (d / "attnres.json").write_text('{"format": 1, "param_dtype": "float32", "streams": [{}]}')),
        "attnres.json"),
    "pickled model": (pickled("m.pt", own_model), "a pickled model"),
    "legacy pickled model": (pickled("m.bin", own_model, legacy=True), "pickled"),
    "bare state_dict": (pickled("m.pth", lambda: own_model().state_dict()), "a pickled state_dict without its model"),
    "bare safetensors": (lambda good, tmp: good / "model.safetensors", "bare state_dict"),
    "some other file": (written("notes.txt", b"hello"), "not a model that attnres_fx can read"),
    "pt2 that is no zip": (written("x.pt2", b"hello"), "not a zip file"),
    "pt2 that is another zip": (foreign_zip, "cannot be read as a program"),
    "pt2 truncated": (truncated_program, "not a zip file"),
    "no module": (lambda good, tmp: "no.such.module:factory", "no module 'no.such.module'"),
    "no file": (lambda good, tmp: f"{tmp}/none.py:factory", "there is no file"),
    "no function": (factory("x = 1"), "has no 'factory'"),
    "factory is no function": (factory("factory = 3"), "not a function"),
    "factory raises": (factory("def factory():\n    raise ValueError('out of\\nluck')"), "ValueError: out of"),
    "factory gives a state_dict": (factory("def factory():\n    return nn.Linear(2, 2).state_dict()"), "a state_dict"),
    "factory gives a number": (factory("def factory():\n    return 3"), "returned a int"),
    "factory gives no inputs": (factory("def factory():\n    return nn.Linear(2, 2)"), "return (model, args)"),
    "module does not import": (factory("import nonesuch_module"), "nonesuch_module"),
    "module is no Python": (factory("def ("), "SyntaxError"),
    "not a transformer": (factory("def factory():\n    return nn.Linear(2, 2), torch.ones(1, 2)"), "no residual stream"),
    "inputs do not fit": (factory("def factory():\n    return nn.Linear(2, 2), torch.ones(1, 3)"), "attnres:"),
    "graph break": (factory(
        "class M(nn.Module):\n    def forward(self, x):\n        return x if x.sum() > 0 else -x\n"
        "def factory():\n    return M(), torch.ones(1, 3)"), "graph break"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, llama: Path, tmp_path: Path, attnres: Callable[..., Result]
) -> None:
    build, told = BAD[case]
    source = build(llama, tmp_path)
    result = attnres("inspect", source, "--json")
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1 and "Traceback" not in result.err
    assert told in result.err, result.err


@pytest.mark.parametrize("arguments, told", [
    (["inspect"], "Missing argument"),
    (["inspect", OWN, "--frob"], "--frob"),
    (["frobnicate"], "frobnicate"),
    (["inspect", OWN, "--num-blocks", "many"], "--num-blocks"),
    (["inspect", OWN, "--num-blocks", "0"], "--num-blocks"),
    (["inspect", OWN, "--mix-scale", "foo"], "--mix-scale"),
    (["verify", OWN, "--eps", "-1"], "--eps"),
    (["inspect", "nowhere:build", "--num-blocks", "2", "--layers-per-block", "2"], "given together"),
    (["plan", "nowhere:build", "--memory-budget", "much"], "memory_budget is 'much'"),
    (["plan", "nowhere:build", "--tokens", "many"], "--tokens is 'many'"),
    (["plan", "nowhere:build", "--schedule", "soon"], "--schedule"),
    (["plan", "nowhere:build", "--dtype", "int8"], "--dtype"),
    (["verify", OWN, "--num-blocks", "2", "--layers-per-block", "2"], "given together"),
    (["verify", OWN, "--streams", "left,right"], "'left', 'right'"),
    (["verify", OWN, "--mix-scale", "median"], "median"),
    (["transform", OWN], "--output"),
    (["transform", OWN, "-o", "out.pt2"], "out.pt2"),
])
def test_bad_options_are_one_line_and_exit_code_2(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attnres: Callable[..., Result]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = attnres(*arguments)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1 and "Traceback" not in result.err and told in result.err, result.err
    assert list(tmp_path.iterdir()) == []


def test_refused_models_leave_no_output(bert: Path, tmp_path: Path, attnres: Callable[..., Result]) -> None:
    for command in (["transform", bert, "-o", tmp_path / "out"], ["verify", bert], ["inspect", bert, "--graph"]):
        result = attnres(*command)
        assert result.code == 2 and len(result.err.splitlines()) == 1
    assert "post-norm" in attnres("verify", bert).err and "What to do" in attnres("verify", bert).err
    assert list(tmp_path.iterdir()) == []


def test_the_output_may_not_lie_in_the_source(llama: Path, attnres: Callable[..., Result]) -> None:
    before = sorted(path.name for path in llama.iterdir())
    for out in (llama, llama / "inner", llama.parent):
        assert attnres("transform", llama, "-o", out, "--force").code == 2
    assert sorted(path.name for path in llama.iterdir()) == before


def test_an_unwritable_place_is_one_line(tmp_path: Path, attnres: Callable[..., Result]) -> None:
    (tmp_path / "file").write_text("x")
    result = attnres("transform", OWN, "-o", tmp_path / "file" / "out")
    assert result.code == 2 and len(result.err.splitlines()) == 1


def test_what_a_factory_prints_is_no_result(tmp_path: Path, attnres: Callable[..., Result]) -> None:
    (tmp_path / "loud.py").write_text("from support.checkpoint_models import own_with_inputs\nprint('loading')\n"
                                      "def factory():\n    print('building')\n    return own_with_inputs()\n")
    result = attnres("inspect", f"{tmp_path / 'loud.py'}:factory", "--json")
    assert result.code == 0 and json.loads(result.out)["kind"] == "factory" and "building" in result.err


def test_inspect_shows_the_mixes_that_a_model_spells_out(
    tmp_path: Path, attnres: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "by_hand.py").write_text(
        "import torch\nfrom support import handwritten\n\n\ndef build():\n"
        "    read = next(read for read in handwritten.READS if read.name == 'paper')\n"
        "    return handwritten.Network(read, block=4), (torch.zeros(2, 5, dtype=torch.long),)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    drawing = tmp_path / "mixes.dot"
    shown = attnres("inspect", "by_hand:build", "--graph", "--dot", drawing)
    assert shown.code == 0, shown
    assert "attention residuals in the model" in shown.out
    assert shown.out.count("torch.ops.attnres.mix(") == 7
    assert "# mix: 3 sources" in shown.out
    assert drawing.read_text().count("palegreen") == 7
    told = attnres("inspect", "by_hand:build", "--json")
    assert [mix["num_sources"] for mix in json.loads(told.out)["mixes"]] == [1, 2, 2, 2, 2, 3, 3]
