"""Quantise a matrix with a scale for each column in one launch, which reads it from memory once.

A scale is known when all rows of its column were read. So programs have two kinds of work: they find the largest magnitudes
of a panel, which is a few columns of all rows, and they cast a panel. Panels are small, and a panel is cast soon after its
magnitudes were found, so that the L2 cache still holds it.

Programs take numbers from a counter, and a number says which part of which panel is measured or cast. Who casts waits until
the panel has been measured. Nobody waits forever: the numbers of those who measure a panel are below the numbers of those who
cast it, so the smallest number that is not finished waits for nothing. It need not be known how many programs run at a time.
The counters lie in the memory of one call, so launches on several streams do not share them.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from halo_tensor.fences.fast_paths import PANELS
from halo_tensor.kernels.device import has_wgmma
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.matmul.request import multiprocessors
from halo_tensor.kernels.quantize.codes import code_matrix, format_options
from halo_tensor.kernels.quantize.kernels import load_matrix, product
from halo_tensor.kernels.quantize.rounding import maximum, round_to_code, scale_from, unlifted
from halo_tensor.kernels.rotate import norm, product_dtype
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import aligned
from halo_tensor.reference.hadamard import block_diagonal, product_width


class Panels(NamedTuple):
    """How programs go through a matrix.

    Attributes:
        height, width: of a tile.
        most: the most tiles, one below the other, that a program takes.
        bytes: of a panel, about.
        lag: how many panels are measured before the first one is cast.
        stages, warps: pipeline stages and warps of a program.
        programs: how many run on a multiprocessor.
    """

    height: int
    width: int
    most: int
    bytes: int
    lag: int
    stages: int
    warps: int
    programs: int


@triton.jit
def _rotated_tile(x, left, rows, columns, M, K, stride_row, stride_column):
    """Return the transpose of a tile of x times left, in float32: [columns, rows]."""
    at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    tile = tl.load(x + at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)
    WIDE: tl.constexpr = tile.dtype == tl.float32
    tile = tl.trans(tile)
    return product(tile if WIDE else tile.to(left.dtype), left)


@triton.jit(do_not_specialize=["GROUPS", "PANELS", "WIDE", "LAG"])
def cast_in_panels(
    x, counters, amax, codes, scales, left,
    M, K, ROWS_OUT, GROUPS, PANELS, WIDE, LAG, stride_row, stride_column, stride_codes,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    HEIGHT_OUT: tl.constexpr, HEIGHT_KEPT: tl.constexpr, NORM: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr, INVERSE_MAX: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Store the transposed codes [K, ROWS_OUT] of left · x [M, K], and the scale of each column. There are two numbers for
    every WIDTH columns by TILES·HEIGHT rows: one to measure and one to cast.

    counters: zeroed int32 [1 + PANELS]: of the numbers that were taken, and of those that have measured a panel.
    amax: zeroed int32 [K], which get float bits.
    left: [HEIGHT, HEIGHT_OUT], transposed; a tile gives HEIGHT_KEPT rows.
    GROUPS, WIDE: how many numbers of each kind a panel has along rows and along columns.
    LAG: how many panels are measured before the first one is cast; afterwards both kinds of numbers alternate.
    """
    h = load_matrix(left, HEIGHT, HEIGHT_OUT)
    units = GROUPS * WIDE
    first, both = LAG * units, 2 * (PANELS - LAG) * units
    mine = tl.atomic_add(counters, 1, sem="relaxed")
    while mine < first + both + first:
        after = mine - first
        early, late = mine < first, after >= both
        casts = tl.where(early, 0, tl.where(late, 1, after % 2))
        unit = tl.where(early, mine % units, tl.where(late, (after - both) % units, after % (2 * units) // 2))
        of_pair = after // (2 * units) + tl.where(casts == 1, 0, LAG)
        panel = tl.where(early, mine // units, tl.where(late, PANELS - LAG + (after - both) // units, of_pair))
        tile_column, group = panel * WIDE + unit % WIDE, unit // WIDE
        columns = tile_column * WIDTH + tl.arange(0, WIDTH)
        # The next number, early, since it takes a while to come. What this one waits for has smaller numbers than both.
        mine = tl.atomic_add(counters, 1, sem="relaxed")
        if casts == 0:
            most = tl.zeros((WIDTH,), tl.float32)
            for i in tl.range(0, TILES, num_stages=STAGES):
                rows = (group * TILES + i) * HEIGHT + tl.arange(0, HEIGHT)
                y = _rotated_tile(x, h, rows, columns, M, K, stride_row, stride_column)
                most = maximum(most, tl.reduce(tl.abs(y), 1, maximum))
            most = most * NORM  # rounds as each number would
            tl.atomic_max(amax + columns, most.to(tl.int32, bitcast=True), mask=columns < K, sem="relaxed")
            tl.debug_barrier()  # all threads' magnitudes are stored before one thread says so
            tl.atomic_add(counters + 1 + panel, 1, sem="release")
        else:
            while tl.atomic_add(counters + 1 + panel, 0, sem="acquire") < units:
                pass
            tl.debug_barrier()
            bits = tl.load(amax + columns, mask=columns < K, other=0, volatile=True)  # not from L1, where it may be old
            scale = scale_from(bits.to(tl.float32, bitcast=True), INVERSE_MAX)
            if group == 0:
                tl.store(scales + columns, unlifted(scale, STEP, False), mask=columns < K)
            inverse = tl.div_rn(tl.full((WIDTH,), 1.0, tl.float32), scale)[:, None]
            for i in tl.range(0, TILES, num_stages=STAGES):
                tile_row = group * TILES + i
                rows = tile_row * HEIGHT + tl.arange(0, HEIGHT)
                y = _rotated_tile(x, h, rows, columns, M, K, stride_row, stride_column) * NORM * inverse
                q = round_to_code(y, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
                index = tl.arange(0, HEIGHT_OUT)
                out = tile_row * HEIGHT_KEPT + index
                target = codes + columns.to(tl.int64)[:, None] * stride_codes + out[None, :]
                tl.store(target, q, mask=(columns < K)[:, None] & ((index < HEIGHT_KEPT) & (out < ROWS_OUT))[None, :])


def serves_columns(x: Any) -> bool:
    """Whether columns of a matrix, or of what stands for one, are quantised in one launch, if tiles hold blocks of their
    rotation. Measured on an H200; float32 has no room for wide tiles."""
    return PANELS.why_off() is None and x.dtype != torch.float32 and has_wgmma(x.device)


def panels_of(edge: int) -> Panels:
    """Return how programs go through a matrix that is rotated in blocks of ``edge``."""
    return Panels(128, 64, 4, 6 * 2**20, 2, 3, 4, 2)


def column_quantizer(
    dtype: torch.dtype, device: torch.device, rotation: Rotation, format: Format, how: Panels | None = None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return a function of x [m, k] that returns the transposed codes [k, m'] of Rᵀ x and a scale for each column, by one
    launch. It may also be given codes and scales, which it overwrites."""
    launch, how = plan_panels(dtype, device, rotation, format, how)

    def quantize(x: torch.Tensor, into: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        m, k = x.shape
        # One memory for counters and magnitudes, which begin at a multiple of 16 bytes.
        start = cdiv(counters_of(m, k, dtype.itemsize, how), 4) * 4
        bits = x.new_zeros(start + k, dtype=torch.int32)
        if into is None:
            scales = (x.new_empty if x.numel() else x.new_ones)((k,), dtype=torch.float32)
            into = code_matrix(x, k, reference.rotated(m, rotation), format), scales
        launch((m, k, *x.stride()), x, bits[:start], bits[start:], *into)
        return into

    return quantize


def counters_of(m: int, k: int, size: int, how: Panels) -> int:
    """Return how many counters a launch needs for a matrix [m, k] of ``size`` bytes an element."""
    return 1 + cdiv(cdiv(k, how.width), _tiles_wide(m, k, size, how))


def _tiles_wide(m: int, k: int, size: int, how: Panels) -> int:
    """Return how many tiles wide a panel is."""
    return min(max(1, how.bytes // max(1, m * how.width * size)), max(1, cdiv(k, how.width)))


@lru_cache(maxsize=4096)
def plan_panels(
    dtype: torch.dtype, device: torch.device, rotation: Rotation, format: Format, how: Panels | None = None
) -> tuple[Planned, Panels]:
    """Return the launch, and how it goes through a matrix.

    A call of the launch takes (rows, columns, strides of x), x, counters, amax, transposed codes and scales.
    """
    how = how or panels_of(rotation.edge)
    height, width, most, _, lag, stages, warps, programs = how
    at_once = programs * multiprocessors(device)
    kept = reference.rotated(height, rotation)
    options: dict[str, Any] = format_options(format, device, False, False) | {
        "HEIGHT": height, "WIDTH": width, "STAGES": stages, "num_warps": warps,
        "HEIGHT_OUT": product_width(kept), "HEIGHT_KEPT": kept, "NORM": norm(rotation),
    }  # fmt: skip
    matrix = block_diagonal(rotation, height, product_dtype(dtype, device), device, transposed=False)

    def count_for(m: int, k: int, *strides: int) -> int:
        """Return the class of ``m`` rows: how many tiles a program takes, a power of two."""
        return min(most, 1 << max(cdiv(m, height) - 1, 0).bit_length())

    def prepare(count: int) -> Variant:
        def sizes(m: int, k: int, *strides: int) -> tuple:
            groups, wide = cdiv(m, height * count), _tiles_wide(m, k, dtype.itemsize, how)
            panels = cdiv(cdiv(k, width), wide)
            rows_out = reference.rotated(m, rotation)
            integers = m, k, rows_out, groups, panels, wide, min(lag, panels), *strides, aligned(rows_out)
            return (min(2 * groups * wide * panels, at_once),), integers

        return Variant(Launch(cast_in_panels, options | {"TILES": count}), sizes, (matrix,))

    return Planned(prepare, count_for), how
