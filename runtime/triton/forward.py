"""The forward kernel: one sweep over the sources with an online softmax over depth.

Everything that a model fixes is a compile-time constant: width, options, the number of sources and of queries. The
tokens and the row strides are arguments, so neither batch nor length compiles anything again. A row, padded to a power
of two, is held by one program, ``BLOCK_T`` rows at a time; each source is loaded once for all queries.

Options are ``tl.constexpr`` and not arguments also because Triton hands Python floats on as float32, which would spoil
the float64 runs of the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import row_sums


@triton.jit
def tile_of(tile, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Rows (64 bit: rows times stride passes 2^31) and columns of a tile."""
    return (tl.zeros([BLOCK_T], tl.int64) + tile) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)


@triton.jit
def load_tile(pointers, rows, columns, tokens, D: tl.constexpr):
    """Load a tile, zero where it has no row or column. A single row always exists, and needs a mask only for its width."""
    if rows.shape[0] == 1 and columns.shape[0] == D:
        tile = tl.load(pointers)
    elif rows.shape[0] == 1:
        tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers, mask=(rows < tokens)[:, None] & (columns < D)[None, :], other=0.0)
    return tile


@triton.jit
def round_to(tile, dtype: tl.constexpr):
    """A tile in the dtype of storage. bfloat16 through float32: the interpreter cannot convert it from float64."""
    return (tile.to(tl.float32) if dtype == tl.bfloat16 else tile).to(dtype)


@triton.jit
def store_tile(pointers, tile, rows, columns, tokens, D: tl.constexpr):
    """Store what exists of a tile, rounded to the dtype of the pointers."""
    rounded = round_to(tile, pointers.dtype.element_ty)
    if rows.shape[0] == 1 and columns.shape[0] == D:
        tl.store(pointers, rounded)
    elif rows.shape[0] == 1:
        tl.store(pointers, rounded, mask=(columns < D)[None, :])
    else:
        tl.store(pointers, rounded, mask=(rows < tokens)[:, None] & (columns < D)[None, :])


@triton.jit
def widen(tile, ACC: tl.constexpr):
    """A tile in the dtype of the statistics, exactly."""
    return (tile.to(tl.float32) if tile.dtype == tl.bfloat16 else tile).to(ACC)


@triton.jit
def load_rows(base, stride, rows, columns, tokens, D: tl.constexpr, ALIGN: tl.constexpr):
    """Rows of width d. Strides are counted in ALIGN elements, so that the compiler knows what it may load at once."""
    return load_tile(base + rows[:, None] * stride * ALIGN + columns[None, :], rows, columns, tokens, D)


@triton.jit
def load_scalars(base, rows, exists, ACC: tl.constexpr):
    """One number per row, contiguous, widened; zero where there is no row."""
    return widen(tl.load(base + rows, mask=exists, other=0.0), ACC)


@triton.jit
def load_vector(base, m, columns, D: tl.constexpr, ACC: tl.constexpr):
    """Row m of a contiguous [M, d] parameter, widened; zero beyond d."""
    return widen(tl.load(base + m * D + columns, mask=columns < D, other=0.0), ACC)


@triton.jit
def load_keyed(query, gain, m, columns, D: tl.constexpr, GAIN_PER_QUERY: tl.constexpr, ACC: tl.constexpr):
    """The folded query: query times key gain."""
    keyed = load_vector(query, m, columns, D, ACC)
    if gain is not None:
        keyed *= load_vector(gain, m if GAIN_PER_QUERY else 0, columns, D, ACC)
    return keyed


@triton.jit
def inverse_rms(wide, D: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of each row."""
    return 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / D + EPS)


@triton.jit
def standard_rows(mixed, columns, D: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr):
    """Rows before gain and bias of the consumer's norm, "rms" or "layer", and the factor [rows, 1] that scaled them."""
    if NORM == "layer":
        centre = tl.sum(mixed, 1) / D
        mixed = tl.where((columns < D)[None, :], mixed - centre[:, None], 0.0)
    scale = inverse_rms(mixed, D, NORM_EPS)[:, None]
    return mixed * scale, scale


@triton.jit
def affine_rows(standard, norm_gain, norm_bias, columns, D: tl.constexpr, ACC: tl.constexpr):
    """Gain and bias of the consumer's norm, each [d] or None, on standardised rows."""
    if norm_gain is not None:
        standard *= load_vector(norm_gain, 0, columns, D, ACC)[None, :]
    if norm_bias is not None:
        standard += load_vector(norm_bias, 0, columns, D, ACC)[None, :]
    return standard


@triton.jit
def add_group(
    held,
    keyed,
    peaks,
    totals,
    sums,
    exists,
    D: tl.constexpr,
    EPS: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOGETHER: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add tiles of some sources to the running softmax of every query: maximum, sum of powers, sum of rows."""
    count: tl.constexpr = len(held)
    queries: tl.constexpr = len(keyed)
    products = ()
    for i in tl.static_range(count):
        wide = widen(held[i], ACC)
        products += (wide * wide,)
        for m in tl.static_range(queries):
            products += (wide * keyed[m][None, :],)
    found = row_sums(products, TOGETHER)
    each: tl.constexpr = 1 + queries
    scales = ()
    for i in tl.static_range(count):
        scales += (tl.where(exists, 1.0 / tl.sqrt(found[each * i] / D + EPS), 0.0),)
    new_peaks = ()
    new_totals = ()
    new_sums = ()
    for m in tl.static_range(queries):
        logits = ()
        peak = peaks[m]
        for i in tl.static_range(count):
            logits += (LOGIT_SCALE * scales[i] * found[each * i + 1 + m],)
            peak = tl.maximum(peak, logits[i], propagate_nan=tl.PropagateNan.ALL)
        kept = tl.exp(peaks[m] - peak)
        total = totals[m] * kept
        rows = sums[m] * kept[:, None]
        for i in tl.static_range(count):
            power = tl.exp(logits[i] - peak)
            total += power
            rows += (power * scales[i] if NORMALIZE else power)[:, None] * widen(held[i], ACC)
        new_peaks += (peak,)
        new_totals += (total,)
        new_sums += (rows,)
    return new_peaks, new_totals, new_sums


@triton.jit
def settle(tile):
    """The tile, computed here and not later: what a compiler defers takes registers until then."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [tile], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def load_group(
    FROM: tl.constexpr,
    TO: tl.constexpr,
    sources,
    strides,
    delta,
    delta_stride,
    partial_out,
    rows,
    columns,
    tokens,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile of each source from FROM to TO; the last source with delta, which is stored, where there is one."""
    held = ()
    for i in tl.static_range(FROM, TO):
        row = load_rows(sources[i], strides[i], rows, columns, tokens, D, ALIGN)
        if delta is not None and i == len(sources) - 1:
            added = load_rows(delta, delta_stride, rows, columns, tokens, D, ALIGN)
            row = round_to(widen(row, ACC) + widen(added, ACC), partial_out.dtype.element_ty)
            store_tile(partial_out + rows[:, None] * D + columns[None, :], row, rows, columns, tokens, D)
        held += (row,)
    return held


@triton.jit
def mix_forward(
    sources,
    strides,
    query,
    gain,
    outputs,
    lses,
    early,
    early_stride,
    early_lse,
    delta,
    delta_stride,
    partial_out,
    norm_gain,
    norm_bias,
    state_sums,
    state_rows,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    ALIGN: tl.constexpr,
    GAIN_PER_QUERY: tl.constexpr,
    EPS: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    OUTPUT_FACTOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mix tiles of BLOCK_T tokens: one per program; several if STAGES is not 0, with rows loaded STAGES - 1 tiles ahead.

    sources, strides: tuples, pointers to rows and their distances in units of ALIGN elements. query [M, d]; gain [d],
    [M, d] or None.
    outputs: a tuple of M [tokens, d]. lses: None, or a tuple of M [tokens], the log-sum-exp of the logits (phase 1).
    early [tokens, d] by stride, early_lse [tokens], or None: the mix of earlier sources and their log-sum-exp (phase 2).
    delta, partial_out: the last source is read as source + delta, rounded, and stored. partial_out may be the last source's
    own memory: every element is loaded once, before its sum is stored, by the one thread that holds it. (A tile of the table
    has elements for all threads of a program; a smaller one would be loaded by several threads, some after the store.)
    norm_gain, norm_bias [d] or None: of the consumer's norm, where NORM is "rms" or "layer" ("" for none).
    state_sums [2, M, tokens], state_rows [M, tokens, d] in ACC: maximum, sum and rows, carried from launch to launch where
    there are more sources than one launch takes: read unless FIRST, written (instead of outputs) unless LAST. GROUP sources
    are loaded at once, TOGETHER sums over rows taken at once; more than one, and STAGES, for NVIDIA's devices only.
    """
    columns = tl.arange(0, BLOCK_D)
    keyed = ()
    for m in tl.static_range(M):
        keyed += (load_keyed(query, gain, m, columns, D, GAIN_PER_QUERY, ACC),)
    if STAGES == 0:
        mix_tile(tl.program_id(0), keyed, sources, strides, gain, outputs, lses, early, early_stride, early_lse, delta,
                 delta_stride, partial_out, norm_gain, norm_bias, state_sums, state_rows, tokens, D, BLOCK_D, BLOCK_T, GROUP,
                 M, ALIGN, GAIN_PER_QUERY, EPS, LOGIT_SCALE, OUTPUT_FACTOR, NORMALIZE, NORM, NORM_EPS, FIRST, LAST, ACC,
                 TOGETHER, False)
    else:
        for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0), num_stages=STAGES):
            mix_tile(tile, keyed, sources, strides, gain, outputs, lses, early, early_stride, early_lse, delta, delta_stride,
                     partial_out, norm_gain, norm_bias, state_sums, state_rows, tokens, D, BLOCK_D, BLOCK_T, GROUP, M, ALIGN,
                     GAIN_PER_QUERY, EPS, LOGIT_SCALE, OUTPUT_FACTOR, NORMALIZE, NORM, NORM_EPS, FIRST, LAST, ACC, TOGETHER,
                     True)


@triton.jit
def mix_tile(
    tile,
    keyed,
    sources,
    strides,
    gain,
    outputs,
    lses,
    early,
    early_stride,
    early_lse,
    delta,
    delta_stride,
    partial_out,
    norm_gain,
    norm_bias,
    state_sums,
    state_rows,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    ALIGN: tl.constexpr,
    GAIN_PER_QUERY: tl.constexpr,
    EPS: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    OUTPUT_FACTOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
    TOGETHER: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Mix one tile of ``mix_forward``, with its folded queries."""
    count: tl.constexpr = len(sources)
    rows, columns = tile_of(tile, BLOCK_D, BLOCK_T)
    exists = rows < tokens
    places = rows[:, None] * D + columns[None, :]
    size = tl.cast(tokens, tl.int64)

    if early is not None:
        early_row = load_rows(early, early_stride, rows, columns, tokens, D, ALIGN)
        early_logit = load_scalars(early_lse, rows, exists, ACC)
    peaks = ()
    totals = ()
    sums = ()
    for m in tl.static_range(M):
        if FIRST:
            peaks += (tl.full([BLOCK_T], float("-inf"), ACC),)
            totals += (tl.zeros([BLOCK_T], ACC),)
            sums += (tl.zeros([BLOCK_T, BLOCK_D], ACC),)
        else:
            peaks += (tl.load(state_sums + m * size + rows, mask=exists, other=0.0),)
            totals += (tl.load(state_sums + (M + m) * size + rows, mask=exists, other=1.0),)
            sums += (load_tile(state_rows + m * size * D + places, rows, columns, tokens, D),)

    GROUPS: tl.constexpr = (count + GROUP - 1) // GROUP
    if GROUPS == 1:
        held = load_group(0, count, sources, strides, delta, delta_stride, partial_out, rows, columns, tokens, D, ALIGN, ACC)
        peaks, totals, sums = add_group(
            held, keyed, peaks, totals, sums, exists, D, EPS, LOGIT_SCALE, NORMALIZE, TOGETHER, ACC)
    elif AHEAD:
        for group in tl.static_range(GROUPS):
            held = load_group(group * count // GROUPS, (group + 1) * count // GROUPS, sources, strides, delta, delta_stride,
                              partial_out, rows, columns, tokens, D, ALIGN, ACC)
            peaks, totals, sums = add_group(
                held, keyed, peaks, totals, sums, exists, D, EPS, LOGIT_SCALE, NORMALIZE, TOGETHER, ACC)
            settled = ()
            for m in tl.static_range(M):
                settled += (settle(sums[m]),)
            sums = settled
    else:
        for group in tl.static_range(GROUPS):
            for _ in range(tl.num_programs(1)):
                # One round. Without the loop LLVM moves the sums of all groups behind the last load, and every row spills.
                held = load_group(group * count // GROUPS, (group + 1) * count // GROUPS, sources, strides, delta,
                                  delta_stride, partial_out, rows, columns, tokens, D, ALIGN, ACC)
                peaks, totals, sums = add_group(
                    held, keyed, peaks, totals, sums, exists, D, EPS, LOGIT_SCALE, NORMALIZE, TOGETHER, ACC)

    for m in tl.static_range(M):
        if LAST:
            mixed = sums[m]
            total = totals[m]
            if NORMALIZE and gain is not None:
                mixed *= load_vector(gain, m if GAIN_PER_QUERY else 0, columns, D, ACC)[None, :]
            if early is not None:
                # One more source, after the gain, which its value carries already.
                peak = tl.maximum(peaks[m], early_logit, propagate_nan=tl.PropagateNan.ALL)
                kept = tl.exp(peaks[m] - peak)
                power = tl.exp(early_logit - peak)
                total = total * kept + power
                mixed = mixed * kept[:, None] + power[:, None] * widen(early_row, ACC)
            mixed *= (OUTPUT_FACTOR / total)[:, None]
            if NORM != "":
                standard, _ = standard_rows(mixed, columns, D, NORM, NORM_EPS)
                mixed = affine_rows(standard, norm_gain, norm_bias, columns, D, ACC)
            store_tile(outputs[m] + places, mixed, rows, columns, tokens, D)
            if lses is not None:
                tl.store(lses[m] + rows, peaks[m] + tl.log(total), mask=exists)
        else:
            tl.store(state_sums + m * size + rows, peaks[m], mask=exists)
            tl.store(state_sums + (M + m) * size + rows, totals[m], mask=exists)
            store_tile(state_rows + m * size * D + places, sums[m], rows, columns, tokens, D)
