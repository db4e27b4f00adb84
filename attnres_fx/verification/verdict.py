"""The verdict of a verification, and the tolerances behind it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnres_fx.passes._compat.graphs import pytree, schema_of
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.findings import Marked
from attnres_fx.passes.graph.edit import copy_graph_module, finish
from attnres_fx.passes.graph.vocabulary import is_mix
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.runtime.mix import MIX

# Largest relative deviation that rounding explains, by the dtype of the model. Models round inside (Hugging Face norms
# go through float32), so that float64 does not give 1e-15.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Verification(float):
    """The relative deviation from the plain network at zero queries, with what else was checked.

    ``zero_query`` is the number itself; ``zero_query_sum`` the same with every mix multiplied by its number of sources,
    which must vanish up to rounding (under "paper" norms see the stream divided by that, and their eps weighs more).
    ``random_query`` is the relative deviation from the definition (Eq. 5-6 re-summed from the recorded layer outputs) with
    random queries and gains, which a wrong block boundary, swapped rows or a lost gain would raise. ``tolerance`` is the
    largest deviation that rounding explains; ``exact_start`` says whether zero queries should reproduce the plain network;
    ``passed`` is the verdict.
    """

    zero_query: float
    zero_query_sum: float
    random_query: float
    tolerance: float
    exact_start: bool
    passed: bool
    notes: tuple[str, ...]

    @staticmethod
    def of(zero: float, zero_sum: float, random: float, tolerance: float, exact: bool, notes: Sequence[str]) -> Verification:
        """Weigh the deviations."""
        result = Verification(zero)
        result.zero_query, result.zero_query_sum, result.random_query = zero, zero_sum, random
        result.tolerance, result.exact_start, result.notes = tolerance, exact, tuple(notes)
        result.passed = random <= tolerance and zero_sum <= tolerance
        return result

    def __str__(self) -> str:
        lines = [
            f"zero queries, against the plain network: relative deviation {self.zero_query:.1e}"
            + ("" if self.zero_query == self.zero_query_sum else f" ({self.zero_query_sum:.1e} as sums)"),
            f"random queries and gains, against Eq. 5-6 by definition: relative deviation {self.random_query:.1e} "
            f"(rounding explains up to {self.tolerance:.0e})",
            *self.notes,
            "passed" if self.passed else "FAILED",
        ]
        return "\n".join(lines)

    __repr__ = __str__


def deviation(result: Any, reference: Any) -> float:
    """The largest relative deviation among the floating-point tensors of two outputs of one structure."""
    largest = 0.0
    for ours, theirs in zip(pytree.tree_leaves(result), pytree.tree_leaves(reference), strict=True):
        if not isinstance(ours, Tensor) or not ours.is_floating_point() or ours.numel() == 0:
            continue
        a, b = ours.double(), theirs.double()
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)):
            return float("inf")
        a, b = a[finite], b[finite]
        scale = b.norm()
        distance = float((a - b).norm() / scale) if scale > 0 else float((a - b).norm())
        largest = max(largest, distance)
    return largest


def tolerance_for(dtypes: Collection[torch.dtype]) -> float:
    """The largest relative deviation that rounding explains in a model with weights of these dtypes."""
    return max(ROUNDING.get(dtype, 1e-4) for dtype in dtypes or {torch.float32})


def trial_values(kind: str, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the parameters of a stream are verified at: (zero queries or unit gains, random ones)."""
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    if kind == "query":
        return torch.zeros_like(like), noise * (2.0 / like.shape[-1] ** 0.5)
    return torch.ones_like(like), 1 + 0.3 * noise


def parameters_of(
    found: Marked, value: Callable[[fx.Node], Tensor]
) -> list[tuple[Stream, StreamPlan, Tensor, Tensor | None]]:
    """The streams of a graph in the form the oracle takes; ``value`` gives the parameter that a node reads."""
    return [(a.stream, a.plan, value(a.query), None if a.key_gain is None else value(a.key_gain)) for a in found.assignments]


def as_sums(gm: fx.GraphModule) -> fx.GraphModule:
    """A rewritten network with every mix multiplied by its number of sources, as under ``mix_scale="sum"``."""
    gm = copy_graph_module(gm)
    for node in gm.graph.nodes:
        if is_mix(node):
            *others, _ = mix_arguments(node, node.args)
            node.args, node.kwargs = (*others, float(len(others[0]))), {}
    return finish(gm)


def mix_arguments(node: fx.Node, given: Sequence[Any]) -> tuple[Any, ...]:
    """The seven arguments of a mix; a serialized graph omits those that have their default value."""
    schema = schema_of(MIX).arguments
    values = [*given, *(argument.default_value for argument in schema[len(given):])]
    for index, described in enumerate(schema):
        if described.name in node.kwargs:
            values[index] = node.kwargs[described.name]
    return tuple(values)
