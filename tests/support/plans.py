"""Plans of streams without a model, the memory plans that come of them, and an arena that is really written and read."""

from __future__ import annotations

from collections.abc import Sequence

from attnres_fx.passes.lower.bytes_moved import PREFER_TWO_PHASES, Group, Machine, schedule, sources_of_plan
from attnres_fx.passes.memory.layout import Layout, Placement
from attnres_fx.passes.memory.lifetimes import AGAIN, GRADIENT, SUM, Buffer, Step, lifetimes
from attnres_fx.passes.memory.steps import steps_of_plans
from attnres_fx.passes.rewrite.partition import partition
from attnres_fx.passes.rewrite.plan import StreamPlan


def stream_plan(
    num_layers: int, num_blocks: int, width: int = 64, name: str = "stream", mix_scale: str = "paper"
) -> StreamPlan:
    sites = tuple((f"layers.{layer}", 0) for layer in range(num_layers))
    boundaries = partition(num_layers, num_blocks=num_blocks)
    return StreamPlan(name, "", num_layers, width, boundaries, sites, 1e-6, mix_scale, True)


def grouped(plan: StreamPlan, wished: str, training: bool = False, most: int = 32) -> tuple[Group, ...]:
    machine = Machine(plan.width, 2, 1e9, training)
    return schedule(sources_of_plan(plan.boundaries, plan.num_layers), machine,
                    penalty=PREFER_TWO_PHASES if wished == "two-phase" else 0.0, most=1 if wished == "one-pass" else most)


def planned_steps(plans: Sequence[StreamPlan], wished: str, training: bool = False, most: int = 32) -> tuple[Step, ...]:
    return steps_of_plans(plans, [grouped(plan, wished, training, most) for plan in plans], 2)


def planned(num_layers: int, num_blocks: int, wished: str = "one-pass", training: bool = False,
            keep_mixes: bool = False) -> tuple[Buffer, ...]:
    return lifetimes(planned_steps([stream_plan(num_layers, num_blocks)], wished, training), training, keep_mixes)


class Clobbered(Exception):
    """Something was read after another value was written over it."""


def run_in_arena(steps: Sequence[Step], layout: Layout, training: bool) -> None:
    """Run the steps, and their backward, on an arena of bytes: every write leaves its mark, every read looks for it.

    What a step reads has to be there when it begins and, unless the step forms a sum in place, when it has written.
    """
    places = {place.buffer.name: place for place in layout.placements}
    arena = [""] * layout.arena

    def write(place: Placement, mark: str) -> None:
        arena[place.offset:place.offset + place.size] = [mark] * place.size

    def read(name: str, at: str) -> None:
        place = places[name]
        found = set(arena[place.offset:place.offset + place.size]) - {name}
        if found:
            raise Clobbered(f"{at}: '{name}' was overwritten by {sorted(found)}")

    for step in steps:
        known = [name for name in step.reads if name in places]
        for name in known:
            read(name, step.name)
        for value in step.writes:
            write(places[value.name], value.name)
        for name in known:
            if not (step.role == SUM and not training):
                read(name, step.name)
    if not training:
        return
    begun: set[str] = set()
    for step in reversed(steps):
        at = f"backward of {step.name}"
        for value in step.writes:
            gradient = GRADIENT + value.name
            if gradient in begun:
                read(gradient, at)
        known = [name for name in step.reads if name in places]
        saved = [name for name in step.saves if name in places]
        again = [value.name + AGAIN for value in step.writes if value.name + AGAIN in places]
        for name in again:
            write(places[name], name)
        for name in saved:
            read(name, at)
        for name in known:
            gradient = GRADIENT + name
            if gradient in begun:
                read(gradient, at)  # what was summed up so far
            begun.add(gradient)
            write(places[gradient], gradient)
        for name in saved:
            read(name, at)
        for name in known:
            read(GRADIENT + name, at)
        for name in again:
            read(name, at)
        for value in step.writes:
            if GRADIENT + value.name in begun and step.role != SUM:
                read(GRADIENT + value.name, at)
