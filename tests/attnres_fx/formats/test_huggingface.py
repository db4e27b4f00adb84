"""``save_pretrained`` of converted models, and how their directories read."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_models import disturb, hugging_face, ids
from torch import nn

import attnres_fx
from attnres_fx import errors

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

INPUTS = {"input_ids": ids(), "use_cache": False}


@functools.lru_cache
def _converted(kind: str, **changes: Any) -> nn.Module:
    model = attnres_fx.convert(hugging_face(kind, **changes), (), INPUTS, num_blocks=2)
    disturb(model)
    return model


def converted(kind: str = "llama", **changes: Any) -> nn.Module:
    return copy.deepcopy(_converted(kind, **changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "model"
    converted().save_pretrained(path)
    return path


def same(model: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(model(**INPUTS).logits, other(**INPUTS).logits)


def test_round_trip_is_bit_equal(saved: Path) -> None:
    again = attnres_fx.load(saved)
    assert same(again, converted())
    assert not again.training and again.config.name_or_path == str(saved)
    assert type(again).__name__ == "LlamaForCausalLM" and isinstance(again, transformers.LlamaForCausalLM)


def test_the_checkpoint_holds_no_key_of_ours(saved: Path) -> None:
    ours = {"attnres.stream.query", "attnres.stream.key_gain"}
    assert set(load_file(saved / "attnres.safetensors")) == ours
    shards = [load_file(path) for path in saved.glob("model*.safetensors")]
    assert shards and not any(ours & set(shard) for shard in shards)
    content = json.loads((saved / "attnres.json").read_text())
    assert content["model_class"] == "LlamaForCausalLM" and content["transformers"] == transformers.__version__


PLAIN = hugging_face("llama").config


@pytest.mark.parametrize("options", [
    {}, {"device_map": None}, {"dtype": torch.bfloat16}, {"torch_dtype": "auto"}, {"use_safetensors": True},
    {"use_safetensors": False}, {"attn_implementation": "eager"}, {"config": PLAIN},
], ids=lambda options: "-".join(options) or "plain call")
@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForCausalLM", "LlamaForCausalLM", "LlamaModel"])
def test_from_pretrained_raises(name: str, options: dict[str, Any], saved: Path) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(transformers, name).from_pretrained(saved, **options)
    if "config" not in options:
        assert "attnres_fx.load(directory)" in str(caught.value)


def test_the_config_nested_in_another_is_guarded_too(tmp_path: Path) -> None:
    from attnres_fx.formats.huggingface import GUARD, GUARD_KEY, _guard, without_guard

    content = {"model_type": "outer", "text_config": {"model_type": "inner", "n": 1}, "rope": {"theta": 1}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    _guard(file)
    guarded = json.loads(file.read_text())
    assert guarded["text_config"][GUARD_KEY] == guarded[GUARD_KEY] == GUARD and GUARD_KEY not in guarded["rope"]
    assert without_guard(guarded) == content


def test_the_config_and_tokenizer_of_the_directory_still_read(saved: Path) -> None:
    assert transformers.AutoConfig.from_pretrained(saved).hidden_size == 32


def test_the_model_in_memory_stays_as_it_was(tmp_path: Path) -> None:
    model = converted()
    model.save_pretrained(tmp_path / "first")  # transformers itself notes dtype and architectures in the config
    config, state = copy.deepcopy(model.config.to_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "second")
    assert model.config.to_dict() == config
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not hasattr(model.config, "transformers_weights")
    hugging_face("llama").save_pretrained(tmp_path / "plain")
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = converted("gpt2")
    model.save_pretrained(tmp_path / "m")
    again = attnres_fx.load(tmp_path / "m")
    assert again.lm_head.weight is again.transformer.wte.weight
    assert same(again, model)


def test_shards_and_state_dict(tmp_path: Path) -> None:
    model = converted()
    doubled = {key: value * 2 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m", state_dict=doubled, max_shard_size="20KB", safe_serialization=True)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    again = attnres_fx.load(tmp_path / "m")
    assert all(torch.equal(value, doubled[key]) for key, value in again.state_dict().items())


def test_saving_over_an_earlier_save_leaves_no_stale_weights(tmp_path: Path) -> None:
    hugging_face("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("kept")
    model = converted()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "m")
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["attnres.json", "attnres.safetensors", "config.json", "generation_config.json",
                     "model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.txt"]
    assert same(attnres_fx.load(tmp_path / "m"), model)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists() or list((tmp_path / "m").iterdir()) == []


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"distributed_checkpoint": True}], ids=lambda o: next(iter(o)))
def test_what_cannot_be_saved_so_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError):
        converted().save_pretrained(tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    monkeypatch.setattr("attnres_fx.formats.huggingface._index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = converted(use_cache=False)
    rows = [{"input_ids": row, "labels": row} for row in ids()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, save_steps=1, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", learning_rate=1e-2)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    saved = tmp_path / "out" / "checkpoint-1"
    assert same(attnres_fx.load(saved), model.eval())
    fresh = converted(use_cache=False)
    assert not same(fresh.eval(), model)
    transformers.Trainer(fresh, arguments, train_dataset=rows)._load_from_checkpoint(str(saved))
    assert same(fresh.eval(), model)


def test_the_transformed_directory_is_the_source_and_two_files(tmp_path: Path) -> None:
    from attnres_fx.formats.huggingface import write_beside

    hugging_face("llama").save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    model = converted()
    write_beside(tmp_path / "plain", tmp_path / "out", model, guard=False)
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    extra = {p.name for p in (tmp_path / "out").iterdir()} - {p.name for p in (tmp_path / "plain").iterdir()}
    assert extra == {"attnres.json", "attnres.safetensors"}
    assert same(attnres_fx.load(tmp_path / "out"), model)
    assert attnres_fx.load(tmp_path / "out", dtype=torch.bfloat16).dtype == torch.bfloat16
    write_beside(tmp_path / "plain", tmp_path / "guarded", model)
    for read in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.LlamaForCausalLM):
        with pytest.raises((ValueError, OSError), match=r"attnres_fx\.load"):
            read.from_pretrained(tmp_path / "guarded")
    with pytest.raises(Exception, match=r"str|attnres_fx"):  # a config of one's own does not help
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "guarded", config=PLAIN)
    assert same(attnres_fx.load(tmp_path / "guarded"), model)


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    class Mine(transformers.LlamaForCausalLM):
        pass

    torch.manual_seed(0)
    model = attnres_fx.convert(Mine(PLAIN).eval(), (), INPUTS, num_blocks=2)
    disturb(model)
    attnres_fx.save(model, tmp_path / "m")
    with pytest.raises(errors.CheckpointFileError, match="Mine"):
        attnres_fx.load(tmp_path / "m")
    for given in (Mine, Mine(PLAIN).eval(), lambda: Mine(PLAIN).eval()):
        again = attnres_fx.load(tmp_path / "m", model=given)
        assert isinstance(again, Mine) and same(again, model)
