"""Models run by value where no whole graph can be had: values and all gradients are those of Eq. 5-6, or it raises."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import models, reference
from support.comparison import disturbed
from support.ways import by_graph, owners_of, untried
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnres_fx
from attnres_fx import backend, by_value, errors, runner, trial
from attnres_fx.by_value import can_run
from attnres_fx.converted import plans_of
from attnres_fx.passes.graph import vocabulary
from attnres_fx.passes.pipeline import LOWER, run
from attnres_fx.passes.rewrite.partition import partition
from attnres_fx.runner import RUNNER
from attnres_fx.runtime import stream as stream_module
from attnres_fx.runtime.mix import MIX_REFERENCE
from attnres_fx.runtime.stream import BY_GRAPH, BY_VALUE

IDS = models.token_ids()
AOT: dict[str, Any] = {"backend": "attnres", "options": {"downstream": "aot_eager"}}


class Aside(reference.Block):
    """A layer whose branch leaves the graph."""

    @staticmethod
    def aside(x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.aside(self.attn(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


def read_out(x: Tensor) -> Tensor:
    return x * 1 if x.sum().item() > 1e9 else x


def routed(x: Tensor) -> Tensor:
    rows = [row for row in x.detach().abs().amax(-1).flatten().tolist() if row > 1e9]
    return x[:0] if rows else x


@torch.compiler.disable
def kept_out(x: Tensor) -> Tensor:
    return x * 1


def cut(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


def grown(x: Tensor) -> Tensor:
    HELD.append(x.shape)
    with LOCK:
        return x * 1


HELD: list[Any] = []
LOCK = threading.Lock()
ASIDES = {function.__name__: function for function in (read_out, routed, kept_out, cut, grown)}


def nanogpt(aside: Callable[[Tensor], Tensor] | None = None, sublayers: int = 6, num_blocks: int = 2) -> Any:
    """A converted model in float64 with random queries and gains, whose layers then get an ``aside``."""
    torch._dynamo.reset()
    model = models.nanogpt(sublayers).double()
    attnres_fx.convert(model, (IDS,), num_blocks=num_blocks)
    disturbed(model)
    if aside is not None:
        for block in model.h:
            block.__class__ = type("Block", (Aside,), {"aside": staticmethod(aside)})
    return model


def loss_of(logits: Tensor) -> Tensor:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (logits * weight).sum()


def step(model: Any, function: Any) -> list[Tensor]:
    """The logits and all gradients."""
    model.zero_grad()
    logits = function(IDS)
    loss_of(logits).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def by_the_paper(model: Any) -> Callable[[Tensor], Tensor]:
    """The modules of ``model`` on the mixes of Eq. 5-6, without an operator or a graph of ours."""
    parameters = model.attnres.stream
    closing = partition(parameters.query.shape[0] - 1, num_blocks=2)
    return lambda ids: reference.nanogpt(model, ids, parameters.query, parameters.key_gain, closing)


def check(model: Any, function: Any) -> None:
    """Two steps and an inference."""
    expected = step(model, by_the_paper(model))
    for _ in range(2):
        for ours, theirs in zip(step(model, function), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(function(IDS), expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tried", [True, False], ids=["tried", "not tried"])
@pytest.mark.parametrize("aside", ASIDES.values(), ids=ASIDES)
def test_what_breaks_the_graph_eagerly(aside: Any, tried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = nanogpt(aside), []
    monkeypatch.setattr(by_value.log, "warning", lambda text, *args: said.append(text % args))
    if tried:
        check(model, model)
        assert not said and RUNNER not in model.__dict__
        return
    check(model, untried(model))
    (line,) = said
    assert BY_VALUE in model.__dict__ and "NanoGPT runs by value" in line and "graph break" in line


@pytest.mark.parametrize("aside", ASIDES.values(), ids=ASIDES)
def test_what_breaks_the_graph_while_it_is_compiled(aside: Any) -> None:
    model = nanogpt(aside)
    check(model, torch.compile(model, **AOT))
    assert BY_VALUE in model.__dict__


def test_one_graph_of_a_model_whose_layers_have_run_by_value() -> None:
    model = nanogpt()
    for layer in model.h:
        layer.compile(**AOT)
    check(model, model)
    check(model, torch.compile(model, fullgraph=True, **AOT))
    check(model, model)


def test_a_break_with_all_defaults() -> None:
    model = nanogpt(cut)
    check(model, torch.compile(model, backend="attnres"))


@pytest.mark.parametrize("aside", [None, *ASIDES.values()], ids=["whole", *ASIDES])
def test_layers_that_are_compiled_one_by_one(aside: Any) -> None:
    model = nanogpt(aside)
    mixes = []
    for block in model.h:
        block.compile(backend=counting(mixes))
    check(model, model)
    assert sum(mixes) > 0


def counting(mixes: list[int]) -> Any:
    """The backend "attnres", which notes how many mixes the graphs hold that it compiles."""

    def compile_one(gm: Any, inputs: Any) -> Any:
        mixes.append(sum("attnres.mix" in str(node.target) for node in gm.graph.nodes))
        return backend.attnres(gm, inputs, options={"downstream": "aot_eager"})

    return compile_one


def test_graphs_do_not_grow_with_depth() -> None:
    """Layers at the same place of a block share their code where the number of blocks is the same."""
    model = nanogpt(sublayers=24, num_blocks=3)
    graphs: list[int] = []
    for block in model.h:
        block.compile(backend=counting(graphs))
    with torch.no_grad():
        expected = model(IDS)
    assert len(graphs) <= 2 * 3 + 4
    model.h[0].compile(backend="eager")
    torch.testing.assert_close(model(IDS), expected, rtol=1e-9, atol=1e-9)


def test_sizes_do_not_compile_anew() -> None:
    model = nanogpt()
    graphs: list[int] = []
    for block in model.h:
        block.compile(backend=counting(graphs))
    with torch.no_grad():
        for length in range(2, 52):
            assert model(models.token_ids(2, length)).shape[1] == length
    assert len(graphs) <= 2 * (2 * 2 + 4)


def test_transforms_of_functions() -> None:
    model = nanogpt()
    expected = step(model, by_the_paper(model))[1:]
    names = [name for name, _ in model.named_parameters()]
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, values, (ids,)))

    found = torch.func.grad(loss)(parameters, IDS)
    for name, theirs in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], theirs, rtol=1e-9, atol=1e-9)

    def first(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (row[None],)).square().sum()

    samples = torch.func.vmap(torch.func.grad(first), in_dims=(None, 0))(parameters, IDS)
    for index, row in enumerate(IDS):
        model.zero_grad()
        by_the_paper(model)(row[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(samples[name][index], parameter.grad, rtol=1e-8, atol=1e-8)


def test_checkpointed_layers() -> None:
    class Checkpointed(Aside):
        aside = staticmethod(read_out)

        def forward(self, x: Any) -> Any:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = nanogpt()
    for block in model.h:
        block.__class__ = Checkpointed
    check(model, model)
    assert RUNNER not in model.__dict__


class Checkpointing(reference.NanoGPT):
    """Checkpoints its layers from outside, the first one around the beginning of the stream."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.ln_f(x))


@pytest.mark.parametrize("in_python", [False, True], ids=["native", "a function in Python"])
def test_layers_checkpointed_from_outside(in_python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the mix is a function in Python, as it is on a GPU, its backward has the layers computed again."""
    if in_python:
        monkeypatch.setattr(stream_module, "MIX", MIX_REFERENCE)
    torch._dynamo.reset()
    model = models.randomize(Checkpointing()).double()
    attnres_fx.convert(model, (IDS,), num_blocks=2)
    disturbed(model).__dict__[BY_VALUE] = True
    check(model, model)


def test_reentrant_checkpointing_is_refused() -> None:
    class Checkpointed(Aside):
        aside = staticmethod(read_out)

        def forward(self, x: Any) -> Any:
            return checkpoint(super().forward, x, use_reentrant=True)

    model = nanogpt()
    for block in model.h:
        block.__class__ = Checkpointed
    with pytest.raises(errors.SplitStreamError, match=r"torch\.autograd\.Function"):
        model(IDS)


@pytest.mark.filterwarnings("ignore:.*torch.compile gave")
def test_what_would_lose_layers_raises() -> None:
    """An early exit, a layer left out, a layer put twice, hidden states replaced: before the first and between layers."""

    def without(model: Any) -> None:
        del model.h[1]

    def swapped(model: Any) -> None:
        model.h[0], model.h[1] = model.h[1], model.h[0]

    def twice(model: Any) -> None:
        model.h.insert(1, model.h[0])

    def replaced(model: Any) -> None:
        model.h[1].register_forward_hook(lambda module, args, output: output.clone() * 1)

    def steered(model: Any) -> None:
        model.h[1].register_forward_hook(lambda module, args, output: output + torch.ones(2, 9, 32, dtype=torch.float64))

    def steered_before(model: Any) -> None:
        model.h[2].register_forward_pre_hook(lambda module, args: (args[0] + torch.ones(2, 9, 32, dtype=torch.float64),))

    for change in (without, swapped, twice, replaced, steered, steered_before):
        model = nanogpt(read_out)
        model(IDS)
        change(model)
        with pytest.raises((errors.SplitStreamError, errors.SitesChangedError), match="layer"):
            model(IDS)


def test_a_function_of_ones_own_may_not_lose_the_gradient() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad

    class Normed(Aside):
        aside = staticmethod(read_out)

        def forward(self, x: Any) -> Any:
            x = x + self.aside(self.attn(self.ln_1(Same.apply(x))))
            return x + self.mlp(self.ln_2(x))

    model = nanogpt()
    for block in model.h:
        block.__class__ = Normed
    with pytest.raises(errors.SplitStreamError, match=r"autograd\.Function"):
        model(IDS)


class Inner(nn.Module):
    """A layer with a stream of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
        self.enter, self.leave = nn.Linear(32, 32), nn.Linear(32, 32)
        self.layers = nn.ModuleList(reference.Block(32, 4) for _ in range(2))

    def forward(self, x: Any) -> Any:
        y = self.enter(self.norm(x))
        for layer in self.layers:
            y = layer(y)
        return x + self.leave(self.last(y))


def test_a_stream_within_a_layer_of_another() -> None:
    torch._dynamo.reset()
    model = models.nanogpt(6)
    model.h = nn.ModuleList(Inner() for _ in range(3))
    model = attnres_fx.convert(model.double(), (IDS,), num_blocks=2)
    disturbed(model)
    assert len(model.attnres.streams) == 4
    assert all(can_run(owner) for owner in owners_of(model))
    with by_graph(model):
        expected = step(model, model)
    for ours, theirs in zip(step(model, model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def refused(model: Any, what: str, function: Any = None) -> None:
    with pytest.raises((errors.SplitStreamError, errors.SitesChangedError), match=what):
        (function or model)(IDS)


class Reentrant(reference.Block):
    def forward(self, x: Any) -> Any:
        return checkpoint(super().forward, x, use_reentrant=True)


def test_what_only_a_graph_can_serve_runs_by_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = nanogpt(), []
    monkeypatch.setattr(runner.log, "warning", lambda text, *args: said.append(text % args))
    for block in model.h:
        block.__class__ = Reentrant
    check(model, model)
    (line,) = said
    assert "torch.autograd.Function" in line and model.__dict__[BY_GRAPH] in line


def test_what_has_written_into_a_buffer_is_not_run_again() -> None:
    """Statistics of a norm over batches before the first layer would count a batch twice."""
    torch._dynamo.reset()
    model = models.nanogpt(6).double()
    model.drop = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(32), nn.Unflatten(0, IDS.shape)).double()
    attnres_fx.convert(model.train(), (IDS,), num_blocks=2)
    assert plans_of(model)[0].trial == "" and not model.drop[1].num_batches_tracked
    for block in model.h:
        block.__class__ = Reentrant
    with pytest.raises(errors.SplitStreamError, match=r"torch\.autograd\.Function"):
        model(IDS)
    assert model.drop[1].num_batches_tracked == 1


def test_a_trial_that_tells_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, said = models.nanogpt(6), []
    monkeypatch.setattr(trial.log, "warning", lambda text, *args: said.append(text % args))
    model.h[1].register_forward_pre_hook(lambda module, args: missing() if not torch.compiler.is_compiling() else None)
    attnres_fx.convert(model, (IDS,), num_blocks=2)
    (line,) = said
    assert "RuntimeError: no such device" in line and plans_of(model)[0].trial is None


def missing() -> None:
    raise RuntimeError("no such device")


class Demanding(reference.Block):
    """Asks its hidden states what they are."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"not a tensor: a {type(x).__name__}")
        return super().forward(x)


class Halving(reference.Block):
    """Does something else where its hidden states are no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if isinstance(x, Tensor) else y + 0.5 * self.mlp(x)


class Scripted(reference.Block):
    """Hands its hidden states to a function that was compiled by torch.jit."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(scripted(x)))
        return x + self.mlp(self.ln_2(x))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * 1


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Functional(reference.Block):
    """Hands its hidden states to a function of autograd, behind another reader."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y = self.ln_2(x)
        return x + self.mlp(y + Doubling.apply(x) - 2 * x)


@pytest.mark.parametrize(("layer", "reason"), [
    (Demanding, "TypeError: not a tensor: a Stream"), (Halving, "recorded no layer"),
    (Scripted, "found type 'Stream'"), (Functional, "within a torch.autograd.Function")])
def test_a_conversion_tries_the_model_by_value(layer: Any, reason: str) -> None:
    torch._dynamo.reset()
    model = models.nanogpt(6).double()
    model.h[2].__class__ = layer
    attnres_fx.convert(model, (IDS,), num_blocks=2)
    (plan,) = plans_of(model)
    assert plan.trial is not None and reason in plan.trial and not can_run(model)
    check(disturbed(model), model)
    assert RUNNER in model.__dict__


class Keeping(reference.Block):
    """Has a buffer, an attribute and a list that a call changes, and draws random numbers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[Any] = []
        self.latest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.seen.append(x.shape)
        self.latest = self.latest + 1
        torch.rand(1)
        return super().forward(x)


def test_a_trial_leaves_nothing_behind() -> None:
    torch._dynamo.reset()
    model = models.nanogpt(6)
    for index in range(3):
        model.h[index] = Keeping(32, 4)
    ids, state = IDS.clone(), torch.get_rng_state()
    attnres_fx.convert(model, (ids,), num_blocks=2)
    assert plans_of(model)[0].trial == "" and torch.equal(torch.get_rng_state(), state)
    for block in model.h:
        assert type(block) is Keeping and not block.count and block.seen == [] and block.latest == 0
    assert not model.attnres.stream.query.any() and (model.attnres.stream.key_gain == 1).all()
    model(ids)
    assert [block.latest for block in model.h] == [1, 1, 1]


def test_hooks_on_the_backward_of_layers_are_refused_in_training() -> None:
    model = nanogpt(read_out)
    model(IDS)
    model.h[1].register_full_backward_hook(lambda *_: None)
    refused(model, "hook on its backward")
    with torch.no_grad():
        model(IDS)


@pytest.mark.parametrize("opened", [False, True], ids=["as it is", "with gradients enabled within"])
def test_a_function_behind_another_reader(opened: bool) -> None:
    """A read without gradients first, so that the mix is there already."""

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            with torch.set_grad_enabled(opened):
                return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad

    class Normed(nn.LayerNorm):
        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                self.largest = x.abs().max()
            return super().forward(Same.apply(x))

    model = nanogpt(read_out)
    for block in model.h:
        block.ln_1.__class__ = Normed
    refused(model, r"autograd\.Function")


def test_a_compiled_layer_within_reentrant_checkpointing_is_refused() -> None:
    model = nanogpt()
    for block in model.h:
        base: Any = type(block)
        block.__class__ = type("Block", (base,), {"__call__": lambda self, x, base=base: checkpoint(
            lambda y: base.__call__(self, y), x, use_reentrant=True)})
        block.compile(**AOT)
    refused(model, "without gradients|autograd")


def test_layers_without_gradients_before_others_with_them_are_refused() -> None:
    class Frozen(Aside):
        aside = staticmethod(read_out)

        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                return super().forward(x)

    model = nanogpt(read_out)
    model.h[0].__class__ = Frozen
    refused(model, "without gradients")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), by_the_paper(model)(IDS))


def test_memory_that_a_layer_uses_again() -> None:
    class Buffered(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.kept = inner, torch.empty(2, 9, 32, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.kept.copy_(self.inner(x))

    model = nanogpt(num_blocks=6)
    with torch.no_grad():
        parameters = model.attnres.stream
        expected = reference.nanogpt(model, IDS, parameters.query, parameters.key_gain, partition(6, num_blocks=6))
        buffered = Buffered(model.h[0].attn), Buffered(model.h[0].mlp)
        for block in model.h:
            block.attn, block.mlp = (Buffered(part) for part in (block.attn, block.mlp))
            block.attn.kept, block.mlp.kept = buffered[0].kept, buffered[0].kept
        model.__dict__[BY_VALUE] = True
        torch.testing.assert_close(model(IDS), expected)


def test_what_a_sublayer_adds_to_what_it_reads_is_no_layer() -> None:
    class Noisy(nn.LayerNorm):
        def forward(self, x: Any) -> Any:
            return super().forward(x + torch.ones(2, 9, 32, dtype=torch.float64) if self.training else x)

    for compiled in (False, True):
        model = nanogpt()
        for block in model.h:
            block.ln_1.__class__ = Noisy
            if compiled:
                block.compile(**AOT)
        model.eval()
        torch.testing.assert_close(model(IDS), by_the_paper(model)(IDS))
        model.__dict__[BY_VALUE] = True
        model.train()
        with pytest.raises(Exception, match=r"continued twice|recorded no layer"):
            model(IDS)


def test_a_dropout_on_the_stream_and_nothing_written_to_it() -> None:
    class Dropped(Aside):
        aside = staticmethod(read_out)

        def forward(self, x: Any) -> Any:
            return super().forward(nn.functional.dropout(x, 0.5, False))

    model = nanogpt()
    for block in model.h:
        block.__class__ = Dropped
    check(model, model)

    def written(module: Any, args: Any) -> None:
        args[0].data = torch.zeros(2, 9, 32, dtype=torch.float64)

    model.h[1].register_forward_pre_hook(written)
    with pytest.raises(AttributeError):
        model(IDS)


@dataclass
class Outputs:
    """What pytrees do not know."""

    logits: Tensor
    states: list[Any]
    kept: dict[str, Any]


def test_hidden_states_in_a_class_of_ones_own_are_tensors() -> None:
    class Describing(reference.NanoGPT):
        def forward(self, ids: Tensor) -> Any:
            states, x = [], self.embed(ids)
            for block in self.h:
                x = block(x)
                states.append(x)
            return Outputs(self.head(self.ln_f(x)), states, self.kept)

    torch._dynamo.reset()
    model = models.randomize(Describing(6)).double()
    model.kept = {"a": 1}
    attnres_fx.convert(model, (IDS,), num_blocks=2)
    disturbed(model)
    found = model(IDS)
    assert RUNNER not in model.__dict__ and type(found.states) is list and found.kept is model.kept
    with by_graph(model):
        expected = model(IDS)
    for ours, theirs in zip(found.states, expected.states, strict=True):
        assert isinstance(ours, Tensor)
        torch.testing.assert_close(ours, theirs)


def test_hooks_see_the_mix() -> None:
    model, seen = nanogpt(read_out), []
    for block in model.h:
        block.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    model(IDS)
    parameters = model.attnres.stream
    mixes = reference.attention_residuals(model.embed(IDS), reference.nanogpt_layers(model), parameters.query,
                                          parameters.key_gain, partition(6, num_blocks=2))
    for ours, theirs in zip(seen, mixes[2::2], strict=True):
        torch.testing.assert_close(ours, theirs.detach())


class HandNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_one_mix_a_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, real = nanogpt(read_out), [], stream_module.MIX
    monkeypatch.setattr(stream_module, "MIX", lambda *args: calls.append(len(args[0])) or real(*args))
    for block in model.h:
        block.ln_1, block.ln_2 = HandNorm(), HandNorm()
    model(IDS)
    assert calls == [2, 2, 2, 3, 3, 3]


def test_one_mix_a_position_in_a_compiled_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def count(gm: Any, inputs: Any, options: Any, *rest: Any) -> Any:
        lowered = run(LOWER, gm, options.context(training=False))
        kept.append(sum("attnres.mix" in str(node.target) for node in lowered.graph.nodes))
        return gm.forward

    monkeypatch.setattr(backend, "compile_downstream", count)
    model = nanogpt()
    for block in model.h:
        block.ln_1, block.ln_2 = HandNorm(), HandNorm()
        block.compile(backend="attnres")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), by_the_paper(model)(IDS))
    assert kept == [1, 2, 2]


def test_threads() -> None:
    model = nanogpt(read_out)
    inputs = [models.token_ids(2, 4 + index) for index in range(8)]
    with torch.no_grad():
        expected = [by_the_paper(model)(ids) for ids in inputs]
    found: list[Any] = [None] * 8

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[index] = model(inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_copies_files_and_reports_of_a_model_that_runs_by_value() -> None:
    model = untried(nanogpt(cut))
    expected = model(IDS)
    assert BY_VALUE in model.__dict__
    torch.testing.assert_close(copy.deepcopy(model)(IDS), expected)
    for block in model.h:  # what is compiled as one graph again
        block.__class__ = reference.Block
    assert attnres_fx.verify(model, (IDS,)).passed
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(IDS), expected)


def llama(**settings: Any) -> Any:
    torch._dynamo.reset()
    model = models.llama(3, **settings).double()
    attnres_fx.convert(model, (IDS,), {"use_cache": False}, num_blocks=2)
    return disturbed(model)


def llama_by_the_paper(model: Any) -> Tensor:
    parameters = model.attnres.stream
    return reference.llama(model, IDS, parameters.query, parameters.key_gain, partition(6, num_blocks=2))


def to_cpu(model: Any, folder: Any) -> Any:
    return accelerate().cpu_offload(model, execution_device="cpu")


def to_disk(model: Any, folder: Any) -> Any:
    return accelerate().disk_offload(model, folder, execution_device="cpu")


def to_several(model: Any, folder: Any) -> Any:
    """As ``device_map="auto"`` does it where the memory is short, the queries on the disk too."""
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
             "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu", "attnres": "disk"}
    return accelerate().dispatch_model(model, device_map=parts, main_device="cpu", offload_dir=folder, force_hooks=True)


def accelerate() -> Any:
    return pytest.importorskip("accelerate")


@pytest.mark.parametrize("offload", [to_cpu, to_disk, to_several])
def test_offloaded_weights(offload: Any, tmp_path: Any) -> None:
    model = llama()
    with torch.no_grad():
        expected = llama_by_the_paper(model)
        offloaded = offload(model, tmp_path)
        torch.testing.assert_close(offloaded(IDS, use_cache=False).logits, expected)
        assert RUNNER not in model.model.__dict__
        accelerate().hooks.remove_hook_from_submodules(model)


def test_regions_of_accelerate() -> None:
    accelerate()
    from accelerate.utils import compile_regions

    model = llama()
    expected = gradients_of(model, lambda: llama_by_the_paper(model))
    regions = compile_regions(model, **AOT)
    found = gradients_of(model, lambda: regions(IDS, use_cache=False).logits)
    for ours, theirs in zip(found, expected, strict=True):  # the norms compute in float32
        assert models.relative(ours, theirs) < 1e-5


def gradients_of(model: Any, call: Callable[[], Tensor]) -> list[Tensor]:
    """The logits and all gradients."""
    model.zero_grad()
    logits = call()
    loss_of(logits).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_a_quantised_cache() -> None:
    """Zero queries under "sum" give the tokens of the plain model with the same cache, whose scales break the graph."""
    from transformers.cache_utils import Cache, QuantizedLayer

    class Rounded(QuantizedLayer):
        def _quantize(self, tensor: Tensor, axis: int) -> Any:
            scale = tensor.abs().amax().item()
            return scale, (tensor / scale * 127).round().to(torch.int8)

        def _dequantize(self, quantised: Any) -> Tensor:
            return quantised[1].double() / 127 * quantised[0]

    def generated(model: Any) -> Tensor:
        cache = Cache(layers=[Rounded(residual_length=2) for _ in range(3)])
        return model.generate(IDS, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)

    torch._dynamo.reset()
    model = models.llama(3).double()
    expected, exact = generated(model), model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert expected.shape == exact.shape
    attnres_fx.convert(model, (IDS,), {"use_cache": False}, num_blocks=2, mix_scale="sum")
    assert torch.equal(generated(model), expected)
    assert RUNNER not in model.model.__dict__


def test_hidden_states_and_a_cache() -> None:
    model = llama()
    states = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    parameters = model.attnres.stream
    mixes = reference.llama_mixes(model, IDS, parameters.query, parameters.key_gain, partition(6, num_blocks=2))
    for ours, theirs in zip(states[:-1], mixes[:-1:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(states[-1], model.model.norm(mixes[-1]))
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert RUNNER not in model.model.__dict__
    with by_graph(model):
        assert torch.equal(tokens, model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_hugging_face_checkpointing_and_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["attnres"]))
    adapted.train()

    def gradients() -> list[Tensor]:
        adapted.zero_grad()
        loss_of(adapted(IDS, use_cache=False).logits).backward()
        return [parameter.grad.clone() for parameter in adapted.parameters() if parameter.grad is not None]

    with by_graph(model):
        expected = gradients()
    model.model.__dict__.pop(RUNNER)
    found = gradients()
    assert RUNNER not in model.model.__dict__
    assert len(found) == len(expected) >= 2 * 3 + 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "layers compiled"])
def test_layers_sharded_one_by_one(one_process: Any, reshard: bool, compiled: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nanogpt()
    expected = step(model, by_the_paper(model))
    for block in model.h:
        if compiled:
            block.compile(**AOT)
        fully_shard(block, mesh=one_process, reshard_after_forward=reshard)
    fully_shard(model, mesh=one_process)
    for _ in range(2):
        found = step(model, model)
        for ours, theirs in zip(found, expected, strict=True):
            whole = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
            torch.testing.assert_close(whole, theirs, rtol=1e-9, atol=1e-9)


def test_layers_sharded_in_mixed_precision_and_checkpointed(one_process: Any) -> None:
    """The weights compute in bfloat16, the queries stay in float32: the gradients are those of the paper's equations on
    weights that were rounded, to what bfloat16 resolves.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = nanogpt()
    expected = step(model, by_the_paper(model))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model.float()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, reference.Block))
    for block in model.h:
        fully_shard(block, mesh=one_process, mp_policy=policy)
    fully_shard(model, mesh=one_process, mp_policy=policy)
    for ours, theirs in zip(step(model, model), expected, strict=True):
        whole = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
        assert models.relative(whole.double(), theirs) < 0.1


def offloaded(model: Any, mesh: Any) -> Any:
    return accelerate().cpu_offload(model, execution_device="cpu")


def sharded_by_layers(model: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrapped_by_layers(model: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True,
                                    auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}))


def wrapped_flat(model: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def in_buckets(model: Any, mesh: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)


SITUATIONS = (offloaded, sharded_by_layers, wrapped_by_layers, wrapped_flat, in_buckets)
BY_DEFAULT = {(offloaded, "eager"), (sharded_by_layers, "regions"), (wrapped_by_layers, "eager"), (in_buckets, "compiled")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("situation", "way"), [
    pytest.param(situation, way, id=f"{situation.__name__}-{way}",
                 marks=() if (situation, way) in BY_DEFAULT else pytest.mark.slow)
    for situation in SITUATIONS for way in ("compiled", "regions", "eager")])
def test_situations(situation: Any, way: str, one_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of docs/by_value.md: the logits and, where the weights stay, the gradients of queries and gains."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    model = llama()
    expected = llama_by_the_paper(model)
    loss_of(expected).backward()
    gradients = [parameter.grad for parameter in model.attnres.parameters()]
    model.zero_grad(set_to_none=True)
    if way == "regions":
        for layer in model.model.layers:
            layer.compile(**AOT)
    wrapped = situation(model, one_process)
    called = torch.compile(wrapped, **AOT) if way == "compiled" else wrapped
    if situation is wrapped_flat and way == "compiled":
        with pytest.raises(errors.PlainPathError):  # Dynamo does not read flat parameters
            called(IDS, use_cache=False)
        return
    with torch.no_grad():
        assert models.relative(called(IDS, use_cache=False).logits, expected) < 1e-6
    if situation is offloaded:
        return
    loss_of(called(IDS, use_cache=False).logits).backward()
    if situation is wrapped_flat:
        return  # which has no gradients of single parameters
    for parameter, theirs in zip(model.attnres.parameters(), gradients, strict=True):
        ours = parameter.grad
        whole = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
        assert models.relative(whole.view_as(theirs), theirs) < 1e-5  # Llama has norms in float32


def test_what_passes_a_stream_on_does_so_in_a_graph_too() -> None:
    in_graphs = vocabulary.CASTS | vocabulary.COPIES | vocabulary.RESHAPES | vocabulary.PERMUTES
    assert in_graphs >= stream_module._THROUGH and vocabulary.ADDITIONS >= stream_module._ADDITIONS
