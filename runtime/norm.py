"""The norms by which a layer reads its mix: their meaning and their gradient in plain torch.

RMSNorm is ``x * rsqrt(mean(x^2) + eps) * weight``; LayerNorm is the same of ``x - mean(x)``, plus a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """LayerNorm where ``centered``, else RMSNorm; weight and bias [d], or None for ones and zeros."""

    centered: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def standard(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [..., d] before weight and bias, and the factor [..., 1] that scaled them."""
        if self.centered:
            rows = rows - rows.mean(-1, keepdim=True)
        scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        return rows * scale, scale

    def affine(self, standard: Tensor) -> Tensor:
        """Weight and bias on standardised rows."""
        made = standard if self.weight is None else standard * self.weight.to(standard.dtype)
        return made if self.bias is None else made + self.bias.to(standard.dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """The norm of rows [..., d], in their dtype."""
        return self.affine(self.standard(rows)[0])

    def backward(self, grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The norm of rows [..., d], the gradient of the rows, and those of the weight and the bias where there are any.

        With x' the standardised rows and G = grad * weight: scale * (G - x' mean(G x')), less its mean where centered.
        """
        standard, scale = self.standard(rows)
        own = grad if self.weight is None else grad * self.weight.to(grad.dtype)
        before = own - standard * (own * standard).mean(-1, keepdim=True)
        if self.centered:
            before = before - own.mean(-1, keepdim=True)
        parameters = []
        width = rows.shape[-1]
        if self.weight is not None:
            parameters.append((grad * standard).reshape(-1, width).sum(0))
        if self.bias is not None:
            parameters.append(grad.reshape(-1, width).sum(0))
        return self.affine(standard), before * scale, parameters
