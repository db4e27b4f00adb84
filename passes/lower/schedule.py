"""Schedule: read sources that consecutive mixes have in common once, in two phases (Algorithm 1), where that pays.

Matches: ``attnres::mix`` nodes of one query whose lists of sources begin alike. Replaces with: one ``attnres::mix_phase1``
over the common sources for all their queries, and one ``attnres::mix_phase2`` per mix over its own later sources. Which
mixes are grouped is decided by :mod:`attnres_fx.passes.lower.bytes_moved`, where they are limited by memory at all; the
blocks of the model play no part in it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnres_fx.passes._compat.symbols import hinted
from attnres_fx.passes.graph.aliases import changes_near
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.edit import insert_call, keep_tags, movable_calls, move_before
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.record import Record, record_of
from attnres_fx.passes.graph.vocabulary import argument, is_mix, op_name
from attnres_fx.passes.lower.bytes_moved import MOST_QUERIES, PREFER_TWO_PHASES, Machine, cpu_machine, gpu_machine, schedule
from attnres_fx.runtime.phases import PHASE1, PHASE2

aten = torch.ops.aten

SCHEDULES = ("auto", "one-pass", "two-phase")
# The last-level cache is shared by many cores, and by what the layers themselves read: the share of it that is counted on.
_SHARERS = 8


@dataclass(frozen=True)
class Read:
    """One mix: its node and its arguments."""

    node: fx.Node
    sources: tuple[fx.Node, ...]
    query: fx.Node
    key_gain: fx.Node | None
    eps: float
    logit_scale: float
    normalize_values: bool
    output_factor: float

    @property
    def family(self) -> tuple[Any, ...]:
        """Only mixes of one family can share a phase 1."""
        value = value_of(self.node)
        gain = None if self.key_gain is None else value_of(self.key_gain).dtype
        # A checkpointed region is recomputed as a whole: what it reads from another one would have to be kept.
        region = self.node.meta.get("ac_graph_id"), self.node.meta.get("recompute")
        return (str(value.shape), value.device, value.dtype, value_of(self.query).dtype, gain, self.eps, self.logit_scale,
                self.normalize_values, *region)


def schedule_mixes(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place, by ``context.schedule``; returns the number of groups that are read in two phases."""
    if context.schedule == "one-pass" or any(node.target is PHASE1 for node in graph.nodes):
        return 0
    most = context.most_queries or MOST_QUERIES
    made = 0
    for reads in families(graph):
        order = {node: place for place, node in enumerate(graph.nodes)}
        movable = [movable_calls((read.query, read.key_gain)) for read in reads]
        known: dict[fx.Node, list[int]] = {}
        changed_at = [changes_near((*read.sources, read.query, read.key_gain, *(calls or ())), order, known)
                      for read, calls in zip(reads, movable)]

        def joinable(first: int, later: int, reads: Sequence[Read] = reads, order: dict[fx.Node, int] = order,
                     movable: Sequence[Any] = movable, changed_at: Sequence[Sequence[int]] = changed_at) -> bool:
            begin, end = order[reads[first].node], order[reads[later].node]
            early = all(order[part] < begin for part in (reads[later].query, reads[later].key_gain) if part is not None)
            return (early or movable[later] is not None) and not any(begin < at < end for at in changed_at[later])

        machine = machine_of(reads[0], context.training)
        if context.schedule == "auto" and not _waits_for_memory(reads, machine):
            continue
        penalty = PREFER_TWO_PHASES if context.schedule == "two-phase" else 0.0
        groups = schedule([read.sources for read in reads], machine, joinable, penalty, most)
        for group in groups:
            if group.prefix:
                _split(reads[group.start:group.stop], movable[group.start:group.stop], group.prefix)
                made += 1
    return made


def families(graph: fx.Graph) -> list[list[Read]]:
    """The mixes of one query in graph order, those together that can share a phase 1."""
    found: dict[tuple[Any, ...], list[Read]] = {}
    recorded: Any = None  # the last switch of autograd in the graph
    level = 0  # a phase 1 for mixes on both sides of a transform's border would be of neither
    for node in graph.nodes:
        name = op_name(node)
        if name == "_set_grad_enabled":
            recorded = node.args[0]
        elif name.endswith("_nesting") or "inference_mode" in name:
            level += 1
        elif is_mix(node):
            read = _read(node)
            if read is not None:
                found.setdefault((*read.family, recorded, level), []).append(read)
    return list(found.values())


def machine_of(read: Read, training: bool) -> Machine:
    """What the bytes of a family are counted with: its traced sizes, and the queries that one sweep serves on its device."""
    value = value_of(read.node)
    width = int(hinted(value.shape[-1]))
    tokens = 1.0
    for size in value.shape[:-1]:
        tokens *= hinted(size)
    shape = width, value.element_size(), tokens, training, read.key_gain is not None
    return gpu_machine(*shape, read.normalize_values) if value.device.type == "cuda" else cpu_machine(*shape)


def _waits_for_memory(reads: Sequence[Read], machine: Machine) -> bool:
    """Whether the time of the reads is decided by bytes.

    On the CPU they are not where all sources stay in a share of the last-level cache, nor for elements of two bytes,
    which take as long to widen as to fetch (measured: benchmarks/NOTES.md). On GPUs a training step moves more in two
    phases, by runtime/triton/traffic.py: the backward of a phase 1 reads its sources twice for two queries, and adds up in
    float32.
    """
    if value_of(reads[0].node).device.type != "cpu":
        return not machine.training
    rows = max(len(read.sources) for read in reads)
    return machine.element >= 4 and rows * machine.tokens * machine.row > last_level_cache() / _SHARERS


@functools.cache
def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache, 32 MiB if the system does not report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] if text[-1:] in ("K", "M") else int(text or 0))
    return max(sizes, default=0) or 32 << 20


def _read(node: fx.Node) -> Read | None:
    sources = argument(node, 0, "sources")
    query, gain = argument(node, 1, "query"), argument(node, 2, "key_gain")
    listed = isinstance(sources, (list, tuple)) and all(isinstance(source, fx.Node) for source in sources)
    if not listed or not isinstance(query, fx.Node) or value_of(query).dim() != 1:
        return None
    # A phase 1 over the narrower of several dtypes would round what the mix does not.
    if any(value_of(source).dtype != value_of(node).dtype for source in sources):
        return None
    return Read(node, tuple(sources), query, gain, argument(node, 3, "eps", 1e-6), argument(node, 4, "logit_scale", 1.0),
                argument(node, 5, "normalize_values", False), argument(node, 6, "output_factor", 1.0))


def _split(reads: Sequence[Read], moved: Sequence[list[fx.Node] | None], prefix: int) -> None:
    """Replace a group of mixes by the two phases."""
    first = reads[0]
    graph, like = first.node.graph, first.node
    queries = len(reads)
    for calls in moved:
        move_before(first.node, calls or [])
    with graph.inserting_before(first.node):
        stacked = insert_call(graph, aten.stack.default, ([read.query for read in reads],), like=like)
        gains = None
        if first.key_gain is not None:
            gains = insert_call(graph, aten.stack.default, ([read.key_gain for read in reads],), like=like)
        options = (first.eps, first.logit_scale, first.normalize_values)
        known = record_of(first.node)
        record = Record("phase 1", known.stream if known is not None else None, sources=prefix, queries=queries)
        common = list(first.sources[:prefix])
        early = insert_call(graph, PHASE1, (common, stacked, gains, *options), like=like, record=record)
        keep_tags(first.node, early)
    values = value_of(early)
    for place, read in enumerate(reads):
        with graph.inserting_before(read.node):
            node = insert_call(graph, operator.getitem, (early, place), like=read.node, value=values[place])
            tail = list(read.sources[prefix:])
            if tail:
                lse = insert_call(graph, operator.getitem, (early, queries + place), like=read.node,
                                  value=values[queries + place])
                node = insert_call(
                    graph, PHASE2, (node, lse, tail, read.query, read.key_gain, *options, read.output_factor),
                    like=read.node, value=value_of(read.node), record=record_of(read.node))
            elif read.output_factor != 1.0:
                node = insert_call(graph, aten.mul.Tensor, (node, read.output_factor), like=read.node)
            keep_tags(read.node, node)
        read.node.replace_all_uses_with(node)
        graph.erase_node(read.node)
