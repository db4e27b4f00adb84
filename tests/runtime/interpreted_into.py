"""The operators that write into given tensors on the Triton kernels in Triton's interpreter, against their functional
siblings, bit by bit. Run by test_triton.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.into_calls import BASES, check, make
from torch import Tensor

from attnres_fx.errors import KernelError
from attnres_fx.runtime.into import INTO
from attnres_fx.runtime.operators import operator_of

TYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("count, shape", [(2, (512,)), (4, (1, 512)), (3, (2, 3, 40)), (33, (1, 1000)), (3, (5, 1))])
@pytest.mark.parametrize("base", BASES)
def test_the_same_bits(base: str, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make(base, count, shape, dtype, normalize=True, early=True), "_triton")
    queries = 1 if base in ("mix_phase2", "mix_norm") else 5  # more than one launch takes
    check(make(base, count, shape, dtype, queries=queries, bare=True), "_triton")


@pytest.mark.parametrize("count, shape", [(1, (7, 24)), (24, (7, 24)), (25, (1, 24)), (49, (1, 1000))])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_partial_sum_in_place(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sources enough for several launches, and tiles of several rows, the last of them partly empty."""
    for early in (False, True):
        check(make("mix_norm", count, shape, dtype, early=early), "_triton")


@pytest.mark.parametrize("base", BASES)
def test_no_positions_and_several_dtypes(base: str) -> None:
    check(make(base, 3, (0, 8)), "_triton")
    call = make(base, 3, (4, 8), delta=False)
    sources = next(argument for argument in call.arguments if isinstance(argument, list))
    sources[0] = sources[0].bfloat16()
    check(call, "_triton")


@pytest.mark.parametrize("base", BASES)
def test_nothing_is_allocated_for_the_results(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(base, 3, (4, 8), early=True)
    outputs = call.named([torch.empty_like(tensor) for tensor in call.functional("_triton")])
    for name in ("empty", "empty_like", "clone"):
        monkeypatch.setattr(torch, name, None)
    monkeypatch.setattr(Tensor, "copy_", None)
    call.into("_triton", outputs)


@pytest.mark.parametrize("base", BASES)
def test_refusals(base: str) -> None:
    call = make(base, 3, (4, 8), early=True)
    wanted = call.functional("_triton")
    outputs = [torch.empty_like(tensor) for tensor in wanted]
    for change, message in ((lambda tensor: tensor[:3].clone(), "has the shape"), (Tensor.half, "has the dtype"),
                            (lambda tensor: tensor.unsqueeze(-1).repeat_interleave(2, -1)[..., 0], "contiguous")):
        with pytest.raises(ValueError, match=message):
            call.into("_triton", call.named([change(outputs[0]), *outputs[1:]]))
    lists: Any = next(argument for argument in call.arguments if isinstance(argument, list))
    lists[1].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        call.into("_triton", call.named(outputs))
    with torch.no_grad():
        torch.library.opcheck(INTO[operator_of(base, "_triton")], (*call.arguments,), call.named(outputs),
                              test_utils=("test_schema", "test_faketensor"))


def test_a_partial_sum_is_completed_in_its_own_order() -> None:
    call = make("mix_norm", 3, (4, 8))
    partial = torch.randn(4, 8)
    call.arguments[0][-1] = partial.view(8, 4).t()
    with pytest.raises(ValueError, match="another order"):
        call.into("_triton", call.named([torch.empty(4, 8), partial]))


def test_too_wide_is_refused() -> None:
    call = make("mix_norm", 2, (1, 8193))
    with pytest.raises(KernelError, match="at most 8192"):
        call.into("_triton", call.named([torch.empty(1, 8193), torch.empty(1, 8193)]))
