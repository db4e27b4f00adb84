"""Which Python files a call runs code of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def files_entered(call: Callable[[], Any]) -> set[str]:
    """The names of the files of which a function is entered during ``call()``."""
    entered: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            entered.add(Path(frame.f_code.co_filename).name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered
