"""Shares: a stream of which every process has only its own part, as under sequence parallelism (analysis).

The mixes of such a stream are correct, since they look at one token at a time. The gradients of its queries and key gains
are not: they sum over tokens, each process sees only its own, and the shares are not added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.nodes import place_of, value_of
from attnres_fx.passes.graph.vocabulary import RESHAPES, SCATTERING_COLLECTIVES, op_name, passed_through
from attnres_fx.runtime.errors import ShardedStreamError

_MOVES = RESHAPES | {"wait_tensor", "to_local", "prim_to_local"}
_ENTRIES = frozenset({"from_local", "prim_from_local"})


def refuse_shares(stream: Stream, parameters: Sequence[fx.Node]) -> None:
    """Raise ShardedStreamError if the graph shows that a process has only a share of ``stream`` while gradients of its
    ``parameters`` are asked for, or that the stream is a distributed tensor, for which no mix is defined.
    """
    training = torch.is_grad_enabled() and any(value_of(node).requires_grad for node in parameters)
    for value in [*stream.values, *(term for layer in stream.layers for term in layer.terms)]:
        if hasattr(value_of(value), "placements"):
            raise ShardedStreamError(
                f"stream '{stream.name}' is a distributed tensor, for which no mix is defined", place=place_of(value),
                remedy="keep local tensors on the stream: use_local_output=True in the plan of the layers that write to it")
        share = next(filter(None, (_share(node) for node in _seen_from(value))), None) if training else None
        if share is not None:
            raise ShardedStreamError(
                f"every process has only a share of stream '{stream.name}' ({share}): the gradients of its queries and key "
                "gains would be those of the share", place=place_of(value),
                remedy="hold the stream whole in every process: no SequenceParallel, and output_layouts=Replicate() for the "
                       "layers that write to it (tensor parallelism within the layers is right as it is); or freeze the "
                       "parameters of model.attnres; inference under torch.no_grad() is right in any case")


def _seen_from(value: fx.Node) -> Iterator[fx.Node]:
    """``value``, what it was before it was moved about or taken out of a distributed tensor, and where it enters one."""
    node: fx.Node | None = value
    while node is not None:
        yield node
        node = next(iter(node.all_input_nodes), None) if op_name(node) in _MOVES else passed_through(node)
    yield from (user for user in value.users if op_name(user) in _ENTRIES)


def _share(node: fx.Node) -> str | None:
    """How what ``node`` holds is divided among processes, in words; None if every process holds all of it."""
    if op_name(node) in SCATTERING_COLLECTIVES:
        return f"'{op_name(node)}' scatters it"
    value = value_of(node)
    divided = [str(placement) for dim, placement in enumerate(getattr(value, "placements", ()))
               if not placement.is_replicate() and value.device_mesh.size(dim) > 1]
    return f"'{node.name}' is placed as {', '.join(divided)}" if divided else None
