"""Layers in the bodies of higher-order operators: seen through with what they mean, or refused by name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import models, reference
from support.ways import owners_of
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import attnres_fx
from attnres_fx import errors
from attnres_fx.runtime.stream import BY_GRAPH

IDS = models.token_ids(2, 5)
QUERY = 0.7 * torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Body = Callable[[Any, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


RAN: list[int] = []


@torch.library.custom_op("attnres_tests::count", mutates_args=())
def count(x: Tensor) -> Tensor:
    """The value itself; notes that it ran."""
    RAN.append(1)
    return x.clone()


@count.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


count.register_autograd(lambda ctx, gradient: gradient)


class Counted(reference.Block):
    """Its attention notes every time it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        return x + self.attn(count(self.ln_1(x)))

    def second(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


def build(body: Body, dropout: float = 0.0) -> Any:
    """A nanoGPT of three blocks whose layers run as ``body`` says."""

    class Wrapped(reference.NanoGPT):
        block = Counted

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.ln_f(body(self, self.embed(ids))))

    return models.randomize(Wrapped(6, width=16, heads=2, dropout=dropout)).double().train()


def plain(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        x = block(x)
    return x


def checkpointed(**settings: Any) -> Body:
    def body(model: Any, x: Tensor) -> Tensor:
        for block in model.h:
            x = checkpoint(block, x, **settings)
        return x

    return body


def nested(model: Any, x: Tensor) -> Tensor:
    def two(x: Tensor) -> Tensor:
        x = checkpoint(model.h[0], x, use_reentrant=False)
        return checkpoint(model.h[1], x, use_reentrant=False)

    return model.h[2](checkpoint(two, x, use_reentrant=False))


def branches(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        x = x + checkpoint(lambda y, b=block: b.attn(count(b.ln_1(y))), x, use_reentrant=False)
        x = x + checkpoint(lambda y, b=block: b.mlp(b.ln_2(y)), x, use_reentrant=False)
    return x


@torch.compiler.nested_compile_region
def region(block: Any, x: Tensor) -> Tensor:
    return block(x)


def regions(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        x = region(block, x)
    return x


def checkpointed_regions(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        x = checkpoint(region, block, x, use_reentrant=False)
    return x


# Name: the body, and how many of the three attentions run again in the backward.
SEEN: dict[str, tuple[Body, int]] = {
    "plain": (plain, 0),
    "non-reentrant": (checkpointed(use_reentrant=False), 3),
    "reentrant": (checkpointed(use_reentrant=True), 3),
    "no random state": (checkpointed(use_reentrant=False, preserve_rng_state=False), 3),
    "nested": (nested, 2),
    "branches": (branches, 3),
    "regions": (regions, 0),
    "checkpointed regions": (checkpointed_regions, 3),
}


def converted(body: Body, **settings: Any) -> tuple[Any, Any]:
    """(the plain model without a wrapper, the converted model with random queries), of the same weights."""
    unwrapped, model = build(plain, **settings), build(body, **settings)
    model.load_state_dict(unwrapped.state_dict())
    attnres_fx.convert(model, IDS, num_blocks=2)
    with torch.no_grad():
        model.attnres.stream.query.copy_(QUERY)
    return unwrapped, model


def gradients(unwrapped: Any, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients by definition."""
    query = QUERY.clone().requires_grad_()
    torch.manual_seed(seed)
    value = reference.nanogpt(unwrapped, IDS, query, None, [3, 6])
    unwrapped.zero_grad()
    value.square().mean().backward()
    found = {name: parameter.grad for name, parameter in unwrapped.named_parameters()}
    return value, {**found, "attnres.stream.query": query.grad}


@pytest.mark.parametrize("name", list(SEEN))
def test_body_is_seen_through_and_recomputed(name: str) -> None:
    body, again = SEEN[name]
    unwrapped, model = converted(body, dropout=0.2)
    (stream,) = attnres_fx.analyze(build(body), IDS).streams
    assert (stream.num_layers, stream.convertible, stream.norm_placement) == (6, True, "pre")
    expected, wanted = gradients(unwrapped, seed=4)
    compiled = torch.compile(model, backend="attnres", options={"downstream": "aot_eager"})
    calls = {"by graph": model, "by value": model, "compiled": compiled}
    if name == "no random state":  # what is recomputed eagerly draws anew then, as in a plain model
        del calls["by value"]
    for way, call in calls.items():
        for owner in owners_of(model):
            owner.__dict__.pop(BY_GRAPH, None)
            if way == "by graph":
                owner.__dict__[BY_GRAPH] = way
        model.zero_grad()
        RAN.clear()
        torch.manual_seed(4)
        value = call(IDS)
        assert models.relative(value, expected) <= 1e-12
        assert len(RAN) == 3
        torch.manual_seed(99)  # what is recomputed draws what it drew
        value.square().mean().backward()
        assert len(RAN) == 3 + again
        own = dict(model.named_parameters())
        assert all(models.relative(own[key].grad, gradient) <= 1e-10 for key, gradient in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("name, schedule", [
    ("non-reentrant", "one-pass"), ("non-reentrant", "two-phase"), ("nested", "one-pass"), ("regions", "two-phase")])
def test_body_under_inductor(name: str, schedule: str) -> None:
    """With torch's own random numbers the values and gradients under Inductor are those of the definition."""
    body, again = SEEN[name]
    unwrapped, model = converted(body, dropout=0.2)
    expected, wanted = gradients(unwrapped, seed=4)
    options = {"inductor": {"fallback_random": True}, "schedule": schedule}
    RAN.clear()
    torch.manual_seed(4)
    value = torch.compile(model, backend="attnres", options=options)(IDS)
    assert models.relative(value, expected) <= 1e-10
    value.square().mean().backward()
    assert len(RAN) == 3 + again
    own = dict(model.named_parameters())
    assert all(models.relative(own[key].grad, gradient) <= 1e-8 for key, gradient in wanted.items())


def saved_bytes(model: Any, ids: Tensor) -> int:
    """What one forward of a language model keeps for its backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    total = sum(kept.values())
    loss.backward()
    return total


def test_hugging_face_checkpointing_saves_memory_and_keeps_gradients() -> None:
    model, ids = models.llama(4).train(), models.token_ids(2, 32)
    attnres_fx.convert(model, ids, {"use_cache": False}, num_blocks=2)
    torch.nn.init.normal_(model.attnres.stream.query, std=0.3)
    whole = saved_bytes(model, ids)
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.gradient_checkpointing_enable()
    for call in (model, torch.compile(model, backend="attnres", options={"downstream": "aot_eager"})):
        model.zero_grad()
        assert saved_bytes(call, ids) < 0.5 * whole
        assert all(models.relative(p.grad, expected[name]) <= 1e-4 for name, p in model.named_parameters()
                   if expected[name].any())


# --- operators that are not seen through -----------------------------------------------------------------------------


def conditional_layers(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        x = torch.cond(x.sum() > -1e9, lambda x, b=block: b(x), lambda x: x.clone(), (x,))
    return x


def one_conditional_layer(model: Any, x: Tensor) -> Tensor:
    x = model.h[0](x)
    x = torch.cond(x.sum() > -1e9, lambda x: model.h[1](x), lambda x: x.clone(), (x,))
    return model.h[2](x)


def looped_layer(model: Any, x: Tensor) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    x = model.h[1](x)
    step = torch.zeros((), dtype=torch.long)
    _, x = while_loop(lambda step, x: step < 2, lambda step, x: (step + 1, model.h[0](x)), (step, x))
    return model.h[2](x)


def vectorised_layers(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        x = torch.func.vmap(lambda y, b=block: b.second(y + b.attn(b.ln_1(y[None]))[0]))(x)
    return x


@pytest.mark.parametrize("body, expected, named", [
    (conditional_layers, errors.HiddenLayersError, "cond"),
    (one_conditional_layer, errors.HiddenLayersError, "cond"),
    (looped_layer, errors.HiddenLayersError, "while_loop"),
    (vectorised_layers, errors.StreamRefusedError, "vmap|getitem|batch_dim"),
])
def test_hidden_layers_are_refused_by_name(body: Body, expected: type[Exception], named: str) -> None:
    model = build(body)
    assert not any(stream.convertible for stream in attnres_fx.analyze(model, IDS).streams)
    with pytest.raises(errors.StreamRefusedError, match=named) as caught:
        attnres_fx.convert(model, IDS)
    assert isinstance(caught.value, expected)
    assert caught.value.place is not None and ".py:" in caught.value.place.source and not hasattr(model, "attnres")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=named) as whole:
        torch.compile(model, backend="attnres")(IDS)
    assert isinstance(getattr(whole.value, "inner_exception", None), expected)
    assert not hasattr(model, "attnres")


def conditional_branches(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        x = x + torch.cond(x.sum() > -1e9, lambda x, b=block: b.attn(b.ln_1(x)), lambda x: x.clone(), (x,))
        x = block.second(x)
    return x


def vectorised_branches(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        x = x + torch.func.vmap(lambda y, b=block: b.attn(b.ln_1(y[None]))[0])(x)
        x = block.second(x)
    return x


def flexible_attention(model: Any, x: Tensor) -> Tensor:
    for block in model.h:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, 2, 8).transpose(1, 2) for part in block.attn.qkv(block.ln_1(x)).split(width, 2))
        y = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: torch.where(i >= j, score, -float("inf")))
        x = x + block.attn.out(y.transpose(1, 2).reshape(batch, length, width))
        x = block.second(x)
    return x


@pytest.mark.parametrize("body", [conditional_branches, vectorised_branches, flexible_attention])
def test_operators_within_a_branch_are_a_branch(body: Body) -> None:
    with torch.no_grad(), warnings.catch_warnings():  # the backward of flex_attention needs a GPU
        warnings.simplefilter("ignore")
        unwrapped, model = converted(body)
        expected = reference.nanogpt(unwrapped, IDS, QUERY, None, [3, 6])
        tolerance = 1e-6 if body is flexible_attention else 1e-12  # whose scores are float32
        compiled = torch.compile(model, backend="attnres", options={"downstream": "eager"})
        for call in (functools.partial(model), compiled):
            assert models.relative(call(IDS), expected) <= tolerance
