"""Every touch of private interfaces of symbolic sizes and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def input_symbols(graph: fx.Graph) -> set[Any]:
    """The symbols of sizes that the inputs of a graph give, as numbers or as sizes of tensors."""
    found = set()
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.add(size.node.expr)
    return found


def symbols_of(number: Any) -> set[Any]:
    """The symbols in a number; none in an integer."""
    return set(number.node.expr.free_symbols) if isinstance(number, torch.SymInt) else set()


def numbers_as_nodes(graph: fx.Graph) -> Callable[[Any], Any]:
    """Makes arguments of nodes from numbers: integers stay, symbolic ones become nodes that compute them from the inputs."""
    from torch.fx.experimental.proxy_tensor import py_sym_types
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    place = placeholders[-1].next if placeholders else next(iter(graph.nodes))
    tracer = fx.proxy.GraphAppendingTracer(graph)
    known: dict[Any, Any] = {}

    for node in placeholders:
        if isinstance(node.meta.get("val"), py_sym_types):
            known.setdefault(node.meta["val"].node.expr, fx.Proxy(node, tracer))
    for node in placeholders:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and size.node.expr not in known:
                with graph.inserting_before(place):
                    read = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                read.meta["val"] = size
                known[size.node.expr] = fx.Proxy(read, tracer)

    def as_argument(number: Any) -> Any:
        if not isinstance(number, torch.SymInt) or number.node.expr.is_number:
            return int(number)
        if number.node.expr not in known:
            before = place.prev
            with graph.inserting_before(place):
                made = sympy_interp(OptimizedPythonReferenceAnalysis, known, number.node.expr)
            node = before.next
            while node is not place:
                node.meta["val"] = node.target(*fx.map_arg(node.args, lambda arg: arg.meta["val"]))
                node = node.next
            known[number.node.expr] = made
        return known[number.node.expr].node

    return as_argument


def known_int(size: Any) -> int | None:
    """The number that a symbolic size has become since it was traced, without a guard; None while it is free."""
    return int(size) if isinstance(size, int) else size.node.maybe_as_int()


def hinted(number: Any, unknown: float = 8) -> Any:
    """The traced number behind a symbolic one, without a guard on it; ``unknown`` for a size known only at run time."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat)):
        return number
    node: Any = number.node
    return unknown if node.hint is None else node.hint
