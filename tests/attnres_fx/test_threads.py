"""Threads, as a server has them: many call a model for the first time, or while another is compiled or converted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import models
from support.arenas import Tower, close, ids
from support.checkpoint_models import disturb
from torch import Tensor, nn

import attnres_fx

THREADS = 8


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tower(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return disturb(attnres_fx.convert(Tower(), ids(5), num_blocks=3))


def llama() -> Any:
    return disturb(attnres_fx.convert(models.llama(2), (models.token_ids(),), {"use_cache": False}, num_blocks=2))


def together(*calls: Callable[[], None]) -> None:
    """Run all calls at once, each in a thread, and raise what the first of them raised."""
    start, errors = threading.Barrier(len(calls)), []

    def run(call: Callable[[], None]) -> None:
        try:
            start.wait(60)
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def checked(model: Any, cases: list[tuple[Any, Tensor]]) -> Callable[[], None]:
    def call() -> None:
        for given, expected in cases:
            with torch.no_grad():
                result = model(given)
            close(result, expected)
    return call


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="attnres", options=options, dynamic=True)


@pytest.mark.parametrize("make", [
    lambda model: model, pytest.param(compiled, marks=pytest.mark.slow),
    lambda model: compiled(model, downstream="eager")],
                         ids=["eager", "compiled", "compiled, run eagerly"])
def test_many_threads_call_two_models_cold_and_warm(make: Callable[[nn.Module], Any]) -> None:
    references = [tower(0), tower(1)]
    lengths = [3, 7, 5, 9]
    with torch.no_grad():
        cases = [[(ids(length), model(ids(length))) for length in lengths] for model in references]
    torch._dynamo.reset()
    callables = [make(tower(seed)) for seed in (0, 1)]
    calls = []
    for thread in range(THREADS):
        own = cases[thread % 2]
        calls.append(checked(callables[thread % 2], own[thread % 4:] + own[: thread % 4]))
    together(*calls)  # cold
    together(*calls)  # warm


@pytest.mark.slow
def test_a_model_serves_while_others_are_converted_and_compiled() -> None:
    model = tower()
    fast = compiled(model, downstream="eager")
    with torch.no_grad():
        cases = [(ids(length), model(ids(length))) for length in (3, 7)]
        for given, expected in cases:
            close(fast(given), expected)
    done, served = threading.Event(), []

    def serve(function: Any) -> Callable[[], None]:
        def call() -> None:
            while not done.is_set():
                checked(function, cases)()
                served.append(function)
        return call

    def work() -> None:
        try:
            for _ in range(2):
                converted = llama()
                given = models.token_ids()
                assert attnres_fx.verify(converted, (given,), {"use_cache": False}).passed
                plain = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
                torch.compile(plain, backend="aot_eager")(torch.randn(2, 8))
                torch.compile(converted, backend="attnres", options={"downstream": "aot_eager"})(given, use_cache=False)
        finally:
            done.set()

    together(work, *[serve(function) for function in (model, fast) for _ in range(3)])
    assert {id(function) for function in served} == {id(model), id(fast)}


def test_threads_train_models_of_their_own() -> None:
    def step(model: nn.Module) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        model(ids(6)).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = [step(tower(seed)) for seed in range(4)]
    torch._dynamo.reset()
    own = [tower(seed) for seed in range(4)]
    together(*[lambda at=at: close(step(own[at]), expected[at]) for at in range(4)])


def test_conversions_at_the_same_time() -> None:
    made: dict[int, Any] = {}

    def convert(seed: int) -> Callable[[], None]:
        return lambda: made.update({seed: tower_of(seed)})

    def tower_of(seed: int) -> nn.Module:
        model = plain[seed]
        return attnres_fx.convert(model, ids(5), num_blocks=3)

    plain = {}
    for seed in range(4):
        torch.manual_seed(seed)
        plain[seed] = Tower()
    together(*[convert(seed) for seed in plain])
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    for seed, model in made.items():
        with torch.no_grad():
            close(disturb(model)(ids(6)), tower(seed)(ids(6)))
    assert limits == (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
    assert max(limits) < 10_000  # what one trace lifted for itself is back
