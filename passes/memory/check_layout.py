"""Check a layout against the definition: no two buffers that live at the same time share a byte. Analysis; pure.

Written independently of the planner, :mod:`attnres_fx.passes.memory.layout`, and from the buffers' lifetimes alone, so that
neither can hide a fault of the other.
"""

from __future__ import annotations

from attnres_fx.passes.memory.layout import ALIGNMENT, Layout, Placement
from attnres_fx.runtime.errors import LayoutError


def check_layout(layout: Layout) -> None:
    """Raise LayoutError, naming the buffers, if the layout breaks a rule.

    Buffers that live at the same time share no byte; each is aligned and within the arena; what takes over another's bytes
    in place lies where that one lay, and begins at the step after its last.
    """
    placed = layout.placements
    by_name = {placement.buffer.name: placement for placement in placed}
    if len(by_name) != len(placed):
        raise LayoutError("two buffers of a layout have the same name", remedy="name every value once")
    for place in placed:
        name, over = place.buffer.name, place.buffer.over
        if place.offset % ALIGNMENT:
            raise LayoutError(f"buffer '{name}' begins at byte {place.offset}, which is not a multiple of {ALIGNMENT}",
                              remedy="plan the layout again")
        if place.offset < 0 or place.offset + place.size > layout.arena:
            raise LayoutError(f"buffer '{name}' at bytes {place.offset} to {place.offset + place.size} lies outside of the "
                              f"arena of {layout.arena} bytes", remedy="plan the layout again")
        if over is not None:
            taken = by_name[over]
            if taken.offset != place.offset or taken.buffer.last + 1 != place.buffer.first:
                raise LayoutError(f"{_told(place)} takes over the bytes of {_told(taken)}, and does not follow it there",
                                  remedy="plan the layout again")
    living: list[Placement] = []
    for later in sorted(placed, key=lambda place: place.buffer.first):
        living = [place for place in living if place.buffer.last >= later.buffer.first]
        for earlier in living:
            if earlier.offset < later.offset + later.size and later.offset < earlier.offset + earlier.size:
                raise LayoutError(f"{_told(earlier)} and {_told(later)} share bytes while both are in use",
                                  remedy="plan the layout again")
        living.append(later)


def _told(place: Placement) -> str:
    return (f"buffer '{place.buffer.name}' (steps {place.buffer.first} to {place.buffer.last}, bytes {place.offset} to "
            f"{place.offset + place.size})")
