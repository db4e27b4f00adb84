"""What a user installs: cheap imports, entry points, one version; and imports that point one way, in readable files."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import networkx as nx
import pytest
import torch

import attnres_fx

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"attnres_fx": ROOT / "attnres_fx", "attnres_fx.passes": ROOT / "passes",
           "attnres_fx.runtime": ROOT / "runtime"}
FILES = [(".".join([package, *path.relative_to(folder).parent.parts]), path)
         for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]
IDS = [f"{package}/{path.name}" for package, path in FILES]


def run(code: str, cwd: Path) -> str:
    """The last line that ``code`` prints in a new interpreter, away from the checkout."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_import_loads_no_torch(tmp_path: Path) -> None:
    code = ("import sys, attnres_fx; attnres_fx.__version__, dir(attnres_fx)\n"
            "print([n for n in ('torch', 'torch._dynamo', 'networkx', 'transformers', 'rich') if n in sys.modules])")
    assert run(code, tmp_path) == "[]"


def test_every_public_name_resolves(tmp_path: Path) -> None:
    code = ("import attnres_fx\n"
            "print([n for n in attnres_fx.__all__ if getattr(attnres_fx, n, None) is None])")
    assert run(code, tmp_path) == "[]"


def test_using_errors_or_the_operator_does_not_load_the_compiler(tmp_path: Path) -> None:
    code = ("import sys, attnres_fx\nattnres_fx.AttnResError, attnres_fx.errors.PostNormError\n"
            "print('torch' in sys.modules)")
    assert run(code, tmp_path) == "False"


def test_importing_after_torch_registers_the_operators(tmp_path: Path) -> None:
    code = "import torch, attnres_fx\nprint(torch.ops.attnres.mix.default.name())"
    assert run(code, tmp_path) == "attnres::mix"


def test_help_is_fast_and_loads_no_torch(tmp_path: Path) -> None:
    code = ("import sys\nfrom attnres_fx.cli.commands import main\nsys.argv = ['attnres', '--help']\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
            "print([n for n in ('torch', 'networkx', 'transformers') if n in sys.modules])")
    assert run(code, tmp_path) == "[]"
    script = Path(sys.executable).with_name("attnres")
    if not script.exists():
        pytest.skip("the console command stands elsewhere in this environment")
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        done = subprocess.run([str(script), "--help"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        taken.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        for command in ("inspect", "transform", "verify"):
            assert command in done.stdout
    assert min(taken) < 1.5, taken  # the aim is 0.3 s; a busy machine is slower


def test_backend_is_found_without_an_import(tmp_path: Path) -> None:
    """``torch.compile(model, backend="attnres")`` in a program that never imports attnres_fx."""
    code = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in range(4))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.norms[3](x)
torch.manual_seed(0)
net, x = Net(), torch.randn(2, 5, 8)
plain = net(x)
fast = torch.compile(net, backend="attnres", options={"downstream": "eager", "mix_scale": "sum", "layers_per_block": 1})
assert torch.allclose(fast(x), plain, atol=1e-5)
with torch.no_grad():
    net.attnres.stream.query.normal_()
assert not torch.allclose(fast(x), plain, atol=1e-2)
print(list(dict(net.attnres.named_parameters())))
"""
    path = tmp_path / "program.py"
    path.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['stream.query', 'stream.key_gain']"


def test_entry_points() -> None:
    backends = entry_points(group="torch_dynamo_backends", name="attnres")
    assert {point.value for point in backends} == {"attnres_fx.backend:attnres"}
    commands = entry_points(group="console_scripts", name="attnres")
    assert {point.value for point in commands} == {"attnres_fx.cli.commands:main"}


def project_line(key: str) -> str:
    """The value of a line ``key = "value"`` of pyproject.toml (tomllib is not in Python 3.10)."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return next(line.split("=", 1)[1].strip().strip('"') for line in lines if line.split("=", 1)[0].strip() == key)


def test_one_version() -> None:
    assert project_line("version") == attnres_fx.__version__
    assert f"## {attnres_fx.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def imported(package: str, path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> int | None:
    """0 for the public face, 1 for passes, 2 for runtime, None for what is not ours."""
    for layer, package in ((2, "attnres_fx.runtime"), (1, "attnres_fx.passes"), (0, "attnres_fx")):
        if name == package or name.startswith(package + "."):
            return layer
    return None


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_file(package: str, path: Path) -> None:
    """Imports go attnres_fx -> passes -> runtime and never back; runtime knows nothing of fx; a file fits in a head."""
    own = layer_of(package)
    assert own is not None
    names = list(imported(package, path))
    back = [name for name in names if (layer := layer_of(name)) is not None and layer < own]
    assert not back, f"{path.name} imports {back}"
    if own == 2:
        assert not [name for name in names if name == "torch.fx" or name.startswith("torch.fx.")]
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 450
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "a module docstring is missing"
    assert "from __future__ import annotations" in text or len(text.splitlines()) < 8


# The folders of the compiler in import order: a file imports from its own folder and from those before it. Beside them stand
# the files that put them together.
ORDER = ("_compat", "graph", "prepare", "recognize", "find", "rewrite", "lower", "memory")


def test_the_folders_of_the_compiler_are_layers() -> None:
    folders = {path.parent.name for path in FOLDERS["attnres_fx.passes"].glob("*/*.py")}
    assert folders == set(ORDER)
    upwards = []
    for package, path in FILES:
        if not package.startswith("attnres_fx.passes."):
            continue
        own = ORDER.index(package.rsplit(".", 1)[-1])
        for name in imported(package, path):
            rest = name.removeprefix("attnres_fx.passes.").split(".")
            if name.startswith("attnres_fx.passes.") and (rest[0] not in ORDER or ORDER.index(rest[0]) > own):
                upwards.append((path.name, name))
    assert not upwards


def test_no_file_imports_itself_in_a_circle() -> None:
    modules = {f"{package}.{path.stem}".removesuffix(".__init__"): (package, path) for package, path in FILES}
    graph: nx.DiGraph[str] = nx.DiGraph()
    for module, (package, path) in modules.items():
        for name in imported(package, path):
            found = name if name in modules else name.rpartition(".")[0]
            if found in modules and found != module and module != "attnres_fx":  # whose imports are for type checkers
                graph.add_edge(module, found)
    assert not [circle for circle in nx.strongly_connected_components(graph) if len(circle) > 1]


def test_no_module_hides_a_public_name() -> None:
    """``import attnres_fx.x`` puts the module x into attnres_fx, in the place of a function of that name."""
    beside = {path.stem for path in (ROOT / "attnres_fx").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert beside & set(attnres_fx.__all__) == {"errors"}


def test_the_vocabulary_alone_knows_names_of_operators() -> None:
    """Sets of operators that passes spell out for themselves drift apart: two or more ATen names in one set."""
    found = []
    for package, path in FILES:
        if not package.startswith("attnres_fx.passes.") or path.name in ("vocabulary.py", "aliases.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = node.elts if isinstance(node, ast.Set) else []
            names = [str(word.value) for word in words if isinstance(word, ast.Constant)]
            devices = ("cuda", "cpu")
            if sum(hasattr(torch.ops.aten, name) for name in names if name.isidentifier() and name not in devices) > 1:
                found.append((path.name, node.lineno, names))
    assert not found


# The files that may touch torch's private interfaces, each with tests for a new release to pass.
PRIVATE = {"attnres_fx.passes._compat", "attnres_fx.runtime/_compat.py"}
# What stands elsewhere: where an nn.Module keeps its own children, parameters and buffers, whose names are as old as torch,
# as a module that overrides attribute access can be changed in no other way, and setattr would run its hooks.
KNOWN = {"_modules", "_parameters", "_buffers"}
# And a mark that is transformers' own.
KNOWN.add("_hf_peft_config_loaded")


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names with a leading underscore, and not a file's own, that it imports from torch or reaches in any object."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in found:
            if name.startswith("torch") and any(part.startswith("_") for part in name.split(".")):
                yield name
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "sys") and node.attr not in own | KNOWN:
                yield f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = str(node.args[1].value) if isinstance(node.args[1], ast.Constant) else ""
            if name.startswith("_") and not name.startswith("__") and name not in own | KNOWN:
                yield name


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_private_names_of_torch_stand_in_few_files(package: str, path: Path) -> None:
    found = list(private_names(ast.parse(path.read_text(encoding="utf-8"))))
    if not {package, f"{package}/{path.name}"} & PRIVATE:
        assert not found, f"{path.name}: move {found} to a module named _compat"


def test_a_private_name_is_seen() -> None:
    text = "import torch._ops\nfrom torch.utils import _pytree\ntorch._check(x)\nx._schema\ngetattr(x, '_code')\nself._own"
    assert len(list(private_names(ast.parse(text)))) == 5


def test_constraints_pin_every_direct_dependency() -> None:
    """The demo, tests and benchmarks run with exact releases: each constraint is a pin."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
             if line.strip() and not line.startswith("#")]
    assert all("==" in line for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    needed = {"torch", "networkx", "typer", "rich", "safetensors", "triton", "transformers", "pytest", "hypothesis",
              "numpy", "accelerate", "ruff", "mypy", "build"}
    assert needed <= pinned
