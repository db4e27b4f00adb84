"""What breaks the graph of a converted model: it works all the same, or the error says what to do about it."""

from __future__ import annotations

import logging
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models, reference
from support.comparison import disturbed
from support.ways import untried
from torch import Tensor, nn

import attnres_fx
from attnres_fx import errors
from attnres_fx.passes.rewrite.partition import partition

CALL = {"use_cache": False}
AOT = {"backend": "attnres", "options": {"downstream": "aot_eager"}}
LOCK = threading.Lock()
LOG = logging.getLogger("a.model")


@torch.compiler.disable
def kept_out(x: Tensor) -> Tensor:
    return x * 1


def locked(x: Tensor) -> Tensor:
    with LOCK:
        return x * 1


def branched(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def looked_up(x: Tensor) -> Tensor:
    logging.getLogger("a.model").info("a layer")
    return x


def opened(x: Tensor) -> Tensor:
    with Path(os.devnull).open() as file:
        return x * (1 + len(file.read()))


def warned(x: Tensor) -> Tensor:
    warnings.warn("from a layer")
    return x


def logged(x: Tensor) -> Tensor:
    LOG.warning("from a layer")
    return x


def printed(x: Tensor) -> Tensor:
    print("from a layer")
    return x


def raised(x: Tensor) -> Tensor:
    raise ValueError("a batch of that size is not known")


def counted(x: Tensor) -> Tensor:
    return x * x.detach().nonzero().shape[0]


def read_out(x: Tensor) -> Tensor:
    return x * x.detach().mean().item()


class Network(nn.Module):
    """Three layers; ``aside`` is called on the output of each branch."""

    def __init__(self, aside: Callable[[Tensor], Tensor] | None = None, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.aside = aside
        self.embed = nn.Embedding(64, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(4))
        self.branches = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, branch in zip(self.norms, self.branches):
            out = branch(norm(x))
            x = x + (out if self.aside is None else self.aside(out))
        return self.norms[3](x)


def converted(aside: Callable[[Tensor], Tensor] | None = None, later: bool = False) -> Any:
    model = Network(None if later else aside)
    attnres_fx.convert(model, (models.token_ids(),), num_blocks=2)
    model.aside = aside
    return model


def llama(model: Any = None) -> Any:
    return attnres_fx.convert(model or models.llama(2), (models.token_ids(),), CALL, num_blocks=2)


def said(call: Callable[[], Any], kind: type[Exception] = errors.GraphBreakError) -> str:
    """The message of an error of ours that ``call`` raises, through Dynamo's wrapper."""
    with pytest.raises(Exception) as caught:
        call()
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, kind), error
    assert "What to do: " in str(error)
    return str(error)


FORMS = {
    "converted": lambda aside: converted(aside),
    "eager": lambda aside: converted(aside, later=True)(models.token_ids()),
    "compiled": lambda aside: torch.compile(converted(aside, later=True), **AOT)(models.token_ids()),
    "one line": lambda aside: torch.compile(
        Network(aside), backend="attnres", options={"num_blocks": 2})(models.token_ids()),
}


@pytest.mark.parametrize("aside, cause, remedy", [
    (kept_out, "torch.compiler.disable", "remove the decorator"),
    (locked, "context manager", "around the call of the model"),
    (branched, "Data-dependent branching", "torch.where or torch.cond"),
    (looked_up, "", "get the logger outside of the forward"),
    (opened, "", "torch.library.custom_op"),
], ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("form", list(FORMS))
def test_a_break_names_the_line_the_reason_and_the_way_out(form: str, aside: Any, cause: str, remedy: str) -> None:
    text = said(lambda: FORMS[form](aside))
    assert "a graph break cuts" in text and "runs as one graph, eagerly too" in text
    assert cause in text and remedy in text
    assert "test_graph_breaks.py" in text or aside is looked_up or aside is opened  # within Python's own library
    assert "Developer debug context" not in text and "\n  Hint" not in text


@pytest.mark.parametrize("aside, switch", [(read_out, "capture_scalar_outputs = True"),
                                           (counted, "capture_dynamic_output_shape_ops = True")])
def test_what_one_switch_captures(aside: Any, switch: str) -> None:
    model = converted(aside)
    expected = model(models.token_ids())
    text = said(lambda: torch.compile(model, **AOT)(models.token_ids()))
    assert switch in text
    whole = torch.compile(model, fullgraph=True, **AOT)
    assert models.relative(whole(models.token_ids()), expected) < 1e-5


@pytest.mark.parametrize("aside", [warned, logged, printed])
def test_messages_are_passed_over_where_a_converted_model_runs(aside: Any, capsys: Any) -> None:
    plain = converted()(models.token_ids())
    model = converted(aside)
    with pytest.warns(UserWarning, match="the forward of Network warns, logs or prints"):
        first = model(models.token_ids())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = model(models.token_ids())
    assert torch.equal(first, plain) and torch.equal(again, plain)
    assert "from a layer" not in "".join(capsys.readouterr())
    before = set(torch._dynamo.config.ignore_logging_functions)
    text = said(lambda: torch.compile(model, **AOT)(models.token_ids()))
    assert "leave messages out of the forward" in text
    with torch._dynamo.config.patch(ignore_logging_functions={print, warnings.warn, logging.Logger.warning}):
        assert torch.equal(torch.compile(model, **AOT)(models.token_ids()), plain)
    assert before == set(torch._dynamo.config.ignore_logging_functions)


def test_what_the_model_raises_is_told() -> None:
    text = said(lambda: converted(raised), errors.TracingError)
    assert "ValueError('a batch of that size is not known')" in text and "test_graph_breaks.py" in text


@pytest.mark.parametrize("on_root", [False, True])
def test_a_forward_on_the_instance(on_root: bool) -> None:
    """Left there by hooks that were taken off, or around the class's own by other tools."""
    def wrapped(module: Any) -> None:
        inner = module.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        module.forward = types.MethodType(forward, module)

    expected = llama()(models.token_ids(), **CALL).logits
    model = models.llama(2)
    for module in model.modules():
        module.forward = module.forward
    assert torch.equal(llama(model)(models.token_ids(), **CALL).logits, expected)
    assert torch.equal(torch.compile(model, **AOT)(models.token_ids(), **CALL).logits, expected)
    model = models.llama(2)
    wrapped(model if on_root else model.model)
    if on_root:
        assert torch.equal(llama(model)(models.token_ids(), **CALL).logits, expected)
    else:
        assert "before other tools wrap its forward" in said(lambda: llama(model), errors.PlainPathError)


# --- other tools' hands --------------------------------------------------------------------------------------------------


def test_offloaded_weights_are_not_converted_and_are_brought_back() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = models.llama(2)
    accelerate.cpu_offload(model, execution_device="cpu")
    text = said(lambda: llama(model))
    assert "accelerate moves the weights" in text and "remove_hook_from_submodules" in text
    accelerate.hooks.remove_hook_from_submodules(model)
    model = llama(model)
    assert models.relative(model(models.token_ids(), **CALL).logits, llama()(models.token_ids(), **CALL).logits) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_modules_are_not_converted() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(models.llama(2).eval(), {nn.Linear}, dtype=torch.qint8)
    assert "torchao.quantization.quantize_" in said(lambda: llama(quantised))


@pytest.mark.filterwarnings("ignore")
def test_converted_models_are_quantised_dynamically() -> None:
    model = torch.ao.quantization.quantize_dynamic(disturbed(llama()).eval(), {nn.Linear}, dtype=torch.qint8)
    parameters, ids = model.attnres.stream, models.token_ids()
    with torch.no_grad():
        expected = reference.llama(model, ids, parameters.query, parameters.key_gain, partition(4, num_blocks=2))
        assert models.relative(model(ids, **CALL).logits, expected) < 1e-6


@pytest.mark.slow
def test_a_paged_cache() -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": 63, "do_sample": False}
    model, prompts = disturbed(llama()).eval(), [[1, 2, 3], [4, 5]]
    expected = [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt):].tolist() for prompt in prompts]
    outputs = model.generate_batch(prompts, generation_config=transformers.GenerationConfig(**settings))
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_flex_attention_works_or_says_where_it_does() -> None:
    model = llama()
    expected = model(models.token_ids(), **CALL).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert models.relative(model(models.token_ids(), **CALL).logits, expected) < 1e-5
    if not torch.cuda.is_available():
        with pytest.raises(NotImplementedError, match="FlexAttention does not support backward"):  # as of a plain model
            model(models.token_ids(), **CALL)
        assert "attn_implementation='sdpa'" in said(lambda: untried(model)(models.token_ids(), **CALL), errors.TracingError)


@pytest.fixture
def one_process() -> Iterator[Any]:
    assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers_sharded_one_by_one_and_whole_models(one_process: Any, compiled: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    expected = disturbed(llama())(models.token_ids(), **CALL).logits
    for by_layers in (True, False):
        model = disturbed(llama())
        for layer in model.model.layers if by_layers else ():
            fully_shard(layer, mesh=one_process)
        fully_shard(model, mesh=one_process)
        called = torch.compile(model, **AOT) if compiled else model
        assert models.relative(called(models.token_ids(), **CALL).logits, expected) < 1e-6


def test_wrappers_come_after_the_conversion(one_process: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    assert "convert the model first" in said(lambda: llama(nn.parallel.DistributedDataParallel(models.llama(2))))
    expected = disturbed(llama())(models.token_ids(), **CALL).logits
    flat = FullyShardedDataParallel(disturbed(llama()), device_id=torch.device("cpu"))
    assert models.relative(flat(models.token_ids(), **CALL).logits, expected) < 1e-6
