"""Matrix products that write into tensors they are given: ``attnres::mm_into`` and ``attnres::addmm_into``.

The row that opens a block is the unchanged output of a layer, and so, mostly, of a matrix product. These are torch's own
products, written to the place of a row: Inductor does not take ``out=`` variants in a graph, but takes our operators. Like
all operators named _into they are for graphs below autograd, and raise RuntimeError where it has something to record.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._compat import check_value
from .into import define_into
from .operators import LIBRARY, native_or, operator_of

_FACTORS = "Scalar beta=1, Scalar alpha=1"


def _check(name: str, left: Tensor, right: Tensor, product_out: Tensor) -> None:
    """ValueError unless ``product_out`` has the shape and the dtype of the product: an ``out=`` would change its shape."""
    reference.check_shape("product_out", product_out, (left.shape[0], right.shape[1]), f"the product of attnres::{name}")
    check_value(product_out.dtype == left.dtype, lambda: (
        f"attnres::{name}: product_out has the dtype {product_out.dtype}, expected {left.dtype}"))


def _check_mm(left: Tensor, right: Tensor, *, product_out: Tensor) -> None:
    _check("mm_into", left, right, product_out)


def _check_addmm(
    bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1, product_out: Tensor
) -> None:
    _check("addmm_into", left, right, product_out)


def write_mm(left: Tensor, right: Tensor, *, product_out: Tensor) -> None:
    """left [n, k] @ right [k, m], written to product_out [n, m] of their dtype; ValueError for any other."""
    _check_mm(left, right, product_out=product_out)
    torch.mm(left, right, out=product_out)


def write_addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1, product_out: Tensor) -> None:
    """beta bias + alpha left @ right, with a bias that broadcasts to [n, m]; the rest as :func:`write_mm`."""
    _check_addmm(bias, left, right, product_out=product_out)
    torch.addmm(bias, left, right, beta=beta, alpha=alpha, out=product_out)


define_into("mm_into", "Tensor left, Tensor right, *, Tensor(a!) product_out", _check_mm)
define_into("addmm_into", f"Tensor bias, Tensor left, Tensor right, *, {_FACTORS}, Tensor(a!) product_out", _check_addmm)
for _name, _kernel in (("mm_into", write_mm), ("addmm_into", write_addmm)):
    LIBRARY.impl(_name, partial(native_or, _kernel, _name), "CompositeExplicitAutograd")

# From torch's products of matrices to those that write into given tensors.
PRODUCTS: dict[Any, Any] = {
    torch.ops.aten.mm.default: operator_of("mm_into"), torch.ops.aten.addmm.default: operator_of("addmm_into")}
