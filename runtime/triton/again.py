"""The backward of a mix of one query in one launch, where the rows of a token do not fit into registers.

Its programs read the rows of a token once for the scalars and once more for the gradients; with a norm, once more to mix
them again, and once more for the scalars that need its gradient. Only the first read is from memory: a program that has a
multiprocessor to itself finds its token's rows in the first-level cache, or else in the second.

The reads of a row differ in their cache hints; otherwise the compiler would merge them, and keep the rows in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import (
    load_keyed,
    load_rows,
    load_tile,
    store_tile,
    tile_of,
    widen,
)
from .norms import norm_rows_grad, norm_sums_zero, store_norm_sums, store_partial
from .sums import row_sums


@triton.jit
def load_again(base, stride, rows, columns, tokens, D: tl.constexpr, ALIGN: tl.constexpr, SWEEP: tl.constexpr):
    """Rows of width d, as ``load_rows``: to be kept in the cache, until the last sweep has read them."""
    pointers = base + rows[:, None] * stride * ALIGN + columns[None, :]
    mask = (rows < tokens)[:, None] & (columns < D)[None, :]
    if SWEEP == 1:
        tile = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_last")
    elif SWEEP == 2:
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif SWEEP == 3:
        tile = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".ca")
    else:
        tile = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def load_sweep(
    FROM: tl.constexpr, TO: tl.constexpr, sources, strides, rows, columns, tokens, D: tl.constexpr, ALIGN: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """Tiles of the sources from FROM to TO."""
    held = ()
    for i in tl.static_range(FROM, TO):
        held += (load_again(sources[i], strides[i], rows, columns, tokens, D, ALIGN, SWEEP),)
    return held


@triton.jit
def mix_group(
    FROM: tl.constexpr, TO: tl.constexpr, sources, strides, weights, mixed, rows, columns, tokens, D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):
    """mixed and the weighted sources from FROM to TO."""
    held = load_sweep(FROM, TO, sources, strides, rows, columns, tokens, D, ALIGN, 2)
    for i in tl.static_range(FROM, TO):
        mixed += weights[i][:, None] * widen(held[i - FROM], ACC)
    return mixed


@triton.jit
def write_group(
    FROM: tl.constexpr, TO: tl.constexpr, sources, strides, source_grads, priors, weights, keys, shrinks, keyed, row_grad,
    keyed_sum, rows, columns, tokens, D: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):
    """Store the gradients of the sources from FROM to TO, and add to the sum for the folded query."""
    held = load_sweep(FROM, TO, sources, strides, rows, columns, tokens, D, ALIGN, 4)
    places = rows[:, None] * D + columns[None, :]
    for i in tl.static_range(FROM, TO):
        wide = widen(held[i - FROM], ACC)
        own = weights[i][:, None] * row_grad + keys[i][:, None] * keyed[None, :] - shrinks[i][:, None] * wide
        if priors[i] is not None:
            own += widen(load_tile(priors[i] + places, rows, columns, tokens, D), ACC)
        store_tile(source_grads[i] + places, own, rows, columns, tokens, D)
        keyed_sum += keys[i][:, None] * wide
    return keyed_sum


@triton.jit
def mix_backward_again(
    grad,
    grad_stride,
    sources,
    strides,
    query,
    gain,
    source_grads,
    priors,
    partial,
    norm_gain,
    norm_bias,
    norm_out,
    norm_partial,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    ALIGN: tl.constexpr,
    EPS: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    OUTPUT_FACTOR: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """All gradients of a mix of one query, of values as they are: arguments and results as of ``mix_backward``, with M = 1.

    grad [tokens, d] by stride. GROUP rows are loaded at once, TOGETHER sums taken at once.
    """
    count: tl.constexpr = len(sources)
    groups: tl.constexpr = (count + GROUP - 1) // GROUP
    each: tl.constexpr = 3 if NORM == "" else 2
    columns = tl.arange(0, BLOCK_D)
    keyed = load_keyed(query, gain, 0, columns, D, False, ACC)
    keyed_sum = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    norm_sums = norm_sums_zero(norm_partial, norm_bias, BLOCK_D, BLOCK_T, ACC)

    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        rows, columns = tile_of(tile, BLOCK_D, BLOCK_T)
        exists = rows < tokens
        raw_grad = load_rows(grad, grad_stride, rows, columns, tokens, D, ALIGN)
        scales = ()
        scores = ()
        pulls = ()
        for group in tl.static_range(groups):
            held = load_sweep(group * count // groups, (group + 1) * count // groups, sources, strides, rows, columns,
                              tokens, D, ALIGN, 1)
            products = ()
            for i in tl.static_range(len(held)):
                wide = widen(held[i], ACC)
                products += (wide * wide, wide * keyed[None, :])
                if NORM == "":
                    products += (wide * widen(raw_grad, ACC),)
            sums = row_sums(products, TOGETHER)
            for i in tl.static_range(len(held)):
                scale = tl.where(exists, 1.0 / tl.sqrt(sums[each * i] / D + EPS), 0.0)
                scales += (scale,)
                scores += (scale * sums[each * i + 1],)
                if NORM == "":
                    pulls += (sums[each * i + 2] * OUTPUT_FACTOR,)

        peak = LOGIT_SCALE * scores[0]
        for i in tl.static_range(1, count):
            peak = tl.maximum(peak, LOGIT_SCALE * scores[i], propagate_nan=tl.PropagateNan.ALL)
        total = tl.zeros([BLOCK_T], ACC)
        powers = ()
        for i in tl.static_range(count):
            powers += (tl.exp(LOGIT_SCALE * scores[i] - peak),)
            total += powers[i]
        weights = ()
        for i in tl.static_range(count):
            weights += (powers[i] / total,)

        row_grad = widen(raw_grad, ACC)
        if NORM != "":
            mixed = tl.zeros([BLOCK_T, BLOCK_D], ACC)
            for group in tl.static_range(groups):
                for _ in range(tl.num_programs(1)):
                    mixed = mix_group(group * count // groups, (group + 1) * count // groups, sources, strides, weights,
                                      mixed, rows, columns, tokens, D, ALIGN, ACC)
            row_grad, norm_sums = norm_rows_grad(
                row_grad, mixed * OUTPUT_FACTOR, norm_gain, norm_bias, norm_out, norm_sums, rows, columns, tokens, D, NORM,
                NORM_EPS, ACC)
        row_grad *= OUTPUT_FACTOR
        if NORM != "":
            for group in tl.static_range(groups):
                held = load_sweep(group * count // groups, (group + 1) * count // groups, sources, strides, rows, columns,
                                  tokens, D, ALIGN, 3)
                products = ()
                for j in tl.static_range(len(held)):
                    products += (widen(held[j], ACC) * row_grad,)
                sums = row_sums(products, TOGETHER)
                pulls += sums

        mean_pull = tl.zeros([BLOCK_T], ACC)
        for i in tl.static_range(count):
            mean_pull += weights[i] * pulls[i]
        keys = ()
        shrinks = ()
        for i in tl.static_range(count):
            score_grad = LOGIT_SCALE * weights[i] * (pulls[i] - mean_pull)
            shrinks += (score_grad * scores[i] * scales[i] * scales[i] / D,)
            keys += (score_grad * scales[i],)

        for group in tl.static_range(groups):
            for _ in range(tl.num_programs(1)):
                # One round, as in ``mix_forward``.
                keyed_sum = write_group(
                    group * count // groups, (group + 1) * count // groups, sources, strides, source_grads, priors, weights,
                    keys, shrinks, keyed, row_grad, keyed_sum, rows, columns, tokens, D, ALIGN, ACC)

    store_partial(partial, 0, 0, 1, columns, D, keyed_sum)
    store_norm_sums(norm_partial, columns, D, norm_sums)
