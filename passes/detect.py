"""Detect: find the residual streams of a normalized graph by data flow alone. Changes nothing.

A residual addition is a sum one operand of which (the skip) reaches the others (the terms) only through a branch. Chains
of such additions, linked by identity through pass-throughs, are the streams. The way:

1. Every sum is flattened over inner sums that nobody else reads. The skip is the operand that is an ancestor of another;
   of two on one chain the later, so that an embedding added again is a term and not a skip.
2. Ancestry is decided by a search backward from the later operand that never goes behind the earlier one and leaps over
   chains already found, so that its cost is that of one branch and the whole stays linear in the graph.
3. Where the skip reaches a sum through something else than pass-throughs (a norm, a scale, a gate), the link is kept and
   the operation recorded as an obstacle: post-norm and its kin are found for what they are.
4. A branch with a contraction is a sublayer. Sums without one count only between two that have one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from attnres_fx.passes.features import feature_dim
from attnres_fx.passes.graph import float_tensor, same_size
from attnres_fx.passes.hidden import cuts, hidden_layers
from attnres_fx.passes.invariance import describe_norms
from attnres_fx.passes.recognize_reads import depth_reads
from attnres_fx.passes.streams import Layer, Obstacle, Stream
from attnres_fx.passes.vocabulary import (
    BATCH_NORMS,
    NORMS,
    Addition,
    addition_of,
    base_of,
    changes_of,
    is_contraction,
    is_mutation,
    keeps_identity,
    op_name,
    passed_through,
)

# How far a skip is followed back through operations on the stream, in nodes: a hand-written norm takes about ten.
_ON_STREAM_REACH = 24
_MULTIPLIES = {"mul", "__mul__", "imul", "mul_", "div", "truediv", "__truediv__", "div_", "lerp", "rmul", "__rmul__"}


@dataclass(eq=False)
class _Link:
    """A residual addition found so far, and its place in the tree of additions that grow from one root."""

    layer: Layer
    root: fx.Node
    position: int
    parent: _Link | None
    contraction: bool
    obstacles: tuple[Obstacle, ...] = ()
    children: list[_Link] = field(default_factory=list)
    enclosed: bool = False  # within the branch of another addition that starts from the same value


class _Search:
    """The state of one detection: the order of nodes and the links found so far."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.links: dict[fx.Node, _Link] = {}
        self.starts: dict[fx.Node, list[_Link]] = {}

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
                inputs[node] = list(node.all_input_nodes)
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

    def on_chain(self, source: fx.Node, link: _Link) -> bool:
        """Whether ``source`` is a proper earlier value of the chain that ``link`` ends."""
        if source is link.root:
            return True
        other = self.links.get(source)
        if other is None or other.root is not link.root or other.position > link.position:
            return False
        walk: _Link | None = link
        while walk is not None and walk.position > other.position:
            walk = walk.parent
        return walk is other


def detect(gm: fx.GraphModule) -> list[Stream]:
    """The residual streams of ``gm``, in graph order, convertible or not.

    ``gm`` is a normalized graph of Dynamo, ``torch.export`` or ``symbolic_trace`` with traced values. Each stream carries
    its layers, the readers of every position, its norm placement, and its obstacles.
    """
    return detect_graph(gm.graph)


def detect_graph(graph: fx.Graph) -> list[Stream]:
    """:func:`detect` on a bare graph."""
    search = _Search(graph)
    for node in graph.nodes:
        link = _link_of(node, search)
        if link is not None:
            for inner in link.layer.inner:
                _withdraw(inner, search)
            _enter(link, search)
    chains = _chains(search)
    reads = {source: read.node for read in depth_reads(graph) for source in read.sources} if chains else {}
    streams = [_stream(f"stream{index}", chain, search, reads) for index, chain in enumerate(chains)]
    for stream in streams:
        describe_norms(stream, search.order)
    for node in hidden_layers(graph):
        for stream in streams:
            if cuts(node, stream, search.reach):
                stream.obstacles.insert(0, Obstacle("hidden", node))
    return streams


def _enter(link: _Link, search: _Search) -> None:
    """Hang a link into its tree; earlier additions to the same value that lead into its branch are enclosed by it."""
    siblings = link.parent.children if link.parent is not None else search.starts.setdefault(link.root, [])
    for sibling in siblings:
        if any(search.reach(sibling.layer.node, term)[0] for term in link.layer.terms):
            sibling.enclosed = True
    siblings.append(link)
    search.links[link.layer.node] = link


def _withdraw(inner: fx.Node, search: _Search) -> None:
    """An inner sum turned out to be part of a larger one: take its own link back."""
    link = search.links.pop(inner, None)
    if link is not None:
        siblings = link.parent.children if link.parent is not None else search.starts[link.root]
        siblings.remove(link)


def _flatten(node: fx.Node, search: _Search) -> tuple[list[fx.Node], list[fx.Node]]:
    """(operands of the whole sum, inner sums that nobody else reads)."""
    operands: list[fx.Node] = []
    inner: list[fx.Node] = []
    whole = float_tensor(node)
    pending = [node]
    while pending:
        total = pending.pop()
        found = addition_of(total)
        if found is None or whole is None:
            continue
        for part in (found.right, found.left):
            lone, through = part, []
            while len(lone.users) == 1 and keeps_identity(lone):
                through.append(lone)
                lone = passed_through(lone) or lone
            value = float_tensor(lone)
            within = addition_of(lone)
            opens = within is not None and len(lone.users) == 1 and not is_mutation(lone) and (
                lone in search.links or _whole_parts(within, whole.shape))
            if opens and value is not None and same_size(value.shape, whole.shape) and value.dtype == whole.dtype:
                inner += [lone, *through]
                pending.append(lone)
            else:
                operands.append(part)
    return operands, inner


def _whole_parts(found: Addition, shape: torch.Size) -> bool:
    """Whether both parts of a sum have its shape: a branch plus its bias is one term, not two."""
    values = [float_tensor(found.left), float_tensor(found.right)]
    return all(value is not None and same_size(value.shape, shape) for value in values)


def _link_of(node: fx.Node, search: _Search) -> _Link | None:
    """``node`` as a residual addition, or None."""
    found, whole = addition_of(node), float_tensor(node)
    if found is None or whole is None or found.alpha != 1 or found.left is found.right or is_mutation(node):
        return None
    operands, inner = _flatten(node, search)
    if len(set(operands)) != len(operands):
        return None
    skips = [part for part in operands
             if (value := float_tensor(part)) is not None and same_size(value.shape, whole.shape)]

    # Of two operands on one chain the later is the skip: an embedding added again is a term.
    ends = [link for part in operands if (link := search.links.get(base_of(part))) is not None]
    skips = [part for part in skips if not any(
        search.on_chain(base_of(part), link) for link in ends if link.layer.node is not base_of(part))]
    skips.sort(key=search.order.__getitem__)

    for skip in skips:
        base = base_of(skip)
        terms = tuple(part for part in operands if part is not skip)
        ways = [search.reach(base, term) for term in terms]
        if any(reached for reached, _ in ways):
            branches = sum(reached and contracts for reached, contracts in ways)
            layer = Layer(node, skip, terms, tuple(inner), branches)
            return _plain_link(layer, base, any(contracts for _, contracts in ways), search)
    for skip in skips:
        terms = tuple(part for part in operands if part is not skip)
        link = _obstructed_link(Layer(node, skip, terms, tuple(inner)), search)
        if link is not None:
            return link
    return None


def _plain_link(layer: Layer, base: fx.Node, contraction: bool, search: _Search) -> _Link:
    parent = search.links.get(base)
    if parent is not None:
        return _Link(layer, parent.root, parent.position + 1, parent, contraction)
    if contraction:
        earlier, way = _back_to_link(base, search)
        if earlier is not None:
            obstacle = _classify(way, earlier.layer.node, search)
            return _Link(layer, earlier.root, earlier.position + 1, earlier, contraction, (obstacle,))
    return _Link(layer, base, 1, None, contraction)


def _obstructed_link(layer: Layer, search: _Search) -> _Link | None:
    """A sum whose skip is scaled, gated or normalised on its way: c * x + f(x)."""
    base = base_of(layer.skip)
    whole = float_tensor(layer.node)
    way: list[fx.Node] = []
    for origin in _origins(base, search, way):
        value = float_tensor(origin)
        if value is None or whole is None or not same_size(value.shape, whole.shape):
            continue
        ways = [search.reach(origin, term) for term in layer.terms]
        if any(reached and contracts for reached, contracts in ways):
            parent = search.links.get(origin)
            obstacle = _classify(_between(base, origin), origin, search)
            root = parent.root if parent is not None else origin
            return _Link(layer, root, parent.position + 1 if parent else 1, parent, True, (obstacle,))
    return None


def _origins(base: fx.Node, search: _Search, way: list[fx.Node]) -> list[fx.Node]:
    """Values that ``base`` is made of by operations without contraction, nearest first, links of chains in front."""
    pending, seen = [base], {base}
    while pending and len(seen) < _ON_STREAM_REACH:
        node = pending.pop(0)
        if is_contraction(node) or (node in search.links and node is not base):
            continue
        for source in node.all_input_nodes:
            if source not in seen and float_tensor(source) is not None:
                seen.add(source)
                way.append(source)
                pending.append(source)
    return sorted((n for n in way if n.op != "get_attr"), key=lambda n: (n not in search.links, -search.order[n]))


def _back_to_link(base: fx.Node, search: _Search) -> tuple[_Link | None, list[fx.Node]]:
    """The chain end from which ``base`` is made by norms, scales and the like, and the operations between."""
    way: list[fx.Node] = []
    whole = float_tensor(base)
    for origin in _origins(base, search, way):
        link, value = search.links.get(origin), float_tensor(origin)
        if link is not None and value is not None and whole is not None and same_size(value.shape, whole.shape):
            return link, _between(base, origin)
    return None, []


def _between(end: fx.Node, start: fx.Node) -> list[fx.Node]:
    """The nodes on ways from ``start`` (excluded) to ``end`` (included) that hold no contraction."""
    found: list[fx.Node] = []
    pending, seen = [end], {end, start}
    while pending and len(seen) < 4 * _ON_STREAM_REACH:
        node = pending.pop()
        found.append(node)
        if is_contraction(node):
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return found


def _classify(way: list[fx.Node], start: fx.Node, search: _Search) -> Obstacle:
    """What the operations on the stream amount to."""
    ordered = sorted((n for n in way if search.order[n] > search.order[start]), key=search.order.__getitem__)

    def first(test: Callable[[fx.Node], bool]) -> fx.Node | None:
        return next((n for n in ordered if test(n)), None)

    if first(lambda n: op_name(n) in {"sigmoid", "hardsigmoid", "Sigmoid", "softmax"}) is not None:
        gate = first(lambda n: op_name(n) in _MULTIPLIES)
        if gate is not None:
            return Obstacle("gate", gate)
    norm = first(lambda n: op_name(n) in NORMS or op_name(n) in BATCH_NORMS or op_name(n) in {"rsqrt", "std", "var", "sqrt"})
    if norm is not None:
        return Obstacle("norm", norm)
    factor = first(lambda n: op_name(n) in _MULTIPLIES)
    if factor is not None:
        computed = [n for n in factor.all_input_nodes if n is not start and search.order[n] > search.order[start]]
        gates = any(search.reach(start, n)[0] for n in computed if base_of(n) is not start)
        return Obstacle("gate" if gates else "scale", factor)
    return Obstacle("operation", ordered[-1] if ordered else start)


def _chains(search: _Search) -> list[list[_Link]]:
    """All chains: the main one of every tree and those that fork off; ends without contraction trimmed, noise left out."""
    plain_depth: dict[int, tuple[int, int]] = {}
    for link in reversed(list(search.links.values())):
        below = max((plain_depth[id(child)] for child in link.children), default=(0, 0))
        plain_depth[id(link)] = (below[0] + (not link.obstacles), below[1] + 1)

    def prefer(link: _Link) -> tuple[bool, tuple[int, int], int]:
        return not link.enclosed, plain_depth[id(link)], search.order[link.layer.node]

    starts = [link for forks in search.starts.values() for link in forks]
    chains = []
    while starts:
        chain = [starts.pop()]
        while chain[-1].children:
            ranked = sorted(chain[-1].children, key=prefer)
            starts += ranked[:-1]
            if ranked[-1].enclosed:
                starts.append(ranked[-1])
                break
            chain.append(ranked[-1])
        while chain and not chain[-1].contraction:
            chain.pop()
        while chain and not chain[0].contraction:
            chain.pop(0)
        if chain:
            chains.append(chain)
    chains.sort(key=lambda chain: (len(chain), search.order[chain[-1].layer.node]), reverse=True)
    kept: list[list[_Link]] = []
    for chain in chains:
        if len(chain) == 1 and kept and len(kept[0]) > 1:
            continue
        doubtful = len(chain) == 1 or any(link.obstacles for link in chain)
        if doubtful and any(_inside_branch(chain, other, search) for other in kept):
            continue
        kept.append(chain)
    return sorted(kept, key=lambda chain: search.order[chain[0].layer.node])


def _inside_branch(chain: list[_Link], other: list[_Link], search: _Search) -> bool:
    """Whether ``chain`` stands within one branch of ``other``: it starts from a value of ``other`` and ends in its next."""
    first, last = search.order[chain[0].layer.node], search.order[chain[-1].layer.node]
    before: fx.Node = base_of(other[0].layer.skip)
    for link in other:
        if search.order[before] < first and last < search.order[link.layer.node]:
            start = base_of(chain[0].layer.skip)
            return start is before or search.reach(before, start)[0]
        before = link.layer.node
    return False


def _stream(name: str, chain: list[_Link], search: _Search, reads: dict[fx.Node, fx.Node]) -> Stream:
    layers = [link.layer for link in chain]
    values = [base_of(layers[0].skip), *(layer.node for layer in layers)]
    # The embedding is what the first addition reads, unless a reader sees it without the pass-throughs before that.
    obstacles = [obstacle for link in chain for obstacle in link.obstacles]
    readers = []
    for position, value in enumerate(values):
        following = layers[position] if position < len(layers) else None
        readers.append(_readers(value, following))
        obstacles += _mutations(value)
    # A block sum may be the very tensor of its first term: a later change in place would reach every mix.
    for layer in layers:
        for term in layer.terms:
            obstacles += [found for found in _mutations(term) if search.order[found.node] > search.order[layer.node]]
    stream = Stream(name, layers, values, readers, obstacles)
    stream.feature_dim = feature_dim(stream)
    # First: what reads the values explains the chain, whatever else stands on it.
    stream.obstacles[:0] = _mixed(stream, reads)
    return stream


def _readers(value: fx.Node, following: Layer | None) -> list[fx.Node]:
    """The users of ``value``, the next addition of the stream excepted."""
    own = set() if following is None else {following.node, *following.inner}
    return [user for user in value.users if user not in own]


def _mutations(value: fx.Node) -> list[Obstacle]:
    """In-place changes of a value, or of a view of it."""
    return [Obstacle("mutation", node) for node in changes_of(value)]


def _mixed(stream: Stream, reads: dict[fx.Node, fx.Node]) -> list[Obstacle]:
    """Values of the stream that are weighted against others by functions of themselves: a hand-written mix, or a kin."""
    found = next((reads[base_of(value)] for value in stream.values if base_of(value) in reads), None)
    return [] if found is None else [Obstacle("mix", found)]
