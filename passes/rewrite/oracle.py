"""The oracle: run a plain graph as Attention Residuals directly by Eq. 5-6, without any of the rewrite's nodes.

An interpreter executes the plain graph node by node. At a residual addition, it records the output of the layer, sums the
outputs so far into blocks again, computes the softmax over depth with elementary operations, and hands the mix to the
readers in place of the sum. It shares detection with the rewrite and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnres_fx.passes.find.streams import Layer, Stream
from attnres_fx.passes.graph.vocabulary import CASTS, COPIES, DROPOUTS, base_of, op_name, pass_through_chain
from attnres_fx.passes.rewrite.plan import StreamPlan


class OracleInterpreter(fx.Interpreter):
    """Executes a normalized plain graph with the streams in ``parameters`` mixed: (stream, plan, query, key gain)."""

    def __init__(
        self, gm: fx.GraphModule, parameters: Sequence[tuple[Stream, StreamPlan, Tensor, Tensor | None]]
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._layers: dict[fx.Node, tuple[int, int]] = {}
        self._parameters = list(parameters)
        self._outputs: list[list[Tensor]] = [[] for _ in parameters]
        self._order: dict[int, Tensor] = {}
        for index, (stream, *_) in enumerate(parameters):
            for position, layer in enumerate(stream.layers, start=1):
                self._layers[layer.node] = (index, position)

    def run_node(self, n: fx.Node) -> Any:
        """The value of ``n``: the mix where ``n`` is an addition of a stream."""
        found = self._layers.get(n)
        plain = super().run_node(n)
        return plain if found is None else self._mix(plain, *found)

    def _mix(self, plain: Tensor, index: int, position: int) -> Tensor:
        stream, plan, query, key_gain = self._parameters[index]
        outputs, layer = self._outputs[index], stream.layers[position - 1]
        if position == 1:
            outputs.append(self.env[layer.skip])
            self._order[index] = torch.arange(plain.numel(), dtype=torch.float64, device=plain.device).view(plain.shape)
        else:
            self._order[index] = self._follow_layout(self._order[index], layer)
        output = torch.zeros_like(plain)
        for term in layer.terms:
            output = output + self.env[term]
        # Layers are summed and mixed in the layout of the first addition, rows along the feature dimension.
        order = self._order[index].long().flatten()
        first = torch.empty_like(outputs[0], dtype=plain.dtype).contiguous()
        first.view(-1)[order] = output.to(plain.dtype).flatten()
        outputs.append(first)
        rows = [value.movedim(stream.feature_dim, -1) for value in outputs]
        mixed = mix_by_definition(rows, plan.boundaries, query[position],
                                  None if key_gain is None else key_gain[position], plan.eps)
        if plan.mix_scale == "sum":
            mixed = mixed * len(sources_by_definition(outputs, plan.boundaries))
        here = mixed.movedim(-1, stream.feature_dim).flatten()[order].view(plain.shape)
        return here.to(plain.dtype)

    def _follow_layout(self, order: Tensor, layer: Layer) -> Tensor:
        """Take the numbering of the elements through the pass-throughs that the stream itself goes through."""
        base = base_of(layer.skip)
        for node in pass_through_chain(layer.skip, base):
            if op_name(node) not in CASTS | COPIES | DROPOUTS:
                before, kept = node.all_input_nodes[0], self.env[node.all_input_nodes[0]]
                self.env[before] = order
                order = super().run_node(node)
                self.env[before] = kept
        return order


def sources_by_definition(outputs: Sequence[Tensor], boundaries: Sequence[int]) -> list[Tensor]:
    """Eq. 5-6: [b_0, the complete block sums, the partial sum if there is one] from b_0 and the layer outputs so far."""
    embedding, layers = outputs[0], outputs[1:]
    sources, start = [embedding], 0
    for end in boundaries:
        members = layers[start:end]
        if members:
            total = members[0]
            for member in members[1:]:
                total = total + member
            sources.append(total)
        start = end
    return sources


def mix_by_definition(
    outputs: Sequence[Tensor], boundaries: Sequence[int], query: Tensor, key_gain: Tensor | None, eps: float
) -> Tensor:
    """Eq. 2-4 by elementary operations on the stacked sources, in float32 or better."""
    sources = sources_by_definition(outputs, boundaries)
    wide = torch.float64 if any(s.dtype == torch.float64 for s in sources) else torch.float32
    values = torch.stack([s.to(wide) for s in sources])
    keys = values / torch.sqrt(values.square().mean(-1, keepdim=True) + eps)
    if key_gain is not None:
        keys = keys * key_gain.to(wide)
    weights = (keys * query.to(wide)).sum(-1, keepdim=True).softmax(0)
    return (weights * values).sum(0)
