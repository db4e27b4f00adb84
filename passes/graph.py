"""Small helpers over torch.fx graphs that every pass shares: values, places, copies, new nodes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnres_fx.passes._compat import carry_dynamo_metadata, copy_codegen, fake_mode_of, tracer_of
from attnres_fx.runtime.errors import Place

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_STRUCTURE = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id")


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
    """Whether a tensor is known to be contiguous, without adding guards on symbolic sizes: torch's own question fails where
    only a call tells a size.
    """
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride())):
        if not same_size([size], [1]) and not same_size([stride], [expected]):
            return False
        expected = expected * size
    return True


def value_key(graph: fx.Graph) -> str:
    """The metadata key under which this graph keeps its traced values."""
    return "example_value" if any("example_value" in node.meta for node in graph.nodes) else "val"


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


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` with its own graph, sharing parameters and submodules, with all metadata that Dynamo needs.

    Dynamo's own graph must never be changed: it is used again after the backend returns.
    """
    graph = fx.Graph(tracer_cls=tracer_of(gm.graph))
    mapping: dict[fx.Node, fx.Node] = {}
    copied = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    old_output = gm.graph.output_node()
    value = copied[0] if isinstance(copied, tuple) else copied
    output = graph.output(value)
    output.meta = dict(old_output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    copy_codegen(gm.graph, graph)
    result = fx.GraphModule(gm, graph)
    result.meta = dict(gm.meta)
    carry_dynamo_metadata(gm, result, mapping)
    return result


def insert_call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    like: fx.Node,
    kwargs: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    value: Any = None,
) -> fx.Node:
    """Add ``target(*args)`` at the graph's insert point with a traced value and the provenance of ``like``.

    ``value`` is the traced value where the caller knows it; otherwise it is computed on the arguments' fake values.
    This is the one place where passes make nodes, so that none is ever left without a value or a module stack.
    """
    kwargs = kwargs or {}
    node = graph.call_function(target, args, kwargs)
    made = _traced_value(node) if value is None else value
    node.meta["val" if "val" in like.meta and "example_value" not in like.meta else "example_value"] = made
    for name in _STRUCTURE:
        if name in like.meta:
            node.meta[name] = like.meta[name]
    if record is not None:
        node.meta["attnres"] = record
    return node


def _traced_value(node: fx.Node) -> Any:
    mode = fake_mode_of(value_of(n) for n in node.all_input_nodes)
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with mode if mode is not None else contextlib.nullcontext(), torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def replace_uses(old: fx.Node, new: fx.Node, users: Iterable[fx.Node]) -> None:
    """Make each of ``users`` read ``new`` where it read ``old``."""
    for user in users:
        user.replace_input_with(old, new)
