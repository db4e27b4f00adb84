"""The backward kernels.

``mix_backward`` holds all source rows of a tile in registers: each is loaded once. Where they do not fit, or where there
are more sources than one launch takes, ``mix_scores`` and ``mix_source_grads`` read them once each, and the softmax over
depth between them is a few scalars per row. Query and gain gradients are summed over tokens in a fixed order: every program
adds up the tiles it walks over and writes one partial row, and ``reduce_parameter_grads`` adds the partial rows. There are
no atomic additions, so equal inputs give equal bits.

Notation as in runtime/reference.py: u_i = dL/da_i ("pull"), ds_i the gradient of a score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import (
    inverse_rms,
    load_keyed,
    load_rows,
    load_scalars,
    load_tile,
    load_vector,
    round_to,
    store_tile,
    tile_of,
    widen,
)
from .norms import norm_rows_grad, norm_sums_zero, store_norm_sums, store_partial


@triton.jit
def mix_backward(
    grads,
    grad_strides,
    lse_grads,
    sources,
    strides,
    query,
    gain,
    early,
    early_stride,
    early_lse,
    source_grads,
    priors,
    early_grad,
    early_lse_grad,
    partial,
    norm_gain,
    norm_bias,
    norm_out,
    norm_partial,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    M: tl.constexpr,
    ALIGN: tl.constexpr,
    GAIN_PER_QUERY: tl.constexpr,
    EPS: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    OUTPUT_FACTOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """All gradients of a mix; every source row and every row of the incoming gradient is read once.

    grads: a tuple of M [tokens, d] by strides (in units of ALIGN elements). lse_grads: None, or a tuple of M [tokens],
    gradients of the log-sum-exp (phase 1). early, early_lse: as in ``mix_forward``; their gradients go to early_grad
    [tokens, d] and early_lse_grad [tokens]. source_grads: a tuple of [tokens, d], written. priors: a tuple of
    [tokens, d] or None, added to the gradients of the sources (it may be the same memory).
    partial [programs, 2, M, d] in ACC: sums for the folded query and for normalised values' gain.
    Where NORM is "rms" or "layer", grads is the gradient of the consumer's norm, of norm_gain and norm_bias [d] or None;
    norm_out [tokens, d] or None receives the norm, norm_partial [programs, 2, d] or None the sums for gain and bias.
    """
    count: tl.constexpr = len(sources)
    value_gain: tl.constexpr = NORMALIZE and gain is not None
    columns = tl.arange(0, BLOCK_D)
    keyed = ()
    keyed_sums = ()
    value_sums = ()
    norm_sums = norm_sums_zero(norm_partial, norm_bias, BLOCK_D, BLOCK_T, ACC)
    for m in tl.static_range(M):
        keyed += (load_keyed(query, gain, m, columns, D, GAIN_PER_QUERY, ACC),)
        keyed_sums += (tl.zeros([BLOCK_T, BLOCK_D], ACC),)
        if value_gain:
            value_sums += (tl.zeros([BLOCK_T, BLOCK_D], ACC),)

    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        rows, columns = tile_of(tile, BLOCK_D, BLOCK_T)
        exists = rows < tokens
        places = rows[:, None] * D + columns[None, :]
        held = ()
        for i in tl.static_range(count):
            held += (load_rows(sources[i], strides[i], rows, columns, tokens, D, ALIGN),)
        raw_grads = ()
        for m in tl.static_range(M):
            raw_grads += (load_rows(grads[m], grad_strides[m], rows, columns, tokens, D, ALIGN),)
        if early is not None:
            early_row = load_rows(early, early_stride, rows, columns, tokens, D, ALIGN)
            early_logit = load_scalars(early_lse, rows, exists, ACC)

        scales = ()
        scores = ()
        for i in tl.static_range(count):
            wide = widen(held[i], ACC)
            scale = tl.where(exists, inverse_rms(wide, D, EPS), 0.0)
            scales += (scale,)
            for m in tl.static_range(M):
                scores += (scale * tl.sum(wide * keyed[m][None, :], 1),)

        # Per query: weights, score gradients and the gradient of the value sum.
        weights = ()
        score_grads = ()
        pulls = ()
        value_grads = ()
        old_value_sums = value_sums
        value_sums = ()
        for m in tl.static_range(M):
            peak = LOGIT_SCALE * scores[m]
            for i in tl.static_range(1, count):
                peak = tl.maximum(peak, LOGIT_SCALE * scores[i * M + m], propagate_nan=tl.PropagateNan.ALL)
            total = tl.zeros([BLOCK_T], ACC)
            if early is not None:
                peak = tl.maximum(peak, early_logit, propagate_nan=tl.PropagateNan.ALL)
                early_weight = tl.exp(early_logit - peak)
                total += early_weight
            powers = ()
            for i in tl.static_range(count):
                powers += (tl.exp(LOGIT_SCALE * scores[i * M + m] - peak),)
                total += powers[i]
            if early is not None:
                early_weight /= total
            here = ()
            for i in tl.static_range(count):
                here += (powers[i] / total,)

            row_grad = widen(raw_grads[m], ACC)
            if NORM != "" or value_gain:
                mixed = tl.zeros([BLOCK_T, BLOCK_D], ACC)
                for i in tl.static_range(count):
                    mixed += (here[i] * scales[i] if NORMALIZE else here[i])[:, None] * widen(held[i], ACC)
                ungained = mixed
                if value_gain:
                    mixed *= load_vector(gain, m if GAIN_PER_QUERY else 0, columns, D, ACC)[None, :]
            if NORM != "":
                if early is not None:
                    mixed += early_weight[:, None] * widen(early_row, ACC)
                row_grad, norm_sums = norm_rows_grad(
                    row_grad, mixed * OUTPUT_FACTOR, norm_gain, norm_bias, norm_out, norm_sums, rows, columns, tokens, D,
                    NORM, NORM_EPS, ACC)
            row_grad *= OUTPUT_FACTOR
            mean_pull = tl.zeros([BLOCK_T], ACC)
            if early is not None:
                early_pull = tl.sum(row_grad * widen(early_row, ACC), 1)
                mean_pull += early_weight * early_pull
                store_tile(early_grad + places, early_weight[:, None] * row_grad, rows, columns, tokens, D)
            if value_gain:
                value_sums += (old_value_sums[m] + row_grad * ungained,)
                row_grad *= load_vector(gain, m if GAIN_PER_QUERY else 0, columns, D, ACC)[None, :]
            value_grads += (row_grad,)

            own_pulls = ()
            for i in tl.static_range(count):
                pull = tl.sum(row_grad * widen(held[i], ACC), 1)
                own_pulls += (pull * scales[i] if NORMALIZE else pull,)
                mean_pull += here[i] * own_pulls[i]
            if early is not None:
                early_logit_grad = round_to(early_weight * (early_pull - mean_pull), early_lse_grad.dtype.element_ty)
                tl.store(early_lse_grad + rows, early_logit_grad, mask=exists)
            if lse_grads is not None:
                mean_pull -= load_scalars(lse_grads[m], rows, exists, ACC)
            for i in tl.static_range(count):
                score_grads += (LOGIT_SCALE * here[i] * (own_pulls[i] - mean_pull),)
            weights += here
            pulls += own_pulls

        for i in tl.static_range(count):
            wide = widen(held[i], ACC)
            shrink = tl.zeros([BLOCK_T], ACC)
            source_grad = tl.zeros([BLOCK_T, BLOCK_D], ACC)
            if priors[i] is not None:
                source_grad += widen(load_tile(priors[i] + places, rows, columns, tokens, D), ACC)
            old_keyed_sums = keyed_sums
            keyed_sums = ()
            for m in tl.static_range(M):
                weight = weights[m * count + i]
                score_grad = score_grads[m * count + i]
                shrink += score_grad * scores[i * M + m]
                if NORMALIZE:
                    shrink += weight * pulls[m * count + i]
                    weight *= scales[i]
                key = score_grad * scales[i]
                source_grad += weight[:, None] * value_grads[m] + key[:, None] * keyed[m][None, :]
                keyed_sums += (old_keyed_sums[m] + key[:, None] * wide,)
            source_grad -= (shrink * scales[i] * scales[i] / D)[:, None] * wide
            store_tile(source_grads[i] + places, source_grad, rows, columns, tokens, D)

    for m in tl.static_range(M):
        store_partial(partial, 0, m, M, columns, D, keyed_sums[m])
        if value_gain:
            store_partial(partial, 1, m, M, columns, D, value_sums[m])
    store_norm_sums(norm_partial, columns, D, norm_sums)


@triton.jit
def mix_scores(
    grads,
    grad_strides,
    sources,
    strides,
    query,
    gain,
    early,
    early_stride,
    scales,
    scores,
    pulls,
    first,
    total_count,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    M: tl.constexpr,
    ALIGN: tl.constexpr,
    GAIN_PER_QUERY: tl.constexpr,
    EPS: tl.constexpr,
    OUTPUT_FACTOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scalars of some of the sources, ``first`` and on, of ``total_count``.

    scales [total_count, tokens]: inverse root mean squares. scores, pulls [M, total_count, tokens]. All in ACC.
    With early, whose pull is the last of the pulls, M is 1.
    """
    count: tl.constexpr = len(sources)
    rows, columns = tile_of(tl.program_id(0), BLOCK_D, BLOCK_T)
    exists = rows < tokens
    keyed = ()
    value_grads = ()
    for m in tl.static_range(M):
        keyed += (load_keyed(query, gain, m, columns, D, GAIN_PER_QUERY, ACC),)
        row_grad = widen(load_rows(grads[m], grad_strides[m], rows, columns, tokens, D, ALIGN), ACC) * OUTPUT_FACTOR
        if early is not None:
            early_row = widen(load_rows(early, early_stride, rows, columns, tokens, D, ALIGN), ACC)
            place = (total_count - 1) * tl.cast(tokens, tl.int64) + rows
            tl.store(pulls + place, tl.sum(early_row * row_grad, 1), mask=exists)
        if NORMALIZE and gain is not None:
            row_grad *= load_vector(gain, m if GAIN_PER_QUERY else 0, columns, D, ACC)[None, :]
        value_grads += (row_grad,)
    for i in tl.static_range(count):
        wide = widen(load_rows(sources[i], strides[i], rows, columns, tokens, D, ALIGN), ACC)
        scale = tl.where(exists, inverse_rms(wide, D, EPS), 0.0)
        tl.store(scales + (first + i) * tl.cast(tokens, tl.int64) + rows, scale, mask=exists)
        for m in tl.static_range(M):
            place = (m * total_count + first + i) * tl.cast(tokens, tl.int64) + rows
            tl.store(scores + place, scale * tl.sum(wide * keyed[m][None, :], 1), mask=exists)
            pull = tl.sum(wide * value_grads[m], 1)
            tl.store(pulls + place, pull * scale if NORMALIZE else pull, mask=exists)


@triton.jit
def mix_source_grads(
    grads,
    grad_strides,
    sources,
    strides,
    query,
    gain,
    source_grads,
    priors,
    early_grad,
    partial,
    value_coefficients,
    key_coefficients,
    shrinks,
    first,
    total_count,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    M: tl.constexpr,
    ALIGN: tl.constexpr,
    GAIN_PER_QUERY: tl.constexpr,
    OUTPUT_FACTOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of some of the sources from their scalars, and their part of the parameters' gradients.

    value_coefficients, key_coefficients [M, total_count, tokens]; shrinks [total_count, tokens]; in ACC. The others as in
    ``mix_backward``. With early_grad, whose coefficient is the last, M is 1.
    """
    count: tl.constexpr = len(sources)
    value_gain: tl.constexpr = NORMALIZE and gain is not None
    columns = tl.arange(0, BLOCK_D)
    keyed = ()
    keyed_sums = ()
    value_sums = ()
    for m in tl.static_range(M):
        keyed += (load_keyed(query, gain, m, columns, D, GAIN_PER_QUERY, ACC),)
        keyed_sums += (tl.zeros([BLOCK_T, BLOCK_D], ACC),)
        if value_gain:
            value_sums += (tl.zeros([BLOCK_T, BLOCK_D], ACC),)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        rows, columns = tile_of(tile, BLOCK_D, BLOCK_T)
        exists = rows < tokens
        places = rows[:, None] * D + columns[None, :]
        raw_grads = ()
        for m in tl.static_range(M):
            raw_grads += (widen(load_rows(grads[m], grad_strides[m], rows, columns, tokens, D, ALIGN), ACC) * OUTPUT_FACTOR,)
        if early_grad is not None:
            place = (total_count - 1) * tl.cast(tokens, tl.int64)
            weight = load_scalars(value_coefficients + place, rows, exists, ACC)
            store_tile(early_grad + places, weight[:, None] * raw_grads[0], rows, columns, tokens, D)
        for i in tl.static_range(count):
            wide = widen(load_rows(sources[i], strides[i], rows, columns, tokens, D, ALIGN), ACC)
            shrink = tl.load(shrinks + (first + i) * tl.cast(tokens, tl.int64) + rows, mask=exists, other=0.0)
            source_grad = -shrink[:, None] * wide
            old_keyed_sums, old_value_sums = keyed_sums, value_sums
            keyed_sums = ()
            value_sums = ()
            for m in tl.static_range(M):
                place = (m * total_count + first + i) * tl.cast(tokens, tl.int64) + rows
                value = tl.load(value_coefficients + place, mask=exists, other=0.0)[:, None]
                key = tl.load(key_coefficients + place, mask=exists, other=0.0)[:, None]
                row_grad = raw_grads[m]
                if value_gain:
                    value_sums += (old_value_sums[m] + value * wide * row_grad,)
                    row_grad *= load_vector(gain, m if GAIN_PER_QUERY else 0, columns, D, ACC)[None, :]
                if value_gain and D > 4096:  # of five rows and three sums the one that can be read again
                    key_row = load_keyed(query, gain, m, columns, D, GAIN_PER_QUERY, ACC)
                else:
                    key_row = keyed[m]
                source_grad += value * row_grad + key * key_row[None, :]
                keyed_sums += (old_keyed_sums[m] + key * wide,)
            if priors[i] is not None:  # last: one row less is held meanwhile
                source_grad += widen(load_tile(priors[i] + places, rows, columns, tokens, D), ACC)
            store_tile(source_grads[i] + places, source_grad, rows, columns, tokens, D)
    for m in tl.static_range(M):
        store_partial(partial, 0, m, M, columns, D, keyed_sums[m])
        if value_gain:
            store_partial(partial, 1, m, M, columns, D, value_sums[m])


@triton.jit
def add_partial_rows(
    partial, kind, programs, target, columns, within, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Some columns of the sum of one kind of rows of partial [programs, 2, d]."""
    total = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    for start in range(0, programs, BLOCK_P):
        rows = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        mask = (rows < programs) & within[None, :]
        total += tl.load(partial + (rows * 2 + kind) * D + columns[None, :], mask=mask, other=0.0)
    tl.store(target + columns, round_to(tl.sum(total, 0), target.dtype.element_ty), mask=within)


@triton.jit
def reduce_parameter_grads(
    partial,
    programs,
    query,
    gain,
    query_grad,
    gain_grad,
    norm_partial,
    norm_gain_grad,
    norm_bias_grad,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    M: tl.constexpr,
    GAIN_PER_QUERY: tl.constexpr,
    VALUE_GAIN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add the partial rows [programs, 2, M, d] in a fixed order and unfold the gradients of query [M, d] and gain.

    Of norm_partial [programs, 2, d], or None, the sums go to norm_gain_grad and norm_bias_grad, [d] or None.
    """
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = columns < D
    shared = tl.zeros([BLOCK_D], ACC)
    for m in tl.static_range(M):
        keyed = tl.zeros([BLOCK_P, BLOCK_D], ACC)
        value = tl.zeros([BLOCK_P, BLOCK_D], ACC)
        for start in range(0, programs, BLOCK_P):
            rows = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
            mask = (rows < programs) & within[None, :]
            keyed += tl.load(partial + (rows * 2 * M + m) * D + columns[None, :], mask=mask, other=0.0)
            if VALUE_GAIN:
                value += tl.load(partial + ((rows * 2 + 1) * M + m) * D + columns[None, :], mask=mask, other=0.0)
        keyed_grad = tl.sum(keyed, 0)
        if gain is not None:
            row = load_vector(query, m, columns, D, ACC)
            own = keyed_grad * row
            if VALUE_GAIN:
                own += tl.sum(value, 0)
            if GAIN_PER_QUERY:
                tl.store(gain_grad + m * D + columns, round_to(own, gain_grad.dtype.element_ty), mask=within)
            else:
                shared += own
            keyed_grad *= load_vector(gain, m if GAIN_PER_QUERY else 0, columns, D, ACC)
        tl.store(query_grad + m * D + columns, round_to(keyed_grad, query_grad.dtype.element_ty), mask=within)
    if gain is not None and not GAIN_PER_QUERY:
        tl.store(gain_grad + columns, round_to(shared, gain_grad.dtype.element_ty), mask=within)
    if norm_gain_grad is not None:
        add_partial_rows(norm_partial, 0, programs, norm_gain_grad, columns, within, D, BLOCK_D, BLOCK_P, ACC)
    if norm_bias_grad is not None:
        add_partial_rows(norm_partial, 1, programs, norm_bias_grad, columns, within, D, BLOCK_D, BLOCK_P, ACC)
