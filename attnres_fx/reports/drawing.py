"""Draw a memory plan as SVG: one bar per buffer for its lifetime over the layers, one row per slot of the arena."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree as Xml

from attnres_fx.passes.memory.budget import bytes_text
from attnres_fx.passes.memory.layout import Placement
from attnres_fx.passes.memory.lifetimes import BLOCK, GRADIENT, KINDS, LOG_SUM_EXP, MIXED, NORMED, PARTIAL, PHASE1_ROW
from attnres_fx.reports.memory import MemoryPlan

# Okabe and Ito's palette, which colour-blind readers can distinguish, too.
_COLOURS = {BLOCK: "#0072B2", PARTIAL: "#E69F00", PHASE1_ROW: "#009E73", LOG_SUM_EXP: "#999999", MIXED: "#56B4E9",
            NORMED: "#CC79A7"}
_ROW, _LEFT, _TOP, _BOTTOM = 16, 120, 66, 30
_CHARACTER = 5.5  # width of one in the labels
_WIDEST, _NARROWEST = 1500, 760


def draw(memory: MemoryPlan, title: str) -> str:
    """The SVG text of a memory plan."""
    layout, forward = memory.choice.layout, len(memory.choice.steps)
    steps = 2 * forward if memory.choice.setting.training else forward
    unit = min(26.0, max(2.0, _WIDEST / max(steps, 1)))
    width, height = max(_NARROWEST, _LEFT + steps * unit + 20), _TOP + layout.slots * _ROW + _BOTTOM
    svg = Xml.Element("svg", {
        "xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}",
        "height": f"{height:g}", "font-family": "sans-serif", "font-size": "10"})
    _box(svg, 0, 0, width, height, fill="white")
    _text(svg, 10, 18, f"{title}: planned peak {bytes_text(layout.arena)}, lower bound {bytes_text(layout.lower_bound)}, "
          f"without sharing {bytes_text(layout.naive)}", **{"font-size": "13"})
    _legend(svg, memory)
    if memory.choice.setting.training:
        _box(svg, _LEFT + forward * unit, _TOP, forward * unit, layout.slots * _ROW, fill="#f2f2f2")
    for x, label in _ticks(memory, unit):
        Xml.SubElement(svg, "line", {"x1": f"{x:g}", "x2": f"{x:g}", "y1": str(_TOP), "stroke": "#dddddd",
                                     "y2": str(_TOP + layout.slots * _ROW)})
        _text(svg, x, _TOP - 5, label, **{"text-anchor": "middle"})
    for place in {place.slot: place for place in reversed(layout.placements)}.values():
        _text(svg, _LEFT - 6, _TOP + place.slot * _ROW + 12, f"{place.slot}: {place.offset:,}", **{"text-anchor": "end"})
    for place in layout.placements:
        _bar(svg, place, unit)
    _text(svg, _LEFT, height - 10, "rows: slots, and their offsets in the arena; columns: steps, marked where a layer runs"
          + (", the backward shaded" if memory.choice.setting.training else ""))
    Xml.indent(svg)
    return Xml.tostring(svg, encoding="unicode") + "\n"


def _bar(svg: Xml.Element, place: Placement, unit: float) -> None:
    buffer = place.buffer
    gradient = buffer.kind.startswith(GRADIENT)
    x, length = _LEFT + buffer.first * unit, (buffer.last - buffer.first + 1) * unit
    y = _TOP + place.slot * _ROW + 1.5
    bar = _box(svg, x, y, length, _ROW - 3, fill=_COLOURS[buffer.kind.removeprefix(GRADIENT)], rx="2",
               **{"fill-opacity": "0.4", "stroke": "#D55E00"} if gradient else {"stroke": "white"})
    Xml.SubElement(bar, "title").text = (
        f"{buffer.name} ({buffer.kind}): steps {buffer.first}-{buffer.last}, {buffer.size} = {place.size:,} bytes at "
        f"offset {place.offset:,}")
    label = buffer.name.replace(GRADIENT, "d ")
    if len(label) * _CHARACTER < length:
        _text(svg, x + 3, y + 10, label, fill="black" if gradient else "white", **{"pointer-events": "none"})


def _ticks(memory: MemoryPlan, unit: float) -> Iterator[tuple[float, str]]:
    """Where layers run, as far as there is room for their labels; the backward's in reverse."""
    forward = len(memory.choice.steps)
    labelled = [(index, step.name) for index, step in enumerate(memory.choice.steps) if re.search(r"layer \d+$", step.name)]
    if memory.choice.setting.training:
        labelled += [(2 * forward - 1 - index, name) for index, name in reversed(labelled)]
    free = 0.0
    for index, name in labelled:
        x = _LEFT + (index + 0.5) * unit
        room = (len(name) + 1) * _CHARACTER
        if x - room / 2 >= free:
            free = x + room / 2
            yield x, name


def _legend(svg: Xml.Element, memory: MemoryPlan) -> None:
    x = 10.0
    drawn = {buffer.kind for buffer in memory.choice.buffers}
    for kind in (*KINDS, *(GRADIENT + kind for kind in KINDS)):
        if kind in drawn:
            outline = {"fill-opacity": "0.4", "stroke": "#D55E00"} if kind.startswith(GRADIENT) else {}
            _box(svg, x, 28, 10, 10, fill=_COLOURS[kind.removeprefix(GRADIENT)], **outline)
            _text(svg, x + 14, 37, kind)
            x += 26 + len(kind) * _CHARACTER


def _box(svg: Xml.Element, x: float, y: float, width: float, height: float, **style: str) -> Xml.Element:
    place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return Xml.SubElement(svg, "rect", {**place, **style})


def _text(svg: Xml.Element, x: float, y: float, content: str, **style: str) -> None:
    Xml.SubElement(svg, "text", {"x": f"{x:g}", "y": f"{y:g}", **style}).text = content
