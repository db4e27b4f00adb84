"""The two ways in which a converted model runs eagerly, chosen by a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from torch import nn

from attnres_fx.by_value import record
from attnres_fx.converted import STREAMS, plans_of
from attnres_fx.runtime.stream import BY_GRAPH, BY_VALUE


def owners_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a converted ``model`` that own streams."""
    return [module for module in model.modules() if STREAMS in module.__dict__]


@contextmanager
def _marked(model: nn.Module, mark: str, other: str) -> Iterator[None]:
    for owner in owners_of(model):
        owner.__dict__.pop(other, None)
        owner.__dict__[mark] = "by a test"
    yield
    for owner in owners_of(model):
        owner.__dict__.pop(mark, None)


def by_graph(model: nn.Module) -> AbstractContextManager[None]:
    """Have ``model`` run by its graph meanwhile when it is called eagerly."""
    return _marked(model, BY_GRAPH, BY_VALUE)


def by_value(model: nn.Module) -> AbstractContextManager[None]:
    """Have ``model`` run by value meanwhile, however it is called."""
    return _marked(model, BY_VALUE, BY_GRAPH)


def untried(model: nn.Module) -> nn.Module:
    """``model`` as if its conversion could not have tried it by value."""
    for plan in plans_of(model):
        record(model, replace(plan, trial=None))
    return model
