"""Reread: the backward takes a norm from where it is computed again, and no value changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import models
from support.models import relative
from support.passes import applied
from support.rewritten_graphs import rewritten
from torch import Tensor, fx, nn

import attnres_fx
from attnres_fx.passes._compat.inductor import run_aot_eager
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.lower.fuse import fuse_mixes
from attnres_fx.passes.lower.reread import reread_norms
from attnres_fx.runtime.mix import mix


def saved_bytes(call: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[Tensor, int]:
    """What a call gives, and the bytes that it keeps for its backward, parameters apart."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    return result, sum(kept.values())


def trained(gm: fx.GraphModule, inputs: list[Any], leaves: list[Tensor], joint: Any) -> tuple[list[Tensor | None], int]:
    """Outputs and gradients by AOTAutograd with a pass over the joint graph, and the bytes kept between the halves."""
    run = run_aot_eager(gm, inputs, joint)
    outputs, kept = saved_bytes(lambda: run(*inputs), [value for value in inputs if isinstance(value, Tensor)])
    floats = [out for out in outputs if isinstance(out, Tensor) and out.is_floating_point()]
    loss = sum((out.sin().sum() for out in floats), torch.zeros(()))
    return [*floats, *torch.autograd.grad(loss, leaves, allow_unused=True)], kept


@pytest.mark.parametrize("mix_scale", ["paper", pytest.param("sum", marks=pytest.mark.slow)])
def test_a_layer_keeps_its_partial_sum_alone(mix_scale: str) -> None:
    num_layers, shape = 2, (2, 16)
    gm, inputs, leaves = rewritten(num_layers, 4, mix_scale=mix_scale, shape=shape, dtype=torch.float32)
    width = next(value.shape[-1] for value in leaves if value.dim() == 1)
    row = shape[0] * shape[1] * width * 4
    fused = applied(fuse_mixes, gm)
    expected, plain = trained(gm, inputs, leaves, None)
    kept_norms = trained(fused, inputs, leaves, None)[1]
    made, kept = trained(fused, inputs, leaves, lambda graph: reread_norms(graph, Context()))
    for one, other in zip(expected, made, strict=True):
        if one is not None and other is not None:
            assert relative(other, one) < 2e-5
    # Every layer but the first reads a mix; each kept one row for its mix or its norm, and keeps neither now.
    mixes = 2 * num_layers
    assert kept <= kept_norms - mixes * row
    assert kept < plain


def joint_graph(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[fx.Graph, fx.Graph]:
    """The joint graph before and after the pass."""
    found: list[fx.Graph] = []

    def keep(graph: fx.Graph) -> None:
        found.append(fx.Graph())
        found[0].output(found[0].graph_copy(graph, {}))
        reread_norms(graph, Context())
        graph.lint()
        found.append(graph)

    def backend(gm: fx.GraphModule, given: list[Any]) -> Any:
        return run_aot_eager(applied(fuse_mixes, gm), given, keep)

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0], found[1]


def backward_reads(graph: fx.Graph) -> int:
    """How many read the norm that a backward hands out."""
    return sum(len(node.users) for node in graph.nodes
               if str(node.target).endswith("getitem>") and "backward" in str(node.args[0]) and node.args[1] == 0)


def test_what_the_backward_itself_needs_stays_kept() -> None:
    """A reader whose gradient leads back into the same mix cannot wait for it."""
    torch.manual_seed(0)
    inputs = [torch.randn(3, 8, requires_grad=True) for _ in range(2)] + [torch.randn(8, requires_grad=True)]

    def squared(rows: Tensor, early: Tensor, query: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(mix([early, rows], query), (8,), eps=1e-6)
        return normed * normed

    before, after = joint_graph(squared, inputs)
    assert backward_reads(before) == backward_reads(after) == 0
    assert len(before.nodes) == len(after.nodes)


def test_twice_is_once() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    inputs = [torch.randn(3, 8, requires_grad=True) for _ in range(2)] + [torch.randn(8, requires_grad=True)]

    def layer(rows: Tensor, early: Tensor, query: Tensor) -> Tensor:
        result: Tensor = linear(torch.nn.functional.rms_norm(mix([early, rows], query), (8,), eps=1e-6))
        return result

    _, after = joint_graph(layer, inputs)
    assert backward_reads(after) >= 1
    text = str(after)
    reread_norms(after, Context())
    assert str(after) == text


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_models_train_alike(checkpointing: bool) -> None:
    results = []
    for fuse in ("never", "always"):
        torch._dynamo.reset()
        model = models.llama(2)
        ids = models.token_ids(2, 12)
        attnres_fx.convert(model, ids, num_blocks=3)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.attnres.parameters():
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        compiled = torch.compile(model, backend="attnres", options={"fuse": fuse, "downstream": "aot_eager"})
        loss = compiled(ids, labels=ids).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 20
    for one, other in zip(*results, strict=True):
        assert relative(other, one) < 2e-5
