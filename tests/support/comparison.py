"""A converted model through two backends: results and all gradients, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support import models

# The rewritten graph as it stands, its mixes in plain torch operations, each by itself.
REFERENCE = {"downstream": "eager", "kernels": "reference", "schedule": "one-pass", "fuse": "never"}


def disturbed(model: nn.Module, scale: float = 0.4) -> nn.Module:
    """Random queries and gains: every row of every mix counts. Returns the model."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.attnres.named_parameters():
            drawn = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(name.endswith("key_gain") + drawn)
    return model


def inferred(function: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return models.tensors_of(function(*args, **kwargs))


def trained(model: nn.Module, function: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The results of a training step and the gradients of all parameters, by name."""
    model.zero_grad(set_to_none=True)
    results = models.tensors_of(function(*args, **kwargs))
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result) for result in results]
    # By the mean, so that the gradients of long and of short outputs are of one size.
    sum((result * weight).mean() for result, weight in zip(results, weights)).backward()  # type: ignore[union-attr]
    found = {f"result {index}": result.detach() for index, result in enumerate(results)}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


Tensors = dict[str, Tensor]


def agree(ours: Tensors, theirs: Tensors, bound: float, of_largest: float | None = None) -> None:
    """Every tensor deviates by at most ``bound`` of its own norm, and ``of_largest`` of the largest among its like.

    The second is for gradients that cancel: a bias of keys shifts all scores alike, and what is left of its gradient is the
    rounding of terms that are as large as other gradients. It is ``bound`` / 1000 if not given.
    """
    wrong = disagreements(ours, theirs, bound, bound / 1000 if of_largest is None else of_largest)
    assert not wrong, "\n".join(wrong)


def disagreements(ours: Tensors, theirs: Tensors, bound: float, floor: float,
                  rounding: dict[str, float] | None = None) -> list[str]:
    """What deviates by more than ``agree`` says, and by more than three times ``rounding`` (norms, by name)."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    largest = {kind: max((float(value.double().norm()) for name, value in theirs.items() if is_result(name) == kind),
                         default=0.0) for kind in (True, False)}
    wrong = []
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape and ours[name].dtype == expected.dtype, name
        deviation, norm = distance(ours[name], expected), float(expected.double().norm())
        allowed = bound * norm + floor * largest[is_result(name)]
        if not deviation <= max(allowed, 3 * rounding[name] if rounding else 0.0):
            wrong.append(f"{name} deviates by {deviation:.1e} of {norm:.1e} (largest: {largest[is_result(name)]:.1e})")
    return wrong


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm())


def is_result(name: str) -> bool:
    return name.startswith("result ")


def moved_by_rounding(model: nn.Module, step: Callable[[], Tensors], expected: Tensors) -> dict[str, float]:
    """By how much each tensor of a step moves, at most of four times, where every parameter moves by about one rounding.

    A network may amplify it a thousandfold (attention without a scale, in three blocks, does): what moves that far when
    nothing but the last bit of the weights changes tells no right implementation from another.
    """
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved = dict.fromkeys(expected, 0.0)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(kept[name].double() * (1 + torch.finfo(parameter.dtype).eps / 2 * drawn))
        found = step()
        moved = {name: max(moved[name], distance(found[name], value)) for name, value in expected.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return moved


def check_both(model: nn.Module, inference: Any, training: Any, slow: Any, args: Any, kwargs: Any, bound: float) -> None:
    """Inference, unless it is None, and a training step with all gradients (the model's, those of queries and gains)."""

    def reference() -> Tensors:
        return trained(model, slow, *args, **kwargs)

    expected = reference()
    queries = [value for name, value in expected.items() if name.endswith(".query")]
    assert queries and all(value[1:].abs().sum() > 0 for value in queries)
    results = {name: value for name, value in expected.items() if is_result(name)}
    for _ in range(2 if inference is not None else 0):  # the second call finds what the first left in the arena
        ours = inferred(inference, *args, **kwargs)
        agree({f"result {index}": value for index, value in enumerate(ours)}, results, bound)
    step = trained(model, training, *args, **kwargs)
    if disagreements(step, expected, bound, bound / 1000):
        wrong = disagreements(step, expected, bound, bound / 1000, moved_by_rounding(model, reference, expected))
        assert not wrong, "\n".join(wrong)
