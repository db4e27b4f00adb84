"""Capture: trace a live model into one graph without running it and without leaving anything behind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from attnres_fx.passes._compat.dynamo import (
    compile_whole,
    inner_error,
    is_graph_break,
    is_model_failure,
    pass_over_requires_grad,
    tracing_alone,
)
from attnres_fx.passes._compat.transformers import install_output_capture
from attnres_fx.passes.graph.edit import copy_graph_module
from attnres_fx.passes.graph.graph_breaks import explain_break, known_remedy
from attnres_fx.runtime.errors import AttnResError, GraphBreakError, Place, TracingError
from attnres_fx.runtime.stream import BY_VALUE, ENTRY

pass_over_requires_grad()


class _Captured(Exception):
    """Internal: carries the graph out of the compiler, so that nothing is compiled, cached or run."""

    def __init__(self, gm: fx.GraphModule, inputs: list[Any]) -> None:
        super().__init__("captured")
        self.gm, self.inputs = gm, inputs


def _stop(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
    raise _Captured(copy_graph_module(gm), list(inputs))


def capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[fx.GraphModule, list[Any]]:
    """The whole graph of ``model(*args, **kwargs)`` as Dynamo sees it, and the values of its inputs.

    The model is not run, its state is untouched, and no compiled code is kept.

    Raises: GraphBreakError if the model cannot be captured as one graph, with the place and Dynamo's reason; TracingError
    if the model fails on these inputs.
    """

    def call(*call_args: Any, **call_kwargs: Any) -> Any:
        return model(*call_args, **call_kwargs)

    install_output_capture(model, kwargs)
    try:
        with tracing_alone(), as_one_graph(model):
            compile_whole(call, _stop, dynamic=False)(*args, **kwargs)
    except Exception as error:
        inner = inner_error(error)
        if install_output_capture(model, kwargs, error):
            return capture(model, args, kwargs)
        if isinstance(inner, _Captured):
            return inner.gm, inner.inputs
        if isinstance(inner, AttnResError):
            raise inner from None
        raise translate(error) from error
    raise GraphBreakError(
        "nothing was traced: the model ran without a graph",
        remedy="check that torch.compile is not disabled (TORCHDYNAMO_DISABLE, torch.compiler.disable, set_stance)",
    )


@contextmanager
def as_one_graph(model: nn.Module) -> Iterator[None]:
    """Have the parts of ``model`` that run by value be traced into the graph meanwhile."""
    marks = [(part, name, part.__dict__.pop(name)) for part in model.modules() for name in (BY_VALUE, ENTRY)
             if name in part.__dict__]
    try:
        yield
    finally:
        for part, name, mark in marks:
            part.__dict__[name] = mark


_USER_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


def translate(error: Exception) -> Exception:
    """Dynamo's refusal in our own words with the user's source line; any other exception as it is."""
    if not is_graph_break(error) and not is_model_failure(error):
        return error
    text = str(error)
    frames = _USER_FRAME.findall(text.split("from user code:")[-1]) if "from user code:" in text else []
    place = Place(source=f"{frames[-1][0]}:{frames[-1][1]}") if frames else None
    lines = [line.strip() for line in text.split("from user code:")[0].splitlines() if line.strip()]
    if is_model_failure(error):
        raised = re.search(r"raised exception (.+)", text)
        reason = raised[1] if raised else lines[0] if lines else type(error).__name__
        return TracingError(
            f"the model fails on these inputs while it is traced: {reason}", place=place,
            remedy=known_remedy("\n".join(lines), "" if place is None else place.source)
            or "check that the model runs on them eagerly: shapes, dtypes and devices")
    return explain_break("\n".join(lines), "" if place is None else place.source)
