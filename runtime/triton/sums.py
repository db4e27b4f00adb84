"""Sums over rows, several tiles at a time.

A sum over a row that several warps hold goes through shared memory and waits for all of them. For several tiles it can do so
once: TOGETHER is their number (1, 2, 4 or 8). The order in which a row is added up is the same, and so are the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _two(a, b, w, x):
    return a + w, b + x


@triton.jit
def _four(a, b, c, d, w, x, y, z):
    return a + w, b + x, c + y, d + z


@triton.jit
def _eight(a, b, c, d, e, f, g, h, s, t, u, v, w, x, y, z):
    return a + s, b + t, c + u, d + v, e + w, f + x, g + y, h + z


@triton.jit
def row_sums(tiles, TOGETHER: tl.constexpr):
    """The sums over the rows [BLOCK_T] of each of a tuple of tiles [BLOCK_T, BLOCK_D]."""
    count: tl.constexpr = len(tiles)
    sums = ()
    if TOGETHER >= 8:
        for i in tl.static_range(count // 8):
            sums += tl.reduce((tiles[8 * i], tiles[8 * i + 1], tiles[8 * i + 2], tiles[8 * i + 3], tiles[8 * i + 4],
                               tiles[8 * i + 5], tiles[8 * i + 6], tiles[8 * i + 7]), 1, _eight)
    done8: tl.constexpr = count // 8 * 8 if TOGETHER >= 8 else 0
    if TOGETHER >= 4:
        for i in tl.static_range((count - done8) // 4):
            sums += tl.reduce((tiles[done8 + 4 * i], tiles[done8 + 4 * i + 1], tiles[done8 + 4 * i + 2],
                               tiles[done8 + 4 * i + 3]), 1, _four)
    done4: tl.constexpr = done8 + (count - done8) // 4 * 4 if TOGETHER >= 4 else done8
    if TOGETHER >= 2:
        for i in tl.static_range((count - done4) // 2):
            sums += tl.reduce((tiles[done4 + 2 * i], tiles[done4 + 2 * i + 1]), 1, _two)
    done2: tl.constexpr = done4 + (count - done4) // 2 * 2 if TOGETHER >= 2 else done4
    for i in tl.static_range(done2, count):
        sums += (tl.sum(tiles[i], 1),)
    return sums
