"""Every touch of private interfaces of transformers: the hooks that it installs within a call to collect outputs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from attnres_fx.passes._compat.dynamo import is_graph_break


def install_output_capture(model: nn.Module, kwargs: Mapping[str, Any], error: BaseException | None = None) -> bool:
    """Install the hooks behind ``output_hidden_states`` and similar options, if the call, or by ``error`` something within
    the model, asks for them; returns whether anything new was installed.

    transformers installs them under a lock at the first such call, and Dynamo cannot trace a lock.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
        return False
    asked = any(name.startswith("output_") and value for name, value in kwargs.items()) if error is None else (
        is_capture_break(error))
    mark = "_output_capturing_hooks_installed"
    found = [module for module in model.modules() if _captures(type(module), capturing.__file__)] if asked else []
    missing = [module for module in found if not getattr(module, mark, False)]
    for module in missing:
        capturing.maybe_install_capturing_hooks(module)
    return bool(missing)


def is_capture_break(error: BaseException) -> bool:
    """Whether a graph broke because transformers installs the hooks behind ``output_hidden_states`` within the call."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    frames = re.findall(r'File "([^"]+)", line', str(error))
    return capturing is not None and is_graph_break(error) and frames[-1:] == [capturing.__file__]


def output_collector() -> tuple[Any, Any] | None:
    """The variable that transformers' hooks read within a call, and what it holds: the collector of an outer model, or None.

    A graph cannot read it. ``variable.set(collector)``, within the graph, has it read the collector from its own inputs.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    variable = getattr(capturing, "_active_collector", None)
    return None if variable is None else (variable, variable.get())


def is_collector_break(error: BaseException) -> bool:
    """Whether a graph broke because a hook within it collects outputs for a model around it."""
    return is_graph_break(error) and "`ContextVar`" in str(error) and "output_capturing" in str(error)


def _captures(cls: type, file: str | None) -> bool:
    """Whether the forward of ``cls`` is wrapped by the capture; hooks of an outer model would record a second time."""
    function = getattr(cls, "forward", None)
    while function is not None:
        if getattr(getattr(function, "__code__", None), "co_filename", "") == file:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
