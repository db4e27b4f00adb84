"""The forward operators once more, writing into tensors they are given: ``attnres::mix_into``, ``mix_phase1_into``,
``mix_phase2_into`` and ``mix_norm_into``, each with the variants of :data:`VARIANTS`.

They are for code that decides where rows are placed, in graphs below autograd: where autograd has something to record they
raise RuntimeError. The kernels are those of the functional operators, and so are the values, bit by bit. An output is
contiguous, of the shape and dtype of the functional operator's result, and may be anywhere in a larger tensor. It overlaps
neither an argument nor another output, with one exception: ``partial_out`` of ``mix_norm_into`` may be the memory of the
last source, which is then completed in place (and must not be among the sources twice).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import mix_norm, phases, reference
from . import triton as triton_kernels
from ._compat import below_autograd, check_value, in_forward_mode
from .mix import mix_composite, mix_results
from .operators import LIBRARY, VARIANTS, Result, native_or, on_gpu, operator_of, tensors_in

_READ = "Tensor[] sources, Tensor query, Tensor? key_gain, float eps, float logit_scale, bool normalize_values"


@dataclass(frozen=True)
class _Family:
    """One functional operator: what it takes, what is written, and its kernels.

    results: the shapes and dtypes of the results, after a check of the arguments. composite: the results by torch
    operations. triton: the kernels, which take the outputs by name.
    """

    base: str
    arguments: str
    outputs: str
    results: Callable[..., list[Result]]
    composite: Callable[..., list[Tensor]]
    triton: Callable[..., Any]

    def check(self, *arguments: Any, **outputs: Any) -> list[Tensor]:
        """The tensors to write, in the order of the results. Raises ValueError unless they have their shape and dtype, and
        what the functional operator raises.
        """
        results = self.results(*arguments)
        written = _written(outputs)
        check_value(len(written) == len(results), lambda: (
            f"attnres::{self.base}_into writes {len(results)} tensors, got {len(written)} ({', '.join(written)})"))
        device = tensors_in(arguments)[0].device
        for (name, tensor), (shape, dtype) in zip(written.items(), results, strict=True):
            reference.check_shape(name, tensor, shape, f"that of the result of attnres::{self.base}")
            self._check_value(name, "the dtype", tensor.dtype, dtype)
            self._check_value(name, "the device", tensor.device, device)
        return list(written.values())

    def _check_value(self, name: str, what: str, got: object, expected: object) -> None:
        check_value(got == expected, lambda: (
            f"attnres::{self.base}_into: {name} has {what} {got}, expected {expected}"))

    def check_layout(self, *arguments: Any, **outputs: Any) -> list[Tensor]:
        """The same, and ValueError for what is not contiguous. Not checked for fakes: symbolic strides may be unknown."""
        written = self.check(*arguments, **outputs)
        for tensor in written:
            if not tensor.is_contiguous():
                raise ValueError(f"attnres::{self.base}_into writes contiguous tensors, got the shape {tuple(tensor.shape)} "
                                 f"with the strides {tensor.stride()}")
        return written


def _written(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the outputs by name, those of lists one by one."""
    named: dict[str, Tensor] = {}
    for name, given in outputs.items():
        listed = [(f"{name}[{i}]", tensor) for i, tensor in enumerate(given)] if isinstance(given, list) else [(name, given)]
        named.update((each, tensor) for each, tensor in listed if tensor is not None)
    return named


_FAMILIES = (
    _Family("mix", f"{_READ}, float output_factor", "Tensor(a!) mixed_out", mix_results,
            lambda *arguments: [mix_composite(*arguments)], triton_kernels.mix),
    _Family("mix_phase1", _READ, "Tensor(a!)[] mixed_out, Tensor(b!)[] lse_out", phases.phase1_results,
            phases.phase1_composite, triton_kernels.mix_phase1),
    _Family("mix_phase2", f"Tensor mixed, Tensor lse, {_READ}, float output_factor", "Tensor(a!) mixed_out",
            phases.phase2_results, lambda *arguments: [phases.phase2_composite(*arguments)], triton_kernels.mix_phase2),
    _Family("mix_norm", mix_norm.ARGUMENTS, "Tensor(a!) normed_out, Tensor(b!)? partial_out", mix_norm.mix_norm_results,
            mix_norm.mix_norm_composite, triton_kernels.mix_norm),
)


def _reference(family: _Family, *arguments: Any, **outputs: Any) -> None:
    """All results before any is written: the last source may be among the outputs."""
    written = family.check_layout(*arguments, **outputs)
    for target, result in zip(written, family.composite(*arguments), strict=True):
        target.copy_(result)


def _triton(family: _Family, *arguments: Any, **outputs: Any) -> None:
    partial: Tensor | None = outputs.get("partial_out")
    last = arguments[0][-1] if partial is not None and arguments[0] else None
    if partial is not None and last is not None and last.data_ptr() == partial.data_ptr() and not last.is_contiguous():
        raise ValueError("attnres::mix_norm_into: partial_out lies where the last source does, whose elements lie there in "
                         "another order")
    family.triton(*arguments, **outputs, check=family.check_layout)


def _fake(family: _Family, *arguments: Any, **outputs: Any) -> None:
    family.check(*arguments, **outputs)


def _below_autograd(name: str, *arguments: Any, **outputs: Any) -> None:
    """Raise RuntimeError where a gradient or a tangent would be lost, else run what is below autograd."""
    if torch.is_grad_enabled() or in_forward_mode():
        tensors = tensors_in([*arguments, *outputs.values()])
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            _refuse(name)
        if in_forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            _refuse(name)
    # Autograd finds out by the version that a tensor it has saved was written.
    increment_version([tensor for tensor in tensors_in(list(outputs.values())) if not tensor.is_inference()])
    with below_autograd():
        operator_of(name)(*arguments, **outputs)


def _refuse(name: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"attnres::{name} writes into the tensors it is given and has no gradient; where autograd records, "
                       "use the operator without _into")


def define_into(name: str, arguments: str, fake: Callable[..., None]) -> None:
    """Define ``attnres::<name>``, which returns nothing: its schema, what is refused, and its checks on fakes."""
    LIBRARY.define(f"{name}({arguments}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, partial(_below_autograd, name), "Autograd")
    for key in ("FuncTorchBatched", "Batched"):
        LIBRARY.impl(name, partial(_refuse, name), key)
    torch.library.register_fake(f"attnres::{name}", fake, lib=LIBRARY)


# From every functional operator to the one that writes into given tensors.
INTO: dict[Any, Any] = {}

for _family in _FAMILIES:
    for _variant in VARIANTS:
        define_into(f"{_family.base}_into{_variant}", f"{_family.arguments}, *, {_family.outputs}", partial(_fake, _family))
        INTO[operator_of(_family.base, _variant)] = operator_of(f"{_family.base}_into", _variant)
    _into, _kernel, _on_triton = f"{_family.base}_into", partial(_reference, _family), partial(_triton, _family)
    LIBRARY.impl(_into, partial(native_or, _kernel, _into), "CompositeExplicitAutograd")
    LIBRARY.impl(_into, partial(on_gpu, _on_triton, _kernel, triton_kernels.serves), "CUDA")
    LIBRARY.impl(f"{_into}_reference", _kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{_into}_triton", _on_triton, "CompositeExplicitAutograd")
