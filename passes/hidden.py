"""Hidden layers: residual additions in the bodies of higher-order operators that detection does not enter.

The branches of ``cond`` and the body of ``while_loop`` run or do not run as values decide, so that they are not inlined. A
stream that such a body continues would be found in pieces; it is refused. A body within a branch is a branch like any other.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from attnres_fx.passes.graph import copy_graph_module, float_tensor, same_size
from attnres_fx.passes.normalize import normalize_graph
from attnres_fx.passes.streams import Stream
from attnres_fx.passes.vocabulary import bodies_of


def hidden_layers(graph: fx.Graph) -> list[fx.Node]:
    """The higher-order operators of ``graph`` whose bodies, at any depth, hold residual additions. Changes nothing."""
    from attnres_fx.passes.detect import detect_graph  # which builds on this file

    found = []
    for node in graph.nodes:
        for body in bodies_of(node):
            inner = copy_graph_module(body)
            normalize_graph(inner.graph)
            if detect_graph(inner.graph) or hidden_layers(inner.graph):
                found.append(node)
                break
    return found


def cuts(node: fx.Node, stream: Stream, reach: Callable[[fx.Node, fx.Node], tuple[bool, bool]]) -> bool:
    """Whether ``stream`` comes out of ``node`` or goes into it, rather than around it as around any other branch.

    ``reach`` tells whether one node is an ancestor of another.
    """
    whole = float_tensor(stream.layers[0].node)
    if whole is None or not any((value := float_tensor(source)) is not None and same_size(value.shape, whole.shape)
                                for source in node.all_input_nodes):
        return False
    return reach(node, stream.values[0])[0] or reach(stream.values[-1], node)[0]
