"""Positions: which row of which query a mix of a rewritten graph reads, from the graph alone."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from attnres_fx.passes.graph.vocabulary import argument


def row_of(mix: fx.Node) -> tuple[str, int]:
    """(path of the stacked query, row) that a mix of a rewritten program reads; an empty path if it reads none."""
    row: Any = argument(mix, 1, "query")
    rows: Any = row.args[0] if isinstance(row, fx.Node) and row.target is operator.getitem else None
    stacked = rows.args[0] if isinstance(rows, fx.Node) else None
    return (str(stacked.target), int(row.args[1])) if isinstance(stacked, fx.Node) else ("", 0)
