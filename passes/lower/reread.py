"""Reread: let the backward take the norm of a mix from the operator that computes it again, instead of keeping it.

Works on the joint graph of AOTAutograd, before its partitioner. Matches: an ``attnres::mix_norm_backward`` whose
``attnres::mix_norm`` stands in the graph, and what reads the norm of the latter in the backward and could wait for its end
(the gradient of a linear layer's weight). Replaces with: the norm that the backward hands out. So a layer keeps only its
partial sum, not its mix or its norm.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from attnres_fx.passes._compat.inductor import is_backward_node, mark_backward
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call, sort_topologically
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.vocabulary import ALIASES, COPIES, NEW_COPIES, PERMUTES, RESHAPES, op_name
from attnres_fx.runtime.operators import VARIANTS, operator_of

_FORWARD = {operator_of("mix_norm", variant): operator_of("mix_norm_backward", variant) for variant in VARIANTS}
_BACKWARD = frozenset(_FORWARD.values())
# A reader with more than this many operations behind it is left where it is.
_MOST_WAITING = 64
_VIEWS = (RESHAPES | PERMUTES | COPIES) - NEW_COPIES


def reread_norms(graph: fx.Graph, context: Context) -> int:
    """Run the pass on a joint graph in place, its order of nodes included; returns the number of norms that are read again.

    A graph without a backward stays as it is.
    """
    forwards = {_key(node): node for node in graph.nodes if node.target in _FORWARD}
    changed = 0
    for node in list(graph.nodes):
        forward = forwards.get(_backward_key(node)) if node.target in _BACKWARD else None
        if forward is not None:
            changed += _reread(forward, node)
    if changed:
        sort_topologically(graph)
    return changed


def _key(node: fx.Node) -> tuple[Any, ...]:
    """What the norm depends on: equal keys are equal norms."""
    arguments: Any = node.args
    sources, query, gain, delta, *rest = arguments
    last = (node, "partial") if delta is not None else _unaliased(sources[-1])
    first = tuple(map(_unaliased, sources[:-1]))
    return _FORWARD[node.target], (*first, last), *map(_unaliased, (query, gain, *rest))


def _backward_key(node: fx.Node) -> tuple[Any, ...]:
    arguments: Any = node.args
    _, _, sources, *rest = arguments
    rows = [_unaliased(source) for source in sources]
    last = rows[-1]
    if isinstance(last, fx.Node) and last.target is operator.getitem and last.args[1] == 1:
        made_by = last.args[0]
        if isinstance(made_by, fx.Node) and made_by.target in _FORWARD:
            with_addition = node.target, (*rows[:-1], (made_by, "partial")), *map(_unaliased, rest)
            if _key(made_by) == with_addition:
                return with_addition
    return node.target, tuple(rows), *map(_unaliased, rest)


def _unaliased(value: Any) -> Any:
    while isinstance(value, fx.Node) and op_name(value) in ALIASES:
        value = value.args[0]
    return value


def _reread(forward: fx.Node, backward: fx.Node) -> bool:
    """Redirect the readers in the backward; whether there are any."""
    graph = backward.graph
    late = [(chain, reader) for normed in forward.users if normed.target is operator.getitem and normed.args[1] == 0
            for chain, reader in _readers(normed, ()) if is_backward_node(reader) and _is_last(reader)]
    if not late:
        return False
    with graph.inserting_after(backward):
        again = insert_call(graph, operator.getitem, (backward, 0), like=backward, value=value_of(backward)[0])
    mark_backward(again)
    made: dict[fx.Node, fx.Node] = {}
    for chain, reader in late:
        place = again
        for view in chain:
            if view not in made:
                with graph.inserting_after(place):
                    target: Any = view.target
                    made[view] = insert_call(graph, target, (place, *view.args[1:]), kwargs=view.kwargs, like=again,
                                             value=value_of(view))
                mark_backward(made[view])
            place = made[view]
        read = chain[-1] if chain else next(node for node in reader.all_input_nodes if node in forward.users)
        reader.replace_input_with(read, place)
    return True


def _readers(node: fx.Node, chain: tuple[fx.Node, ...]) -> Iterator[tuple[tuple[fx.Node, ...], fx.Node]]:
    """The nodes that read the values of ``node``, and the views they do so by."""
    for user in list(node.users):
        if op_name(user) in _VIEWS and user.args and user.args[0] is node:
            yield from _readers(user, (*chain, user))
        else:
            yield chain, user


def _is_last(node: fx.Node) -> bool:
    """Whether no backward of a fused mix, and little else, depends on ``node``: then it can wait for any of them."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.target in _BACKWARD or len(seen) > _MOST_WAITING:
                return False
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return True
