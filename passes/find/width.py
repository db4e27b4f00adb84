"""Features: which dimension of a stream is its width d. Streams are usually [..., d]; convolutional ones are [B, d, T]."""

from __future__ import annotations

from torch import fx

from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.nodes import same_size, value_of
from attnres_fx.passes.graph.vocabulary import (
    BATCH_NORMS,
    CONVOLUTIONS,
    GROUP_NORMS,
    OF_THE_LAST_DIMENSION,
    PERMUTES,
    argument,
    op_name,
    passed_through,
    permutation_of,
)

# How many readers of the stream are examined before the last dimension is taken.
_ASKED = 64


def feature_dim(stream: Stream) -> int:
    """The feature dimension of ``stream``, counted from the end, in the layout of its first addition.

    The first reader that normalises or contracts one dimension decides: a layer norm or a linear map its last, a convolution
    or a batch norm the channels. Permutations between the stream and the reader are followed; after a reshape, or if no
    reader decides, it is the last.
    """
    first = stream.layers[0]
    rank = value_of(first.node).dim()
    pending = [(first.node, list(range(rank)))]
    if value_of(stream.values[0]).dim() == rank:
        pending.insert(0, (first.skip, list(range(rank))))
    seen: set[fx.Node] = set()
    while pending and len(seen) < _ASKED:
        node, origin = pending.pop(0)
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            told = _told_by(user, len(origin))
            if told is not None and argument(user, 0, "input") is node:
                return origin[told] - rank
            if passed_through(user) is node:
                moved = _follow(user, node, origin)
                if moved is not None:
                    pending.append((user, moved))
    return -1


def _told_by(node: fx.Node, rank: int) -> int | None:
    """The dimension of its first argument that ``node`` treats as features, or None."""
    name = op_name(node)
    if name in OF_THE_LAST_DIMENSION:
        return rank - 1
    convolution = CONVOLUTIONS.get(name)
    if convolution is not None and rank >= convolution + 1:
        return rank - convolution - 1
    if (name in BATCH_NORMS or name in GROUP_NORMS) and rank >= 2:
        return 1
    return None


def _follow(node: fx.Node, source: fx.Node, origin: list[int]) -> list[int] | None:
    """Where each dimension of the pass-through ``node`` comes from; None behind a reshape."""
    if op_name(node) in PERMUTES:
        return [origin[dim] for dim in permutation_of(node)]
    before, after = value_of(source), value_of(node)
    return origin if before.dim() == after.dim() and same_size(before.shape, after.shape) else None
