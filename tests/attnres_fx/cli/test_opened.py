"""Sources of the command line: what is opened, with which inputs, and what is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_models import checkpoint, disturb, hugging_face, ids, own_model
from torch import nn

import attnres_fx
from attnres_fx import errors
from attnres_fx.cli.opened import open_source
from attnres_fx.formats.program import Program, open_program, transform
from attnres_fx.passes.graph.vocabulary import is_mix
from attnres_fx.verification.programs import verify_program

pytest.importorskip("transformers")

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"input_ids": (2, 16), "use_cache": False},
    "gpt2": {"input_ids": (2, 12), "use_cache": False},  # no longer than its positions
    "t5": {"input_ids": (2, 16), "decoder_input_ids": (2, 16), "use_cache": False},
    "vit": {"pixel_values": (2, 3, 16, 16)},
    "bert": {"input_ids": (2, 16)},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_example_inputs_fit_the_model(kind: str, tmp_path: Path) -> None:
    opened = open_source(str(checkpoint(kind, tmp_path / "m")))
    assert (opened.kind, opened.converted, opened.args) == ("huggingface", False, ())
    found = {key: tuple(v.shape) if isinstance(v, torch.Tensor) else v for key, v in opened.kwargs.items()}
    assert {**found, "use_cache": False} == {**SHAPES[kind], "use_cache": False}
    assert not opened.model.training
    with torch.no_grad():
        ours, theirs = opened.model(**opened.kwargs)[0], hugging_face(kind)(**opened.kwargs)[0]
    assert torch.equal(ours, theirs)


def test_sharded_checkpoints_open(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path / "m", max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    opened = open_source(str(path))
    assert torch.equal(opened.model(**opened.kwargs).logits, hugging_face("llama")(**opened.kwargs).logits)


def test_a_converted_directory_opens_converted(tmp_path: Path) -> None:
    model = attnres_fx.convert(hugging_face("llama"), (ids(),), {"use_cache": False})
    disturb(model)
    attnres_fx.save(model, tmp_path / "m")
    opened = open_source(str(tmp_path / "m"))
    assert opened.converted
    assert torch.equal(opened.model(**opened.kwargs).logits, model(**opened.kwargs).logits)


@pytest.mark.parametrize("returned", ["M()", "M(), X", "M(), (X,)", "[M(), (X,)][0], (), {'ids': X}", "M(), {'ids': X}"])
def test_what_a_factory_may_return(returned: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from support.checkpoint_models import own_model as M, ids\nX = ids()\ndef factory():\n"
                    f"    return {returned}\n")
    if returned == "M()":
        with pytest.raises(attnres_fx.AttnResError, match="return"):
            open_source(f"{file}:factory")
        return
    opened = open_source(f"{file}:factory")
    assert opened.kind == "factory" and opened.program is None
    assert torch.equal(opened.model(*opened.args, **opened.kwargs), own_model()(ids()))


def test_factories_by_module_name_and_of_hugging_face_models() -> None:
    assert open_source("support.checkpoint_models:own_with_inputs").args[0].shape == (2, 7)


def export(path: Path, model: nn.Module | None = None) -> Path:
    batch, length = torch.export.Dim("batch", max=8), torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model or own_model(), (ids(),), dynamic_shapes=({0: batch, 1: length},), strict=False)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def program_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exported") / "own.pt2")


def test_an_exported_program_opens_with_its_ties(program_file: Path) -> None:
    opened = open_source(str(program_file))
    assert (opened.kind, opened.converted) == ("exported", False)
    assert opened.model.head.weight is opened.model.embed.weight
    assert torch.equal(opened.model(*opened.args), own_model()(ids()))


@pytest.mark.parametrize("options", [{"num_blocks": 2}, {"layers_per_block": 1, "mix_scale": "sum"}],
                         ids=["paper", "sum"])
def test_a_rewritten_program_is_the_converted_model(options: dict[str, Any], program_file: Path, tmp_path: Path) -> None:
    program = open_program(program_file)
    plans = transform(program, tmp_path / "out.pt2", **options)
    module = attnres_fx.load(tmp_path / "out.pt2")
    assert module.head.weight is module.embed.weight
    assert {"attnres.stream.query", "attnres.stream.key_gain"} <= set(dict(module.named_parameters()))

    model = attnres_fx.convert(own_model(), (ids(),), **options)
    again = open_program(tmp_path / "out.pt2")
    assert again.plans == tuple(plans)
    assert [plan.boundaries for plan in plans] == [plan.boundaries for plan in again.plans]
    for converted in (module, model):
        disturb(converted)
    for shape in ((2, 7), (3, 33), (8, 2)):  # dynamic dimensions stay dynamic
        tokens = torch.randint(32, shape)
        assert torch.allclose(module(tokens), model(tokens), atol=1e-5)
    with pytest.raises(AssertionError, match="64"):  # and keep their bounds
        module(torch.randint(32, (2, 65)))
    module(ids()).square().mean().backward()
    assert module.get_parameter("attnres.stream.query").grad.norm() > 0


def test_programs_are_verified_plain_and_rewritten(program_file: Path, tmp_path: Path) -> None:
    program = open_program(program_file)
    before = {key: value.clone() for key, value in program.module.state_dict().items()}
    result = verify_program(program, num_blocks=2, mix_scale="sum")
    assert result.passed and result < 1e-5 and result.random_query < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in program.module.state_dict().items())
    transform(program, tmp_path / "out.pt2", num_blocks=2, mix_scale="sum")
    again = open_program(tmp_path / "out.pt2")
    assert verify_program(again).passed and verify_program(again) < 1e-5


@pytest.mark.parametrize("position, change", [
    (1, lambda mix: mix.update_arg(0, mix.args[0][:-1])),  # a source less
    (2, lambda mix: mix.update_arg(0, [mix.args[0][0], *mix.args[0]])),  # b_0 twice
    (2, lambda mix: mix.args[1].update_arg(1, 1)),  # the query row of another position
    (2, lambda mix: mix.update_arg(3, 1e-2)),  # another eps
], ids=["source less", "b_0 twice", "row", "eps"])
def test_a_rewritten_program_is_held_to_its_plan(
    position: int, change: Any, program_file: Path, tmp_path: Path
) -> None:
    transform(open_program(program_file), tmp_path / "out.pt2", num_blocks=2)
    program: Program = open_program(tmp_path / "out.pt2")
    mix = [node for node in program.module.graph.nodes if is_mix(node)][position]
    mix.args = (*mix.args, *(1e-6, 1.0, False, 1.0)[len(mix.args) - 3:])
    change(mix)
    program.module.recompile()
    with pytest.raises(errors.CheckpointFileError, match="mix"):
        verify_program(program)


@pytest.mark.parametrize("kind, expected", [
    ("llama", [("stream", "model", 4)]),
    pytest.param("t5", [("encoder", "encoder", 4), ("decoder", "decoder", 6)], marks=pytest.mark.slow),
])
def test_hugging_face_programs(kind: str, expected: list[tuple[str, str, int]], tmp_path: Path) -> None:
    model = hugging_face(kind)
    names = ["input_ids", *(["decoder_input_ids"] if kind == "t5" else [])]
    inputs = {**dict.fromkeys(names, ids()), "use_cache": False}
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {**dict.fromkeys(names, free), "use_cache": None}
    torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False), tmp_path / "hf.pt2")
    opened = open_program(tmp_path / "hf.pt2")
    result = verify_program(opened, num_blocks=2, mix_scale="sum")
    assert result.passed and result < 1e-4
    plans = transform(opened, tmp_path / "out.pt2", num_blocks=2, mix_scale="sum")
    assert [(plan.name, plan.owner, plan.num_layers) for plan in plans] == expected
    assert verify_program(open_program(tmp_path / "out.pt2")).passed
    module = attnres_fx.load(tmp_path / "out.pt2")
    longer = {**dict.fromkeys(names, torch.arange(33).reshape(3, 11) + 3), "use_cache": False}
    with torch.no_grad():
        assert torch.allclose(module(**longer).logits, model(**longer).logits, atol=1e-4)


def test_a_failed_transform_leaves_nothing(program_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(errors.CheckpointFileError, match="disk full"):
        transform(open_program(program_file), tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_plan_travels_in_the_program(program_file: Path, tmp_path: Path) -> None:
    transform(open_program(program_file), tmp_path / "out.pt2", num_blocks=2)
    extra = {"attnres.json": ""}
    torch.export.load(tmp_path / "out.pt2", extra_files=extra)
    content = json.loads(extra["attnres.json"])
    assert {name for pair in content["aliases"].items() for name in pair} == {"head.weight", "embed.weight"}
    assert content["function_preserving"] is True
