"""The plan of a converted stream: what a conversion fixes and every later graph must match, as JSON in the marker."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from attnres_fx.passes.rewrite.partition import sources_at
from attnres_fx.passes.rewrite.sites import sites_of
from attnres_fx.runtime.errors import CheckpointFileError

FORMAT = 1
MIX_SCALES = ("paper", "sum")


@dataclass(frozen=True)
class StreamPlan:
    """One converted stream.

    ``owner`` is the path of the lowest module that owns all its additions; ``sites`` are (path below the owner, call
    ordinal), one per layer; ``boundaries`` are the positions at which blocks close, the last one L. ``additions`` counts,
    for each layer, the additions of which the stream is an operand, and ``start`` is (path below the owner, argument by
    number or name) of the module that is handed b_0; None where the stream cannot be run by value. ``trial`` is "" if it was
    run by value when it was converted, why that cannot be done if it failed, and None if it was not tried.
    """

    name: str
    owner: str
    num_layers: int
    width: int
    boundaries: tuple[int, ...]
    sites: tuple[tuple[str, int], ...]
    eps: float
    mix_scale: str
    key_gain: bool
    additions: tuple[int, ...] | None = None
    start: tuple[str, str] | None = None
    trial: str | None = None

    @property
    def num_blocks(self) -> int:
        """N of the paper: the actual number of blocks."""
        return len(self.boundaries)

    @property
    def way(self) -> str:
        """How a model with this stream runs when it is called eagerly, and why not by value if it does not."""
        if self.trial == "":
            return "by value"
        return f"as one graph: {self.trial}" if self.trial else "as one graph, or by value where none can be had"

    def output_factor(self, position: int) -> float:
        """The factor on the mix at ``position``: its number of sources under "sum", 1 under "paper"."""
        return float(len(sources_at(self.boundaries, position))) if self.mix_scale == "sum" else 1.0

    def to_json(self) -> str:
        """The plan as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> StreamPlan:
        """The plan that :meth:`to_json` wrote."""
        return StreamPlan.from_dict(json.loads(text))

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> StreamPlan:
        """A plan from plain data. Raises CheckpointFileError if a field is missing or unknown or does not fit."""
        try:
            plan = StreamPlan(**{
                **content,
                "boundaries": tuple(int(b) for b in content["boundaries"]),
                "sites": tuple((str(path), int(ordinal)) for path, ordinal in content["sites"]),
                "additions": None if content.get("additions") is None else tuple(int(n) for n in content["additions"]),
                "start": None if content.get("start") is None else (str(content["start"][0]), str(content["start"][1])),
            })
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointFileError(f"the plan of a stream cannot be read: {error}") from error
        if not plan.boundaries or plan.boundaries[-1] != plan.num_layers or len(plan.sites) != plan.num_layers:
            raise CheckpointFileError(f"the plan of stream '{plan.name}' contradicts itself: {plan.num_layers} layers, "
                                      f"{len(plan.sites)} sites, blocks closing at {list(plan.boundaries)}")
        if plan.boundaries[0] < 1 or any(a >= b for a, b in zip(plan.boundaries, plan.boundaries[1:])):
            raise CheckpointFileError(f"the blocks of stream '{plan.name}' close at {list(plan.boundaries)}, which does not "
                                      "increase")
        if not plan.name.isidentifier() or plan.width < 1 or not 0 <= plan.eps < math.inf:
            raise CheckpointFileError(f"the plan of stream '{plan.name}' has the width {plan.width} and the eps {plan.eps}")
        if plan.sites != sites_of([path for path, _ in plan.sites]):
            raise CheckpointFileError(f"the plan of stream '{plan.name}' miscounts the calls of its layers")
        if plan.additions is not None and (len(plan.additions) != plan.num_layers or min(plan.additions) < 1):
            raise CheckpointFileError(f"the plan of stream '{plan.name}' miscounts the additions of its layers")
        if plan.mix_scale not in MIX_SCALES:
            raise CheckpointFileError(f"the plan of stream '{plan.name}' has an unknown mix_scale {plan.mix_scale!r}")
        return plan
