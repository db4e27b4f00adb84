"""Graphs for people: the rewritten graph as Python code, and the streams before and after as DOT text.

The code is that of the graph itself, grouped by the module that each line comes from. The DOT drawing is a spine: the values
of a stream, one box per layer for its branch, and after the rewrite the block sums and the mixes with their sources. For a
model that spells its mixes out, only the second half is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from attnres_fx.passes.find.streams import Layer
from attnres_fx.passes.findings import find_marked
from attnres_fx.passes.graph.nodes import module_path
from attnres_fx.passes.graph.record import record_of
from attnres_fx.passes.graph.vocabulary import argument, is_mix, op_name
from attnres_fx.passes.rewrite.match import Assignment
from attnres_fx.passes.rewrite.plan import StreamPlan


@dataclass(frozen=True)
class Pair:
    """One graph before and after the rewrite; ``assignments`` say where the streams are before, and their plans."""

    assignments: tuple[Assignment, ...]
    after: fx.GraphModule


def before_and_after(marked: fx.GraphModule) -> Pair:
    """Both sides of the rewrite of a graph with markers, which stays unchanged."""
    found = find_marked(marked)
    return Pair(found.assignments, found.rewritten())


def readable_code(gm: fx.GraphModule) -> str:
    """The graph as Python code: parameters under their paths, a comment where the module changes, mixes remarked."""
    nodes = {node.name: node for node in gm.graph.nodes}
    names = _short_names(gm)
    inputs = [names.get(node.name, node.name) for node in nodes.values() if node.op == "placeholder"]
    given = [name for name in inputs if not _is_state(name, gm, names)]
    lines = [f"def forward(self, {', '.join(given)}):  # parameters and buffers stand under their names in the model"]
    last: str | None = None
    for line in gm.graph.python_code("self").src.splitlines():
        line = re.sub(r";  \w+( = \w+)* = None\b.*$", "", line).rstrip()
        found = re.match(r"    (\w+)(?: : [^=]+)? = ", line)
        node = nodes.get(found.group(1)) if found else None
        if node is not None and node.op in ("placeholder", "get_attr"):
            continue
        if node is None and not line.startswith("    return") and not re.match(r"    \S", line):
            continue
        if node is not None:
            module = module_path(node)
            if module != last:
                lines.append(f"    # {module or '(the model itself)'}")
                last = module
            line += _remark(node)
        line = re.sub(r"\w+", lambda word: names.get(word.group(), word.group()), line)
        lines.append(re.sub(r"(\w)\.default\(", r"\1(", line))
    return "\n".join(lines)


_STATE = re.compile(r"_(?:parameters|buffers)_(\w+?)_?$")


def _short_names(gm: fx.GraphModule) -> dict[str, str]:
    """Dynamo names an input by how the frame reaches it; the path in the model is equivalent."""
    short: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op != "placeholder" or not node.name.startswith("l_"):
            continue
        stem = _STATE.sub(r"_\1", node.name)
        name = stem.replace("_dict_attnres_", "_attnres_").split("_modules_", 1)[-1].replace("_modules_", "_")
        name = re.sub(r"^l_(model|call|kwargs)_", "", name).strip("_")
        if name.isidentifier() and name not in short.values() and name not in {n.name for n in gm.graph.nodes}:
            short[node.name] = name
    return short


def _is_state(name: str, gm: fx.GraphModule, names: dict[str, str]) -> bool:
    original = next((long for long, short in names.items() if short == name), name)
    return bool(_STATE.search(original))


def _remark(node: fx.Node) -> str:
    record = record_of(node)
    if is_mix(node):
        where = f"position {record.position} of '{record.stream}', " if record and record.stream else ""
        return f"  # mix: {where}{len(argument(node, 0, 'sources'))} sources"
    return f"  # block sum of '{record.stream}', layers up to {record.position}" if record else ""


def dot(pair: Pair, name: str = "model") -> str:
    """Both sides as one DOT graph with a cluster for each; no graphviz is needed to write it."""
    lines = [f"digraph {_quoted(name)} {{", "  rankdir=TB; compound=true; fontname=Helvetica;",
             '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=10];',
             "  edge [color=gray40, arrowsize=0.7];"]
    lines += _cluster("before", "before: residual streams", [line for a in pair.assignments for line in _before(a)])
    lines += _cluster("after", "after: attention residuals",
                      [line for a in pair.assignments for line in _after(a, pair.after)])
    return "\n".join([*lines, "}"]) + "\n"


def dot_of_mixes(gm: fx.GraphModule, name: str = "model") -> str:
    """The mixes of a graph, their sources, and which mix each source is computed from."""
    lines = [f"digraph {_quoted(name)} {{", "  rankdir=TB; fontname=Helvetica;",
             '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=10];',
             "  edge [color=gray40, arrowsize=0.7];"]
    mixes = [node for node in gm.graph.nodes if is_mix(node)]
    sources = dict.fromkeys(source for mix in mixes for source in argument(mix, 0, "sources"))
    for source in sources:
        lines.append("  " + _node(source.name, f"{source.name}\n{module_path(source)}", "lightyellow"))
        lines += ["  " + _edge(origin.name, source.name) for origin in _origins(source, {*mixes, *sources})]
    for mix in mixes:
        listed = argument(mix, 0, "sources")
        lines.append("  " + _node(mix.name, f"mix: {len(listed)} sources\n{module_path(mix)}", "palegreen"))
        lines += ["  " + _edge(source.name, mix.name, "color=seagreen") for source in dict.fromkeys(listed)]
    return "\n".join([*lines, "}"]) + "\n"


def _origins(node: fx.Node, shown: set[fx.Node]) -> list[fx.Node]:
    """The nearest of the shown nodes that ``node`` is computed from."""
    found, pending, seen = [], list(node.all_input_nodes), set(node.all_input_nodes)
    while pending:
        current = pending.pop()
        if current in shown:
            found.append(current)
            continue
        pending += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)
    return found


def _cluster(key: str, label: str, lines: Sequence[str]) -> list[str]:
    return [f"  subgraph cluster_{key} {{", f"    label={_quoted(label)}; color=gray70;",
            *(f"    {line}" for line in lines), "  }"]


def _before(assignment: Assignment) -> list[str]:
    plan, key = assignment.plan, f"before.{assignment.plan.name}"
    lines = [_node(f"{key}.v0", f"{plan.name}: embedding", "lightblue")]
    for position, layer in enumerate(assignment.stream.layers, start=1):
        branch, value, previous = f"{key}.f{position}", f"{key}.v{position}", f"{key}.v{position - 1}"
        lines += [_node(branch, branch_label(layer, position)), _node(value, f"+  {layer.node.name}", "orange"),
                  _edge(previous, branch), _edge(branch, value), _edge(previous, value, "color=orange, penwidth=2")]
    lines += [_node(f"{key}.out", "output of the stream", "lightgray"),
              _edge(f"{key}.v{plan.num_layers}", f"{key}.out")]
    return lines


def _after(assignment: Assignment, gm: fx.GraphModule) -> list[str]:
    """Drawn from the mixes that stand in the rewritten graph, so that the picture shows what runs."""
    plan, key = assignment.plan, f"after.{assignment.plan.name}"
    mixes = mixes_of(gm, plan)
    label = _source_names(plan)
    lines = [_node(f"{key}.s0", f"{plan.name}: b_0, the embedding", "lightblue")]
    made: dict[fx.Node, str] = {}
    reader = f"{key}.s0"  # position 0 has one source, and no mix
    for position, (layer, mixed) in enumerate(zip(assignment.stream.layers, mixes), start=1):
        branch, value, mix = f"{key}.f{position}", f"{key}.s{position}", f"{key}.m{position}"
        sources = [_unmoved(source) for source in argument(mixed, 0, "sources")]
        made.setdefault(sources[0], f"{key}.s0")
        lines += [_node(branch, branch_label(layer, position)), _node(value, label[position], "lightyellow"),
                  _edge(reader, branch), _edge(branch, value)]
        if position > 1 and position - 1 not in plan.boundaries:
            lines.append(_edge(f"{key}.s{position - 1}", value, "color=goldenrod, penwidth=2"))
        made[sources[-1]] = value
        lines.append(_node(mix, f"mix {position}: {len(sources)} sources", "palegreen"))
        lines += [_edge(made[source], mix, "color=seagreen") for source in sources]
        reader = mix
    return [*lines, _node(f"{key}.out", "output of the stream", "lightgray"), _edge(reader, f"{key}.out")]


def _unmoved(source: fx.Node) -> fx.Node:
    """A source before its features were moved last for the mix."""
    while op_name(source) == "movedim" and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source


def mixes_of(gm: fx.GraphModule, plan: StreamPlan) -> list[fx.Node]:
    """The mixes of one stream in a rewritten graph, position 1 first."""
    found = [(record.position, node) for node in gm.graph.nodes
             if is_mix(node) and (record := record_of(node)) is not None and record.stream == plan.name]
    return [node for _, node in sorted(found, key=lambda pair: pair[0])]


def _source_names(plan: StreamPlan) -> dict[int, str]:
    """What the newest source at each position is: a complete block or a partial sum."""
    names, start = {}, 0
    for block, end in enumerate(plan.boundaries, start=1):
        names.update(dict.fromkeys(range(start + 1, end), f"partial sum of block {block}"))
        names[end] = f"b_{block}, layers {start + 1}-{end}" if end > start + 1 else f"b_{block}, layer {end}"
        start = end
    return names


def branch_label(layer: Layer, position: int) -> str:
    """The module whose output a layer adds: the part of its term's path one step below the module that adds."""
    here = layer.place.module
    names = []
    for term in layer.terms:
        path = module_path(term)
        inside = path[len(here):].lstrip(".").split(".")[0] if path.startswith(here) else path
        names.append(".".join(part for part in (here, inside) if part) if path.startswith(here) else inside)
    label = " + ".join(dict.fromkeys(name for name in names if name)) or here
    return f"{position}: {label}" if label else f"layer {position}"


def _node(key: str, label: str, colour: str = "white") -> str:
    return f"{_quoted(key)} [label={_quoted(label)}, fillcolor={colour}];"


def _edge(source: str, target: str, style: str = "") -> str:
    return f"{_quoted(source)} -> {_quoted(target)}{f' [{style}]' if style else ''};"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
