"""The table of every way to call, copy, save, compile, wrap and export a converted model.

Each row ends "rewritten" (the value of the independent reference) or "raised" (an error); none may end "plain". A row is a
function that gets a :class:`Converted` and returns logits.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import models, reference
from torch import Tensor, nn

import attnres_fx
from attnres_fx import runner

REWRITTEN, RAISED = "rewritten", "raised"


@dataclass
class Converted:
    """A converted tiny Llama with random queries, its input, and what the reference makes of both."""

    model: Any
    ids: Tensor
    tmp_path: Path

    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.model.attnres.stream.query, self.model.attnres.stream.key_gain

    def expected(self, model: Any = None, ids: Tensor | None = None) -> Tensor:
        model, ids = self.model if model is None else model, self.ids if ids is None else ids
        stream = model.attnres.stream
        with torch.no_grad():
            return reference.llama(model, ids, stream.query, stream.key_gain, [2, 4])

    def call(self, model: Any = None, ids: Tensor | None = None) -> Tensor:
        model = self.model if model is None else model
        return model(self.ids if ids is None else ids, use_cache=False).logits


def build(tmp_path: Path, **settings: Any) -> tuple[Converted, Tensor]:
    torch._dynamo.reset()
    model, ids = models.llama(2, **settings), models.token_ids()
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    attnres_fx.convert(model, (ids,), {"use_cache": False}, num_blocks=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.attnres.stream.query.copy_(0.7 * torch.randn(model.attnres.stream.query.shape, generator=generator))
        model.attnres.stream.key_gain.add_(0.2 * torch.randn(model.attnres.stream.query.shape, generator=generator))
    return Converted(model, ids, tmp_path), plain


ROWS: dict[str, tuple[str, Callable[[Converted], Tensor]]] = {}


def row(ending: str) -> Callable[[Callable[[Converted], Tensor]], Callable[[Converted], Tensor]]:
    def enter(function: Callable[[Converted], Tensor]) -> Callable[[Converted], Tensor]:
        ROWS[function.__name__] = (ending, function)
        return function

    return enter


# --- calls -----------------------------------------------------------------------------------------------------------


@row(REWRITTEN)
def call(c: Converted) -> Tensor:
    return c.call()


@row(REWRITTEN)
def call_forward(c: Converted) -> Tensor:
    return c.model.forward(input_ids=c.ids, use_cache=False).logits


@row(REWRITTEN)
def call_with_embeddings(c: Converted) -> Tensor:
    return c.model(inputs_embeds=c.model.model.embed_tokens(c.ids), use_cache=False).logits


@row(REWRITTEN)
def call_with_labels(c: Converted) -> Tensor:
    return c.model(c.ids, labels=c.ids, use_cache=False).logits


@row(REWRITTEN)
def call_inner_module(c: Converted) -> Tensor:
    return c.model.lm_head(c.model.model(c.ids, use_cache=False).last_hidden_state)


@row(REWRITTEN)
def call_inside_another_module(c: Converted) -> Tensor:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = c.model

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids, use_cache=False).logits

    return Outer()(c.ids)


@row(REWRITTEN)
def call_without_grad(c: Converted) -> Tensor:
    with torch.no_grad():
        return c.call()


@row(REWRITTEN)
def call_in_inference_mode(c: Converted) -> Tensor:
    with torch.inference_mode():
        return c.call().clone()


@row(REWRITTEN)
def call_in_training(c: Converted) -> Tensor:
    return c.call(c.model.train())


@row(REWRITTEN)
def call_in_a_thread(c: Converted) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(c.call()))
    thread.start()
    thread.join()
    return results[0]


@row(REWRITTEN)
def call_after_dynamo_reset(c: Converted) -> Tensor:
    c.call()
    torch._dynamo.reset()
    return c.call()


@row(REWRITTEN)
def call_with_cache(c: Converted) -> Tensor:
    with torch.no_grad():
        first = c.model(c.ids[:, :5], use_cache=True)
        second = c.model(c.ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, second.logits], 1)


@row(REWRITTEN)
def call_with_hidden_states(c: Converted) -> Tensor:
    output = c.model(c.ids, use_cache=False, output_hidden_states=True)
    embedding, middle, _ = output.hidden_states  # the last is what the final norm made of the output mix
    assert torch.equal(embedding, c.model.model.embed_tokens(c.ids))
    assert models.relative(middle, reference.llama_mixes(c.model, c.ids, *c.parameters(), [2, 4])[2]) < 2e-5
    return output.logits


@row(REWRITTEN)
def call_with_hooks_on_a_layer(c: Converted) -> Tensor:
    seen: list[Any] = []
    c.model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    result = c.call()
    assert seen
    return result


@row(REWRITTEN)
def functional_call(c: Converted) -> Tensor:
    state = {name: value.detach().clone() for name, value in c.model.named_parameters()}
    with torch.no_grad():
        for parameter in c.model.attnres.parameters():
            parameter.zero_()  # the call must read the given ones
    result = torch.func.functional_call(c.model, state, (c.ids,), {"use_cache": False}).logits
    c.model.load_state_dict(state, strict=False)
    return result


@row(REWRITTEN)
def functional_grad(c: Converted) -> Tensor:
    state = {name: value.detach() for name, value in c.model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = torch.func.functional_call(c.model, parameters, (c.ids,), {"use_cache": False}).logits
        return logits.sum(), logits

    gradients, logits = torch.func.grad(loss, has_aux=True)(state)
    assert gradients["attnres.stream.query"][1:].abs().sum(-1).all()
    return logits


@row(REWRITTEN)
def call_with_dynamo_disabled(c: Converted) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return c.call()


@row(REWRITTEN)
def call_past_the_recompile_limit(c: Converted) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=1), mock.patch.object(runner, "KINDS_OF_CALLS", 1):
        for train in (True, False):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    result = c.call(c.model.train(train))
    return result


@row(RAISED)
def call_with_an_early_exit(c: Converted) -> Tensor:
    del c.model.model.layers[1]
    c.model.config.num_hidden_layers = 1
    return c.call()


@row(RAISED)
def call_with_layers_swapped(c: Converted) -> Tensor:
    class Skip(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return hidden_states

    c.model.model.layers[1] = Skip()
    return c.call()


@row(REWRITTEN)
def generate(c: Converted) -> Tensor:
    return _generated(c, use_cache=False)


@row(REWRITTEN)
def generate_with_cache(c: Converted) -> Tensor:
    return _generated(c, use_cache=True)


def _generated(c: Converted, use_cache: bool) -> Tensor:
    made = c.model.generate(c.ids, max_new_tokens=4, do_sample=False, use_cache=use_cache, eos_token_id=None,
                            attention_mask=torch.ones_like(c.ids), pad_token_id=0)
    ids = c.ids
    for _ in range(4):
        ids = torch.cat([ids, c.expected(ids=ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, ids)
    return c.call()


# --- copies and files ------------------------------------------------------------------------------------------------


@row(REWRITTEN)
def deepcopy(c: Converted) -> Tensor:
    c.call()
    duplicate = copy.deepcopy(c.model)
    with torch.no_grad():
        c.model.attnres.stream.query.zero_()  # the copy must have parameters of its own
    result = c.call(duplicate)
    c.model.attnres.stream.load_state_dict(duplicate.attnres.stream.state_dict())
    return result


@row(REWRITTEN)
def shallow_copy(c: Converted) -> Tensor:
    return c.call(copy.copy(c.model))


@row(REWRITTEN)
def deepcopy_of_the_inner_module(c: Converted) -> Tensor:
    return c.model.lm_head(copy.deepcopy(c.model.model)(c.ids, use_cache=False).last_hidden_state)


@row(REWRITTEN)
def pickled(c: Converted) -> Tensor:
    c.call()
    return c.call(pickle.loads(pickle.dumps(c.model)))


@row(REWRITTEN)
def torch_saved(c: Converted) -> Tensor:
    stored = io.BytesIO()
    torch.save(c.model, stored)
    stored.seek(0)
    return c.call(torch.load(stored, weights_only=False))


@row(REWRITTEN)
def state_dict_into_a_converted_model(c: Converted) -> Tensor:
    other, _ = build(c.tmp_path)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    other.model.load_state_dict(c.model.state_dict())
    return other.call()


@row(REWRITTEN)
def saved_and_loaded(c: Converted) -> Tensor:
    attnres_fx.save(c.model, c.tmp_path / "model")
    return c.call(attnres_fx.load(c.tmp_path / "model"))


@row(REWRITTEN)
def save_pretrained_and_load(c: Converted) -> Tensor:
    c.model.save_pretrained(c.tmp_path / "model")
    return c.call(attnres_fx.load(c.tmp_path / "model"))


@row(RAISED)
def save_pretrained_and_auto_model(c: Converted) -> Tensor:
    import transformers

    c.model.save_pretrained(c.tmp_path / "model")
    return c.call(transformers.AutoModelForCausalLM.from_pretrained(c.tmp_path / "model"))


@row(RAISED)
def save_pretrained_and_the_class(c: Converted) -> Tensor:
    c.model.save_pretrained(c.tmp_path / "model")
    return c.call(type(c.model).__mro__[1].from_pretrained(c.tmp_path / "model"))  # type: ignore[attr-defined]


@row(RAISED)
def save_pretrained_of_the_inner_module(c: Converted) -> Tensor:
    c.model.model.save_pretrained(c.tmp_path / "model")
    return c.call()


# --- compilers -------------------------------------------------------------------------------------------------------


def _compiled(c: Converted, **settings: Any) -> Tensor:
    return c.call(torch.compile(c.model, **settings))


@row(REWRITTEN)
def compiled(c: Converted) -> Tensor:
    return _compiled(c, backend="attnres", fullgraph=True)


@row(REWRITTEN)
def compiled_without_fullgraph(c: Converted) -> Tensor:
    return _compiled(c, backend="attnres", options={"downstream": "aot_eager"})


@row(REWRITTEN)
def compiled_without_grad(c: Converted) -> Tensor:
    with torch.no_grad():
        return _compiled(c, backend="attnres", options={"downstream": "eager"})


@row(REWRITTEN)
def compiled_dynamic(c: Converted) -> Tensor:
    return _compiled(c, backend="attnres", dynamic=True, options={"downstream": "aot_eager"})


@row(REWRITTEN)
def compiled_in_place(c: Converted) -> Tensor:
    c.model.compile(backend="attnres", options={"downstream": "eager"})
    return c.call()


@row(REWRITTEN)
def compiled_inner_module(c: Converted) -> Tensor:
    c.model.model.compile(backend="attnres", options={"downstream": "eager"})
    return c.call()


@row(REWRITTEN)
def compiled_step_function(c: Converted) -> Tensor:
    @torch.compile(backend="attnres", options={"downstream": "eager"})
    def step(ids: Tensor) -> Tensor:
        return c.model(ids, use_cache=False).logits * 2

    return step(c.ids) / 2


@row(REWRITTEN)
def compiled_after_a_graph_break(c: Converted) -> Tensor:
    def step(ids: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return c.model(ids, use_cache=False).logits

    return torch.compile(step, backend="attnres", options={"downstream": "eager"})(c.ids)


@row(REWRITTEN)
def compiled_with_a_graph_break_inside(c: Converted) -> Tensor:
    c.model.model.layers[1].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return _compiled(c, backend="attnres", options={"downstream": "eager"})


@row(RAISED)
def compiled_one_layer(c: Converted) -> Tensor:
    for layer in c.model.model.layers:
        layer.compile(backend="attnres", options={"downstream": "eager"})
    return c.model.model.layers[0](torch.randn(2, 9, 32), position_embeddings=(torch.ones(1, 9, 8), torch.zeros(1, 9, 8)))


@row(REWRITTEN)
def call_with_compiled_layers(c: Converted) -> Tensor:
    for layer in c.model.model.layers:
        layer.compile(backend="eager")
    return c.call()


@row(RAISED)
def plain_inductor(c: Converted) -> Tensor:
    return _compiled(c)


@row(RAISED)
def plain_inductor_without_grad(c: Converted) -> Tensor:
    with torch.no_grad():
        return _compiled(c)


@row(RAISED)
def plain_aot_eager(c: Converted) -> Tensor:
    return _compiled(c, backend="aot_eager")


@row(RAISED)
def plain_eager_backend(c: Converted) -> Tensor:
    return _compiled(c, backend="eager")


# --- exporters -------------------------------------------------------------------------------------------------------


def _exported(c: Converted, strict: bool) -> Any:
    return torch.export.export(c.model, (c.ids,), {"use_cache": False}, strict=strict)


@row(RAISED)
def exported(c: Converted) -> Tensor:
    return c.call(_exported(c, strict=False).module())


@row(RAISED)
def exported_strict(c: Converted) -> Tensor:
    return c.call(_exported(c, strict=True).module())


@row(RAISED)
def exported_and_decomposed(c: Converted) -> Tensor:
    with torch.no_grad():
        return c.call(_exported(c, strict=False).run_decompositions().module())


@row(RAISED)
def exported_saved_and_loaded(c: Converted) -> Tensor:
    stored = io.BytesIO()
    torch.export.save(_exported(c, strict=False), stored)
    stored.seek(0)
    return c.call(torch.export.load(stored).module())


@row(RAISED)
def jit_traced(c: Converted) -> Tensor:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = c.model

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids, use_cache=False).logits

    return torch.jit.trace(Logits(), (c.ids,), check_trace=False)(c.ids)


@row(RAISED)
def symbolically_traced(c: Converted) -> Tensor:
    return torch.fx.symbolic_trace(c.model.model)(c.ids)


# --- precision -------------------------------------------------------------------------------------------------------


@row(REWRITTEN)
def to_float64_and_back(c: Converted) -> Tensor:
    wide = c.call(c.model.double())
    assert wide.dtype == torch.float64
    c.model.float()
    return wide.float()


@row(REWRITTEN)
def in_bfloat16(c: Converted) -> Tensor:
    narrow = c.call(copy.deepcopy(c.model).to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    return narrow


@row(REWRITTEN)
def under_autocast(c: Converted) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return c.call()


# --- wrappers --------------------------------------------------------------------------------------------------------


@row(REWRITTEN)
def gradient_checkpointing(c: Converted) -> Tensor:
    c.model.train().gradient_checkpointing_enable()
    return c.call()


@row(REWRITTEN)
def gradient_checkpointing_after_a_call(c: Converted) -> Tensor:
    c.call(c.model.train())
    c.model.gradient_checkpointing_enable()
    return c.call()


@row(REWRITTEN)
def gradient_checkpointing_compiled(c: Converted) -> Tensor:
    c.model.train().gradient_checkpointing_enable()
    return _compiled(c, backend="attnres", options={"downstream": "aot_eager"})


@pytest.fixture
def group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0,
                                         world_size=1)
    yield None
    torch.distributed.destroy_process_group()


@row(REWRITTEN)
def distributed_data_parallel(c: Converted) -> Tensor:
    return c.call(nn.parallel.DistributedDataParallel(c.model.train()))


@row(REWRITTEN)
def distributed_data_parallel_compiled(c: Converted) -> Tensor:
    with torch._dynamo.config.patch(optimize_ddp=False):
        wrapped = nn.parallel.DistributedDataParallel(c.model.train())
        return c.call(torch.compile(wrapped, backend="attnres", options={"downstream": "eager"}))


@row(REWRITTEN)
def distributed_data_parallel_compiled_in_buckets(c: Converted) -> Tensor:
    first = mock.patch.object(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)  # tiny models fill no real bucket
    with torch._dynamo.config.patch(optimize_ddp=True), first:
        wrapped = nn.parallel.DistributedDataParallel(c.model.train(), bucket_cap_mb=0.01)
        return c.call(torch.compile(wrapped, backend="attnres", options={"downstream": "eager"}))


@row(REWRITTEN)
def fully_sharded_at_the_root(c: Converted) -> Tensor:
    from torch.distributed.fsdp import fully_shard

    duplicate = copy.deepcopy(c.model).train()
    fully_shard(duplicate)
    return c.call(duplicate)


@row(REWRITTEN)
def trainer(c: Converted) -> Tensor:
    import transformers

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": c.ids[index % 2], "labels": c.ids[index % 2]}

    before = c.model.attnres.stream.query.detach().clone()
    settings = transformers.TrainingArguments(output_dir=str(c.tmp_path), max_steps=2, per_device_train_batch_size=2,
                                              report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2,
                                              disable_tqdm=True)
    transformers.Trainer(model=c.model, args=settings, train_dataset=Rows()).train()
    assert not torch.equal(before, c.model.attnres.stream.query)
    return c.call(c.model.eval())


# Bfloat16 rounds every activation; whatever its noise, it must be far nearer to the reference than to the plain network.
LOOSE = {"in_bfloat16", "under_autocast"}


def ending_of(c: Converted, plain: Tensor, function: Callable[[Converted], Tensor], loose: bool) -> tuple[str, str]:
    """How a row ends, and the error if it raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(c)
    except Exception as error:
        return RAISED, f"{type(error).__name__}: {error}"
    if models.relative(result, c.expected()) < (0.2 if loose else 2e-5):
        return REWRITTEN, ""
    return ("plain" if models.relative(result, plain) < 2e-5 else "neither"), ""


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name == "compiled_dynamic" else ()) for name in ROWS])
def test_every_way_ends_rewritten_or_raised(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name.startswith(("distributed", "fully_sharded")):
        request.getfixturevalue("group")
    expected, function = ROWS[name]
    converted, plain = build(tmp_path)
    assert models.relative(converted.expected(), plain) > 0.3, "the reference must differ from the plain network"
    ending, error = ending_of(converted, plain, function, name in LOOSE)
    assert ending == expected, error
    # A refusal must be one of ours, or the tracer's own; not an accident inside the project.
    accidents = ("AttributeError", "KeyError", "AssertionError", "IndexError")
    assert expected == REWRITTEN or not error.startswith(accidents), error
