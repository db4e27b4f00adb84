"""On the stream: what lies between two values of a residual stream, and what it amounts to. Changes nothing.

Where no identity leads from one value to the next, something is done to the stream itself: it is normalised, scaled, gated,
mixed with its first value, split into lanes that a small matrix mixes, handed to a recurrent cell, written over. Each is
found by what the operations compute from the value before and becomes an :class:`Obstacle` of its own kind. Features that
are merely added on the way are not an obstacle: they are terms (:func:`injected`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import fx

from attnres_fx.passes.find.chains import Link, Search
from attnres_fx.passes.find.obstacles import Obstacle
from attnres_fx.passes.find.streams import Layer
from attnres_fx.passes.graph.aliases import is_mutation
from attnres_fx.passes.graph.nodes import float_tensor, same_size, value_of
from attnres_fx.passes.graph.vocabulary import (
    BATCH_NORMS,
    CONCATENATIONS,
    DIVISIONS,
    LIKENESSES,
    MATRIX_PRODUCTS,
    MULTIPLICATIONS,
    NORMS,
    ROOTS,
    SIGMOIDS,
    SOFTMAXES,
    STATE_UPDATES,
    WRITES,
    addition_of,
    argument,
    base_of,
    is_contraction,
    keeps_identity,
    op_name,
    passed_through,
)
from attnres_fx.passes.recognize.gather import static_numel

# How far a skip is followed back through operations on the stream, in nodes: a hand-written norm takes about ten.
_REACH = 24
_MULTIPLIES = MULTIPLICATIONS | DIVISIONS | {"lerp"}
# More lanes than this are tokens or features.
_MOST_LANES = 16


def state_update(node: fx.Node, search: Search) -> Link | None:
    """A recurrent cell, or an interpolation, whose state is the stream and whose input a branch from it."""
    places = STATE_UPDATES.get(op_name(node))
    if places is None or float_tensor(node) is None:
        return None
    state, branch = (argument(node, index, name) for index, name in places)
    if float_tensor(state) is None or float_tensor(branch) is None or value_of(state).dim() < 2:
        return None
    base = base_of(state)
    if search.reach(base, branch) != (True, True):
        return None
    kind = "gate" if op_name(node) == "lerp" else "cell"
    return hang(Layer(node, state, (branch,)), base, (Obstacle(kind, node),), search)


def hang(layer: Layer, base: fx.Node, obstacles: tuple[Obstacle, ...], search: Search) -> Link:
    """``layer`` as the link after ``base``, a value of a chain or the root of a new one."""
    parent = search.links.get(base)
    root, position = (base, 1) if parent is None else (parent.root, parent.position + 1)
    return Link(layer, root, position, parent, True, obstacles)


def injected(layer: Layer, search: Search) -> tuple[Layer, Link] | None:
    """``layer`` with the terms that were added to a value of the stream on the way to its skip, and that value's link.

    Other nodes read the value without them: they are terms of the following layer.
    """
    terms: list[fx.Node] = []
    opened: list[fx.Node] = []
    node = layer.skip
    while node not in search.links:
        found = addition_of(node)
        inner = passed_through(node) if keeps_identity(node) else None
        if inner is None and found is not None and found.alpha == 1 and not is_mutation(node):
            inner, term = (found.left, found.right) if _carries(found.left, search) else (found.right, found.left)
            terms.append(term)
        if inner is None or value_of(inner).dtype != value_of(node).dtype or not _same(inner, node):
            break
        opened.append(node)
        node = inner
    link = search.links.get(base_of(node))
    if link is None or not terms:
        return None
    return Layer(layer.node, node, (*layer.terms, *terms), layer.inner, layer.branches, tuple(opened)), link


def _carries(node: fx.Node, search: Search) -> bool:
    base = base_of(node)
    return base in search.links or (addition_of(base) is not None and any(
        base_of(part) in search.links for part in base.all_input_nodes))


def _same(a: fx.Node, b: fx.Node) -> bool:
    first, second = float_tensor(a), float_tensor(b)
    return first is not None and second is not None and same_size(first.shape, second.shape)


def _as_many(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have one shape, or one is a reshape of the other."""
    return _same(a, b) or (static_numel(a) is not None and static_numel(a) == static_numel(b))


def long_skips(layer: Layer, terms: Iterable[fx.Node], end: Link | None, search: Search) -> tuple[Obstacle, ...]:
    """Terms that are made of a value further back on the stream than the one they are added to."""
    if end is None:
        return ()
    far = (term for term in terms if search.earlier_value(term, end) is not None)
    return tuple(Obstacle("long skip", layer.node) for _ in far)[:1]


def joined(root: fx.Node, search: Search) -> tuple[Obstacle, ...]:
    """A stream that starts from a projection of several values of one earlier stream, set side by side."""
    pending, seen, products = [root], {root}, 0
    while pending and len(seen) < _REACH:
        node = pending.pop()
        if op_name(node) in CONCATENATIONS:
            parts = [base_of(part) for part in node.all_input_nodes]
            ends = [search.links[part] for part in parts if part in search.links]
            latest = max(ends, key=lambda link: link.position, default=None)
            if latest is None:
                continue
            far = [part for part in parts if part is not latest.layer.node and search.on_chain(part, latest)]
            if far:
                return (Obstacle("long skip", node),)
            continue
        products += is_contraction(node)
        if products > 1 or node in search.links:
            return ()
        pending += [s for s in node.all_input_nodes if s not in seen and float_tensor(s) is not None and s.op != "get_attr"]
        seen.update(node.all_input_nodes)
    return ()


def origins(base: fx.Node, search: Search) -> list[fx.Node]:
    """Values that ``base`` is made of by operations without contraction, nearest first, links of chains in front.

    Mixing lanes by a small matrix is followed to the lanes.
    """
    pending, seen = [base], {base}
    way: list[fx.Node] = []
    while pending and len(seen) < _REACH:
        node = pending.pop(0)
        if node in search.links and node is not base:
            continue
        lanes = mixed_lanes(node)
        if (lanes is None and is_contraction(node)) or op_name(node) in LIKENESSES:
            continue
        for source in node.all_input_nodes if lanes is None else [lanes]:
            if source not in seen and float_tensor(source) is not None:
                seen.add(source)
                way.append(source)
                pending.append(source)
    return sorted((n for n in way if n.op != "get_attr"), key=lambda n: (n not in search.links, -search.order[n]))


def mixed_lanes(node: fx.Node) -> fx.Node | None:
    """The operand that ``node`` multiplies by a small matrix along a dimension of few entries; None if it does not."""
    parts = [part for part in node.all_input_nodes if float_tensor(part) is not None]
    if op_name(node) not in MATRIX_PRODUCTS or len(parts) != 2 or any(value_of(part).dim() < 2 for part in parts):
        return None
    tails = [[size for size in value_of(part).shape[-2:] if isinstance(size, int)] for part in parts]
    for small, wide, lanes in ((tails[0], tails[1], parts[1]), (tails[1], tails[0], parts[0])):
        if (len(small) == len(wide) == 2 and max(small) <= _MOST_LANES and 2 * max(small) <= max(wide)
                and min(wide) in small and value_of(lanes).dim() >= 3):
            return lanes
    return None


def lane_terms(layer: Layer, base: fx.Node) -> tuple[Obstacle, ...]:
    """Terms that are the value they are added to, its lanes mixed: S + S A is S (I + A)."""
    for term in layer.terms:
        lanes = mixed_lanes(base_of(term))
        if lanes is not None and value_of(lanes).dim() >= 4 and base_of(lanes) is base:
            return (Obstacle("lanes", base_of(term)),)
    return ()


def _sums_lanes(node: fx.Node) -> bool:
    """Whether ``node`` sums weighted lanes: a product over one of its dimensions, the last one kept."""
    source = argument(node, 0, "input", node.kwargs.get("self"))
    whole, product = float_tensor(node), float_tensor(source)
    return (op_name(node) == "sum" and whole is not None and product is not None and op_name(source) in _MULTIPLIES
            and 3 <= whole.dim() < product.dim() and same_size(whole.shape[-1:], product.shape[-1:]))


def back_to_link(base: fx.Node, search: Search) -> tuple[Link | None, list[fx.Node]]:
    """The chain end from which ``base`` is made by norms, scales and similar operations, and the operations between."""
    for origin in origins(base, search):
        link = search.links.get(origin)
        if link is not None and _as_many(origin, base):
            return link, between(base, origin)
    return None, []


def between(end: fx.Node, start: fx.Node) -> list[fx.Node]:
    """The nodes on paths from ``start`` (excluded) to ``end`` (included) without a contraction other than of lanes."""
    found: list[fx.Node] = []
    pending, seen = [end], {end, start}
    while pending and len(seen) < 4 * _REACH:
        node = pending.pop()
        found.append(node)
        lanes = mixed_lanes(node)
        if (lanes is None and is_contraction(node)) or op_name(node) in LIKENESSES:
            continue
        for source in node.all_input_nodes if lanes is None else [lanes]:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return found


def classify(way: Sequence[fx.Node], start: fx.Node, root: fx.Node, search: Search) -> Obstacle:
    """What the operations of ``way`` on the value ``start`` of a stream from ``root`` amount to."""
    ordered = sorted((n for n in way if search.order[n] > search.order[start]), key=search.order.__getitem__)

    def first(test: Callable[[fx.Node], bool]) -> fx.Node | None:
        return next((n for n in ordered if test(n)), None)

    lanes = first(lambda n: mixed_lanes(n) is not None or _sums_lanes(n))
    if lanes is not None:
        return Obstacle("lanes", lanes)
    written = first(lambda n: op_name(n) in WRITES)
    if written is not None:
        return Obstacle("operation", written)
    if first(lambda n: op_name(n) in SIGMOIDS | SOFTMAXES) is not None:
        gate = first(lambda n: op_name(n) in _MULTIPLIES)
        if gate is not None:
            return Obstacle("gate", gate)
    norm = first(lambda n: op_name(n) in NORMS or op_name(n) in BATCH_NORMS or op_name(n) in ROOTS)
    if norm is not None:
        return Obstacle("norm", norm)
    link = search.links.get(start)
    skip = None if link is None else first(lambda n: addition_of(n) is not None and any(
        base_of(part) is not start and search.earlier_value(part, link) is not None for part in n.all_input_nodes))
    if skip is not None:
        return Obstacle("long skip", skip)
    factor = first(lambda n: op_name(n) in _MULTIPLIES)
    if factor is not None:
        computed = [n for n in factor.all_input_nodes if n is not start and search.order[n] > search.order[start]]
        if any(search.reach(start, n)[0] for n in computed if base_of(n) is not start):
            return Obstacle("gate", factor)
        parts = [part for node in ordered if addition_of(node) is not None for part in node.all_input_nodes]
        return Obstacle("first value" if start is not root and of_first(parts, root, search) else "scale", factor)
    return Obstacle("operation", ordered[-1] if ordered else start)


def of_first(parts: Iterable[fx.Node], root: fx.Node, search: Search) -> bool:
    """Whether one of ``parts`` is the first value of the stream, or what that is made of, or a multiple of it."""
    early = {root, *(node for node in origins(root, search) if _same(node, root))}
    made = [source for part in parts for source in (
        part, *(part.all_input_nodes if op_name(base_of(part)) in _MULTIPLIES else ()))]
    return any(base_of(source) in early or source in early for source in made)
