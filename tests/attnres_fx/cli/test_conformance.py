"""The conformance suite from the command line: a right implementation passes, for a wrong one the fault is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnres_fx.cli.commands import run

RIGHT = '''
import torch
def mix(sources, query, key_gain, eps=1e-6):
    values = torch.stack([source.float() for source in sources])
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    keys = keys if key_gain is None else keys * key_gain
    weights = (keys * query).sum(-1, keepdim=True).softmax(0)
    return (weights * values).sum(0).to(sources[0].dtype){change}
'''


@pytest.mark.parametrize(("change", "code", "said"), [
    ("", 0, []), (".double()", 1, ["dtype torch.float64"]), (" * 1.01", 1, ["off by"]), ("[..., :1]", 1, ["shape"])])
def test_an_implementation_in_a_file(
    change: str, code: int, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RIGHT.format(change=change), encoding="utf-8")
    given = ["conformance", f"{file}:mix", "--dtypes", "float32", "--no-deterministic"]
    assert run([*given, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["checks"] > 30 and bool(found["failures"]) == bool(code)
    assert all(any(word in failure["said"] for failure in found["failures"]) for word in said)
    assert run(given) == code
    assert f"of {found['checks']} checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere:mix"], "no module 'nowhere'"), (["math:no_such"], "'math' has no 'no_such'"),
    (["math:sin", "--dtypes", "int8"], "'int8' is not known"), (["math:sin", "--options", "eps"], "'eps' is not known")])
def test_what_is_wrong_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conformance", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
