"""Links: the additions that detection has found so far, the tree they form, and which descends from which."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from attnres_fx.passes.find.obstacles import Obstacle
from attnres_fx.passes.find.streams import Layer
from attnres_fx.passes.graph.vocabulary import LIKENESSES, base_of, is_contraction, op_name

# How far a term is followed back to an earlier value of the stream, in nodes.
_TERM_REACH = 128


@dataclass(eq=False)
class Link:
    """A residual addition found so far, and its place in the tree of additions that grow from one root."""

    layer: Layer
    root: fx.Node
    position: int
    parent: Link | None
    contraction: bool
    obstacles: tuple[Obstacle, ...] = ()
    children: list[Link] = field(default_factory=list)
    enclosed: bool = False  # within the branch of another addition that starts from the same value


class Search:
    """The state of one detection: the order of nodes and the links found so far."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.links: dict[fx.Node, Link] = {}
        self.starts: dict[fx.Node, list[Link]] = {}

    def reach(self, source: fx.Node, target: fx.Node) -> tuple[bool, bool]:
        """(whether ``source`` is an ancestor of ``target``, whether a contraction lies on a way between)."""
        start = self.order[source]
        if self.order[target] <= start:
            return False, False
        inputs: dict[fx.Node, list[fx.Node]] = {}
        pending = [target]
        leaps: dict[fx.Node, bool] = {}
        while pending:
            node = pending.pop()
            if node in inputs:
                continue
            link = self.links.get(node)
            if link is not None:
                # A chain found already: leap to the source if it is on the chain, else to the root of the chain.
                if self.on_chain(source, link):
                    leaps[node] = True
                    inputs[node] = []
                    continue
                inputs[node] = [link.root] if start < self.order[link.root] else []
            else:
                inputs[node] = [] if op_name(node) in LIKENESSES else list(node.all_input_nodes)
            pending += [i for i in inputs[node] if self.order[i] > start and i not in inputs]
        descends = {source: False}
        for node in sorted(inputs, key=self.order.__getitem__):
            if node in leaps:
                descends[node] = True
                continue
            ways = [descends[i] for i in inputs[node] if i in descends]
            if ways:
                descends[node] = any(ways) or is_contraction(node) or node in self.links
        return (target in descends), descends.get(target, False)

    def on_chain(self, source: fx.Node, link: Link) -> bool:
        """Whether ``source`` is a proper earlier value of the chain that ``link`` ends."""
        if source is link.root:
            return True
        other = self.links.get(source)
        if other is None or other.root is not link.root or other.position > link.position:
            return False
        walk: Link | None = link
        while walk is not None and walk.position > other.position:
            walk = walk.parent
        return walk is other

    def earlier_value(self, term: fx.Node, end: Link) -> fx.Node | None:
        """The value of the chain before ``end``, its root apart, that ``term`` is made of; None if there is none.

        The output of a sublayer that reads an earlier value (a shortcut around other layers) is a term like any other.
        """
        pending, seen = [base_of(term)], {term}
        while pending and len(seen) < _TERM_REACH:
            node = pending.pop()
            link = self.links.get(node)
            if link is not None:
                if link.root is end.root and link.position < end.position and self.on_chain(node, end):
                    return node
            elif self.order[node] > self.order[end.root] and op_name(node) not in LIKENESSES and not is_contraction(node):
                pending += [source for source in node.all_input_nodes if source not in seen]
                seen.update(node.all_input_nodes)
        return None
