"""The cross-entropy of a head in Triton, for one part of the vocabulary: see :mod:`halo_tensor.reference.loss`.

All kernels are limited by memory. ``row_statistics`` reads the logits once. Of the gradient, ``column_magnitudes`` finds the
scales of columns, and ``gradient_codes`` then writes both operands of backward; ``gradient_dense`` writes it unquantised.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.quantize.codes import code_matrix, format_options
from halo_tensor.kernels.quantize.fast_math import tanh
from halo_tensor.kernels.quantize.kernels import scale_of, write_scale
from halo_tensor.kernels.quantize.rounding import maximum, round_to_code
from halo_tensor.recipe import FP8_E4M3
from halo_tensor.reference.loss import Objective

Tiles = tuple[tuple[int, int, int], tuple[int, int, int]]
LOG2_E = tl.constexpr(1.4426950408889634)
#: The most logits of a row that a program holds at a time, and its warps.
ROW, ROW_WARPS = 4096, 4
#: Tiles of the passes over a gradient: tokens, columns, warps. A program takes one tile: those that went through several, one
#: after the other, waited for memory (docs/notes/head.md). The second of two is for objectives and sizes that need more
#: registers: other than a plain cross-entropy, or numbers of columns that are no multiple of 16.
MAGNITUDES, CODES = ((128, 64, 4), (64, 128, 8)), ((64, 128, 4), (64, 64, 4))
DENSE = ((16, 128, 4),) * 2


@triton.jit
def _score(logits, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return z of logits, in float32."""
    z = logits.to(tl.float32)
    if SCALE != 1.0:
        z = z * SCALE
    if SOFTCAP > 0:
        z = SOFTCAP * tanh(z * (1.0 / SOFTCAP))
    return z


@triton.jit(do_not_specialize=["M"])
def row_statistics(
    logits, targets, statistics, M, N, FIRST, stride,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Add a part of the logits [M, N], whose first column is FIRST, to statistics [5, M]. A program takes a row.

    SUMMED: the sum of all logits is gathered, too.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # in reverse order, because L2 has the last rows
    at = statistics + row
    most, total, other, chosen = tl.load(at), tl.load(at + M), tl.load(at + 2 * M), tl.load(at + 3 * M)
    summed = tl.load(at + 4 * M)
    target = (tl.load(targets + row) - FIRST).to(tl.int32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        z = _score(tl.load(logits + row * stride + columns, mask=inside, other=0.0), SCALE, SOFTCAP)
        z = tl.where(inside, z, float("-inf"))
        mine = columns == target
        top = tl.maximum(most, tl.max(z, 0))
        other = tl.maximum(other, tl.max(tl.where(mine, float("-inf"), z), 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2((most - safe) * LOG2_E) + tl.sum(tl.exp2((z - safe) * LOG2_E), 0)
        most = top
        here = (target >= start) & (target < start + BLOCK) & (target < N)
        chosen = tl.where(here, tl.sum(tl.where(mine, z, 0.0), 0), chosen)
        if SUMMED:
            summed += tl.sum(tl.where(inside, z, 0.0), 0)
    tl.store(at, most)
    tl.store(at + M, total)
    tl.store(at + 2 * M, other)
    tl.store(at + 3 * M, chosen)
    if SUMMED:
        tl.store(at + 4 * M, summed)


@triton.jit
def _gradient_tile(
    logits, targets, factors, rows, columns, M, N, FIRST, stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Return E of some rows and columns in float32, and where they are inside of the part; 0 elsewhere."""
    there = rows < M
    inside = there[:, None] & (columns < N)[None, :]
    z = tl.load(logits + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    z = _score(z, SCALE, SOFTCAP)
    lse = tl.load(factors + rows, mask=there, other=0.0)
    slope = tl.load(factors + M + rows, mask=there, other=0.0)
    one_hot = tl.load(factors + 3 * M + rows, mask=there, other=0.0)
    target = (tl.load(targets + rows, mask=there, other=-1) - FIRST).to(tl.int32)
    e = slope[:, None] * tl.exp2(z * LOG2_E - lse[:, None])
    if SMOOTHED:
        e = e - tl.load(factors + 2 * M + rows, mask=there, other=0.0)[:, None]
    e = tl.where(columns[None, :] == target[:, None], e - one_hot[:, None], e)
    if SOFTCAP > 0:
        ratio = z * (1.0 / SOFTCAP)
        e = e * (1.0 - ratio * ratio)
    if SCALE != 1.0:
        e = e * SCALE
    return tl.where(inside, e, 0.0), inside


@triton.jit(do_not_specialize=["M"])
def column_magnitudes(
    logits, targets, factors, magnitudes, sums, M, N, FIRST, stride,
    BM: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Find the largest magnitude of each column of E. A program takes a [BM, BN] tile.

    magnitudes: zeroed int32 [N], which get float bits. They have the order of non-negative floats, with NaN above all.
    SUMMED: the sum of each column of a tile goes to sums [rows of tiles, N].
    """
    program = tl.num_programs(1) - 1 - tl.program_id(1)  # in reverse order, because L2 has the last rows
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = program * BM + tl.arange(0, BM)
    e, _ = _gradient_tile(logits, targets, factors, rows, columns, M, N, FIRST, stride, SCALE, SOFTCAP, SMOOTHED)
    most = tl.reduce(tl.abs(e), 0, maximum)
    tl.atomic_max(magnitudes + columns, most.to(tl.int32, bitcast=True), mask=columns < N, sem="relaxed")
    if SUMMED:
        tl.store(sums + program * N + columns, tl.sum(e, 0), mask=columns < N)


@triton.jit
def gradient_codes(
    logits, targets, factors, magnitudes, codes, codes_t, scales, M, N, FIRST, stride, stride_codes, stride_codes_t,
    BM: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr, INVERSE_MAX: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Store codes [M, N] of E by tokens, transposed codes [N, M] by columns, and the scales of columns.

    magnitudes: [N] of :func:`column_magnitudes`. A program takes a [BM, BN] tile.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    e, inside = _gradient_tile(logits, targets, factors, rows, columns, M, N, FIRST, stride, SCALE, SOFTCAP, SMOOTHED)
    by_row = tl.load(factors + 4 * M + rows, mask=rows < M, other=0.0)
    q = round_to_code(e * by_row[:, None], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
    tl.store(codes + rows.to(tl.int64)[:, None] * stride_codes + columns[None, :], q, mask=inside)
    scale = scale_of(magnitudes, columns, N, INVERSE_MAX, 2, BN)
    write_scale(scales, scale, columns, N, tl.program_id(1), 2)
    e = e * tl.div_rn(tl.full((BN,), 1.0, tl.float32), scale)[None, :]
    q = round_to_code(e, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
    target = codes_t + columns.to(tl.int64)[:, None] * stride_codes_t + rows[None, :]
    tl.store(target, tl.trans(q), mask=tl.trans(inside))


@triton.jit(do_not_specialize=["M"])
def gradient_dense(
    logits, targets, factors, out, M, N, FIRST, stride,
    BM: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Store E to out [M, N], which has the row stride of the logits and may have their memory."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    e, inside = _gradient_tile(logits, targets, factors, rows, columns, M, N, FIRST, stride, SCALE, SOFTCAP, SMOOTHED)
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(out + at, e.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["COUNT"])
def scale_elements(x, factor, COUNT, BLOCK: tl.constexpr):
    """Multiply COUNT elements of x with one number, in place. A factor of 1 reads none of them."""
    by = tl.load(factor)
    if by != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(x + index, mask=index < COUNT, other=0.0).to(tl.float32) * by
        tl.store(x + index, y.to(x.dtype.element_ty), mask=index < COUNT)


def update_statistics_(
    statistics: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, first: int, objective: Objective
) -> None:
    """Do :func:`halo_tensor.reference.loss.update_statistics_`. Rows of ``logits`` have contiguous elements."""
    numbers = (*logits.shape, first, logits.stride(0))
    _plan_statistics(logits.dtype, logits.device, objective)(numbers, logits, targets, statistics)


def quantize_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factors: torch.Tensor,
    first: int,
    objective: Objective,
    codes: torch.Tensor,
    summed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Do :func:`halo_tensor.reference.loss.quantize_gradient`.

    Args:
        codes: [tokens, columns], where the codes by tokens are written to. Rows have contiguous elements.
        summed: whether to return the sums of columns, else None.

    Returns:
        Transposed codes by columns, their scales, and the sums of columns.
    """
    m, n = logits.shape
    find, write = _plan_codes(logits.dtype, logits.device, objective, summed)
    magnitudes = targets.new_zeros(n, dtype=torch.int32)
    sums = factors.new_empty(cdiv(m, _tile(MAGNITUDES, objective, n)[0]), n) if summed else None
    find((m, n, first, logits.stride(0)), logits, targets, factors, magnitudes, sums)
    codes_t, scales = code_matrix(logits, n, m, FP8_E4M3), factors.new_empty(n)
    numbers = m, n, first, logits.stride(0), codes.stride(0), codes_t.stride(0)
    write(numbers, logits, targets, factors, magnitudes, codes, codes_t, scales)
    return codes_t, scales, None if sums is None else sums.sum(0)


def dense_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factors: torch.Tensor,
    first: int,
    objective: Objective,
    out: torch.Tensor,
) -> None:
    """Store :func:`halo_tensor.reference.loss.gradient` to ``out``, which has the strides of ``logits``."""
    planned = _plan_dense(logits.dtype, out.dtype, logits.device, objective)
    planned((*logits.shape, first, logits.stride(0)), logits, targets, factors, out)


def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply a contiguous tensor with one float32 number, in place."""
    _plan_scale(x.dtype, x.device)((x.numel(),), x, factor)


def _options(objective: Objective) -> dict[str, Any]:
    return {"SCALE": objective.scale, "SOFTCAP": objective.softcap}


@lru_cache
def _plan_statistics(dtype: torch.dtype, device: torch.device, objective: Objective) -> Planned:
    options = _options(objective) | {"BLOCK": ROW, "SUMMED": objective.smoothing > 0, "num_warps": ROW_WARPS}
    launch = Launch(row_statistics, options)
    return Planned(lambda _: Variant(launch, lambda m, *rest: ((m,), (m, *rest))))


@lru_cache
def _plan_codes(dtype: torch.dtype, device: torch.device, objective: Objective, summed: bool) -> tuple[Planned, Planned]:
    rounding = format_options(FP8_E4M3, device)
    return (
        _plan_tiles(column_magnitudes, MAGNITUDES, objective, {"SUMMED": summed}),
        _plan_tiles(gradient_codes, CODES, objective, rounding),
    )


@lru_cache
def _plan_dense(dtype: torch.dtype, out: torch.dtype, device: torch.device, objective: Objective) -> Planned:
    return _plan_tiles(gradient_dense, DENSE, objective, {})


def _tile(tiles: Tiles, objective: Objective, columns: int) -> tuple[int, int, int]:
    """Return the tile for a part of the vocabulary."""
    return tiles[bool(objective.softcap or objective.smoothing or columns % 16)]


def _plan_tiles(kernel: Any, tiles: Tiles, objective: Objective, options: dict[str, Any]) -> Planned:
    def prepare(tile: tuple[int, int, int]) -> Variant:
        bm, bn, warps = tile
        constants = {"BM": bm, "BN": bn, "SMOOTHED": objective.smoothing > 0, "num_warps": warps}
        launch = Launch(kernel, constants | _options(objective) | options)
        sizes: Callable[..., tuple] = lambda m, n, *rest: ((cdiv(n, bn), cdiv(m, bm)), (m, n, *rest))  # noqa: E731
        return Variant(launch, sizes)

    return Planned(prepare, lambda m, n, *rest: _tile(tiles, objective, n))


@lru_cache
def _plan_scale(dtype: torch.dtype, device: torch.device) -> Planned:
    block = 4096
    launch = Launch(scale_elements, {"BLOCK": block, "num_warps": 4})
    return Planned(lambda _: Variant(launch, lambda count: ((cdiv(count, block),), (count,))))
