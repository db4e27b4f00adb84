"""Files of converted models: what was changed is refused, what would be ignored too, and a full disk is an error of ours."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_models import disturb, hugging_face, ids, own_model

import attnres_fx
from attnres_fx import errors
from attnres_fx.formats.files import _beside, staging_in, whole_directory, whole_file

INPUTS = {"input_ids": ids(), "use_cache": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of one's own model, and one of transformers, saved."""
    folder = tmp_path_factory.mktemp("saved")
    attnres_fx.save(disturb(attnres_fx.convert(own_model(), (ids(),), num_blocks=2)), folder / "own")
    attnres_fx.save(disturb(attnres_fx.convert(hugging_face("llama"), (), INPUTS, num_blocks=2)), folder / "llama")
    return folder


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    for file in (saved / "own").iterdir():
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "own"


def edit_plan(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / "attnres.json").read_text())
    content["streams"][0].update(changes)
    (directory / "attnres.json").write_text(json.dumps(content))


def edit_query(directory: Path) -> None:
    tensors = load_file(directory / "attnres.safetensors")
    tensors["attnres.stream.query"][3, 2] += 1e-3
    save_file(tensors, directory / "attnres.safetensors")


@pytest.mark.parametrize("edit", [
    lambda d: edit_plan(d, boundaries=[1, 4]), lambda d: edit_plan(d, mix_scale="sum"), lambda d: edit_plan(d, eps=1e-5),
    edit_query], ids=["blocks", "scale", "eps", "a query"])
def test_a_change_that_makes_sense_is_seen(own: Path, edit: Callable[[Path], None]) -> None:
    edit(own)
    with pytest.raises(errors.CheckpointFileError, match="digest differs"):
        attnres_fx.load(own, model=own_model)
    content = json.loads((own / "attnres.json").read_text())
    del content["digest"]  # as the message says, for intended changes; files of the first version have none
    (own / "attnres.json").write_text(json.dumps(content))
    attnres_fx.load(own, model=own_model)


def test_a_program_has_a_digest_too(tmp_path: Path) -> None:
    from attnres_fx.formats.program import load_program, open_program, transform

    program = torch.export.export(own_model(), (ids(),))
    torch.export.save(program, tmp_path / "plain.pt2")
    transform(open_program(tmp_path / "plain.pt2"), tmp_path / "out.pt2", num_blocks=2)
    loaded, description, _ = load_program(tmp_path / "out.pt2")
    description["streams"][0]["boundaries"] = [1, 4]
    torch.export.save(loaded, tmp_path / "edited.pt2", extra_files={"attnres.json": json.dumps(description)})
    with pytest.raises(errors.CheckpointFileError, match="digest differs"):
        attnres_fx.load(tmp_path / "edited.pt2")


@pytest.mark.parametrize("option", ["subfolder", "revision", "variant", "gguf_file", "use_safetensors", "config", "token"])
def test_what_would_be_ignored_is_refused(saved: Path, option: str) -> None:
    with pytest.raises(errors.OptionError, match=f"takes no {option}"):
        attnres_fx.load(saved / "llama", **{option: "x"})


def test_an_unknown_option_is_not_the_directorys_fault(saved: Path) -> None:
    with pytest.raises(errors.OptionError, match="takes no 'attention_flavour'") as caught:
        attnres_fx.load(saved / "llama", attention_flavour="mild")
    assert "belong together" not in str(caught.value)
    assert attnres_fx.load(saved / "llama", attn_implementation="eager").config._attn_implementation == "eager"


@contextmanager
def small_disk(most: int) -> Iterator[None]:
    """No file may grow beyond ``most`` bytes: writing fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk(tmp_path: Path) -> None:
    """Weights or plans, of one's own model or of transformers, to a new place or over an old one."""
    model = attnres_fx.convert(own_model(), (ids(),), num_blocks=2)
    llama = attnres_fx.convert(hugging_face("llama"), (), INPUTS, num_blocks=2)
    for most in (100, 1500):
        for write in (lambda: attnres_fx.save(model, tmp_path / "m"), lambda: attnres_fx.save(llama, tmp_path / "l"),
                      lambda: llama.save_pretrained(tmp_path / "p")):
            with small_disk(most), pytest.raises(errors.CheckpointFileError, match="cannot be written"):
                write()
    assert list(tmp_path.iterdir()) == []
    attnres_fx.save(model, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    with small_disk(1500), pytest.raises(errors.CheckpointFileError, match="cannot be written"):
        attnres_fx.save(model, tmp_path / "m", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_what_an_interrupted_save_left_is_cleaned_up(tmp_path: Path) -> None:
    """By the next save to that place; what a living process writes, or another machine, is left alone."""
    code = """
import os, sys
from pathlib import Path
from attnres_fx.formats.files import staging_in, whole_directory, whole_file
folder = Path(sys.argv[1])
with whole_directory(folder / "model") as a, whole_file(folder / "graph.svg") as b, staging_in(folder / "pretrained") as c:
    for partial in (a / "half", b, c / "half"):
        partial.write_text("half")
    os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == 9 and len([*tmp_path.rglob(".*-*")]) == 3
    alive = _beside(tmp_path / "model")
    alive.mkdir()
    other = tmp_path / f".model-elsewhere-{os.getpid()}-0123abcd"
    other.mkdir()
    with whole_directory(tmp_path / "model"), whole_file(tmp_path / "graph.svg") as drawn, \
            staging_in(tmp_path / "pretrained"):
        drawn.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "graph.svg", "pretrained", alive.name, other.name}
    assert list((tmp_path / "pretrained").iterdir()) == []
