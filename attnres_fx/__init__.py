"""Turn any PyTorch transformer into an Attention-Residuals model and run it fast.

The names below are the public interface. They are loaded on first use, so that ``import attnres_fx`` and the command
line's help import neither torch nor its compiler; where torch is loaded already, the operators are registered at once.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from attnres_fx.version import VERSION as __version__

_HOMES = {
    "analyze": "attnres_fx.analysis",
    "Report": "attnres_fx.reports.streams",
    "ResidualStream": "attnres_fx.reports.streams",
    "convert": "attnres_fx.conversion",
    "depth_weights": "attnres_fx.verification.models",
    "kernels": "attnres_fx.reports.kernels",
    "load": "attnres_fx.formats.directory",
    "mix": "attnres_fx.runtime.mix",
    "save": "attnres_fx.formats.directory",
    "verify": "attnres_fx.verification.models",
    "Verification": "attnres_fx.verification.verdict",
    "AttnResError": "attnres_fx.errors",
}

__all__ = [
    "AttnResError",
    "Report",
    "ResidualStream",
    "Verification",
    "__version__",
    "analyze",
    "convert",
    "depth_weights",
    "errors",
    "kernels",
    "load",
    "mix",
    "save",
    "verify",
]

if TYPE_CHECKING:
    from attnres_fx import errors
    from attnres_fx.analysis import analyze
    from attnres_fx.conversion import convert
    from attnres_fx.errors import AttnResError
    from attnres_fx.formats.directory import load, save
    from attnres_fx.reports.kernels import kernels
    from attnres_fx.reports.streams import Report, ResidualStream
    from attnres_fx.runtime.mix import mix
    from attnres_fx.verification.models import depth_weights, verify
    from attnres_fx.verification.verdict import Verification


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("attnres_fx.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'attnres_fx' has no attribute '{name}'")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "torch" in sys.modules:
    importlib.import_module("attnres_fx.runtime.into")  # and with it all operators
    importlib.import_module("attnres_fx.runtime.marker")
