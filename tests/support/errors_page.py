"""docs/errors.md, from the classes of errors and the table of obstacles; ``make docs`` writes it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from attnres_fx import errors
from attnres_fx.passes.find.obstacles import KINDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
HEAD = """# Errors

Every refusal is an `attnres_fx.errors.AttnResError` (a `RuntimeError`) with the place in the model, as
`[node, module path, source line]`, in `error.place`, and what to do about it in `error.remedy`; both are part of the
message. `torch.compile` wraps what a backend raises in its `BackendCompilerFailed`, whose `inner_exception` it is. This page
is made from the code by `make docs`.
"""


def page() -> str:
    """The page as Markdown."""
    lines = [HEAD, "## Streams that are not rewritten", "", "| error | why | what to do |", "|---|---|---|"]
    lines += [f"| `{kind.error.__name__}` | {_cell(kind.why.format('...'))} | {_cell(kind.remedy)} |"
              for kind in sorted(KINDS.values(), key=lambda kind: kind.error.__name__)]
    lines += ["", "## All classes", "", "| error | is a | raised when |", "|---|---|---|"]
    for name in sorted(errors.__all__):
        cls = getattr(errors, name)
        if inspect.isclass(cls) and issubclass(cls, errors.AttnResError):
            bases = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
            said = re.sub(r"``(.+?)``", r"`\1`", " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()))
            lines.append(f"| `{name}` | {bases} | {_cell(said)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
