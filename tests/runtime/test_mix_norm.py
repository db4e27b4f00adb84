"""``attnres::mix_norm`` against its three parts spelled out in float64: values and all gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attnres_fx.runtime import mix_norm as fused
from attnres_fx.runtime.mix import mix
from attnres_fx.runtime.phases import PHASE2

EPS, NORM_EPS = 1e-6, 1e-5


def make(count: int, shape: tuple[int, ...], given: set[str], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The tensors of a call, in the order of the operator; those that are not in ``given`` are None."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    width = shape[-1]
    sources, query = [draw(*shape) for _ in range(count)], draw(width)
    rest = [("key_gain", (width,)), ("delta", shape), ("mixed", shape), ("lse", shape[:-1]), ("weight", (width,)),
            ("bias", (width,))]
    optional = [draw(*size) if name in given or (name == "lse" and "mixed" in given) else None for name, size in rest]
    return [sources, query, *optional]


def leaves_of(arguments: list[Any]) -> list[Tensor]:
    return [*arguments[0], *(tensor for tensor in arguments[1:] if tensor is not None)]


def in_parts(arguments: list[Any], logit_scale: float, normalize: bool, factor: float, centered: bool) -> list[Tensor]:
    """The addition, the mix (or phase 2) and the norm, each by itself."""
    sources, query, gain, delta, mixed, lse, weight, bias = arguments
    partial = None if delta is None else sources[-1] + delta
    rows = sources if partial is None else [*sources[:-1], partial]
    if mixed is None:
        made = mix(rows, query, gain, eps=EPS, logit_scale=logit_scale, normalize_values=normalize, output_factor=factor)
    else:
        made = PHASE2(mixed, lse, rows, query, gain, EPS, logit_scale, normalize, factor)
    width = [made.shape[-1]]
    if centered:
        normed = F.layer_norm(made, width, weight, bias, NORM_EPS)
    else:
        normed = F.rms_norm(made, width, weight, NORM_EPS)
        normed = normed if bias is None else normed + bias
    return [normed] if partial is None else [normed, partial]


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("given", [set(names) for count in range(6) for names in
                                   itertools.combinations(("key_gain", "delta", "mixed", "weight", "bias"), count)],
                         ids=lambda given: "-".join(sorted(given)) or "bare")
def test_is_its_three_parts(given: set[str], normalize: bool, centered: bool) -> None:
    arguments = make(3, (2, 5, 6), given)
    leaves = leaves_of(arguments)
    made = fused.MIX_NORM_REFERENCE(*arguments, EPS, 0.7, normalize, 1.5, centered, NORM_EPS)
    expected = in_parts(arguments, 0.7, normalize, 1.5, centered)
    grads = [torch.randn_like(rows) for rows in made]
    for use in [slice(0, 1), slice(None), *([slice(1, 2)] if "delta" in given else [])]:
        # Each result alone, too: a model may read the norm, the partial sum, or both.
        ours = torch.autograd.grad(made[use], leaves, grads[use], retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(expected[use], leaves, grads[use], retain_graph=True, allow_unused=True)
        for one, other in zip((*made, *ours), (*expected, *theirs), strict=True):
            if one is None or other is None:
                assert all(grad is None or not grad.any() for grad in (one, other))
            else:
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_backward_hands_out_the_norm_again() -> None:
    arguments = make(3, (4, 6), {"key_gain", "weight"})
    options = (EPS, 1.0, False, 1.0, False, NORM_EPS)
    with torch.no_grad():
        (normed,) = fused.MIX_NORM_REFERENCE(*arguments, *options)
        again = torch.ops.attnres.mix_norm_backward_reference(
            torch.randn_like(normed), None, *arguments[:3], *arguments[4:], *options)[0]
    assert torch.equal(normed, again)


@pytest.mark.parametrize(("change", "message"), [
    ({"lse": None}, "mixed and lse"), ({"delta": torch.zeros(4, 7)}, "delta"),
    ({"delta": torch.zeros(4, 6, dtype=torch.float32)}, "delta"),
    ({"weight": torch.zeros(5)}, "weight"), ({"query": torch.zeros(2, 6)}, "query"),
])
def test_refuses_what_has_no_meaning(change: dict[str, Any], message: str) -> None:
    names = ("sources", "query", "key_gain", "delta", "mixed", "lse", "weight", "bias")
    arguments = dict(zip(names, make(3, (4, 6), {"delta", "mixed", "weight"})))
    with pytest.raises((ValueError, TypeError), match=message):
        fused.MIX_NORM(*{**arguments, **change}.values(), EPS, 1.0, False, 1.0, False, NORM_EPS)


def test_second_backward_is_refused_and_torch_func_is_not() -> None:
    arguments = make(2, (3, 4), {"weight"})
    options = (EPS, 1.0, False, 1.0, False, NORM_EPS)
    (grad,) = torch.autograd.grad(fused.MIX_NORM(*arguments, *options)[0].sum(), arguments[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated only once"):
        grad.sum().backward()

    def loss(query: Tensor) -> Tensor:
        return fused.MIX_NORM(arguments[0], query, *arguments[2:], *options)[0].square().sum()

    hessian = torch.func.hessian(loss)(arguments[1].detach())
    torch.testing.assert_close(hessian, hessian.t())
    assert hessian.abs().max() > 1e-3
