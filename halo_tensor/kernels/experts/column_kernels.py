"""Triton kernels that quantise columns of experts, with a scale for each (expert, column), into transposed codes.

A program takes some columns of one expert's rows. It reads them twice, the second time from L2 if the group is not large: once
for the scale, and once for the codes. So there are no atomics and no magnitudes in memory, and results are deterministic.
"""

import triton
import triton.language as tl

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
