"""Sites: where the layers of a stream stand in the modules of a model, and which module owns them all."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.nodes import stack_paths

_FRAME_PREFIX = re.compile(r"^[LG]\[['\"]\w+['\"]\]")


_FRAME_VARIABLE = re.compile(r"^[LG]\[['\"]\w+['\"]\]$")


def tracer_path(node: fx.Node) -> str:
    """The path of the innermost module that runs ``node``, as the tracer spells it; empty for the tracing frame."""
    stack = stack_paths(node)
    return stack[-1][1] if stack else ""


def identity_of(key: str) -> str:
    """The module that a ``key`` of a module stack means, without the number of its call."""
    return key.partition("@")[0]


def common_path(stream: Stream) -> list[tuple[str, str]]:
    """The modules that run all layers of ``stream``, outermost first, as (identity key, path as the tracer spells it).

    A module that stands at several paths is another call at each.
    """
    common = []
    for level in zip(*(stack_paths(layer.node) for layer in stream.layers)):
        if len(set(level)) != 1:
            break
        common.append(level[0])
    return common


def relative_sites(stream: Stream, owner: str) -> tuple[tuple[str, int], ...]:
    """Sites of ``stream`` below the module that the tracer calls ``owner``."""
    paths = [tracer_path(layer.node).removeprefix(owner) for layer in stream.layers]
    if not owner:  # the owner is the tracing frame itself, whose paths start with the name of its variable
        paths = [_FRAME_PREFIX.sub("", path) for path in paths]
    return sites_of([path.lstrip(".") for path in paths])


def owner_path(marker: fx.Node) -> str:
    """The path of the module whose forward called ``marker``, as the tracer spells it; empty for the tracing frame."""
    path = tracer_path(marker)
    return "" if _FRAME_VARIABLE.match(path) else path


def find_sites(stream: Stream, sites: Sequence[tuple[str, int]]) -> str | None:
    """The path of the module below which the layers of ``stream`` are exactly these sites; None if there is none."""
    if stream.num_layers != len(sites):
        return None
    prefixes = set()
    for layer, (relative, _) in zip(stream.layers, sites):
        path = tracer_path(layer.node)
        if relative and path != relative and not path.endswith("." + relative):
            return None
        prefix = path[: len(path) - len(relative)].rstrip(".")
        prefixes.add("" if _FRAME_VARIABLE.match(prefix) else prefix)
    return prefixes.pop() if len(prefixes) == 1 else None


def sites_of(paths: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Sites of a stream: (module path, call ordinal) of each layer; the ordinal counts equal paths in order."""
    seen: dict[str, int] = {}
    sites = []
    for path in paths:
        sites.append((path, seen.get(path, 0)))
        seen[path] = seen.get(path, 0) + 1
    return tuple(sites)
