"""Calls of the operators that write into given tensors, for the tests of every kernel: the tensors lie in one arena."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnres_fx.runtime.into import INTO
from attnres_fx.runtime.operators import operator_of

BASES = ("mix", "mix_phase1", "mix_phase2", "mix_norm")
GUARD = 5  # elements between two outputs in the arena: odd, so that the next is not aligned


@dataclass
class Call:
    """One call of a functional operator, by base name."""

    base: str
    arguments: list[Any]

    def functional(self, variant: str = "") -> list[Tensor]:
        made = operator_of(self.base, variant)(*self.arguments)
        return made if isinstance(made, list) else [made]

    def into(self, variant: str, outputs: dict[str, Any]) -> None:
        assert INTO[operator_of(self.base, variant)](*self.arguments, **outputs) is None

    def named(self, tensors: list[Tensor]) -> dict[str, Any]:
        """Tensors like the results, as the arguments that they are written to."""
        if self.base == "mix_phase1":
            count = len(tensors) // 2
            return {"mixed_out": tensors[:count], "lse_out": tensors[count:]}
        if self.base == "mix_norm":
            return {"normed_out": tensors[0], "partial_out": tensors[1] if len(tensors) > 1 else None}
        return {"mixed_out": tensors[0]}


def make(base: str, count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, queries: int = 1,
         early: bool = False, delta: bool = True, normalize: bool = False, bare: bool = False, seed: int = 3) -> Call:
    """A call with ``count`` sources; ``early``, ``delta`` and ``bare`` (no gains) say what else there is."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(like)

    width = shape[-1]
    several = base == "mix_phase1" or queries > 1
    query = draw(*([queries] if several else []), width, like=wide) / width**0.5
    gain = None if bare else 1 + draw(*query.shape, like=wide) / 3
    sources = [draw(*shape) * (0.5 + i % 3) for i in range(count)]
    options = [1e-5, 0.7, normalize]
    given = [draw(*shape), draw(*shape[:-1], like=wide)]
    if base == "mix_phase1":
        return Call(base, [sources, query, gain, *options])
    if base == "mix":
        return Call(base, [sources, query, gain, *options, 1.5])
    if base == "mix_phase2":
        return Call(base, [*given, sources, query, gain, *options, 1.5])
    known = given if early else [None, None]
    weight = None if bare else draw(width, like=wide)
    added = draw(*shape) if delta else None
    return Call(base, [sources, query, gain, added, *known, weight, weight, *options, 1.5, normalize, 1e-6])


@dataclass
class Arena:
    """Tensors like some results, one after the other in a buffer of bytes."""

    storage: Tensor
    outputs: list[Tensor]

    def untouched(self) -> bool:
        """Whether every byte beside the outputs is as it was."""
        rest = self.storage.clone()
        base = self.storage.data_ptr()
        for tensor in self.outputs:
            start = tensor.data_ptr() - base
            rest[start : start + tensor.nbytes] = 255
        return bool((rest == 255).all())


def arena(like: list[Tensor]) -> Arena:
    """All bits set: NaN in every dtype."""
    places, end = [], 0
    for tensor in like:
        start = -(-end // tensor.element_size()) * tensor.element_size() + GUARD * tensor.element_size()
        places.append(start)
        end = start + tensor.nbytes
    storage = torch.full((end + 64,), 255, dtype=torch.uint8)
    outputs = []
    for tensor, start in zip(like, places):
        size = tensor.element_size()
        whole = storage[start % size :]
        flat = whole[: whole.numel() // size * size].view(tensor.dtype)[start // size :]
        outputs.append(flat[: tensor.numel()].view(tensor.shape))
        assert all(math.isnan(value) for value in flat[:2].tolist())
    return Arena(storage, outputs)


def check(call: Call, variant: str = "") -> None:
    """The results in an arena, bit by bit those of the functional operator; and so again with the partial sum in place."""
    wanted = call.functional(variant)
    placed = arena(wanted)
    call.into(variant, call.named(placed.outputs))
    for got, other in zip(placed.outputs, wanted, strict=True):
        assert torch.equal(got, other), call.base
    assert placed.untouched()
    if len(wanted) == 2 and call.base == "mix_norm":
        in_place = arena(wanted)
        last = call.arguments[0][-1]
        in_place.outputs[1].copy_(last)
        sources = [*call.arguments[0][:-1], in_place.outputs[1]]
        replace(call, arguments=[sources, *call.arguments[1:]]).into(variant, call.named(in_place.outputs))
        for got, other in zip(in_place.outputs, wanted, strict=True):
            assert torch.equal(got, other), "in place"
        assert in_place.untouched()
