"""What the rewrite records on the nodes that it makes, for later passes and reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

_KEY = "attnres"  # in the meta of a node


@dataclass(frozen=True)
class Record:
    """``role``: "mix", "partial" (a block sum, complete or not), "phase 1" or "memory" (what rows share). ``stream`` and
    ``position`` say which value of which stream it is; a mix that was spelled out by hand has neither. ``sources`` and
    ``queries`` are counts.
    """

    role: str
    stream: str | None = None
    position: int = 0
    sources: int = 0
    queries: int = 1


def record_of(node: fx.Node) -> Record | None:
    """What was noted on ``node``, or None."""
    found: Record | None = node.meta.get(_KEY)
    return found


def note(node: fx.Node, record: Record | None) -> None:
    """Note ``record`` on ``node``; None leaves it as it is."""
    if record is not None:
        node.meta[_KEY] = record
