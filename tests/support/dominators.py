"""A second opinion on streams: by dominators, which detection itself does not use."""

from __future__ import annotations

import networkx as nx
from torch import fx

from attnres_fx.passes.find.streams import Stream


def bypassed(stream: Stream) -> list[int]:
    """The positions of ``stream`` around which a way leads from its first value to its last.

    Where every layer reads the value before it and no other, there is none: each value dominates the next.
    """
    first, last = stream.values[0], stream.values[-1]
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    flow.add_edges_from((source, node) for node in first.graph.nodes for source in node.all_input_nodes)
    dominator = nx.immediate_dominators(flow, first)
    on_all_ways, node = {last}, last
    while node is not first:
        node = dominator[node]
        on_all_ways.add(node)
    return [position for position, value in enumerate(stream.values) if value not in on_all_ways]
