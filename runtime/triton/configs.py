"""How wide a tile, how many warps, how many sources and queries a launch takes: one fixed table, chosen by reasoning.

No GPU was at hand to measure on, so the rules are those that can be argued and checked in the compiled binaries:

- 16-byte loads: at least 16 bytes of a row in each thread.
- The fewest warps that keep a program's values in registers: sums over a row cross warps only through shared memory and
  barriers, so a row of up to 1024 elements belongs to one warp in the forward.
- The backward holds every source row of a token; its threads hold 8 elements of each, and where count rows do not fit, it
  reads them twice instead (``fits``).
- Sums over tokens leave at most PARTIAL_ROWS partial rows, whatever the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = 8192
MAX_SOURCES = 32  # a launch; more sources are chained
MAX_QUERIES = 4  # a launch; more queries sweep again
PARTIAL_ROWS = 512
REDUCE_COLUMNS, REDUCE_ROWS, REDUCE_WARPS = 64, 32, 4  # of reduce_parameter_grads: a warp reads 256 bytes of each row


@dataclass(frozen=True)
class Tile:
    """What one program works on: ``block_t`` rows of ``block_d`` elements with ``warps`` warps."""

    block_d: int
    block_t: int
    warps: int
    group: int = 4


def next_power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def tile(width: int, elements: int, warp_size: int = 32, most_warps: int = 16) -> Tile:
    """A tile in which a thread holds about ``elements`` of a row (or of the rows, where rows are short)."""
    block_d = max(next_power_of_two(width), 16)
    block_t = max(1, elements * warp_size // block_d)
    warps = max(1, min(most_warps, block_d * block_t // (elements * warp_size)))
    return Tile(block_d, block_t, warps)


def forward_tile(width: int, queries: int, warp_size: int = 32) -> Tile:
    """Of ``mix_forward``: a thread holds 32 elements of a row for one query, less for several."""
    return tile(width, max(8, 32 // next_power_of_two(queries)), warp_size)


def split_tile(width: int, queries: int, warp_size: int = 32) -> Tile:
    """Of ``mix_scores`` and ``mix_source_grads``."""
    return tile(width, max(8, 16 // next_power_of_two(queries)), warp_size)


def backward_tile(width: int, count: int, queries: int, warp_size: int = 32) -> Tile | None:
    """Of ``mix_backward``, or None where the rows of a token do not fit into registers."""
    return tile(width, 8, warp_size)


def programs(tokens: int, tile: Tile) -> int:
    """How many programs walk over the tokens where each leaves one partial row."""
    return min(-(-tokens // tile.block_t), PARTIAL_ROWS)
