"""Which implementation serves an operator, by device, dtype and shape, and why: one table for people and programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

_NATIVE_DTYPES = "float32, bfloat16, float16, float64; one dtype for all sources"


@dataclass(frozen=True)
class Kernel:
    """One row: calls on ``device`` with these ``dtypes`` and ``shapes`` run on ``implementation``, because of ``reason``.

    ``operators`` of the namespace attnres, forward and backward: "all" are mix, mix_phase1, mix_phase2 and mix_norm.
    """

    device: str
    operators: str
    dtypes: str
    shapes: str
    implementation: str
    reason: str


class KernelTable(tuple[Kernel, ...]):
    """The rows, most specific first: the first that fits a call is the one that serves it. ``print`` shows a table."""

    __slots__ = ()

    def __new__(cls, rows: Iterable[Kernel]) -> KernelTable:
        return super().__new__(cls, tuple(rows))

    def table(self) -> Any:
        """The rows as a rich table."""
        from rich.table import Table

        table = Table("device", "operators", "dtypes of the sources", "shapes", "kernel", "why")
        for row in self:
            table.add_row(row.device, row.operators, row.dtypes, row.shapes, row.implementation, row.reason)
        return table

    def __str__(self) -> str:
        from attnres_fx.reports.streams import render

        return render(self.table())

    def to_dict(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self]


def kernels() -> KernelTable:
    """What serves ``attnres_fx.mix``, and in compiled models its phases and mix_norm too, forward and backward.

    Builds and loads nothing.
    ``torch.compile(model, backend="attnres", options={"kernels": "reference"})`` overrules it for one model.
    """
    from attnres_fx.runtime.cpu import build, native

    state = native.state()
    reason = {
        "ready": "compiled C++, loaded",
        "not loaded": "compiled C++, loaded at the first call" if build.is_built()
        else "C++, compiled once at the first call",
        "unavailable": f"the native kernels are not available: {state.reason}",
    }[state.status]
    if state.status == "not loaded" and not build.is_built() and build.compiler() is None:
        implementation, reason = "reference", "no C++ compiler was found to build the native kernels with"
    else:
        implementation = "reference" if state.status == "unavailable" else "native"
    return KernelTable([
        Kernel("cpu", "mix, mix_norm", "any", "one source alone, raw values", "reference",
               "the mix of one source is a copy"),
        Kernel("cpu", "all", _NATIVE_DTYPES, "any", implementation, reason),
        Kernel("cpu", "all", "several dtypes among the sources", "any", "reference",
               "native kernels read rows of one dtype"),
        _gpu(),
        Kernel("any other", "all", "any", "any", "reference", "there is no kernel for other devices"),
    ])


def _gpu() -> Kernel:
    from attnres_fx.runtime.triton import obstacle
    from attnres_fx.runtime.triton.configs import MAX_WIDTH

    refusal = obstacle("cuda")
    if refusal is not None:
        return Kernel("cuda", "all", "any", "any", "reference", "triton is not installed: pip install attnres-fx[triton]")
    return Kernel("cuda", "all", "any", f"d <= {MAX_WIDTH}; wider on the reference", "triton",
                  "Triton, compiled by it at the first call; not run on a GPU by the project's tests")
