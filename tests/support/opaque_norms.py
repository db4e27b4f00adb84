"""Opaque operators that add and norm in one call, as kernel libraries ship them, for the tests.

Every one is known to the passes by its schema and its numbers alone: names, argument orders and results differ on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Any, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    made = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (made if weight is None else made * weight).to(x.dtype)


@torch.library.custom_op("kernels_a::rmsnorm_plus", mutates_args=())
def rms_with_sum(branch: Tensor, scale: Tensor, epsilon: float, stream: Tensor) -> tuple[Tensor, Tensor]:
    total = branch + stream
    return _rms(total, scale, epsilon), total


@torch.library.custom_op("kernels_b::op7", mutates_args=())
def sum_with_layer_norm(a: Tensor, b: Tensor, w: Tensor, c: Tensor, e: float = 1e-5) -> tuple[Tensor, Tensor]:
    total = a + b
    return total, torch.nn.functional.layer_norm(total, total.shape[-1:], w, c, e)


@torch.library.custom_op("kernels_c::norm_of_sum", mutates_args=())
def norm_alone(a: Tensor, b: Tensor, w: Tensor | None, e: float) -> Tensor:
    return _rms(a + b, w, e)


@torch.library.custom_op("kernels_d::fused_add_rms_norm", mutates_args=("x", "residual"))
def in_place(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    total = x + residual
    residual.copy_(total)
    x.copy_(_rms(total, weight, epsilon))


@torch.library.custom_op("kernels_e::offset_norm", mutates_args=())
def with_offset(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = x + y
    return _rms(total, 1 + w, 1e-6), total, total.square().mean(-1)


@torch.library.custom_op("kernels_f::no_such_norm", mutates_args=())
def near_miss(x: Tensor, y: Tensor, w: Tensor, e: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return total / (total.square().mean(-1, keepdim=True).sqrt() + e) * w, total  # the eps outside the root


@torch.library.custom_op("kernels_g::scaled", mutates_args=())
def scaled_miss(x: Tensor, y: Tensor, w: Tensor, e: float) -> tuple[Tensor, Tensor]:
    total = x + 0.5 * y
    return _rms(total, w, e), total


@torch.library.custom_op("kernels_h::other_gradient", mutates_args=())
def stops_gradients(x: Tensor, y: Tensor, w: Tensor, e: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return _rms(total, w, e), total


@torch.library.custom_op("kernels_i::elsewhere", mutates_args=(), device_types="cuda")
def not_on_cpu(x: Tensor, y: Tensor, w: Tensor, e: float) -> tuple[Tensor, Tensor]:
    raise AssertionError("never run")


@torch.library.custom_op("kernels_j::damp", mutates_args=("stream",))
def damp(weight: Tensor, stream: Tensor) -> None:
    stream.mul_(weight)


for _operator in (rms_with_sum, sum_with_layer_norm, near_miss, scaled_miss, stops_gradients, not_on_cpu):
    _operator.register_fake(lambda a, *rest: (torch.empty_like(a), torch.empty_like(a)))
norm_alone.register_fake(lambda a, *rest: torch.empty_like(a))
with_offset.register_fake(lambda a, *rest: (torch.empty_like(a), torch.empty_like(a), a.new_empty(a.shape[:-1])))


def _differentiable(operator: Any, of_norm: Callable[..., tuple[Tensor, ...]]) -> None:
    """The gradients of an operator by autograd of its own formula."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.inputs = inputs

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            held = [part.detach().requires_grad_() if isinstance(part, Tensor) else part for part in ctx.inputs]
            made = of_norm(*held)
            leaves = [part for part in held if isinstance(part, Tensor)]
            found = iter(torch.autograd.grad(made, leaves, gradients, allow_unused=True))
        return tuple(next(found) if isinstance(part, Tensor) else None for part in held)

    operator.register_autograd(backward, setup_context=setup)


_differentiable(rms_with_sum, lambda b, w, e, s: (_rms(b + s, w, e), b + s))
_differentiable(sum_with_layer_norm, lambda a, b, w, c, e: (
    a + b, torch.nn.functional.layer_norm(a + b, a.shape[-1:], w, c, e)))
_differentiable(norm_alone, lambda a, b, w, e: (_rms(a + b, w, e),))
_differentiable(with_offset, lambda x, y, w: (_rms(x + y, 1 + w, 1e-6), x + y, (x + y).square().mean(-1)))
_differentiable(stops_gradients, lambda x, y, w, e: (_rms((x + y).detach(), w, e), x + y))


class FusedStack(nn.Module):
    """A pre-norm stack in the style of kernel libraries: each layer adds the previous branch and norms the sum at once."""

    def __init__(self, run: Run, num_layers: int = 4, width: int = 16, vocabulary: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.run, self.num_layers = run, num_layers
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(num_layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_layers))
        self.weights = nn.ParameterList(1 + 0.2 * torch.randn(width, generator=generator) for _ in range(num_layers + 1))
        self.biases = nn.ParameterList(0.2 * torch.randn(width, generator=generator) for _ in range(num_layers + 1))

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embedding(ids)
        normed = _rms(stream, self.weights[0], 1e-6)
        for index, (up, down) in enumerate(zip(self.up, self.down), start=1):
            normed, stream = self.run(self, down(torch.tanh(up(normed))), stream, index)
        return self.head(normed)


def _in_place(m: Any, f: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
    in_place(f, x, m.weights[i], 1e-6)
    return f, x


def _in_place_on_a_copy(m: Any, f: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
    x = x.clone()
    in_place(f, x, m.weights[i], 1e-6)
    return f, x


def _in_place_seen(m: Any, f: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
    before = x.view(-1, x.shape[-1])  # another name of what is written
    in_place(f, x, m.weights[i], 1e-6)
    return f, x + torch.tanh(before).view_as(x)


def _norm_alone(m: Any, f: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
    return norm_alone(x, f, m.weights[i] if i % 2 else None, 1e-6), x + f


def _layer_norm(m: Any, f: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
    total, normed = sum_with_layer_norm(x, f, m.weights[i], m.biases[i])
    return normed, total


FUSED: dict[str, Run] = {
    "rms": lambda m, f, x, i: rms_with_sum(f, m.weights[i], 1e-3, x),
    "rms, other order": lambda m, f, x, i: rms_with_sum(x, m.weights[i], 1e-6, f),
    "layer norm": _layer_norm,
    "offset": lambda m, f, x, i: with_offset(f, x, m.weights[i])[:2],
    "norm alone": _norm_alone,
}
IN_PLACE: dict[str, Run] = {"in place": _in_place, "in place on a copy": _in_place_on_a_copy}
LEFT_ALONE: dict[str, Run] = {
    "near miss": lambda m, f, x, i: near_miss(x, f, m.weights[i], 0.1),
    "scaled": lambda m, f, x, i: scaled_miss(x, f, m.weights[i], 1e-6),
    "gradients": lambda m, f, x, i: stops_gradients(x, f, m.weights[i], 1e-6),
    "a second name": _in_place_seen,
}
