"""Fuse: the addition that completes a partial sum, the mix, and the norm that alone reads it, as one node.

Matches: an ``attnres::mix`` of one query, or an ``attnres::mix_phase2``, whose only reader is an RMSNorm or LayerNorm; with
the addition that made its last source where nothing reads that before. Replaces with: one ``attnres::mix_norm``. Its
backward computes the mix again, so neither the mix nor the norm has to be kept for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnres_fx.passes.graph.aliases import changes_near, is_mutation
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call, keep_tags
from attnres_fx.passes.graph.nodes import float_tensor, is_contiguous, same_size, value_of
from attnres_fx.passes.graph.record import record_of
from attnres_fx.passes.graph.vocabulary import ADDITIONS, LIKENESSES, addition_of, argument, is_mix, op_name
from attnres_fx.passes.lower.consumer_norm import ConsumerNorm, consumer_norm
from attnres_fx.runtime.mix_norm import MIX_NORM
from attnres_fx.runtime.phases import PHASE2

FUSIONS = ("auto", "always", "never")

# Nodes that decide how later nodes run: nothing may cross them.
_BORDERS = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode")


@dataclass(frozen=True)
class Fusion:
    """A mix (``early``: with what phase 1 left), its reader, and the addition that made its last source, or None."""

    mix: fx.Node
    sources: tuple[fx.Node, ...]
    early: tuple[fx.Node, fx.Node] | None
    parameters: tuple[fx.Node, fx.Node | None]
    options: tuple[Any, ...]
    norm: ConsumerNorm
    addition: fx.Node | None


def fuse_mixes(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place, if ``context.fuse``; returns the number of fused nodes."""
    fusions = find_fusions(graph) if context.fuse and any(_may_fuse(node) for node in graph.nodes) else []
    for fusion in fusions:
        _replace(fusion)
    return len(fusions)


def find_fusions(graph: fx.Graph) -> list[Fusion]:
    """What can be fused, in graph order."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    borders = [place for node, place in order.items()
               if op_name(node) in _BORDERS or op_name(node).endswith("_nesting")]
    known: dict[fx.Node, list[int]] = {}
    found = []
    for node in graph.nodes:
        fusion = _fusion(node, order) if _may_fuse(node) else None
        if fusion is None:
            continue
        alone = replace(fusion, addition=None)
        chosen = next((each for each in (fusion, alone) if _safe(each, order, borders, known)), None)
        if chosen is not None:
            found.append(chosen)
    return found


def _may_fuse(node: fx.Node) -> bool:
    return is_mix(node) or node.target is PHASE2


def _fusion(node: fx.Node, order: dict[fx.Node, int]) -> Fusion | None:
    """The fusion at a mix, not yet known to be safe."""
    late = node.target is PHASE2
    first = 2 if late else 0
    sources: Any = argument(node, first, "sources")
    query, gain = argument(node, first + 1, "query"), argument(node, first + 2, "key_gain")
    if not isinstance(sources, (list, tuple)) or not isinstance(query, fx.Node) or value_of(query).dim() != 1:
        return None
    rows = [*sources, argument(node, 0, "mixed")] if late else sources
    value = value_of(node)
    # Rows of several dtypes are for the reference: a fused node would be slower than its parts.
    if any(float_tensor(row) is None or value_of(row).dtype != value.dtype for row in rows):
        return None
    norm = consumer_norm(node, order)
    if norm is None:
        return None
    options = tuple(argument(node, first + 3 + place, name, default) for place, (name, default) in enumerate(
        (("eps", 1e-6), ("logit_scale", 1.0), ("normalize_values", False), ("output_factor", 1.0))))
    early = (argument(node, 0, "mixed"), argument(node, 1, "lse")) if late else None
    addition = sources[-1] if _completes(sources[-1], sources, value) else None
    return Fusion(node, tuple(sources), early, (query, gain), options, norm, addition)


def _completes(source: fx.Node, sources: Sequence[fx.Node], value: torch.Tensor) -> bool:
    """Whether ``source`` is a sum of two tensors of its own kind."""
    added = addition_of(source) if op_name(source) in ADDITIONS else None
    if added is None or added.alpha != 1 or is_mutation(source) or list(sources).count(source) > 1:
        return False
    parts = [float_tensor(part) for part in (added.left, added.right)]
    return all(part is not None and part.dtype == value.dtype and same_size(part.shape, value.shape) for part in parts)


def _safe(fusion: Fusion, order: dict[fx.Node, int], borders: Sequence[int], known: dict[fx.Node, list[int]]) -> bool:
    """Whether all parts of a fusion can be computed where its norm ends."""
    first, last = order[fusion.addition or fusion.mix], order[fusion.norm.node]
    parts = [fusion.mix, *fusion.norm.region] + ([] if fusion.addition is None else [fusion.addition])
    if len({(part.meta.get("ac_graph_id"), part.meta.get("recompute")) for part in parts}) > 1:
        return False  # a checkpointed region is recomputed as a whole
    if any(first < border < last for border in borders):
        return False
    if fusion.addition is not None and any(
            order[user] < last for user in fusion.addition.users if user is not fusion.mix):
        return False
    read = [*fusion.sources, *(fusion.early or ()), *fusion.parameters, fusion.norm.weight, fusion.norm.bias]
    if fusion.addition is not None:
        read += fusion.addition.all_input_nodes
    # Nothing changes what the norm makes before it is complete, nor what it is made from.
    return not any(first < place < last for place in changes_near([*read, fusion.mix, *fusion.norm.region], order, known))


def _replace(fusion: Fusion) -> None:
    """Replace the parts by the fused node."""
    mix, norm, graph = fusion.mix, fusion.norm, fusion.mix.graph
    # Its sources may have become part of fused nodes themselves.
    sources, delta = list(argument(mix, 0 if fusion.early is None else 2, "sources")), None
    if fusion.addition is not None:
        added = addition_of(fusion.addition)
        assert added is not None
        sources[-1], delta = added.left, added.right
    mixed, lse = fusion.early or (None, None)
    args = (sources, *fusion.parameters, delta, mixed, lse, norm.weight, norm.bias, *fusion.options, norm.centered, norm.eps)
    with graph.inserting_before(norm.node):
        made = insert_call(graph, MIX_NORM, args, like=mix, record=record_of(mix))
        normed = insert_call(graph, operator.getitem, (made, 0), like=norm.node, value=value_of(norm.node))
        keep_tags(mix, made)
        if fusion.addition is not None:
            known = value_of(fusion.addition)  # of any strides, while a fused node's is contiguous
            partial = insert_call(graph, operator.getitem, (made, 1), like=fusion.addition,
                                  value=known if is_contiguous(known) else None,
                                  record=record_of(fusion.addition))
            fusion.addition.replace_all_uses_with(partial, delete_user_cb=lambda user: user is not mix)
    norm.node.replace_all_uses_with(normed)
    # Nodes that only need the mix's shape (size, zeros_like) may stand before the norm: let them read a source.
    mix.replace_all_uses_with(sources[0], delete_user_cb=lambda user: op_name(user) in LIKENESSES)
    for node in reversed((mix, *norm.region)):
        graph.erase_node(node)
    if fusion.addition is not None:
        graph.erase_node(fusion.addition)
