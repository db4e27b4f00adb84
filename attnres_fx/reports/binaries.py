"""What the Triton kernels use on a GPU, by compiling them ahead of time; for ``attnres kernels``."""

from __future__ import annotations

from typing import Any

from attnres_fx.runtime.errors import KernelError, OptionError
from attnres_fx.runtime.triton import obstacle

_COLUMNS = ("name", "config", "registers", "spills", "shared_bytes", "load_bytes", "warps", "programs")


def compile_table(target: str, width: int | None = None, brief: bool = False) -> list[dict[str, Any]]:
    """One row for each kernel and configuration of the default table, compiled for ``target``.

    ``width`` keeps the configurations of one width, ``brief`` the first of each kernel and width.
    Raises: OptionError for an unknown target or width; KernelError where triton is missing.
    """
    refusal = obstacle("cuda")
    if refusal is not None:
        raise KernelError("the kernels cannot be compiled without the package triton",
                          remedy="pip install 'attnres-fx[triton]'")
    from attnres_fx.runtime.triton import aot, cases

    every = aot.table(target)
    if width is not None and width not in cases.WIDTHS:
        raise OptionError(f"no configuration has the width {width}",
                          remedy=f"give one of {', '.join(map(str, cases.WIDTHS))}")
    chosen = [case for case in every if width in (None, case.width)]
    if brief:
        chosen = list({(case.name, case.width): case for case in reversed(chosen)}.values())[::-1]
    return [aot.compile_case(case, target).to_dict() for case in chosen]


def table(found: list[dict[str, Any]], target: str) -> str:
    """The rows for people."""
    from rich.table import Table

    from attnres_fx.reports.streams import render

    shown = Table(*_COLUMNS, title=f"{target}: compiled ahead of time, not run on a GPU")
    for row in found:
        shown.add_row(*(str(row[name]) for name in _COLUMNS))
    return render(shown)
