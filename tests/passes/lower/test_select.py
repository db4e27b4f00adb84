"""Select: named kernels behind the mixes of a graph."""

from __future__ import annotations

import pytest
import torch
from support.passes import applied

from attnres_fx.errors import KernelError
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.lower.select import select_kernels
from attnres_fx.runtime import triton
from attnres_fx.runtime.mix import MIX, MIX_REFERENCE, mix


class Mixing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mix([x, x.sin(), mix([x, x.cos()], self.query[0])], self.query[1])


def targets(gm: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if "mix" in str(node.target)]


def test_named_kernels_replace_the_mixes_of_a_copy() -> None:
    x = torch.randn(3, 8)
    gm, inputs = capture(Mixing(), (x,), {})
    assert applied(select_kernels, gm, kernels="auto") is gm
    chosen = applied(select_kernels, gm, kernels="reference")
    assert targets(gm) == [MIX, MIX]
    assert targets(chosen) == [MIX_REFERENCE, MIX_REFERENCE]
    assert applied(select_kernels, chosen, kernels="reference") is chosen
    torch.testing.assert_close(chosen(*inputs), gm(*inputs))


def test_triton_is_refused_where_it_cannot_run() -> None:
    gm, _ = capture(Mixing(), (torch.randn(3, 8),), {})
    if triton.obstacle("cpu") is None:
        assert targets(applied(select_kernels, gm, kernels="triton")) != [MIX, MIX]
        return
    with pytest.raises(KernelError, match="no compiler for the CPU"):
        applied(select_kernels, gm, kernels="triton")
