"""The rewritten graph of a random network, made by the passes alone."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from attnres_fx.passes._compat.graphs import fake_mode_of
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.rewrite.match import Assignment
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.passes.rewrite.sites import relative_sites
from support.passes import rewrite


def queries(num_layers: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers + 1, width)
    return (torch.randn(shape, generator=generator, dtype=torch.float64),
            1 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64))


def rewritten(gm: fx.GraphModule, stream: Stream, boundaries: tuple[int, ...], mix_scale: str) -> fx.GraphModule:
    """``gm`` with two more inputs in front, the queries and the gains."""
    width = stream.width
    sites = relative_sites(stream, "")
    plan = StreamPlan("stream", "", stream.num_layers, width, boundaries, sites, 1e-6, mix_scale, True)
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        query, gain = gm.graph.placeholder("query"), gm.graph.placeholder("gain")
    mode = fake_mode_of([value_of(stream.layers[0].node)])
    for node in (query, gain):
        node.meta["example_value"] = mode.from_tensor(torch.empty(stream.num_layers + 1, width, dtype=torch.float64))
    return rewrite(gm, [Assignment(stream, plan, query, gain)])
