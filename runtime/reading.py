"""The arguments of ``attnres::mix_norm`` and its backward as one value, for every kind of kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from ._compat import check_value
from .norm import Norm


@dataclass(frozen=True)
class Reading:
    """The arguments of the operator, except those of the addition.

    sources: [..., d] each, the completed partial sum last where there is an addition; query [d], key_gain [d] or None;
    mixed [..., d] and lse [...] are what phase 1 left for this query, or both None; weight and bias [d] of the norm.
    """

    sources: list[Tensor]
    query: Tensor
    key_gain: Tensor | None
    mixed: Tensor | None
    lse: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    logit_scale: float
    normalize_values: bool
    output_factor: float
    centered: bool
    norm_eps: float

    @property
    def rows(self) -> list[Tensor]:
        """All rows that are mixed."""
        return self.sources if self.mixed is None else [*self.sources, self.mixed]

    @property
    def dtype(self) -> torch.dtype:
        """That of the result: the promoted dtype of the rows."""
        return reference.result_dtype(self.rows)

    @property
    def options(self) -> tuple[float, float, bool, float]:
        return self.eps, self.logit_scale, self.normalize_values, self.output_factor

    @property
    def norm(self) -> Norm:
        return Norm(self.centered, self.weight, self.bias, self.norm_eps)

    @property
    def targets(self) -> list[Tensor]:
        """The tensors that receive a gradient, in the order in which the backward gives them."""
        given = [self.mixed, self.lse, *self.sources, self.query, self.key_gain, self.weight, self.bias]
        return [tensor for tensor in given if tensor is not None]

    def check(self) -> None:
        """Raise ValueError or TypeError for meaningless arguments."""
        reference.check_arguments(self.rows, self.query, self.key_gain, self.eps)
        check_value(len(self.sources) > 0, lambda: "attnres::mix_norm needs at least one source")
        check_value(self.query.ndim == 1, lambda: (
            f"attnres::mix_norm: query must be [d], got {tuple(self.query.shape)}"))
        check_value((self.mixed is None) == (self.lse is None), lambda: (
            "attnres::mix_norm: give mixed and lse, or neither"))
        if self.lse is not None:
            reference.check_shape("lse", self.lse, self.sources[0].shape[:-1], "the positions of the sources")
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            if parameter is not None:
                reference.check_shape(name, parameter, (self.sources[0].shape[-1],), "the width of the sources")

    def mix(self) -> Tensor:
        """The mix before its norm and its rounding."""
        if self.mixed is None or self.lse is None:
            return reference.mix_forward(self.sources, self.query, self.key_gain, *self.options)
        return reference.phase2(self.mixed, self.lse, self.sources, self.query, self.key_gain, *self.options)

    def mix_backward(self, grad: Tensor) -> list[Tensor]:
        """The gradients of the mix: of mixed and lse where there are any, the sources, the query and the gain."""
        if self.mixed is None or self.lse is None:
            return reference.mix_backward(grad, self.sources, self.query, self.key_gain, *self.options)
        return reference.phase2_backward(grad, self.mixed, self.lse, self.sources, self.query, self.key_gain, *self.options)
