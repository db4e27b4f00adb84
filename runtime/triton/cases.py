"""The kernels in every configuration that the default table can choose, in the form the ahead-of-time compiler takes.

Not every width is listed: those at which the tile, the number of warps or the mask changes, and those of known models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl

from . import again, backward, configs, forward, norms

WIDTHS = (64, 256, 1000, 1024, 2048, 2304, 4096, 7168, 8192)
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
NORMS = ("rms", "layer")
OPTIONS = {"EPS": 1e-6, "LOGIT_SCALE": 1.0, "OUTPUT_FACTOR": 1.0}


@dataclass(frozen=True)
class Typed:
    """A run-time argument: Triton's name of its type, and whether it is divisible by 16 (an address: by 16 bytes)."""

    type: str
    divisible: bool = True


@dataclass(frozen=True)
class Arguments:
    """Every argument of a kernel by name, its number of warps and how many registers a thread of it may use."""

    values: dict[str, Any]
    warps: int
    registers: int


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    name: str
    kernel: Any
    width: int
    count: int
    queries: int = 1
    dtype: str = "bf16"
    normalize: bool = False
    gain: bool = True
    features: tuple[str, ...] = field(default=())
    chosen: configs.Plan | None = None

    @property
    def phase(self) -> int | None:
        """Of Algorithm 1; None for the whole mix."""
        return 1 if "phase 1" in self.features else 2 if "phase 2" in self.features else None

    @property
    def norm(self) -> str:
        """Of the consumer: "rms", "layer" or none."""
        return next((feature for feature in self.features if feature in NORMS), "")

    @property
    def config(self) -> str:
        """The configuration in words."""
        words = [f"d={self.width}", f"sources={self.count}", f"queries={self.queries}", self.dtype]
        words += ["normalized values"] if self.normalize else []
        return " ".join([*words, *self.features])

    def arguments(self, warp_size: int) -> Arguments:
        """The arguments as the launcher would give them on a device with this warp size."""
        tile = self.tile(warp_size)
        row, wide = Typed(f"*{self.dtype}"), Typed("*fp32")
        stride = Typed("i32", False)
        rows = (row,) * self.count
        align = 16 if self.width % 16 == 0 else 8 if self.width % 8 == 0 else 1
        has_gain = wide if self.gain else None
        norm = self.norm
        grad = wide if "wide gradient" in self.features else row
        delta = row if "delta" in self.features else None
        chained = "chained" in self.features
        last_prior = row if "prior of the last" in self.features else None
        priors = rows if "priors" in self.features else (*(None,) * (self.count - 1), last_prior)
        scalars = (wide,) * self.queries if self.phase == 1 else None
        early, early_lse = (row, wide) if self.phase == 2 else (None, None)
        values: dict[str, Any] = {
            "sources": rows, "strides": (stride,) * self.count, "query": wide, "gain": has_gain,
            "outputs": (row,) * self.queries, "lses": scalars,
            "early": early, "early_stride": stride if early else 0, "early_lse": early_lse,
            "delta": delta, "delta_stride": stride if delta else 0, "partial_out": delta,
            "norm_gain": wide if norm else None, "norm_bias": wide if norm == "layer" else None,
            "state_sums": wide if chained else None, "state_rows": wide if chained else None,
            "FIRST": not chained, "LAST": True, "NORM": norm, "NORM_EPS": 1e-6 if norm else 0.0,
            "grads": (grad,) * self.queries, "grad_strides": (stride,) * self.queries, "lse_grads": scalars,
            "source_grads": rows, "priors": priors, "early_grad": early, "early_lse_grad": early_lse,
            "partial": wide, "norm_out": row if norm else None, "norm_partial": wide if norm else None,
            "grad": row, "grad_stride": stride, "mixed": wide,
            "scales": wide, "scores": wide, "pulls": wide, "first": Typed("i32", False), "total_count": Typed("i32", False),
            "value_coefficients": wide, "key_coefficients": wide, "shrinks": wide,
            "norm_gain_grad": wide if norm else None, "norm_bias_grad": wide if norm == "layer" else None,
            "programs": Typed("i32", False), "query_grad": wide, "gain_grad": has_gain,
            "tokens": Typed("i32", False), "D": self.width, "BLOCK_D": tile.block_d, "BLOCK_T": tile.block_t,
            "GROUP": self.plan(warp_size).group, "TOGETHER": self.plan(warp_size).together,
            "STAGES": self.plan(warp_size).stages, "BLOCK_P": configs.REDUCE_ROWS,
            "M": self.queries, "ALIGN": align, "GAIN_PER_QUERY": False, "NORMALIZE": self.normalize,
            "VALUE_GAIN": self.normalize and self.gain, "ACC": tl.float32, **OPTIONS}
        registers = self.plan(warp_size).registers or configs.most_registers(tile)
        if self.kernel is backward.mix_backward:
            element = 4 if grad is wide else TYPES[self.dtype]
            registers = configs.backward_registers(tile, self.width, self.count, self.normalize, TYPES[self.dtype], element,
                                                   triton.__version__)
        return Arguments({name: values[name] for name in self.kernel.arg_names}, tile.warps, registers)

    def row_bytes(self, warp_size: int) -> int:
        """Bytes of rows that one thread loads on average in one pass over its tile; none beyond the width."""
        tile = self.tile(warp_size)
        rows = configs.REDUCE_ROWS if self.kernel is backward.reduce_parameter_grads else self.count * tile.block_t
        size = 4 if self.kernel is backward.reduce_parameter_grads else TYPES[self.dtype]
        return rows * min(self.width, tile.block_d) * size // (tile.warps * warp_size)

    def plan(self, warp_size: int) -> configs.Plan:
        """The plan given, or that of the table; for kernels without plans, only the tile counts."""
        kind = "forward" if self.kernel is forward.mix_forward else "backward"
        shape = configs.Shape(kind, self.width, self.count, 1 << 20, TYPES[self.dtype], self.queries, bool(self.norm),
                              warp_size=warp_size, capability=(8, 0) if warp_size == 32 else None)
        found = configs.again_plan(shape) if self.kernel is again.mix_backward_again else configs.forward_plan(shape)
        plan = self.chosen or found
        if plan is None:
            raise ValueError(f"{self.config}: no plan")
        return plan

    def tile(self, warp_size: int) -> configs.Tile:
        """The tile that the table gives. Raises ValueError for a backward whose rows do not fit."""
        if self.kernel is backward.reduce_parameter_grads:
            return configs.Tile(configs.REDUCE_COLUMNS, 1, configs.REDUCE_WARPS)
        if self.kernel in (forward.mix_forward, again.mix_backward_again):
            return self.plan(warp_size).tile
        if self.kernel is backward.mix_backward:
            tile = configs.backward_tile(self.width, self.count, self.queries, warp_size, bool(self.norm), self.phase,
                                         self.normalize)
            if tile is None:
                raise ValueError(f"{self.config}: the rows do not fit")
            return tile
        if self.kernel is norms.norm_backward:
            return configs.norm_tile(self.width, warp_size)
        return configs.split_tile(self.width, self.queries, warp_size)


def measured_cases(generation: int) -> Iterator[Case]:
    """Every plan that was measured on a device generation, with each number of sources that it is for."""
    for kind, width, least, most, _, plan in configs.MEASURED.get(generation, ()):
        norm, ahead = kind.endswith("norm"), ("ahead",) if plan.stages else ()
        for count in range(max(least, 2), most + 1):
            for added in (False, True) if norm else (False,):
                if kind.startswith("forward"):
                    features = (*(("delta",) if added else ()), *(("rms",) if norm else ()), *ahead)
                    yield Case("mix_forward", forward.mix_forward, width, count, features=features, chosen=plan)
                else:
                    features = (*(("prior of the last",) if added else ()), *(("rms",) if norm else ()))
                    yield Case("mix_backward_again", again.mix_backward_again, width, count, features=features, chosen=plan)


def cases(warp_size: int = 32, generation: int | None = None) -> Iterator[Case]:
    """Every kernel at every width with the most sources and queries the table gives a launch, and every option once.

    Those of ``measured_cases`` come last.
    """
    for width in WIDTHS:
        for dtype in ("bf16", "fp32"):
            queries, normalized = (configs.forward_queries(width, TYPES[dtype], normalize) for normalize in (False, True))
            for count in (9, configs.FORWARD_SOURCES):
                yield Case("mix_forward", forward.mix_forward, width, count, dtype=dtype)
            yield Case("mix_forward", forward.mix_forward, width, 9, normalized, dtype, normalize=True)
            yield Case("mix_forward", forward.mix_forward, width, 9, dtype=dtype, features=("chained",))
            for count, more, norm in ((9, (), "rms"), (9, (), "layer"), (1, ("phase 2",), "rms"), (9, ("chained",), "layer"),
                                      (configs.forward_sources(2), ("phase 2",), "layer")):
                yield Case("mix_forward", forward.mix_forward, width, count, dtype=dtype, normalize=count == 1,
                           features=(*more, "delta", norm))
            yield Case("mix_forward", forward.mix_forward, width, 9, queries, dtype, features=("phase 1",))
            for count, normalize in ((1, False), (configs.forward_sources(2), True)):
                yield Case("mix_forward", forward.mix_forward, width, count, dtype=dtype, normalize=normalize,
                           features=("phase 2",))
            yield from _backward_cases(width, dtype)
            yield from _again_cases(width, dtype, warp_size)
        yield Case("mix_forward", forward.mix_forward, width, 9, dtype="fp16")
        yield Case("reduce_parameter_grads", backward.reduce_parameter_grads, width, 1, normalize=True)
    if generation is not None:
        yield from measured_cases(generation)


def _backward_cases(width: int, dtype: str) -> Iterator[Case]:
    for queries in range(1, configs.backward_queries(width) + 1):
        for normalize in (False, True):
            for phase in (None, 1, 2) if queries == 1 else (None, 1):
                features = () if phase is None else (f"phase {phase}",)
                held = _most_held(width, queries, phase, normalize)
                if held:
                    yield Case("mix_backward", backward.mix_backward, width, held, queries, dtype, normalize,
                               features=features)
                if phase == 1:
                    continue  # its other launches are those of the mix
                yield Case("mix_scores", backward.mix_scores, width, configs.score_sources(width), queries, dtype, normalize,
                           features=features)
                count = configs.split_sources(width, queries, TYPES[dtype], phase, normalize)
                for more in ((), ("priors",)) if phase is None else ((),):
                    yield Case("mix_source_grads", backward.mix_source_grads, width, count, queries, dtype, normalize,
                               features=features + more)
    for normalize in (False, True):
        for phase in (None, 2):
            yield from _norm_cases(width, dtype, normalize, phase)
    for norm in NORMS:
        yield Case("norm_backward", norms.norm_backward, width, 1, dtype=dtype, features=(norm,))


def _again_cases(width: int, dtype: str, warp_size: int) -> Iterator[Case]:
    """The backward that reads rows again, alone and with each norm, of the most sources."""
    for features in ((), *(("prior of the last", norm) for norm in NORMS)):
        served = [count for count in range(2, 33)
                  if configs.again_plan(configs.Shape("backward", width, count, 1, TYPES[dtype], norm=bool(features),
                                                      warp_size=warp_size))]
        if served:
            yield Case("mix_backward_again", again.mix_backward_again, width, served[-1], dtype=dtype, features=features)


def _norm_cases(width: int, dtype: str, normalize: bool, phase: int | None) -> Iterator[Case]:
    """The backward of a mix and its norm; where the norm comes first, by itself, the others read its gradient unrounded."""
    features = ("prior of the last",) if phase is None else (f"phase {phase}", "prior of the last")
    after_norm = (*features, "wide gradient")
    for norm in NORMS:
        held = _most_held(width, 1, phase, normalize, norm=True)
        if held:
            yield Case("mix_backward", backward.mix_backward, width, held, 1, dtype, normalize, features=(*features, norm))
    held = _most_held(width, 1, phase, normalize)
    if held:
        yield Case("mix_backward", backward.mix_backward, width, held, 1, dtype, normalize, features=after_norm)
    if dtype != "fp32":  # there it is the same kernel
        yield Case("mix_scores", backward.mix_scores, width, configs.score_sources(width), 1, dtype, normalize,
                   features=after_norm)
    count = configs.split_sources(width, 1, TYPES[dtype], phase, normalize)
    yield Case("mix_source_grads", backward.mix_source_grads, width, count, 1, dtype, normalize, features=after_norm)


def _most_held(width: int, queries: int, phase: int | None, normalize: bool, norm: bool = False) -> int:
    """The most sources that one launch of ``mix_backward`` takes, or 0."""
    return max((count for count in range(1, 33)
                if configs.backward_tile(width, count, queries, norm=norm, phase=phase, normalize=normalize)), default=0)
