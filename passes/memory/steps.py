"""Steps: what a forward with attention residuals writes and reads, in order, from plans or from a graph. Analysis.

From plans, the steps are those that the rewrite and the schedule would make. From a graph, they are its mixes, phases, fused
nodes and sums, and every node that makes or reads one of their rows. The inputs and outputs of the graph are left out, since
their memory is not part of an arena.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from attnres_fx.passes._compat.symbols import hinted
from attnres_fx.passes.graph.aliases import whole_memory_of, whole_readers
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.record import record_of
from attnres_fx.passes.graph.vocabulary import addition_of, argument, is_mix, op_name
from attnres_fx.passes.lower.bytes_moved import Group, sources_of_plan
from attnres_fx.passes.memory.lifetimes import (
    BLOCK,
    LOG_SUM_EXP,
    MIX,
    MIXED,
    NORMED,
    PARTIAL,
    PHASE1_ROW,
    READER,
    SCALE,
    SUM,
    Step,
    Value,
)
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.runtime.mix_norm import MIX_NORM
from attnres_fx.runtime.phases import PHASE1, PHASE2

STATISTIC = 4  # bytes of a log-sum-exp, float32


def steps_of_plans(plans: Sequence[StreamPlan], groups: Sequence[Sequence[Group]], element: int) -> tuple[Step, ...]:
    """The steps of a forward through the planned streams, one after the other, whose mixes are read in the given groups.

    ``element``: bytes per element of the streams. The number of tokens is called "T"; with several streams, which may differ
    in it, "T_<stream>", and names of values begin with the stream's name.
    """
    several = len(plans) > 1
    return tuple(step for plan, grouped in zip(plans, groups, strict=True)
                 for step in _steps_of_plan(plan, grouped, element, f"{plan.name}." if several else "",
                                            f"T_{plan.name}" if several else "T"))


def _steps_of_plan(
    plan: StreamPlan, groups: Sequence[Group], element: int, prefix: str, tokens: str
) -> Iterator[Step]:
    def value(name: str, kind: str) -> Value:
        size = max(STATISTIC, element) if kind == LOG_SUM_EXP else plan.width * element
        return Value(prefix + name, plan.name, kind, size, tokens)

    sources = [[prefix + str(source) for source in read]
               for read in sources_of_plan(plan.boundaries, plan.num_layers)]
    starts = {0, *plan.boundaries}
    group_of = {position: group for group in groups if group.prefix
                for position in range(group.start + 1, group.stop + 1)}
    yield Step(f"{prefix}embedding", READER, (), (value("b_0", BLOCK),))
    # Only mixes are fused with the norms that read them; a norm that reads another row keeps it for its backward.
    read, kept = prefix + "b_0", True
    for position in range(1, plan.num_layers + 1):
        newest = value(sources[position - 1][-1].removeprefix(prefix), BLOCK if position in plan.boundaries else PARTIAL)
        first = position - 1 in starts
        yield Step(f"{prefix}layer {position}", READER, (read,), (newest,) if first else (), (read,) if kept else ())
        if not first:
            yield Step(f"{prefix}sum {position}", SUM, (sources[position - 2][-1],), (newest,))
        mixed = value(f"mix {position}", MIXED)
        group = group_of.get(position)
        if group is None:
            rows = tuple(sources[position - 1])
            yield Step(mixed.name, MIX, rows, (mixed,), rows)
            read, kept = mixed.name, False
            continue
        row, statistic = (prefix + f"{name} {position}" for name in ("row", "lse"))
        if position == group.start + 1:
            together = range(position, group.stop + 1)
            made = [value(f"row {p}", PHASE1_ROW) for p in together] + [value(f"lse {p}", LOG_SUM_EXP) for p in together]
            rows = tuple(sources[position - 1][:group.prefix])
            yield Step(f"{prefix}phase 1 of {position}-{group.stop}", MIX, rows, tuple(made), rows)
        tail = sources[position - 1][group.prefix:]
        read, kept = mixed.name, not tail
        if tail:
            rows = (row, statistic, *tail)
            yield Step(mixed.name, MIX, rows, (mixed,), rows)
        elif plan.output_factor(position) != 1.0:
            yield Step(mixed.name, SCALE, (row,), (mixed,))
        else:
            read = row  # the result of phase 1 is the mix
    yield Step(f"{prefix}output", READER, (read,), (), (read,) if kept else ())


def steps_of_graph(gm: fx.GraphModule) -> tuple[tuple[Step, ...], dict[str, int]]:
    """The steps of a rewritten, perhaps scheduled and fused graph, and the numbers of tokens it was traced with, by name.

    Values are named after the nodes that make them; their memory is followed through views. Kernels are not selected yet.
    """
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    found, tokens = _values(gm.graph)
    steps: dict[fx.Node, Step] = {}

    def step_at(node: fx.Node) -> Step:
        return steps.get(node) or Step(node.name, _role(node), (), ())

    for owner, value in found.items():
        users, escapes = whole_readers(owner)
        maker = _maker(owner)
        if escapes or maker.op in ("placeholder", "get_attr"):
            continue
        steps[maker] = replace(step_at(maker), writes=(*step_at(maker).writes, value))
        for user in users:
            step = step_at(user)
            if user in found and addition_of(user) is not None:
                step = replace(step, role=SUM)
            earlier = step.role == SUM and value.kind == PARTIAL
            reads = (value.name, *step.reads) if earlier else (*step.reads, value.name)
            # A fused node saves the sum that it completes, not the earlier part of it. Only mixes are fused with the
            # norms that read them; a norm that reads another row keeps it.
            complete = value.kind in (BLOCK, PHASE1_ROW) or _role(owner) == SCALE
            saved = (step.role == MIX and _continued(user) is not owner) or (step.role == READER and complete)
            steps[user] = replace(step, reads=reads, saves=(*step.saves, value.name) if saved else step.saves)
    for node, step in list(steps.items()):
        if node.target in (PHASE1, MIX_NORM) and step.writes:
            made = (*step.writes, *_unread(node, step.writes[0]))
            completed = [value.name for value in made if value.kind in (BLOCK, PARTIAL)]
            steps[node] = replace(step, writes=made, saves=(*step.saves, *completed))
    return tuple(steps[node] for node in sorted(steps, key=order.__getitem__)), tokens


def _values(graph: fx.Graph) -> tuple[dict[fx.Node, Value], dict[str, int]]:
    """The values of attention residuals by the node that owns their memory, and the numbers of tokens."""
    mixes = [node for node in graph.nodes if _role(node) == MIX]
    owners = {whole_memory_of(source) for mix in mixes for source in _sources(mix)}
    owners |= {part for mix in mixes if mix.target is MIX_NORM for part in mix.users if part.args[1] == 1}
    found: dict[fx.Node, Value] = {}
    tokens: dict[str, int] = {}
    for mix in mixes:
        like = value_of(_sources(mix)[0])
        count, number = 1, 1
        for size in like.shape[:-1]:
            count, number = count * size, number * int(hinted(size))
        tokens[str(count)] = number
        read = [*map(whole_memory_of, _sources(mix)), *(part for part in mix.users if part in owners)]
        kinds = {owner: PARTIAL if _is_summed(owner, owners) else BLOCK for owner in read}
        if mix.target is PHASE1:
            for part in mix.users:
                kinds[part] = PHASE1_ROW if value_of(part).dim() == like.dim() else LOG_SUM_EXP
                kinds.update((user, MIXED) for user in part.users if _role(user) == SCALE)
        elif mix.target is MIX_NORM:
            kinds.update((part, NORMED) for part in mix.users if part not in owners)
        else:
            kinds[mix] = MIXED
        record = record_of(mix)
        stream = (record.stream if record is not None else None) or "stream"
        for owner, kind in kinds.items():
            value = value_of(owner)
            size = int(hinted(value.numel())) * value.element_size() // number
            found.setdefault(owner, Value(owner.name, stream, kind, size, str(count)))
    return found, tokens


def _unread(node: fx.Node, like: Value) -> Iterator[Value]:
    """Results of an operator with several results that no node takes: statistics of queries that have no later source, and
    the last block where it is completed in the mix at the output."""
    taken = {part.args[1] for part in node.users}
    results = value_of(node)
    for index, made in enumerate(results):
        if index not in taken:
            width = int(hinted(made.shape[-1]))
            if node.target is MIX_NORM:
                kind = NORMED if index == 0 else BLOCK
            else:
                kind = PHASE1_ROW if 2 * index < len(results) else LOG_SUM_EXP
            size = made.element_size() * (1 if kind == LOG_SUM_EXP else width)
            yield Value(f"{node.name}[{index}]", like.stream, kind, size, like.tokens)


def _role(node: fx.Node) -> str:
    if is_mix(node) or node.target in (PHASE1, PHASE2, MIX_NORM):
        return MIX
    row = node.args[0] if node.args else None
    scaled = op_name(node) == "mul" and isinstance(row, fx.Node) and isinstance(node.args[1], (int, float))
    return SCALE if scaled and isinstance(row, fx.Node) and _maker(row).target is PHASE1 else READER


def _sources(mix: fx.Node) -> list[fx.Node]:
    return list(argument(mix, 2 if mix.target is PHASE2 else 0, "sources"))


def _continued(node: fx.Node) -> fx.Node | None:
    """The partial sum that a fused node adds to, by the node that owns its memory."""
    adds = node.target is MIX_NORM and argument(node, 3, "delta") is not None
    return whole_memory_of(_sources(node)[-1]) if adds else None


def _is_summed(owner: fx.Node, owners: set[fx.Node]) -> bool:
    """Whether a source is part of a later sum that is a source, too."""
    return any((user in owners and addition_of(user) is not None) or _continued(user) is owner
               for user in whole_readers(owner)[0])


def _maker(owner: fx.Node) -> fx.Node:
    """The node that allocates the memory of ``owner``: the operator of which it is one of several results, or itself."""
    source = owner.args[0] if op_name(owner) == "getitem" else None
    return source if isinstance(source, fx.Node) and isinstance(value_of(source), (list, tuple)) else owner
