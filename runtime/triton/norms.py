"""The backward of the norm that reads a mix: part of ``mix_backward``, and a kernel by itself.

The gradients of the norm's gain and bias are summed over tokens as those of query and gain are: each program writes one
partial row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import affine_rows, load_rows, load_tile, load_vector, standard_rows, store_tile, tile_of, widen


@triton.jit
def store_partial(partial, kind, m, M: tl.constexpr, columns, D: tl.constexpr, total):
    """One program's sum for one parameter row: partial is [programs, kinds * M, d], contiguous."""
    kinds: tl.constexpr = 2
    place = (tl.program_id(0) * kinds + kind) * M + m
    tl.store(partial + place.to(tl.int64) * D + columns, tl.sum(total, 0), mask=columns < D)


@triton.jit
def norm_sums_zero(norm_partial, norm_bias, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr):
    """What a program adds up for gain and, if there is one, bias of the consumer's norm; nothing if neither is needed."""
    sums = ()
    if norm_partial is not None:
        sums += (tl.zeros([BLOCK_T, BLOCK_D], ACC),)
        if norm_bias is not None:
            sums += (tl.zeros([BLOCK_T, BLOCK_D], ACC),)
    return sums


@triton.jit
def norm_rows_grad(
    grad,
    mixed,
    norm_gain,
    norm_bias,
    norm_out,
    norm_sums,
    rows,
    columns,
    tokens,
    D: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of a tile of rows before the consumer's norm, and the sums for its parameters.

    The norm itself is stored to norm_out [tokens, d] unless that is None.
    """
    standard, scale = standard_rows(mixed, columns, D, NORM, NORM_EPS)
    if norm_out is not None:
        normed = affine_rows(standard, norm_gain, norm_bias, columns, D, ACC)
        store_tile(norm_out + rows[:, None] * D + columns[None, :], normed, rows, columns, tokens, D)
    if len(norm_sums) > 1:
        norm_sums = (norm_sums[0] + grad * standard, norm_sums[1] + grad)
    elif len(norm_sums) > 0:
        norm_sums = (norm_sums[0] + grad * standard,)
    if norm_gain is not None:
        grad = grad * load_vector(norm_gain, 0, columns, D, ACC)[None, :]
    result = grad - standard * (tl.sum(grad * standard, 1) / D)[:, None]
    if NORM == "layer":
        result = tl.where((columns < D)[None, :], result - (tl.sum(grad, 1) / D)[:, None], 0.0)
    return result * scale, norm_sums


@triton.jit
def store_norm_sums(norm_partial, columns, D: tl.constexpr, norm_sums):
    """One program's sums for gain and bias of the norm: norm_partial is [programs, 2, d], contiguous, or None."""
    if norm_partial is not None:
        store_partial(norm_partial, 0, 0, 1, columns, D, norm_sums[0])
        if len(norm_sums) > 1:
            store_partial(norm_partial, 1, 0, 1, columns, D, norm_sums[1])


@triton.jit
def norm_backward(
    grad,
    grad_stride,
    mixed,
    norm_gain,
    norm_bias,
    norm_out,
    norm_partial,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALIGN: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The backward of the norm alone: of mixes that were computed before, as is necessary when sources do not fit.

    mixed [tokens, d] in ACC, contiguous: every row is read, and the gradient of the mix written in its place. The others as
    in ``mix_backward``.
    """
    columns = tl.arange(0, BLOCK_D)
    norm_sums = norm_sums_zero(norm_partial, norm_bias, BLOCK_D, BLOCK_T, ACC)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        rows, columns = tile_of(tile, BLOCK_D, BLOCK_T)
        places = rows[:, None] * D + columns[None, :]
        row_grad = widen(load_rows(grad, grad_stride, rows, columns, tokens, D, ALIGN), ACC)
        before, norm_sums = norm_rows_grad(
            row_grad, load_tile(mixed + places, rows, columns, tokens, D), norm_gain, norm_bias, norm_out, norm_sums, rows,
            columns, tokens, D, NORM, NORM_EPS, ACC)
        store_tile(mixed + places, before, rows, columns, tokens, D)
    store_norm_sums(norm_partial, columns, D, norm_sums)
