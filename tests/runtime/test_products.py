"""Products that write into given matrices: torch's own values, and nothing written beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_fx.runtime import products
from attnres_fx.runtime.cpu import build, native
from attnres_fx.runtime.products import PRODUCTS

NATIVE = pytest.mark.skipif(build.compiler() is None and not build.is_built(),
                            reason="no C++ compiler here, and no library built before")
aten: Any = torch.ops.aten
MM = [pytest.param(PRODUCTS[aten.mm.default], marks=NATIVE, id="native"), pytest.param(products.write_mm, id="python")]
ADDMM = [pytest.param(PRODUCTS[aten.addmm.default], marks=NATIVE, id="native"),
         pytest.param(products.write_addmm, id="python")]


@pytest.fixture(autouse=True)
def _loaded() -> None:
    native.ensure()
    torch.manual_seed(2)


def slot(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An arena of NaNs, and a matrix in it at an odd place: which kernel computes a product may depend on where it goes."""
    arena = torch.full((rows * columns + 10,), torch.nan, dtype=dtype)
    return arena, arena[5:-5].view(rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, m", [(6, 1000, 40), (1, 8, 1000), (5, 1, 3), (3, 0, 4)])
@pytest.mark.parametrize("write", MM)
def test_mm(write: Callable[..., None], n: int, k: int, m: int, dtype: torch.dtype) -> None:
    left, right = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype).t()  # as the weight of nn.Linear
    arena, out = slot(n, m, dtype)
    write(left, right, product_out=out)
    assert torch.equal(out, torch.mm(left, right, out=slot(n, m, dtype)[1]))
    torch.testing.assert_close(out, torch.mm(left, right))
    assert arena.isnan().sum() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", ADDMM)
def test_addmm(write: Callable[..., None], dtype: torch.dtype) -> None:
    left, right = torch.randn(6, 16).to(dtype), torch.randn(16, 9).to(dtype)
    for bias, factors in ((torch.randn(9), {}), (torch.randn(6, 9), {"beta": 0.5, "alpha": 2})):
        arena, out = slot(6, 9, dtype)
        write(bias.to(dtype), left, right, **factors, product_out=out)
        arguments = bias.to(dtype), left, right
        assert torch.equal(out, torch.addmm(*arguments, **factors, out=slot(6, 9, dtype)[1]))
        torch.testing.assert_close(out, torch.addmm(*arguments, **factors))
        assert arena.isnan().sum() == 10


@pytest.mark.parametrize("write", MM)
def test_another_shape_or_dtype_is_refused(write: Callable[..., None]) -> None:
    left, right = torch.ones(2, 3), torch.ones(3, 4)
    for wrong in (torch.zeros(4, 2), torch.zeros(8), torch.zeros(2, 4, dtype=torch.float64), torch.zeros(0)):
        with pytest.raises(ValueError, match="product_out"):
            write(left, right, product_out=wrong)
        assert not wrong.any()


def test_no_gradient_is_dropped_in_silence() -> None:
    left, right, out = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4), torch.zeros(2, 4)
    for operator, rest in ((PRODUCTS[aten.mm.default], ()), (PRODUCTS[aten.addmm.default], (torch.ones(4),))):
        with pytest.raises(RuntimeError, match="no gradient"):
            operator(*rest, left, right, product_out=out)
        with torch.no_grad():
            version = out._version
            operator(*rest, left, right, product_out=out)
            assert out._version > version
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.func.vmap(lambda rows: PRODUCTS[aten.mm.default](rows, right, product_out=out))(torch.ones(2, 2, 3))


def test_the_operators_are_what_they_say() -> None:
    left, right = torch.ones(2, 3), torch.ones(3, 4)
    with torch.no_grad():
        for operator, rest in ((PRODUCTS[aten.mm.default], ()), (PRODUCTS[aten.addmm.default], (torch.ones(4),))):
            torch.library.opcheck(operator, (*rest, left, right), {"product_out": torch.empty(2, 4)},
                                  test_utils=("test_schema", "test_faketensor"))
