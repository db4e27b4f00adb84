"""Training: the losses of a converted and compiled model are those of the reference; shapes may change on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models, reference
from torch import Tensor, nn

import attnres_fx
from attnres_fx.backend import attnres

STEPS = 10
SHAPES = [(2, 9), (2, 13), (3, 7), (4, 16), (5, 3), (2, 32), (7, 11), (3, 24)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


class Plain(nn.Module):
    """The reference as something to train: the plain model's modules, a query and a gain."""

    def __init__(self, model: nn.Module, boundaries: Sequence[int], **options: Any) -> None:
        super().__init__()
        self.model, self.boundaries, self.options = copy.deepcopy(model), boundaries, options
        weight: Tensor = self.model.wte.weight
        shape = (boundaries[-1] + 1, weight.shape[1])
        self.query = nn.Parameter(torch.zeros(shape, dtype=weight.dtype))
        self.gain = nn.Parameter(torch.ones(shape, dtype=weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return reference.nanogpt(self.model, ids, self.query, self.gain, self.boundaries, **self.options)


def train(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], optimizer: str) -> list[float]:
    """The losses of ten steps of next-token prediction, a new batch each."""
    made: torch.optim.Optimizer
    made = (torch.optim.SGD(parameters, lr=0.3, momentum=0.9) if optimizer == "SGD"
            else torch.optim.AdamW(parameters, lr=1e-2))
    losses = []
    for step in range(STEPS):
        ids = models.token_ids(3, 8, seed=step)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        made.zero_grad()
        loss.backward()
        made.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("optimizer, mix_scale", [("SGD", "paper"), ("AdamW", "sum")])
def test_losses_equal_the_reference(optimizer: str, mix_scale: str) -> None:
    model = models.nanogpt(5, width=16, heads=2).double().train()
    plain = Plain(model, [2, 4, 5], mix_scale=mix_scale)
    attnres_fx.convert(model, models.token_ids(3, 7), layers_per_block=2, mix_scale=mix_scale)
    compiled = torch.compile(model, backend="attnres", options={"downstream": "eager"})
    ours = train(compiled, list(model.parameters()), optimizer)
    theirs = train(plain, list(plain.parameters()), optimizer)
    assert max(abs(a - b) / abs(b) for a, b in zip(ours, theirs)) <= 1e-6
    assert theirs[-1] < theirs[0]
    query, gain = model.attnres.stream.query, model.attnres.stream.key_gain
    assert models.relative(query, plain.query) <= 1e-6 and models.relative(gain, plain.gain) <= 1e-6
    assert not query[0].any() and all(row.norm() > 1e-3 for row in query[1:]), "every query but row 0 has moved"


def test_losses_under_inductor_equal_the_reference() -> None:
    model = models.nanogpt(4, width=16, heads=2).train()
    plain = Plain(model, [2, 4])
    attnres_fx.convert(model, models.token_ids(3, 7), layers_per_block=2)
    compiled = torch.compile(model, backend="attnres")
    ours = train(compiled, list(model.parameters()), "AdamW")
    theirs = train(plain, list(plain.parameters()), "AdamW")
    assert max(abs(a - b) / abs(b) for a, b in zip(ours, theirs)) <= 1e-4
    assert model.attnres.stream.query.norm() > 1e-2


def test_eager_call_trains_as_the_compiled_one() -> None:
    model = models.nanogpt(4, width=16, heads=2).double().train()
    attnres_fx.convert(model, models.token_ids(3, 7), layers_per_block=2)
    other = copy.deepcopy(model)
    ours = train(model, list(model.parameters()), "AdamW")
    compiled = torch.compile(other, backend="attnres", options={"downstream": "aot_eager"})
    assert max(abs(a - b) for a, b in zip(ours, train(compiled, list(other.parameters()), "AdamW"))) <= 1e-10


@pytest.mark.parametrize("downstream", ["eager", "aot_eager"])
def test_dropout_in_training_and_none_in_evaluation(downstream: str) -> None:
    """Dropout stays inside the branch and draws what the reference draws."""
    plain = models.nanogpt(4, width=16, heads=2, dropout=0.3).double()
    model, ids = copy.deepcopy(plain), models.token_ids(2, 5)
    attnres_fx.convert(model, ids, num_blocks=2)
    query = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.attnres.stream.query.copy_(query)
    compiled = torch.compile(model, backend="attnres", options={"downstream": downstream})
    for training in (True, False, True):
        model.train(training)
        plain.train(training)
        for call in (model, compiled):
            torch.manual_seed(3)
            value = call(ids)
            torch.manual_seed(3)
            assert models.relative(value, reference.nanogpt(plain, ids, query, None, [2, 4])) <= 1e-10
    assert models.relative(model(ids), model(ids)) > 1e-3, "dropout is drawn again in each call"


def _run_shapes(call: Callable[[Tensor], Tensor], model: Any, plain: Any, boundaries: Sequence[int]) -> None:
    for batch, length in SHAPES:
        ids = models.token_ids(batch, length)
        stream = model.attnres.stream
        expected = reference.nanogpt(plain, ids, stream.query, stream.key_gain, boundaries)
        assert models.relative(call(ids), expected) <= 1e-10, (batch, length)


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_changing_shapes_compile_few_times(grad: bool) -> None:
    plain = models.nanogpt(5, width=16, heads=2).double()
    model = copy.deepcopy(plain)
    attnres_fx.convert(model, models.token_ids(2, 9), num_blocks=3)
    torch.nn.init.normal_(model.attnres.stream.query, std=0.3)
    count = 0

    def counting(gm: Any, inputs: Any, **_: Any) -> Any:
        nonlocal count
        count += 1
        return attnres(gm, inputs, options={"downstream": "eager"})

    with torch.set_grad_enabled(grad):
        _run_shapes(torch.compile(model, backend=counting), model, plain, [2, 4, 5])
        assert count <= 4
        _run_shapes(torch.compile(model, backend=counting), model, plain, [2, 4, 5])
        assert count <= 4, "no shape is compiled again the second time"


def test_changing_shapes_without_a_compiler() -> None:
    plain = models.nanogpt(5, width=16, heads=2).double()
    model = copy.deepcopy(plain)
    attnres_fx.convert(model, models.token_ids(2, 9), num_blocks=3)
    torch.nn.init.normal_(model.attnres.stream.query, std=0.3)
    torch._dynamo.utils.counters.clear()
    _run_shapes(model, model, plain, [2, 4, 5])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("ids", [models.token_ids(1, 9), models.token_ids(2, 1), models.token_ids(1, 1)])
def test_sizes_of_one(ids: Tensor) -> None:
    """Sizes of one are special to the tracer; a model converted at other sizes is right there as well."""
    plain = models.nanogpt(5, width=16, heads=2).double()
    model = copy.deepcopy(plain)
    attnres_fx.convert(model, models.token_ids(2, 9), num_blocks=3)
    torch.nn.init.normal_(model.attnres.stream.query, std=0.3)
    stream = model.attnres.stream
    expected = reference.nanogpt(plain, ids, stream.query, stream.key_gain, [2, 4, 5])
    assert models.relative(model(ids), expected) <= 1e-10


def test_one_line_form_trains_as_the_reference() -> None:
    """``torch.compile(plain, backend="attnres")`` converts in its first call; the optimizer is built after it."""
    model = models.nanogpt(5, width=16, heads=2).double().train()
    plain = Plain(model, [2, 4, 5])
    compiled = torch.compile(model, backend="attnres", options={"layers_per_block": 2, "downstream": "eager"})
    with torch.no_grad():
        first = compiled(models.token_ids(3, 7))
        assert models.relative(first, plain(models.token_ids(3, 7))) <= 1e-10
    ours = train(compiled, list(model.parameters()), "AdamW")
    theirs = train(plain, list(plain.parameters()), "AdamW")
    assert max(abs(a - b) / abs(b) for a, b in zip(ours, theirs)) <= 1e-6
    assert models.relative(model.attnres.stream.query, plain.query) <= 1e-6
