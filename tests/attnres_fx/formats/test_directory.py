"""Saving and loading converted models: bit-equal, strict, whole or not at all, without pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_models import Own, disturb, hugging_face, ids, own_model
from torch import nn

import attnres_fx
from attnres_fx import errors
from attnres_fx.converted import plans_of
from attnres_fx.formats.files import json_text, whole_directory, whole_file


def converted(**options: Any) -> nn.Module:
    model = attnres_fx.convert(own_model(), (ids(),), **{"num_blocks": 2, **options})
    disturb(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    attnres_fx.save(converted(), path)
    return path


def copy_of(saved: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_own_model_comes_back_bit_equal(saved: Path) -> None:
    model = converted()
    again = attnres_fx.load(saved, model=own_model)
    assert torch.equal(again(ids()), model(ids()))
    assert list(again.state_dict()) == list(model.state_dict())
    assert plans_of(again) == plans_of(model)
    assert again.head.weight is again.embed.weight


def test_weights_come_from_the_file_and_not_from_the_instance(saved: Path) -> None:
    torch.manual_seed(9)
    blank = Own().eval()
    again = attnres_fx.load(saved, blank)
    assert again is blank
    assert torch.equal(again(ids()), converted()(ids()))


def test_the_files_hold_what_they_say(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["attnres.json", "attnres.safetensors", "model.safetensors"]
    content = json.loads((saved / "attnres.json").read_text())
    assert list(content) == ["format", "attnres_fx", "torch", "model_class", "param_dtype", "streams", "aliases",
                             "digest"]
    assert (content["format"], content["model_class"], content["param_dtype"]) == (1, "Own", "float32")
    assert content["aliases"] == {"head.weight": "embed.weight"}
    assert content["streams"][0]["boundaries"] == [2, 4]
    assert sorted(load_file(saved / "attnres.safetensors")) == ["attnres.stream.key_gain", "attnres.stream.query"]
    assert "head.weight" not in load_file(saved / "model.safetensors")


def test_a_tie_made_after_construction_is_made_again(saved: Path) -> None:
    def untied() -> nn.Module:
        model = own_model()
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
        return model

    again = attnres_fx.load(saved, model=untied)
    assert again.head.weight is again.embed.weight


def test_a_model_that_ties_what_was_not_tied_is_refused(tmp_path: Path) -> None:
    model = own_model()
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
    attnres_fx.save(attnres_fx.convert(model, (ids(),)), tmp_path / "m")
    with pytest.raises(errors.CheckpointFileError, match=r"two values for 'head\.weight'"):
        attnres_fx.load(tmp_path / "m", model=own_model)


def test_options_of_the_plan_survive(tmp_path: Path) -> None:
    model = converted(num_blocks=None, layers_per_block=1, mix_scale="sum", eps=1e-4, key_gain=False,
                      param_dtype=torch.bfloat16)
    attnres_fx.save(model, tmp_path / "m")
    again = attnres_fx.load(tmp_path / "m", model=own_model)
    assert again.attnres.stream.key_gain is None and again.attnres.stream.query.dtype == torch.bfloat16
    assert torch.equal(again(ids()), model(ids()))


@pytest.mark.slow
def test_two_streams_and_another_dtype(tmp_path: Path) -> None:
    model = hugging_face("t5").double()
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(), "use_cache": False}
    attnres_fx.convert(model, (), inputs, num_blocks=2)
    disturb(model)
    attnres_fx.save(model, tmp_path / "m")
    again = attnres_fx.load(tmp_path / "m")
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_loaded_models_train_and_save_again(saved: Path, tmp_path: Path) -> None:
    model = attnres_fx.load(saved, model=own_model)
    model(ids()).square().mean().backward()
    assert model.attnres.stream.query.grad.norm() > 0
    attnres_fx.save(model, tmp_path / "again")
    for name in ("attnres.json", "attnres.safetensors", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_plain_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(errors.NotConvertedError):
        attnres_fx.save(own_model(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_own_models_need_the_model(saved: Path) -> None:
    with pytest.raises(errors.CheckpointFileError, match="model=") as caught:
        attnres_fx.load(saved)
    assert "Own" in str(caught.value)
    with pytest.raises(errors.AlreadyConvertedError):
        attnres_fx.load(saved, model=converted())
    with pytest.raises(errors.OptionError, match="gave a int"):
        attnres_fx.load(saved, model=lambda: 3)


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries, without the digest that would reveal it (see test_files.py)."""
    content = json.loads(path.read_text())
    content.pop("digest", None)
    path.write_text(json.dumps({**content, **changes}))


def edit_stream(directory: Path, **changes: Any) -> None:
    streams = json.loads((directory / "attnres.json").read_text())["streams"]
    edit_json(directory / "attnres.json", streams=[{**streams[0], **changes}])


def double_stream(directory: Path) -> None:
    edit_json(directory / "attnres.json", streams=2 * json.loads((directory / "attnres.json").read_text())["streams"])


def edit_tensors(path: Path, **changes: Any) -> None:
    tensors = {**load_file(path), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "parameter file missing": (lambda d: (d / "attnres.safetensors").unlink(), "attnres.safetensors"),
    "parameter file truncated": (lambda d: truncate(d / "attnres.safetensors"), "attnres.safetensors"),
    "weights truncated": (lambda d: truncate(d / "model.safetensors"), "model.safetensors"),
    "weights missing": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "plan missing": (lambda d: (d / "attnres.json").unlink(), "attnres.json"),
    "plan corrupted": (lambda d: truncate(d / "attnres.json"), "attnres.json"),
    "plan no object": (lambda d: (d / "attnres.json").write_text("[1]"), "not an object"),
    "plan of a newer format": (lambda d: edit_json(d / "attnres.json", format=7), "format 7"),
    "plan without streams": (lambda d: edit_json(d / "attnres.json", streams=[]), "no streams"),
    "stream without blocks": (lambda d: edit_stream(d, boundaries=[]), "cannot be read"),
    "stream of another length": (lambda d: edit_stream(d, boundaries=[2, 5]), "contradicts itself"),
    "blocks that do not increase": (lambda d: edit_stream(d, boundaries=[3, 2, 4]), "does not increase"),
    "a block of no layer": (lambda d: edit_stream(d, boundaries=[0, 4]), "does not increase"),
    "a negative eps": (lambda d: edit_stream(d, eps=-1.0), "the eps -1"),
    "an infinite eps": (lambda d: edit_stream(d, eps=float("inf")), "the eps inf"),
    "no width": (lambda d: edit_stream(d, width=0), "the width 0"),
    "a width of another model": (lambda d: edit_stream(d, width=17), r"attnres\.json says \[5, 17\]"),
    "a truth for a number": (lambda d: edit_stream(d, num_layers=True), "'num_layers'"),
    "layers called in no order": (lambda d: edit_stream(d, sites=[[f"blocks.{i}", 1] for i in range(4)]), "miscounts"),
    "a name that is none": (lambda d: edit_stream(d, name="a stream"), "a stream"),
    "two streams of one name": (lambda d: double_stream(d), "two streams that are named 'stream'"),
    "no number": (lambda d: edit_tensors(d / "attnres.safetensors", attnres__stream__query=torch.full((5, 16), torch.nan)),
                  "NaN or infinite"),
    "owner elsewhere": (lambda d: edit_stream(d, owner="nowhere"), "'nowhere'"),
    "eps in words": (lambda d: edit_stream(d, eps="small"), "'eps'"),
    "stream without sites": (lambda d: edit_json(d / "attnres.json", streams=[{"name": "stream"}]), "stream"),
    "dtype unknown": (lambda d: edit_json(d / "attnres.json", param_dtype="float33"), "float33"),
    "dtype of another": (lambda d: edit_json(d / "attnres.json", param_dtype="float64"), "attnres.stream.query"),
    "key missing": (lambda d: edit_tensors(d / "attnres.safetensors", attnres__stream__query=None), "stream.query"),
    "key too many": (lambda d: edit_tensors(d / "attnres.safetensors", other=torch.ones(1)), "'other'"),
    "shape": (lambda d: edit_tensors(d / "attnres.safetensors", attnres__stream__query=torch.ones(5, 3)), r"\[5, 3\]"),
    "weight missing": (lambda d: edit_tensors(d / "model.safetensors", norm__weight=None), "norm.weight"),
    "weight too many": (lambda d: edit_tensors(d / "model.safetensors", extra=torch.ones(1)), "'extra'"),
    "weight shape": (lambda d: edit_tensors(d / "model.safetensors", norm__weight=torch.ones(3)), "norm.weight"),
    "weight dtype": (lambda d: edit_tensors(d / "model.safetensors", norm__weight=torch.ones(16).half()), "float16"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_changes_nothing(damage: str, saved: Path, tmp_path: Path) -> None:
    directory = copy_of(saved, tmp_path)
    spoil, told = DAMAGES[damage]
    spoil(directory)
    model = own_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(errors.CheckpointFileError, match=told):
        attnres_fx.load(directory, model=model)
    assert type(model) is Own and not hasattr(model, "attnres")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_of_another_width_is_refused(saved: Path) -> None:
    with pytest.raises(errors.CheckpointFileError, match=r"has shape \[16\]; the model has \[24\]"):
        attnres_fx.load(saved, model=own_model(width=24))


def test_an_output_is_not_overwritten_unasked(saved: Path, tmp_path: Path) -> None:
    target = copy_of(saved, tmp_path)
    with pytest.raises(errors.CheckpointFileError, match="exists already"):
        attnres_fx.save(converted(), target)
    attnres_fx.save(converted(num_blocks=4), target, overwrite=True)
    assert json.loads((target / "attnres.json").read_text())["streams"][0]["boundaries"] == [1, 2, 3, 4]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(errors.CheckpointFileError, match="not written by attnres_fx"):
        attnres_fx.save(converted(), foreign, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    monkeypatch.setattr("attnres_fx.formats.directory.json_text", lambda content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attnres_fx.save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_whole_outputs(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "d") as partial:
        (partial / "x").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with whole_file(tmp_path / "a") as partial:
        partial.write_text("whole")
    with pytest.raises(errors.CheckpointFileError), whole_file(tmp_path / "a"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("content", [{"a": [1, 2], "b": {"c": [["x.0", 1], ["y [z", 2]]}}, {"a": [], "b": "[ 1,\n 2 ]"}])
def test_json_text_is_the_same_json(content: dict[str, Any]) -> None:
    assert json.loads(json_text(content)) == content


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class WithState(Own):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = attnres_fx.convert(WithState().eval(), (ids(),))
    with pytest.raises(errors.CheckpointFileError, match="_extra_state"):
        attnres_fx.save(model, tmp_path / "m")
