"""The width of a tile, and the warps, sources and queries per launch: one fixed table.

A few shapes were measured, on an H100 (``MEASURED``, and where a rule below says so). The others follow rules that can be
explained, and checked in the compiled binaries:

- 16-byte loads: at least 16 bytes of a row in each thread.
- The fewest warps that keep a program's values in registers: sums over a row cross warps only through shared memory and
  barriers, so a row of up to 1024 elements belongs to one warp in the forward.
- No spills: that decided how many sources and queries a launch takes. Programs get a limit on registers
  (``most_registers``), as ptxas otherwise spills on purpose to make room for more of them.
- The backward holds every source row of a token; its threads hold 8 elements of each. Where that many rows do not fit
  (``backward_tile``) it reads them twice instead.
- Sums over tokens leave at most PARTIAL_ROWS partial rows per launch, whatever the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = 8192
FORWARD_SOURCES = 24  # per launch; more are chained. On AMD their addresses fill the scalar registers beyond
REGISTERS = 65536  # of one multiprocessor
PARTIAL_ROWS = 512  # programs that walk over tokens: about four for each multiprocessor of today's GPUs
REDUCE_COLUMNS, REDUCE_ROWS, REDUCE_WARPS = 64, 32, 4  # of reduce_parameter_grads: a warp reads 256 bytes of each row


@dataclass(frozen=True)
class Tile:
    """What one program works on: ``block_t`` rows of ``block_d`` elements with ``warps`` warps."""

    block_d: int
    block_t: int
    warps: int


@dataclass(frozen=True)
class Plan:
    """How a kernel goes over rows.

    group: how many sources are loaded at once; together: of how many tiles sums over rows are taken at once. stages: 0
    where a program of the forward works on one tile; else (2 and more) programs stay, ``resident`` of them on a
    multiprocessor, as those of the backward always do, and load the rows of their next tiles into shared memory in advance.
    registers: how many a thread may use on NVIDIA GPUs; None: ``most_registers``.
    """

    tile: Tile
    group: int
    together: int = 1
    stages: int = 0
    resident: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class Shape:
    """What a plan is chosen by. kind: "forward" or "backward"; norm: whether addition and norm are within.

    element: bytes of the widest source. capability: of an NVIDIA device, as (9, 0), or None.
    """

    kind: str
    width: int
    count: int
    tokens: int
    element: int = 2
    queries: int = 1
    norm: bool = False
    plain: bool = True
    warp_size: int = 32
    capability: tuple[int, int] | None = None


def next_power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def tile(width: int, elements: int, warp_size: int = 32, most_warps: int = 16) -> Tile:
    """A tile in which a thread holds about ``elements`` of a row (or of the rows, where rows are short)."""
    block_d = max(next_power_of_two(width), 16)
    block_t = max(1, elements * warp_size // block_d)
    warps = max(1, min(most_warps, block_d * block_t // (elements * warp_size)))
    return Tile(block_d, block_t, warps)


def forward_sources(phase: int | None) -> int:
    """How many sources one launch of ``mix_forward`` takes; phase 2 must also address what phase 1 left."""
    return 16 if phase == 2 else FORWARD_SOURCES


def forward_queries(width: int, element: int = 2, normalize: bool = False) -> int:
    """How many queries share one launch of ``mix_forward`` on sources of this many bytes per element; more sweep again.

    normalize: the values are normalised, which takes one more factor for each.
    """
    if normalize:
        return 4 if width <= 2048 else 2 if width <= 4096 else 1
    return 4 if width <= 4096 else max(1, 4 // element)


def forward_tile(width: int, queries: int, warp_size: int = 32) -> Tile:
    """Of ``mix_forward``: a thread holds 16 elements of a row, or 8 if several queries hold a sum each."""
    return tile(width, 16 if (width > 512 and queries == 1) or width > 4096 else 8, warp_size)


def forward_group(width: int, queries: int, element: int = 2) -> int:
    """How many sources, of this many bytes per element, ``mix_forward`` loads at once: 64 bytes per thread of wide rows.

    A dozen short rows are taken at once; on AMD, together with the addresses of several queries' results, they fill the
    registers.
    """
    if width <= 64 and queries > 1:
        return 2
    return 4 if width <= 4096 else max(1, 4 // element)


def backward_queries(width: int) -> int:
    """How many queries share one launch of the backward; the others add to its gradients."""
    return 2 if width <= 2048 else 1


def queries_per_sweep(width: int, element: int, training: bool, normalize: bool = False) -> int:
    """How many queries read the sources together in every launch that a call or a training step makes."""
    queries = forward_queries(width, element, normalize)
    return min(queries, backward_queries(width)) if training else queries


def backward_tile(
    width: int, count: int, queries: int, warp_size: int = 32, norm: bool = False, phase: int | None = None,
    normalize: bool = False,
) -> Tile | None:
    """Of ``mix_backward``, or None where the rows of a token do not fit into registers.

    A thread may use 255 registers in a program of up to 8 warps, 128 in one of 16. The norm takes two more sums. Normalised
    values take one more sum, for the gain's gradient, which matters where registers are fewest. The gradient of the
    log-sum-exp costs phase 1 one row, or two if a program takes several short ones. Phase 2 adds few sources and holds at
    most three: what phase 1 left takes a row, and the last addresses for which AMD has scalar registers.
    """
    if norm:
        rows = 0 if width > 2048 else 4 if width > 512 else 3
    else:
        rows = 9 if width <= 2048 else 4 - normalize if width <= 4096 else 0
    rows = rows - (2 if width <= 512 else 1) if phase == 1 else min(rows // 2, 3) if phase == 2 else rows
    return tile(width, 8, warp_size) if count <= rows // queries else None


# By device generation (the major number of NVIDIA's capability): kind, width, the least and the most sources and the most
# tokens that a plan is for, the plan. The first that fits is taken. Lines as ``benchmarks/gpu.py --only search`` prints
# them; the bounds between what was measured are drawn by hand. 9 is an H100: 5 sources of 128 tokens and 9 of 8192 (7168),
# 9 of 1 and of 4096 (2048). Few tokens, which do not fill the device for long, are fastest with all rows of a token loading
# at once; many, of wide rows, with those of the next token in shared memory. The backward with the norm was also timed with
# prefetched rows, since removed: it cost a sixth to a half elsewhere, and the fastest plan, no faster, spilled.
MEASURED: dict[int, tuple[tuple[str, int, int, int, int, Plan], ...]] = {
    9: (("forward", 7168, 1, 9, 1024, Plan(Tile(8192, 1, 8), 5, 8)),
        ("forward", 7168, 1, 9, 1 << 40, Plan(Tile(8192, 1, 8), 3, 8, 2)),
        ("backward", 7168, 1, 9, 1 << 40, Plan(Tile(8192, 1, 8), 2, 8, registers=248)),
        ("forward norm", 2048, 1, 9, 256, Plan(Tile(2048, 1, 4), 9, 8)),
        ("backward norm", 2048, 5, 9, 1 << 40, Plan(Tile(2048, 1, 4), 3, 8, resident=2))),
}


def forward_plan(shape: Shape) -> Plan:
    """Of ``mix_forward``. For rows wider than 4096 a thread holds 32 elements: a fifth faster than 16, measured at 7168."""
    own, group = (forward_tile(shape.width, shape.queries, shape.warp_size),
                  forward_group(shape.width, shape.queries, shape.element))
    nvidia = shape.capability is not None
    if nvidia and shape.width > 4096 and shape.plain and shape.queries == 1 and shape.element == 2:
        own, group = tile(shape.width, 32, shape.warp_size), 3
    return measured(shape) or Plan(own, group, 8 if nvidia and own.warps > 1 else 1)


def again_plan(shape: Shape) -> Plan | None:
    """Of ``mix_backward_again``, or None where it cannot be used: it supports one query and raw values, unrolls the sources,
    and has no registers left for the norm of a wide row.

    A thread holds many elements, since it also holds the scalars of all sources.
    """
    wide = shape.width > 4096
    widest, short = (shape.element > 2 and within for within in (shape.width == MAX_WIDTH, shape.width <= 128))
    fits = shape.count <= (7 if widest else 9 if wide else 8 if short and shape.norm else 10 if short or shape.norm else 12)
    if shape.norm and (wide or (shape.width > 2048 and shape.element > 2)):
        fits = False
    if shape.queries > 1 or not shape.plain or not fits or shape.warp_size != 32:
        return None  # the addresses of this many rows, each read several times, do not fit into AMD's scalar registers
    own = tile(shape.width, 32 if wide else 16 if shape.width > 512 else 8, shape.warp_size)
    together = 4 if shape.capability is not None and own.warps > 1 else 1
    full = wide and shape.count > 8 and shape.width < own.block_d  # masks take the registers of the second row
    return measured(shape) or Plan(own, 1 if shape.element > 2 or full else 2, together,
                                   resident=max(1, min(16, 8 // own.warps)))


def measured(shape: Shape) -> Plan | None:
    """The fastest plan found on a device of this generation for a shape like this; None where nothing was measured."""
    if not shape.plain or shape.queries > 1 or shape.element != 2 or shape.capability is None:
        return None
    kind = shape.kind + (" norm" if shape.norm else "")
    for name, width, least, most, tokens, found in MEASURED.get(shape.capability[0], ()):
        if name == kind and width == shape.width and least <= shape.count <= most and shape.tokens <= tokens:
            return found
    return None


def split_tile(width: int, queries: int, warp_size: int = 32) -> Tile:
    """Of ``mix_scores`` and ``mix_source_grads``, which take the sources one after the other."""
    return tile(width, 16 if width > 512 and queries == 1 and width != 4096 else 8, warp_size)


def score_sources(width: int) -> int:
    """How many sources one launch of ``mix_scores`` takes. Each reads the incoming gradient again."""
    return FORWARD_SOURCES if width <= 4096 else 8


def norm_tile(width: int, warp_size: int = 32) -> Tile:
    """Of ``norm_backward``."""
    return tile(width, 16 if width > 512 else 8, warp_size)


def split_sources(width: int, queries: int, element: int = 2, phase: int | None = None, normalize: bool = False) -> int:
    """How many sources, of this many bytes per element, one launch of ``mix_source_grads`` takes.

    Each launch reads the incoming gradient again.
    """
    if width > 4096 and (phase == 2 or element > 2 or normalize):
        return 1
    return 4 if width <= 4096 and queries == 1 and phase != 2 else 2


def most_registers(tile: Tile) -> int:
    """How many registers a thread on an NVIDIA GPU may use where one program has a multiprocessor to itself."""
    return min(255, REGISTERS // (tile.warps * 32))


def backward_registers(
    tile: Tile, width: int, count: int, normalize: bool, element: int, grad_element: int, compiler: str
) -> int:
    """The same for ``mix_backward``, which holds the rows of ``count`` sources.

    With nine wide rows the registers are full, and if ptxas may use the last ones its scheduling leads to spills. With these
    bounds there are none on any target of ``aot``; with Triton 3.8 and 3.9 (compiler: its version) there are none only
    without the bounds.
    """
    release = tuple(int(part) for part in compiler.split(".")[:2])
    if count < 9 or width <= 512 or release >= (3, 8):
        return most_registers(tile)
    if element > 2:
        return 240
    if normalize or grad_element > 2:
        return 224
    return 208 if width == tile.block_d else 255


def programs(tokens: int, tile: Tile) -> int:
    """How many programs walk over the tokens where each leaves one partial row."""
    return min(-(-tokens // tile.block_t), PARTIAL_ROWS)
