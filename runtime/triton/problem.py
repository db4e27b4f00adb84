"""The tensors of a mix in the form the Triton kernels take, and the arguments that all of them share.

Importing this module imports triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from attnres_fx.runtime import reference
from attnres_fx.runtime.errors import KernelError
from attnres_fx.runtime.norm import Norm

from . import configs

ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class Options:
    """The options of a mix, as :func:`attnres_fx.runtime.mix.mix` takes them."""

    eps: float
    logit_scale: float
    normalize_values: bool
    output_factor: float


def rows_of(tensor: Tensor) -> Tensor:
    """[..., d] as [tokens, d] with unit stride along d: a view where strides allow it, else a copy."""
    if tensor.ndim == 2 and tensor.stride(1) == 1:
        return tensor
    width = tensor.shape[-1]
    flat = tensor.reshape(-1, width)
    return flat if width == 1 or flat.stride(-1) == 1 else flat.contiguous()


def scalars_of(tensor: Tensor) -> Tensor:
    """[...] as [tokens], contiguous."""
    return tensor.reshape(-1).contiguous()


def empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors for results, whatever the strides of those they resemble."""
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]


def alignment(width: int, strides: Sequence[int]) -> int:
    """The largest power of two, at most 16, that divides the width and every stride (in elements)."""
    return math.gcd(16, width, *strides)


def warp_size(device: torch.device) -> int:
    """Threads that run in step: 64 on AMD's CDNA, 32 on NVIDIA's and in the interpreter."""
    return 64 if device.type == "cuda" and torch.version.hip is not None else 32


def launch_options(tile: configs.Tile, device: torch.device, registers: int | None = None) -> dict[str, int]:
    """Warps and, where ptxas gets a limit, registers: ``configs.most_registers`` unless they are given."""
    options = {"num_warps": tile.warps}
    if device.type == "cuda" and torch.version.hip is None:
        options["maxnreg"] = configs.most_registers(tile) if registers is None else registers
    return options


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a device has; a few in the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 3


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA device, or None."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def programs_of(tokens: int, plan: configs.Plan, device: torch.device) -> int:
    """How many programs stay and walk over the tokens. Each may leave a partial row."""
    return min(configs.programs(tokens, plan.tile), processors(device) * plan.resident)


def row_stride(rows: Tensor) -> int:
    """A single row may carry any stride; zero avoids another compilation."""
    return rows.stride(0) if rows.shape[0] > 1 else 0


def accumulator(sources: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 as soon as one source is."""
    return reference.statistics_dtype(sources)


def chunks(count: int, most: int) -> list[slice]:
    """``count`` items in the fewest runs of at most ``most``, of nearly equal length."""
    runs = math.ceil(count / most)
    bounds = [count * run // runs for run in range(runs + 1)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]


@dataclass(frozen=True)
class Early:
    """What phase 1 left for one query: mixed [tokens, d] with unit stride along d, and lse [tokens], contiguous."""

    mixed: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Problem:
    """The tensors of one mix in the form the kernels take.

    sources [tokens, d] by strides; query [M, d] and gain [d], [M, d] or None, contiguous, in their own dtypes. phase: 1
    where the log-sum-exp is wanted too; 2 for one query that goes on from early; None for the whole mix.
    """

    sources: list[Tensor]
    query: Tensor
    gain: Tensor | None
    options: Options
    align: int
    phase: int | None = None
    early: Early | None = None

    @staticmethod
    def of(
        sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None, options: Options,
        others: Sequence[Tensor] = (), phase: int | None = None, early: Early | None = None,
    ) -> Problem:
        """``others`` are further [tokens, d] that the kernels load by stride."""
        rows = [rows_of(source) for source in sources]
        width = rows[0].shape[-1]
        if width > configs.MAX_WIDTH:
            raise KernelError(
                f"the Triton kernels take rows of at most {configs.MAX_WIDTH} elements, got {width}",
                remedy="compile with options={'kernels': 'reference'}")
        others = others if early is None else [*others, early.mixed]
        align = alignment(width, [row_stride(row) for row in (*rows, *others)])
        return Problem(rows, query.reshape(-1, width).contiguous(),
                       None if key_gain is None else key_gain.contiguous(), options, align, phase, early)

    @property
    def tokens(self) -> int:
        return self.sources[0].shape[0]

    @property
    def width(self) -> int:
        return self.sources[0].shape[1]

    @property
    def queries(self) -> int:
        return self.query.shape[0]

    @property
    def element(self) -> int:
        """Bytes of an element of the widest source."""
        return max(rows.element_size() for rows in self.sources)

    @property
    def accumulate(self) -> torch.dtype:
        early = () if self.early is None else (self.early.mixed, self.early.lse)
        return accumulator([*self.sources, *early])

    @property
    def value_gain(self) -> bool:
        return self.options.normalize_values and self.gain is not None

    def stride(self, rows: Tensor) -> int:
        """The distance of rows in the unit of the kernels."""
        return row_stride(rows) // self.align

    def strides(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(self.stride(rows) for rows in tensors)

    def early_arguments(self, wanted: bool = True) -> tuple[Tensor | None, int, Tensor | None]:
        """Rows, their distance and the log-sum-exp of what phase 1 left; nothing unless wanted."""
        if self.early is None or not wanted:
            return None, 0, None
        return self.early.mixed, self.stride(self.early.mixed), self.early.lse

    def of_queries(self, part: slice) -> Problem:
        """The same mix for some of its queries."""
        gain = self.gain[part] if self.gain is not None and self.gain.ndim == 2 else self.gain
        return replace(self, query=self.query[part], gain=gain)

    def constants(self, tile: configs.Tile, registers: int | None = None) -> dict[str, Any]:
        """The compile-time arguments that all kernels over rows share, and their launch's, as ``launch_options``."""
        return {
            "D": self.width, "BLOCK_D": tile.block_d, "BLOCK_T": tile.block_t, "M": self.queries, "ALIGN": self.align,
            "GAIN_PER_QUERY": self.gain is not None and self.gain.ndim == 2,
            "OUTPUT_FACTOR": self.options.output_factor, "NORMALIZE": self.options.normalize_values,
            "ACC": ACCUMULATE[self.accumulate], **launch_options(tile, self.query.device, registers)}

    def shape(self, kind: str, norm: bool) -> configs.Shape:
        """What a plan for one of the kernels is chosen by."""
        device = self.query.device
        plain = self.phase is None and not self.options.normalize_values
        return configs.Shape(kind, self.width, len(self.sources), self.tokens, self.element, self.queries, norm, plain,
                             warp_size(device), capability(device))

    def backward_tile(self, norm: Norm | None) -> configs.Tile | None:
        """The tile of ``mix_backward``, or None where the rows do not fit."""
        return configs.backward_tile(self.width, len(self.sources), self.queries, warp_size(self.query.device),
                                     norm is not None, self.phase, self.options.normalize_values)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised buffer in the dtype of the statistics."""
        return torch.empty(shape, dtype=self.accumulate, device=self.query.device)
