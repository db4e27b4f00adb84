"""Detect: find the residual streams of a normalized graph by data flow alone. Changes nothing.

A residual addition is a sum one operand of which (the skip) reaches the others (the terms) only through a branch. Chains
of such additions, linked by identity through pass-throughs, are the streams. The way:

1. Every sum is flattened over inner sums that no other node reads. The skip is the operand that is an ancestor of another;
   of two on one chain the later, so that an embedding added again is a term and not a skip.
2. Ancestry is decided by a search backward from the later operand that never goes behind the earlier one and leaps over
   chains already found, so that its cost is that of one branch and the whole stays linear in the graph.
3. Where the skip reaches a sum through something else than pass-throughs (a norm, a scale, a gate), the link is kept and
   the operation recorded as an obstacle: post-norm and similar forms are recognised as such.
4. A branch with a contraction is a sublayer. Sums without one count only between two that have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from attnres_fx.passes.find.between import (
    back_to_link,
    between,
    classify,
    hang,
    injected,
    joined,
    lane_terms,
    long_skips,
    of_first,
    origins,
    state_update,
)
from attnres_fx.passes.find.chains import Link, Search
from attnres_fx.passes.find.norms import with_norms
from attnres_fx.passes.find.obstacles import Obstacle
from attnres_fx.passes.find.streams import Layer, Stream
from attnres_fx.passes.find.width import feature_dim
from attnres_fx.passes.graph.aliases import changes_of, is_mutation
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import copy_graph_module
from attnres_fx.passes.graph.nodes import float_tensor, same_size
from attnres_fx.passes.graph.vocabulary import (
    Addition,
    addition_of,
    base_of,
    bodies_of,
    has_one_reader,
    keeps_identity,
    passed_through,
)
from attnres_fx.passes.prepare.normalize import normalize
from attnres_fx.passes.recognize.depth_reads import depth_reads


def detect(graph: fx.Graph) -> tuple[Stream, ...]:
    """The residual streams of ``graph``, in graph order, convertible or not.

    ``graph`` is a normalized graph of Dynamo, ``torch.export`` or ``symbolic_trace`` with traced values. Each stream carries
    its layers, the readers of every position, its norm placement, and its obstacles.
    """
    search = Search(graph)
    for node in graph.nodes:
        link = _link_of(node, search)
        if link is not None:
            for inner in link.layer.inner:
                _withdraw(inner, search)
            _enter(link, search)
    chains = _chains(search)
    reads = {source: read.node for read in depth_reads(graph) for source in read.sources} if chains else {}
    hiding = hidden_layers(graph)
    return tuple(_stream(f"stream{index}", chain, search, reads, hiding) for index, chain in enumerate(chains))


def _enter(link: Link, search: Search) -> None:
    """Insert a link into its tree; earlier additions to the same value that lead into its branch are enclosed by it."""
    siblings = link.parent.children if link.parent is not None else search.starts.setdefault(link.root, [])
    for sibling in siblings:
        if any(search.reach(sibling.layer.node, term)[0] for term in link.layer.terms):
            sibling.enclosed = True
    siblings.append(link)
    search.links[link.layer.node] = link


def _withdraw(inner: fx.Node, search: Search) -> None:
    """An inner sum turned out to be part of a larger one: take its own link back."""
    link = search.links.pop(inner, None)
    if link is not None:
        siblings = link.parent.children if link.parent is not None else search.starts[link.root]
        siblings.remove(link)


def _flatten(node: fx.Node, search: Search) -> tuple[list[fx.Node], list[fx.Node]]:
    """(operands of the whole sum, inner sums that no other node reads)."""
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
            while has_one_reader(lone) and keeps_identity(lone):
                through.append(lone)
                lone = passed_through(lone) or lone
            value = float_tensor(lone)
            within = addition_of(lone)
            opens = within is not None and has_one_reader(lone) and not is_mutation(lone) and (
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


def _link_of(node: fx.Node, search: Search) -> Link | None:
    """``node`` as a residual addition, or as another update of a stream, or None."""
    updated = state_update(node, search)
    if updated is not None:
        return updated
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
            apart = [term for term, (reached, _) in zip(terms, ways) if not reached]
            return _plain_link(layer, base, any(contracts for _, contracts in ways), apart, search)
    bases = [base_of(skip) for skip in skips]
    leads = [link for base in bases if (link := search.links.get(base) or back_to_link(base, search)[0]) is not None]
    for skip in skips:
        terms = tuple(part for part in operands if part is not skip)
        link = _obstructed_link(Layer(node, skip, terms, tuple(inner)), leads, search)
        if link is not None:
            return link
    return None


def _plain_link(layer: Layer, base: fx.Node, contraction: bool, apart: list[fx.Node], search: Search) -> Link:
    """``layer`` as the next of its chain; ``apart`` are its terms that do not descend from its skip."""
    parent = search.links.get(base)
    if parent is None:
        opened = injected(layer, search)
        if opened is not None:
            apart = apart + [term for term in opened[0].terms if term not in layer.terms]
            layer, parent = opened
    if parent is not None:
        found = lane_terms(layer, parent.layer.node) + long_skips(layer, apart, parent, search)
        return Link(layer, parent.root, parent.position + 1, parent, contraction, found)
    if contraction:
        earlier, way = back_to_link(base, search)
        if earlier is not None:
            obstacle = classify(way, earlier.layer.node, earlier.root, search)
            return Link(layer, earlier.root, earlier.position + 1, earlier, contraction, (obstacle,))
    return Link(layer, base, 1, None, contraction, lane_terms(layer, base) + (joined(base, search) if contraction else ()))


def _obstructed_link(layer: Layer, leads: list[Link], search: Search) -> Link | None:
    """A sum whose skip is scaled, gated, normalised or mixed on its way: c * x + f(x).

    An earlier value of a chain that another operand continues (one of ``leads``) is mixed back in, and is not a skip.
    """
    base = base_of(layer.skip)
    whole = float_tensor(layer.node)
    if base in search.links:
        return None  # a plain value of the stream, to which something is added that does not come from it
    for origin in origins(base, search):
        value = float_tensor(origin)
        if value is None or whole is None or not same_size(value.shape, whole.shape):
            continue
        if any(lead.layer.node is not origin and (search.on_chain(origin, lead) or (
                origin not in search.links and of_first([origin], lead.root, search))) for lead in leads):
            continue
        ways = [search.reach(origin, term) for term in layer.terms]
        if any(reached and contracts for reached, contracts in ways):
            parent = search.links.get(origin)
            root = parent.root if parent is not None else origin
            obstacle = classify(between(base, origin), origin, root, search)
            apart = [term for term, (reached, _) in zip(layer.terms, ways) if not reached]
            if obstacle.kind == "scale" and origin is not root and of_first(apart, root, search):
                obstacle = Obstacle("first value", obstacle.node)
            return hang(layer, origin, (obstacle,), search)
    return None


def _chains(search: Search) -> list[list[Link]]:
    """All chains: the main one of every tree and those that fork off; ends without contraction trimmed, noise left out."""
    plain_depth: dict[int, tuple[int, int]] = {}
    for link in reversed(list(search.links.values())):
        below = max((plain_depth[id(child)] for child in link.children), default=(0, 0))
        plain_depth[id(link)] = (below[0] + (not link.obstacles), below[1] + 1)

    def prefer(link: Link) -> tuple[bool, tuple[int, int], int]:
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
    kept: list[list[Link]] = []
    for chain in chains:
        if len(chain) == 1 and kept and len(kept[0]) > 1:
            continue
        doubtful = len(chain) == 1 or any(link.obstacles for link in chain)
        if doubtful and any(_inside_branch(chain, other, search) for other in kept):
            continue
        kept.append(chain)
    return sorted(kept, key=lambda chain: search.order[chain[0].layer.node])


def _inside_branch(chain: list[Link], other: list[Link], search: Search) -> bool:
    """Whether ``chain`` lies within one branch of ``other``: it starts from a value of ``other`` and ends in its next."""
    first, last = search.order[chain[0].layer.node], search.order[chain[-1].layer.node]
    before: fx.Node = base_of(other[0].layer.skip)
    for link in other:
        if search.order[before] < first and last < search.order[link.layer.node]:
            start = base_of(chain[0].layer.skip)
            return start is before or search.reach(before, start)[0]
        before = link.layer.node
    return False


def _stream(name: str, chain: list[Link], search: Search, reads: dict[fx.Node, fx.Node],
            hiding: Sequence[fx.Node]) -> Stream:
    layers = tuple(link.layer for link in chain)
    values = (base_of(layers[0].skip), *(layer.node for layer in layers))
    # The embedding is what the first addition reads, unless a reader sees it without the pass-throughs before that.
    obstacles = [obstacle for link in chain for obstacle in link.obstacles]
    readers = []
    for position, value in enumerate(values):
        following = layers[position] if position < len(layers) else None
        readers.append(_readers(value, following))
        obstacles += _mutations(value)
        # The layer adds to a copy of the value: what changes the copy changes the stream.
        for copy in (*_passed(following.skip, value), *following.injections) if following is not None else ():
            obstacles += [found for found in _mutations(copy) if found not in obstacles]
    # A block sum may be the very tensor of its first term: a later change in place would reach every mix.
    for layer in layers:
        for term in layer.terms:
            obstacles += [found for found in _mutations(term) if search.order[found.node] > search.order[layer.node]]
    stream = Stream(name, layers, values, tuple(map(tuple, readers)))
    # First: what reads the values explains the chain, whatever else stands on it.
    mixed = _mixed(stream, reads)
    described = with_norms(replace(stream, feature_dim=feature_dim(stream), obstacles=(*mixed, *obstacles)), search.order)
    hidden = [Obstacle("hidden", node) for node in hiding if _cuts(node, stream, search)]
    return replace(described, obstacles=(*reversed(hidden), *described.obstacles))


def _passed(skip: fx.Node, value: fx.Node) -> list[fx.Node]:
    """The pass-throughs that hand ``value`` on to the skip of the next layer."""
    found = []
    while skip is not value:
        found.append(skip)
        inner = passed_through(skip)
        if inner is None:
            break
        skip = inner
    return found


def _readers(value: fx.Node, following: Layer | None) -> list[fx.Node]:
    """The users of ``value``, the next addition of the stream excepted."""
    own = set() if following is None else {following.node, *following.inner}
    return [user for user in value.users if user not in own]


def _mutations(value: fx.Node) -> list[Obstacle]:
    """In-place changes of a value, or of a view of it."""
    return [Obstacle("mutation", node) for node in changes_of(value)]


def _mixed(stream: Stream, reads: dict[fx.Node, fx.Node]) -> list[Obstacle]:
    """Values of the stream that are weighted against others by functions of themselves: a hand-written mix, or similar."""
    found = next((reads[base_of(value)] for value in stream.values if base_of(value) in reads), None)
    return [] if found is None else [Obstacle("mix", found)]


def hidden_layers(graph: fx.Graph) -> list[fx.Node]:
    """The higher-order operators of ``graph`` whose bodies, at any depth, hold residual additions. Changes nothing.

    Values decide whether the branches of ``cond`` and the body of ``while_loop`` run, so they are not inlined.
    A stream that such a body continues would be found in pieces; it is refused. A body within a branch is a branch like any
    other.
    """
    found = []
    for node in graph.nodes:
        for body in bodies_of(node):
            inner = copy_graph_module(body)
            normalize(inner.graph, Context())
            if detect(inner.graph) or hidden_layers(inner.graph):
                found.append(node)
                break
    return found


def _cuts(node: fx.Node, stream: Stream, search: Search) -> bool:
    """Whether ``stream`` comes out of ``node`` or goes into it, rather than around it as around any other branch."""
    whole = float_tensor(stream.layers[0].node)
    if whole is None or not any((value := float_tensor(source)) is not None and same_size(value.shape, whole.shape)
                                for source in node.all_input_nodes):
        return False
    return search.reach(node, stream.values[0])[0] or search.reach(stream.values[-1], node)[0]
