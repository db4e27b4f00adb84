"""Reports: what was found in a model, as plain data that prints as a table."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.nodes import place_of
from attnres_fx.passes.lower.bytes_moved import gpu_machine, schedule, sources_of_plan
from attnres_fx.passes.rewrite.partition import sources_at
from attnres_fx.passes.rewrite.plan import StreamPlan


@dataclass(frozen=True)
class LayerEntry:
    """One layer: the module that runs its addition, the user's source line, and the form of the addition."""

    module: str
    source: str
    form: str
    node: str


@dataclass(frozen=True)
class Reader:
    """A reader that sees the raw stream: its position, and its place in the model."""

    position: int
    node: str
    module: str
    source: str


@dataclass(frozen=True)
class ResidualStream:
    """One residual stream of a model, convertible or not.

    ``norm_placement`` is "pre" (a norm before every branch), "sandwich" (before and after), "parallel" (pre-norm with
    several branches per addition), "branch" (on branch outputs alone), "post" (on the stream), "gated", "mixed", "none".
    ``reason`` says in a sentence why the stream is not convertible, and is None where it is. ``function_preserving``: at
    zero queries the converted model computes the original function under ``mix_scale="paper"`` as norm eps goes to 0;
    ``raw_readers`` are the readers that prevent it.
    """

    name: str
    num_layers: int
    width: int
    layers: tuple[LayerEntry, ...]
    norm_placement: str
    convertible: bool
    reason: str | None
    function_preserving: bool
    raw_readers: tuple[Reader, ...]


@dataclass(frozen=True)
class MixEntry:
    """One attention-residual mix found in a model: where, and how many sources it reads."""

    module: str
    source: str
    num_sources: int


@dataclass(frozen=True)
class Report:
    """What :func:`attnres_fx.analyze` found; ``print(report)`` gives a table.

    ``seen`` describes what was seen instead if there is neither a stream nor a mix. ``ways`` says, of a converted model, how
    each stream runs when the model is called eagerly, by value or as one graph, and why not by value.
    """

    streams: tuple[ResidualStream, ...]
    mixes: tuple[MixEntry, ...] = ()
    seen: str = ""
    ways: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.streams and not self.mixes:
            return "no residual stream found" + (f": {self.seen}" if self.seen else "")
        tables = [streams_table(self.streams)] if self.streams else []
        tables += [found_table(self.mixes)] if self.mixes else []
        reasons = (f"\n{stream.name}: {stream.reason}" for stream in self.streams if stream.reason)
        ways = (f"\n{name}: called eagerly, it runs {way}" for name, way in self.ways.items())
        return render(*tables) + "".join((*reasons, *ways))


def describe_stream(stream: Stream) -> ResidualStream:
    """The public view of a detected stream."""
    refusal = stream.refusal()
    readers = []
    for position, node in stream.raw_readers:
        place = place_of(node)
        readers.append(Reader(position, "the model's output" if node.op == "output" else place.node, place.module,
                              place.source))
    layers = tuple(LayerEntry(layer.place.module, layer.place.source, layer.form, layer.node.name)
                   for layer in stream.layers)
    return ResidualStream(
        name=stream.name, num_layers=stream.num_layers, width=stream.width, layers=layers,
        norm_placement=stream.norm_placement, convertible=refusal is None,
        reason=None if refusal is None else str(refusal).replace("\n ", ""),
        function_preserving=stream.function_preserving, raw_readers=tuple(readers))


def streams_table(streams: Sequence[ResidualStream]) -> Any:
    """A table of streams for the terminal."""
    from rich.table import Table

    table = Table("stream", "layers", "width", "norm placement", "function-preserving", "convertible")
    for stream in streams:
        table.add_row(stream.name, str(stream.num_layers), str(stream.width), stream.norm_placement,
                      "yes" if stream.function_preserving else "no", "yes" if stream.convertible else "no")
    return table


def found_table(mixes: Sequence[MixEntry]) -> Any:
    """A table of the mixes that a model spells out, which its compilation fuses."""
    from rich.table import Table

    table = Table("attention residuals in the model", "source", "sources of the mix")
    for mix in mixes:
        table.add_row(mix.module, mix.source, str(mix.num_sources))
    return table


def blocks_table(plans: Sequence[StreamPlan]) -> Any:
    """A table of the blocks of converted streams: which layers each sums."""
    from rich.table import Table

    table = Table("stream", "block", "layers", "first module", "last module")
    for plan in plans:
        table.add_row(plan.name, "b_0", "-", "embedding", "")
        starts = (0, *plan.boundaries[:-1])
        for index, (start, end) in enumerate(zip(starts, plan.boundaries), start=1):
            table.add_row(plan.name, f"b_{index}", f"{start + 1}-{end}" if end > start + 1 else str(end),
                          plan.sites[start][0] or plan.owner, plan.sites[end - 1][0] or plan.owner)
    return table


def mixes_table(plans: Sequence[StreamPlan]) -> Any:
    """A table of the mixes of converted streams: position, reader and sources."""
    from rich.table import Table

    table = Table("stream", "position", "read by", "sources")
    for plan in plans:
        for position in range(1, plan.num_layers + 1):
            found = sources_at(plan.boundaries, position)
            names = [f"b_{index}" for index in range(found.blocks + 1)] + (["partial"] if found.partial else [])
            listed = ", ".join(names) if len(names) <= 4 else f"{names[0]} .. {names[-2]}, {names[-1]}"
            reader = (plan.sites[position][0] or "layer") if position < plan.num_layers else "output"
            table.add_row(plan.name, str(position), reader, f"{len(names)}: {listed}")
    return table


def schedules(plans: Sequence[StreamPlan], tokens: int) -> list[dict[str, Any]]:
    """What the schedule would do with the mixes of converted streams: one row per group, for inference and training.

    Counted for ``tokens`` tokens in bfloat16 on a GPU; bytes are per token. ``prefix`` is the number of sources that a
    group reads once in phase 1, 0 if every mix of it is read in one pass.
    """
    rows = []
    for plan, training in itertools.product(plans, (False, True)):
        machine = gpu_machine(plan.width, 2, tokens, training, plan.key_gain)
        groups = schedule(sources_of_plan(plan.boundaries, plan.num_layers), machine)
        for alone, run in itertools.groupby(groups, key=lambda group: group.prefix == 0):
            parts = list(run)
            # Neighbours that are read one by one share a row.
            for part in [parts] if alone else [[group] for group in parts]:
                rows.append({"stream": plan.name, "training": training, "first": part[0].start + 1, "last": part[-1].stop,
                             "prefix": part[0].prefix, "one_pass": sum(group.one_pass for group in part),
                             "chosen": sum(group.bytes for group in part)})
    return rows


def schedule_table(plans: Sequence[StreamPlan], tokens: int) -> Any:
    """The rows of :func:`schedules` as a table, with the sums, in bytes per token."""
    from rich.table import Table

    table = Table("stream", "for", "positions", "chosen", "bytes in one pass", "bytes as chosen")
    rows = schedules(plans, tokens)
    for (name, training), listed in itertools.groupby(rows, key=lambda row: (row["stream"], row["training"])):
        group = list(listed)
        purpose = "training" if training else "inference"
        for row in group:
            chosen = f"two phases, {row['prefix']} sources in common" if row["prefix"] else "one pass"
            positions = f"{row['first']}-{row['last']}" if row["last"] > row["first"] else str(row["first"])
            table.add_row(name, purpose, positions, chosen, f"{row['one_pass']:,.0f}", f"{row['chosen']:,.0f}")
        totals = (sum(row[key] for row in group) for key in ("one_pass", "chosen"))
        table.add_row(name, purpose, "all", "", *(f"{total:,.0f}" for total in totals), end_section=True)
    return table


def render(*parts: Any, width: int = 120) -> str:
    """Tables and text as plain text."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, no_color=True, highlight=False)
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return out.getvalue().rstrip("\n")
