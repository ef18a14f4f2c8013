"""Triton kernels that quantise columns of experts, with a scale for each (expert, column), into transposed codes.

A program takes some columns of one expert's rows. It reads them twice, the second time from L2 if the group is not large: once
for the scale, and once for the codes. So there are no atomics and no magnitudes in memory, and results are deterministic.
"""

import triton
import triton.language as tl

from halo_tensor.kernels.experts.gating import gated_backward, load_halves
from halo_tensor.kernels.quantize.rounding import FOLD_LIFT, maximum, round_to_code, scale_from, unlifted


@triton.jit
def _rows_of(tiles, starts, expert):
    """Return the first row of an expert's group, its end, its first tile and its number of tiles."""
    tile = tl.load(starts + expert)
    count = tl.load(starts + expert + 1) - tile
    there = count > 0
    first = tl.load(tiles + tile * 4 + 1, mask=there, other=0)
    end = tl.load(tiles + (tile + count - 1) * 4 + 2, mask=there, other=0)
    return first, end, tile, count


@triton.jit
def _headroom(rows, LONGEST: tl.constexpr, MANTISSA: tl.constexpr):
    """Return by what the scales of a group are multiplied, so that no sum of products of its integers leaves int32."""
    if MANTISSA == -1:
        return tl.maximum((rows + (LONGEST - 1)) // LONGEST, 1).to(tl.float32)
    else:
        return 1.0


@triton.jit
def _load_rows(x, index, weight, fold, row, end, columns, stride_row, C, INDEXED: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return a tile of x, times its routing weights, and the folded scales of its rows."""
    at = row
    if INDEXED:
        at = tl.load(index + row, mask=row < end, other=0)
    inside = (row < end)[:, None] & (columns < C)[None, :]
    y = tl.load(x + at.to(tl.int64)[:, None] * stride_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        y = y * tl.load(weight + row, mask=row < end, other=0.0)[:, None]
    return y, tl.load(fold + row, mask=row < end, other=0.0) * FOLD_LIFT


@triton.jit
def _store_codes(codes_t, column, C, place, stride_t, q):
    """Store codes [rows, columns] as rows of codes_t, of TILE columns from ``place`` on."""
    target = codes_t + column.to(tl.int64)[:, None] * stride_t + (place + tl.arange(0, q.shape[0]))[None, :]
    tl.store(target, tl.trans(q), mask=(column < C)[:, None] & (tl.arange(0, q.shape[0]) >= 0)[None, :])


@triton.jit
def group_columns(
    x, index, weight, fold, tiles, starts, codes_t, scales, sums, stride_row, stride_t, C,
    INDEXED: tl.constexpr, WEIGHTED: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr, SUMS: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    INVERSE_MAX: tl.constexpr, STEP: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """Quantise BC columns of x [·, C] of one expert, BM rows at a time."""
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    first, end, tile, count = _rows_of(tiles, starts, expert)
    steps = count * (T // BM)
    most = tl.zeros((BM, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        row = first + i * BM + tl.arange(0, BM)
        y, by_row = _load_rows(x, index, weight, fold, row, end, columns, stride_row, C, INDEXED, WEIGHTED)
        if SUMS:
            total += tl.sum(y, 0)
        most = maximum(most, tl.abs(y * by_row[:, None]))
    scale = scale_from(tl.reduce(most, 0, maximum) * _headroom(end - first, LONGEST, MANTISSA), INVERSE_MAX)
    inverse = tl.div_rn(tl.full((BC,), 1.0, tl.float32), scale)
    for i in tl.range(0, steps, num_stages=STAGES):
        row = first + i * BM + tl.arange(0, BM)
        y, by_row = _load_rows(x, index, weight, fold, row, end, columns, stride_row, C, INDEXED, WEIGHTED)
        q = round_to_code(y * by_row[:, None] * inverse[None, :], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
        _store_codes(codes_t, columns, C, tile * T + i * BM, stride_t, q)
    at = expert.to(tl.int64) * C + columns
    tl.store(scales + at, unlifted(scale, STEP, True), mask=columns < C)
    if SUMS:
        tl.store(sums + at, total, mask=columns < C)


@triton.jit
def _load_gradients(
    h, grad, weight, fold, row, end, first_column, F,
    WEIGHTED: tl.constexpr, BC: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Return tiles of the gradients of gate and of up, and the folded scales of their rows."""
    columns = first_column + tl.arange(0, BC)
    inside = (row < end)[:, None] & (columns < F)[None, :]
    at = row.to(tl.int64)[:, None]
    gate, up = load_halves(h, at * 2 * F, first_column, F, inside, BC, INTERLEAVED)
    g = tl.load(grad + at * F + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        g = g * tl.load(weight + row, mask=row < end, other=0.0)[:, None]
    d_gate, d_up, _ = gated_backward(gate, up, g, ALPHA, LIMIT, SHIFT)
    by_row = tl.load(fold + row, mask=row < end, other=0.0) * FOLD_LIFT
    return tl.where(inside, d_gate, 0.0), tl.where(inside, d_up, 0.0), by_row


@triton.jit
def gated_grad_columns(
    h, grad, weight, fold, tiles, starts, codes_t, scales, sums, stride_t, F,
    WEIGHTED: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, INTERLEAVED: tl.constexpr, SUMS: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    INVERSE_MAX: tl.constexpr, STEP: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """Quantise the gradient of h [·, 2F] of one expert: BC columns of the gate's half and of up's, BM rows at a time."""
    expert = tl.program_id(1)
    first_column = tl.program_id(0) * BC
    columns = first_column + tl.arange(0, BC)
    first, end, tile, count = _rows_of(tiles, starts, expert)
    steps = count * (T // BM)
    most_gate, most_up = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    sum_gate, sum_up = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        row = first + i * BM + tl.arange(0, BM)
        d_gate, d_up, by_row = _load_gradients(
            h, grad, weight, fold, row, end, first_column, F, WEIGHTED, BC, ALPHA, LIMIT, SHIFT, INTERLEAVED
        )
        if SUMS:
            sum_gate += tl.sum(d_gate, 0)
            sum_up += tl.sum(d_up, 0)
        most_gate = maximum(most_gate, tl.abs(d_gate * by_row[:, None]))
        most_up = maximum(most_up, tl.abs(d_up * by_row[:, None]))
    one = tl.full((BC,), 1.0, tl.float32)
    headroom = _headroom(end - first, LONGEST, MANTISSA)
    scale_gate = scale_from(tl.reduce(most_gate, 0, maximum) * headroom, INVERSE_MAX)
    scale_up = scale_from(tl.reduce(most_up, 0, maximum) * headroom, INVERSE_MAX)
    inverse_gate, inverse_up = tl.div_rn(one, scale_gate), tl.div_rn(one, scale_up)
    # The rows of codes_t are the columns of h.
    at_gate = 2 * columns if INTERLEAVED else columns
    at_up = 2 * columns + 1 if INTERLEAVED else columns + F
    beyond_gate = 2 * F if INTERLEAVED else F
    for i in tl.range(0, steps, num_stages=STAGES):
        row = first + i * BM + tl.arange(0, BM)
        d_gate, d_up, by_row = _load_gradients(
            h, grad, weight, fold, row, end, first_column, F, WEIGHTED, BC, ALPHA, LIMIT, SHIFT, INTERLEAVED
        )
        q = round_to_code(d_gate * by_row[:, None] * inverse_gate[None, :], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
        _store_codes(codes_t, at_gate, beyond_gate, tile * T + i * BM, stride_t, q)
        q = round_to_code(d_up * by_row[:, None] * inverse_up[None, :], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
        _store_codes(codes_t, at_up, 2 * F, tile * T + i * BM, stride_t, q)
    start = expert.to(tl.int64) * 2 * F
    tl.store(scales + start + at_gate, unlifted(scale_gate, STEP, True), mask=columns < F)
    tl.store(scales + start + at_up, unlifted(scale_up, STEP, True), mask=columns < F)
    if SUMS:
        tl.store(sums + start + at_gate, sum_gate, mask=columns < F)
        tl.store(sums + start + at_up, sum_up, mask=columns < F)
