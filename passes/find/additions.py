"""Additions: in how many steps each layer is added to its stream, which a run by value counts. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import fx

from attnres_fx.passes.find.streams import Layer, Stream
from attnres_fx.passes.graph.nodes import place_of, stack_paths
from attnres_fx.passes.graph.vocabulary import addition_of, base_of, op_name, passed_through
from attnres_fx.runtime.marker import WITNESS

_IN_PLACE = frozenset({"add_", "iadd", "__iadd__"})


def additions_of(stream: Stream, overwritten: Collection[str]) -> tuple[int, ...] | str:
    """For each layer the number of additions of which the stream itself is an operand.

    Or why it cannot be run by value, in a sentence: if the number cannot be told, if the features are not the last
    dimension, if one of the additions is at an :func:`overwritten` place, or if a sublayer adds something to what it reads,
    which could not be told from a layer.
    """
    sums = [node for layer in stream.layers for node in (layer.node, *layer.inner, *layer.injections)]
    if stream.feature_dim != -1:
        return "its features are not the last dimension"
    for node in sums:
        if str(node.meta.get("stack_trace", "")) in overwritten:
            return f"'{_module_of(node)}' adds in place to a tensor that is read again under its old name"
    for reader in (reader for readers in stream.readers for reader in _passed_on(readers)):
        if addition_of(reader) is not None and reader not in sums:
            return f"'{_module_of(reader)}' adds something to what it reads of the stream"
    for layer in stream.layers:
        for node in (*layer.inner, *layer.injections):
            if addition_of(node) is not None and stack_paths(node)[-1:] != stack_paths(layer.node)[-1:]:
                return f"the additions of one layer are in two modules, '{_module_of(node)}' and '{_module_of(layer.node)}'"
    counts = [_additions(layer.node, layer) for layer in stream.layers]
    for layer, count in zip(stream.layers, counts):
        if not count:
            return f"an addition in '{_module_of(layer.node)}' is spelled as no '+', 'add' or 'sum'"
    return tuple(count for count in counts if count)


def _module_of(node: fx.Node) -> str:
    return place_of(node).module or "the model"


def _passed_on(readers: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """``readers``, and what reads those of them that only pass the stream on."""
    pending = list(readers)
    while pending:
        node = pending.pop()
        yield node
        if passed_through(node) is not None:
            pending += node.users


def _additions(node: fx.Node, layer: Layer) -> int | None:
    """How many additions lead from the skip of ``layer`` to ``node``, those of features injected in between among them."""
    if node is layer.skip:
        return 0
    if node is not layer.node and node not in layer.inner and node not in layer.injections:
        return None
    found = addition_of(node)
    if found is None:
        inner = passed_through(node)
        return None if inner is None else _additions(inner, layer)
    for part in (found.left, found.right):
        count = _additions(part, layer)
        if count is not None:
            return count + 1
    return None


def overwritten(graph: fx.Graph) -> frozenset[str]:
    """The places (stack traces) of additions in place to a tensor that is read again under its old name later.

    ``t += x`` with a stream x gives a stream by value, and leaves t as it was for whoever else holds it. ``graph`` is as the
    tracer made it.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    found = set()
    for node in graph.nodes:
        if op_name(node) in _IN_PLACE and node.args and isinstance(node.args[0], fx.Node) and any(
                order[user] > order[node] for alias in _aliases(node.args[0]) for user in alias.users if alias is not node):
            found.add(str(node.meta.get("stack_trace", "")))
    return frozenset(found)


def _aliases(written: fx.Node) -> list[fx.Node]:
    """``written``, and what may share its memory through pass-throughs."""
    while (inner := passed_through(written)) is not None and op_name(written) != "clone":
        written = inner
    found = [written]
    for node in found:
        found += [user for user in node.users
                  if passed_through(user) is node and op_name(user) != "clone" and user not in found]
    return found


def starts_of(stream: Stream, witnesses: Sequence[tuple[str, fx.Node]]) -> list[str]:
    """The places at which b_0 of ``stream`` was handed on. ``witnesses`` are (place of an argument, its node)."""
    embedding = base_of(stream.layers[0].skip)
    return [place for place, handed in witnesses if base_of(handed) is embedding]


def witnesses_of(graph: fx.Graph) -> list[tuple[str, fx.Node]]:
    """The witnesses in ``graph``: the place of each, and the node that was handed on there."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is WITNESS:
            handed, place = node.args
            assert isinstance(handed, fx.Node)
            found.append((str(place), handed))
    return found
