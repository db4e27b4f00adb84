"""The rows of a training step, through ``torch.compile``: where they are placed, and what frees them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import models
from support.arenas import LAYERS, WIDTH, Tower, close, fast, ids, tower
from torch import Tensor, nn

import attnres_fx
from attnres_fx.passes.memory.place import Arena

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def gradients(run: Callable[[], Any], model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    run()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and max(map(models.relative, got, expected)) < 1e-4


@pytest.mark.parametrize("schedule", ["one-pass", "two-phase"])
def test_the_blocks_of_a_training_step_lie_together(schedule: str, planned: list[Arena]) -> None:
    model = tower()
    compiled = fast(model, schedule=schedule)

    def two_forwards() -> None:  # before either backward, one of them twice
        first, second = compiled(ids(7)), compiled(ids(7, seed=1))
        second.square().sum().backward()
        (first.sum() + first.square().sum()).backward()

    def plainly() -> None:
        model(ids(7, seed=1)).square().sum().backward()
        result = model(ids(7))
        (result.sum() + result.square().sum()).backward()

    assert same(gradients(two_forwards, model), gradients(plainly, model))
    (arena,) = planned
    # The embedding and three blocks; nothing is over anything, as the backward reads all.
    assert len(arena.places) == 4 and arena.numel == 4 * 2 * 7 * WIDTH
    assert len({place.offset for place in arena.places}) == 4


def test_blocks_are_freed_with_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    compiled = fast(model)
    compiled(ids(7)).sum().backward()
    kept: list[weakref.ref[torch.UntypedStorage]] = []
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        kept.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compiled(ids(7))
    assert 4 * 4 * 2 * 7 * WIDTH in sizes
    del result
    gc.collect()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert [ref for ref in kept if (storage := ref()) is not None and storage.data_ptr() not in parameters] == []


def test_what_a_training_step_returns_lies_elsewhere(planned: list[Arena]) -> None:
    model = tower(hidden=True)
    compiled = fast(model)
    result, seen = compiled(ids(7))
    expected, theirs = model(ids(7))
    close([result, *seen], [expected, *theirs])
    assert len({tensor.untyped_storage().data_ptr() for tensor in [result, *seen]}) == LAYERS + 1
    rows = 2 * 7 * WIDTH * 4
    assert all(tensor.untyped_storage().nbytes() == rows for tensor in seen)
    assert same(gradients(lambda: result.sum().backward(), model), gradients(lambda: expected.sum().backward(), model))


@pytest.mark.slow
def test_checkpointed_layers(planned: list[Arena]) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Tower):
        def forward(self, given: Tensor) -> Tensor:
            x = self.embedding(given)
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=False)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = attnres_fx.convert(Checkpointed(), ids(7), num_blocks=3)
    with torch.no_grad():
        model.attnres.stream.query.normal_()
    compiled = fast(model)
    assert same(gradients(lambda: compiled(ids(7)).square().sum().backward(), model),
                gradients(lambda: model(ids(7)).square().sum().backward(), model))
    assert planned
