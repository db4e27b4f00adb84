"""Reports: what was found in a model, as plain data that prints as a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnres_fx.passes.graph import place_of
from attnres_fx.passes.partition import sources_at
from attnres_fx.passes.plan import StreamPlan
from attnres_fx.passes.streams import Stream


@dataclass(frozen=True)
class LayerEntry:
    """One layer: the module that runs its addition, the user's source line, and the form of the addition."""

    module: str
    source: str
    form: str
    node: str


@dataclass(frozen=True)
class Reader:
    """A reader that sees the raw stream: its position, and where it stands."""

    position: int
    node: str
    module: str
    source: str


@dataclass(frozen=True)
class ResidualStream:
    """One residual stream of a model, convertible or not.

    ``norm_placement`` is "pre" (a norm before every branch), "sandwich" (before and after), "parallel" (pre-norm with
    several branches an addition), "branch" (on branch outputs alone), "post" (on the stream), "gated", "mixed", "none".
    ``reason`` says in a sentence why the stream is not convertible, and is None where it is. ``function_preserving``: at
    zero queries the converted model computes the original function under ``mix_scale="paper"`` as norm eps goes to 0;
    ``raw_readers`` are the readers that stand against it.
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

    ``seen`` says what was seen instead where there is neither a stream nor a mix.
    """

    streams: tuple[ResidualStream, ...]
    mixes: tuple[MixEntry, ...] = ()
    seen: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.streams and not self.mixes:
            return "no residual stream found" + (f": {self.seen}" if self.seen else "")
        tables = [streams_table(self.streams)] if self.streams else []
        tables += [found_table(self.mixes)] if self.mixes else []
        reasons = (f"\n{stream.name}: {stream.reason}" for stream in self.streams if stream.reason)
        return render(*tables) + "".join(reasons)


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


def render(*parts: Any, width: int = 120) -> str:
    """Tables and text as plain text."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, no_color=True, highlight=False)
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return out.getvalue().rstrip("\n")
