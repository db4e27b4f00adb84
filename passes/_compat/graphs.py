"""Every touch of private interfaces of torch.fx and the dispatcher; the other files of this folder have the rest.

Written against torch 2.11 to 2.15; features are looked up, not version numbers. The tests of ``tests/passes/_compat``
hold one for each: a new release needs them to pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._logging import trace_structured
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from attnres_fx.runtime.marker import ENTER, WITNESS

__all__ = ["HigherOrderOperator", "OpOverload", "OpOverloadPacket", "pytree", "trace_structured"]

# Dead-code elimination must keep the marker, or other backends would silently run the plain network.
fx.node.has_side_effect(ENTER)
fx.node.has_side_effect(WITNESS)

_MODULE_ATTRIBUTES = ("_param_name_to_source", "compile_subgraph_reason", "_backend_id")


def carry_dynamo_metadata(old: fx.GraphModule, new: fx.GraphModule, mapping: dict[fx.Node, fx.Node]) -> None:
    """Copy what ``Graph.graph_copy`` loses: the sources of placeholders and Dynamo's attributes of the module."""
    for before, after in mapping.items():
        if before.op == "placeholder" and hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    for name in _MODULE_ATTRIBUTES:
        if hasattr(old, name):
            value = getattr(old, name)
            setattr(new, name, dict(value) if isinstance(value, dict) else value)


def late_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module of ``graph`` whose code is generated only when it is first read or run."""
    return _LazyGraphModule(root, graph, class_name="GraphModule")


def generate_code(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with its code generated, so that its ``forward`` may be taken and called on its own."""
    gm.recompile()
    if isinstance(gm, _LazyGraphModule):
        gm.real_recompile()
    return gm


def schema_of(operator: Any) -> Any:
    """The schema of an overload of an operator."""
    return operator._schema


def codegen_of(graph: fx.Graph) -> Any:
    """What writes the code of a graph, and knows how its inputs and outputs are nested."""
    return graph._codegen


def tracer_of(graph: fx.Graph) -> Any:
    """The class of the tracer that made a graph, or None."""
    return getattr(graph, "_tracer_cls", None)


def copy_codegen(old: fx.Graph, new: fx.Graph) -> None:
    """Let a graph nest its inputs and outputs as another does."""
    new._codegen = old._codegen


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The fake-tensor mode that the values belong to, or None when they are real tensors."""
    from torch._subclasses.fake_tensor import FakeTensor

    for value in values:
        while isinstance(value, (tuple, list)) and value:
            value = value[0]  # the values of one node share a mode; looking at all would be quadratic in large tuples
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def propagate_fake(gm: fx.GraphModule, args: Sequence[Any]) -> None:
    """Give every node of ``gm`` its fake value as ``meta["val"]``; sizes of inputs other than 0 and 1 stay symbolic.

    Each size is a symbol of its own: two sizes that are equal in these inputs alone must not be taken for one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(duck_shape=False))
    FakeTensorProp(gm, mode).propagate(*args)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Real tensors and plain operators whatever modes, subclasses or autocast are active around; gradients recorded."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction(), torch.enable_grad(), \
            torch.autocast("cpu", enabled=False):
        yield
