"""The parameters that are read are those at the model: under PEFT's adapters, and whatever else replaces them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.checkpoint_models import disturb
from torch import Tensor, nn

import attnres_fx
from attnres_fx import errors
from attnres_fx.runtime.parameters import AttnRes

peft = pytest.importorskip("peft")
CALL = {"use_cache": False}
DEFAULT = {"backend": "attnres", "options": {"downstream": "aot_eager"}}


def llama() -> Any:
    return models.llama(2)


def converted(**options: Any) -> Any:
    return attnres_fx.convert(llama(), (models.token_ids(),), CALL, **{"num_blocks": 2, **options})


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(models.token_ids(), **CALL).logits


def reference(model: Any, attnres: Any) -> Tensor:
    """The independent network, with the queries of ``attnres`` and the layers of ``model``, adapters included."""
    from support.reference import llama as by_hand

    with torch.no_grad():
        return by_hand(model, models.token_ids(), attnres.stream.query, attnres.stream.key_gain, [2, 4])


def step(model: Any) -> dict[str, Tensor]:
    """The gradients of one step by name."""
    model.zero_grad(set_to_none=True)
    model(models.token_ids(), labels=models.token_ids(), **CALL).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- replaced by hand ------------------------------------------------------------------------------------------------


def by_name(model: Any, new: Any) -> None:
    model.attnres = new


def by_submodule(model: Any, new: Any) -> None:
    model.set_submodule("attnres", new)


def by_table(model: Any, new: Any) -> None:
    model._modules["attnres"] = new


@pytest.mark.parametrize("replace", [by_name, by_submodule, by_table])
@pytest.mark.parametrize("called_before", [False, True])
def test_a_replacement_is_what_is_read(replace: Any, called_before: bool) -> None:
    model = disturb(converted())
    fast = torch.compile(model, **DEFAULT)
    if called_before:
        logits(model), logits(fast)
    new = copy.deepcopy(model.attnres)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(-0.7)
    replace(model, new)
    expected = reference(model, new)
    assert models.relative(logits(model), expected) < 2e-5
    assert models.relative(logits(fast), expected) < 2e-5
    gradients = step(model)
    assert gradients["attnres.stream.query"].norm() > 0 and new.stream.query.grad is not None


@pytest.mark.parametrize("spoil, told", [
    (lambda model: delattr(model, "attnres"), "nothing at attnres.stream"),
    (lambda model: setattr(model, "attnres", nn.Identity()), "nothing at attnres.stream"),
    (lambda model: setattr(model, "attnres", converted(num_blocks=4).attnres), "another conversion"),
], ids=["deleted", "another module", "another plan"])
def test_what_cannot_be_read_raises(spoil: Any, told: str) -> None:
    model = disturb(converted())
    before = logits(model)
    kept = model.attnres
    spoil(model)
    with pytest.raises(errors.ReplacedParametersError, match=told):
        logits(model)
    with pytest.raises(errors.ReplacedParametersError, match=told):
        model.model(models.token_ids(), **CALL)
    with pytest.raises(Exception, match=rf"{told}|attnres"):
        logits(torch.compile(model, **DEFAULT))
    model.attnres = kept
    assert torch.equal(logits(model), before)


def test_copies_read_their_own() -> None:
    model = disturb(converted())
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.attnres.stream.query.mul_(3)
        assert torch.equal(logits(other), expected) and not torch.equal(logits(model), expected)
        inner = copy.deepcopy(other.model)
        with torch.no_grad():
            other.attnres.stream.query.mul_(3)
            hidden = inner(models.token_ids(), **CALL).last_hidden_state
            assert torch.equal(other.lm_head(hidden), expected)


def test_a_model_is_freed() -> None:
    model = converted()
    logits(model)
    gone = [weakref.ref(model), weakref.ref(model.model.layers[0]), weakref.ref(model.attnres)]
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_every_module_with_parameters_of_ours_can_initialise_them() -> None:
    with torch.device("meta"):
        model = models.nanogpt(4, width=16, heads=2)
    attnres_fx.convert(model, models.token_ids(2, 5).to("meta"), num_blocks=2)
    model.to_empty(device="cpu")
    for owned in (model.attnres, model.attnres.stream):
        with torch.no_grad():
            for parameter in owned.parameters():
                parameter.fill_(torch.nan)
        owned.reset_parameters()
        assert not model.attnres.stream.query.any() and bool((model.attnres.stream.key_gain == 1).all())
    bare = converted(key_gain=False)
    bare.attnres.reset_parameters()
    assert bare.attnres.stream.key_gain is None


# --- PEFT --------------------------------------------------------------------------------------------------------------


def test_queries_are_trained_saved_loaded_and_merged_with_an_adapter(tmp_path: Path) -> None:
    base = converted()
    model = peft.get_peft_model(copy.deepcopy(base), lora(modules_to_save=["attnres"]))
    disturb(model)
    copied = model.base_model.model.attnres.modules_to_save["default"]
    assert isinstance(copied, AttnRes)
    expected = logits(model)
    assert models.relative(expected, reference(model.base_model.model, copied)) < 2e-5
    assert models.relative(logits(torch.compile(model, **DEFAULT)), expected) < 2e-5
    gradients = step(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == trained and sum("attnres" in name for name in trained) == 2
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    assert models.relative(logits(merged), expected) < 2e-5 and isinstance(merged.attnres, AttnRes)
    attnres_fx.save(merged, tmp_path / "merged")
    assert models.relative(logits(attnres_fx.load(tmp_path / "merged")), expected) < 2e-5


def test_adapters_on_and_off() -> None:
    model = peft.get_peft_model(converted(), lora(modules_to_save=["attnres"]))
    fast = torch.compile(model, **DEFAULT)
    disturb(model)
    host = model.base_model.model
    on = logits(model)
    with model.disable_adapter():
        off, compiled_off = logits(model), logits(fast)
        original = host.attnres.original_module
        assert models.relative(off, reference(host, original)) < 2e-5
    assert models.relative(off, on) > 1e-2
    assert models.relative(compiled_off, off) < 2e-5 and models.relative(logits(fast), on) < 2e-5
    model.add_adapter("other", lora(modules_to_save=["attnres"]))
    model.set_adapter("other")
    other = host.attnres.modules_to_save["other"]
    assert models.relative(logits(model), reference(host, other)) < 2e-5
    model.set_adapter("default")
    assert torch.equal(logits(model), on)


def test_a_model_with_adapters_is_converted(tmp_path: Path) -> None:
    """The queries hang at the model within, where they outlive the wrapper, and belong to the adapter."""
    plain = llama()
    model = peft.get_peft_model(copy.deepcopy(plain), lora())
    assert attnres_fx.convert(model, (models.token_ids(),), CALL, num_blocks=2) is model
    result = attnres_fx.verify(model, (models.token_ids(),), CALL)
    assert result.passed, result
    disturb(model)
    expected = logits(model)
    gradients = step(model)
    assert sum("attnres" in name for name in gradients) == 2 and sum("lora" in name for name in gradients) == 4
    with pytest.raises(errors.AlreadyConvertedError):
        attnres_fx.convert(model, (models.token_ids(),), CALL)
    model.save_pretrained(tmp_path / "adapter")
    base = attnres_fx.convert(copy.deepcopy(plain), (models.token_ids(),), CALL, num_blocks=2)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    with pytest.raises(errors.OptionError, match="merge_and_unload"):
        attnres_fx.save(model, tmp_path / "whole")
    with pytest.raises(errors.OptionError, match="merge the adapters"):
        attnres_fx.save(model.get_base_model(), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    merged = model.merge_and_unload()
    assert models.relative(logits(merged), expected) < 2e-5
    merged.save_pretrained(tmp_path / "merged")
    assert models.relative(logits(attnres_fx.load(tmp_path / "merged")), expected) < 2e-5


def test_a_failed_conversion_leaves_the_adapters_alone() -> None:
    model = peft.get_peft_model(llama(), lora())
    before = list(model.state_dict())
    with pytest.raises(errors.OptionError):
        attnres_fx.convert(model, (models.token_ids(),), CALL, streams=["none"])
    assert list(model.state_dict()) == before and not model.peft_config["default"].modules_to_save


def test_trained_queries_are_not_left_out_of_an_adapter_without_a_word(tmp_path: Path, recwarn: Any) -> None:
    model = peft.get_peft_model(converted(), lora())
    model.save_pretrained(tmp_path)  # the queries are frozen, and those of the base
    assert not [each for each in recwarn if "queries" in str(each.message)]
    for parameter in model.attnres.parameters():
        parameter.requires_grad_()
    with pytest.warns(UserWarning, match="without the queries"):
        model.save_pretrained(tmp_path)
    recwarn.clear()
    model.state_dict()
    peft.get_peft_model(converted(), lora(modules_to_save=["attnres"])).save_pretrained(tmp_path)
    assert not [each for each in recwarn if "queries" in str(each.message)]


@pytest.mark.parametrize("config", [
    {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2},
    {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []},
], ids=["prompt", "ia3"])
def test_other_kinds_of_adapters(config: dict[str, Any], tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.get_peft_config(config))
    attnres_fx.convert(model, (), {"input_ids": models.token_ids(), **CALL}, num_blocks=2)
    expected = logits(disturb(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(converted(), tmp_path)), expected)


def test_a_release_that_cannot_name_modules_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft.utils, "set_additional_trainable_modules")
    model = peft.get_peft_model(llama(), lora())
    with pytest.warns(UserWarning, match="not part of the model's adapters"):
        attnres_fx.convert(model, (models.token_ids(),), CALL, num_blocks=2)
    assert step(disturb(model))["base_model.model.attnres.stream.query"].norm() > 0


@pytest.mark.parametrize("checkpoint", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["new", "reentrant"])
@pytest.mark.parametrize("hooked_first", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_is_trained_with_checkpointed_layers(checkpoint: Any, hooked_first: bool, compiled: bool) -> None:
    base = llama()
    if hooked_first:
        base.enable_input_require_grads()
    attnres_fx.convert(base, (models.token_ids(),), CALL, num_blocks=2)
    model = disturb(peft.get_peft_model(base, lora(modules_to_save=["attnres"]))).train()
    expected = step(model)
    if not hooked_first:
        base.enable_input_require_grads()
    base.gradient_checkpointing_enable(checkpoint)
    found = step(torch.compile(model, **DEFAULT) if compiled else model)
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
    assert found.keys() == expected.keys()
    assert any("lora_A" in name for name in found) and any("query" in name for name in found)
    assert max(models.relative(found[name], expected[name]) for name in expected) < 2e-5
