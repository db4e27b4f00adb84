"""Transforms: the levels of torch.func at which a stream runs (analysis).

The operators support ``grad``, ``vjp`` and what is built on them. Batched values, and values with tangents, have properties
that a graph does not show, so a rewrite may fail on them.
"""

from __future__ import annotations

from torch import fx

from attnres_fx.passes.graph.nodes import place_of
from attnres_fx.passes.graph.vocabulary import op_name
from attnres_fx.runtime.errors import StreamRefusedError
from attnres_fx.runtime.marker import ENTER

_OPENS = {
    "_vmap_increment_nesting": ("torch.vmap", "give the model the batch itself, and keep vmap for what is around it"),
    "_enter_dual_level": ("forward-mode differentiation (torch.func.jvp, jacfwd)",
                          "differentiate backwards, with torch.func.vjp or jacrev"),
}
_CLOSES = {"_vmap_decrement_nesting": "_vmap_increment_nesting", "_exit_dual_level": "_enter_dual_level"}


def refusal_of_transform(graph: fx.Graph) -> StreamRefusedError | None:
    """What to say where the rewrite of a graph failed whose stream runs at such a level; None where no stream does."""
    levels: list[str] = []
    for node in graph.nodes:
        name = op_name(node)
        if name in _OPENS:
            levels.append(name)
        elif _CLOSES.get(name, "") in levels:
            levels.remove(_CLOSES[name])
        elif node.target is ENTER and levels:
            transform, remedy = _OPENS[levels[-1]]
            return StreamRefusedError(f"the stream runs under {transform}, where it cannot be rewritten",
                                      place=place_of(node), remedy=remedy)
    return None
