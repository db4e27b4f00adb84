"""Small helpers over torch.fx graphs that every pass shares: values, places, copies, new nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnres_fx.runtime.errors import Place

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def value_of(node: Any) -> Any:
    """The traced (usually fake) value of a node: Dynamo's ``example_value`` or export's ``val``; None if unknown."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get("example_value")
    return node.meta.get("val") if found is None else found


def float_tensor(node: Any) -> torch.Tensor | None:
    """The traced value of ``node`` if it is a floating-point tensor, else None."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def same_size(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without adding guards on symbolic sizes."""
    if len(a) != len(b):
        return False
    return all((x == y) if isinstance(x, int) and isinstance(y, int) else statically_known_true(x == y)
               for x, y in zip(a, b))


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether a tensor is known to be contiguous, without adding guards on symbolic sizes: torch's own check fails where a
    size is known only in a call.
    """
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride())):
        if not same_size([size], [1]) and not same_size([stride], [expected]):
            return False
        expected = expected * size
    return True


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """The module that a graph belongs to, whose attributes its nodes name."""
    owner = graph.owning_module
    if owner is None:
        raise ValueError("the graph does not belong to a module")
    return owner


def stack_paths(node: fx.Node) -> list[tuple[str, str]]:
    """The module stack of ``node``, outermost first: pairs of (identity key, module path as the tracer spells it)."""
    return [(key, entry[0]) for key, entry in (node.meta.get("nn_module_stack") or {}).items()]


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that runs ``node``, without the name of the tracing frame's variable."""
    stack = stack_paths(node)
    return re.sub(r"^[LG]\[['\"]\w+['\"]\]\.?", "", stack[-1][1]) if stack else ""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost user frame that made ``node``, or an empty string."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


def place_of(node: fx.Node) -> Place:
    """Where ``node`` stands in the user's model."""
    return Place(node.name, module_path(node), source_line(node))
