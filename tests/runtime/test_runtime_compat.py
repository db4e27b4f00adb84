"""One test for each private interface of torch that ``runtime/_compat.py`` touches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnres_fx.runtime import _compat


def test_any_requires_grad_looks_inside_the_list() -> None:
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert not _compat.any_requires_grad([plain], plain, None)
    assert _compat.any_requires_grad([plain, leaf], plain, None)
    assert _compat.any_requires_grad([plain], plain, leaf)


def test_forward_mode_is_seen() -> None:
    assert not _compat.in_forward_mode()
    with forward_ad.dual_level():
        assert _compat.in_forward_mode()
    assert not _compat.in_forward_mode()


def test_transforms_are_seen() -> None:
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(_compat.in_functorch_transform())
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    function(torch.ones(2))
    assert seen == [True, False]


def test_below_autograd_records_nothing() -> None:
    leaf = torch.ones(2, requires_grad=True)
    with _compat.below_autograd():
        made = leaf * 2
    assert not made.requires_grad
    assert (leaf * 2).requires_grad


def test_sharers_of_memory_are_seen() -> None:
    tensor = torch.ones(8)
    assert not _compat.is_shared(tensor)
    view = tensor[:2].view(torch.int32).as_strided((1, 1), (1, 1), 1)
    assert _compat.is_shared(tensor) and _compat.is_shared(view)
    del view
    assert not _compat.is_shared(tensor)


def test_the_cpu_has_one_stream_and_captures_nothing() -> None:
    assert _compat.stream_id(torch.device("cpu")) == 0
    assert not _compat.is_capturing(torch.device("cpu"))


@pytest.mark.parametrize("version, said", [
    ("2.11.0+cu130", False), ("2.15.3", False), ("2.10.1", True), ("2.16.0a0+git1", True), ("3.0", True), ("main", True)])
def test_a_release_that_was_not_tested_is_named(version: str, said: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _compat.warn_of_untested(version)
    assert [version in str(each.message) for each in caught] == [True] * said


def test_checks_raise_what_they_are_named_for() -> None:
    _compat.check_value(True, lambda: "no")
    _compat.check_type(True, lambda: "no")
    with pytest.raises(ValueError, match="a value"):
        _compat.check_value(False, lambda: "a value")
    with pytest.raises(TypeError, match="a type"):
        _compat.check_type(False, lambda: "a type")


def test_inside_autograd_function_is_seen() -> None:
    seen = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(_compat.inside_autograd_function())
            return x * 1

    class WithoutContext(torch.autograd.Function):
        @staticmethod
        def forward(*given: Tensor) -> Tensor:
            seen.append(_compat.inside_autograd_function())
            return given[0] * 1

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(_compat.inside_autograd_function())
            return x

    Function.apply(torch.ones(2))
    WithoutContext.apply(torch.ones(2))
    with torch.no_grad():
        Module()(torch.ones(2))
    assert seen == [True, True, False]


def test_saved_tensor_hooks_tell_a_checkpointed_region_from_its_recomputation() -> None:
    seen = [_compat.saved_tensor_hooks()]

    def region(x: Tensor) -> Tensor:
        seen.append(_compat.saved_tensor_hooks())
        return x.sin()

    torch.utils.checkpoint.checkpoint(region, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    outside, forward, recomputed = seen
    assert outside is None and forward is not None and recomputed is not None and forward != recomputed


def test_in_backward() -> None:
    seen = [_compat.in_backward()]
    x = torch.ones(2, requires_grad=True)
    y = x.sin()
    y.register_hook(lambda grad: seen.append(_compat.in_backward()))
    y.sum().backward()
    assert seen == [False, True]


def test_times_written() -> None:
    x = torch.ones(3)
    before = _compat.times_written(x)
    x[1:].add_(1)
    assert _compat.times_written(x) == before + 1
    with torch.inference_mode():
        assert _compat.times_written(torch.ones(3)) == -1


def test_a_backward_is_not_within_the_forward_of_a_function() -> None:
    seen = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(_compat.inside_autograd_function())
            return grad

    Function.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [False]
