"""Quantise one matrix for two products that rotate different dimensions of it, as HOT's backward does with E.

grad_input reads E with its columns rotated, in rows; grad_weight reads E with its rows rotated, of which a rank may keep a
part, transposed. Their formats, scales and roundings may differ. The first of two passes reads the matrix for all magnitudes,
and the second for all codes. Either operand can be left out: X of grad_weight, and W of grad_input, are the second one alone.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.device import has_wgmma
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.quantize.codes import code_matrix, format_options
from halo_tensor.kernels.quantize.kernels import load_matrix, product, scale_of, write_scale
from halo_tensor.kernels.quantize.order import column_order, in_parts, load_shuffled, row_order
from halo_tensor.kernels.quantize.rounding import maximum, noise, noise_streams, round_by, round_to_code, unlifted
from halo_tensor.kernels.rotate import TILE, norm, product_dtype
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import aligned
from halo_tensor.reference.hadamard import block_diagonal, product_width

#: A program takes fewer tiles if there were fewer programs than this: four for each multiprocessor of an H100.
_PROGRAMS = 528


class Side(NamedTuple):
    """How a matrix is quantised for one of its products.

    Attributes:
        rotation: of the columns for the first operand, of the rows for the second.
        format: of the codes.
        per_index: whether each row of the first operand, or each column of the second, has a scale; else all share one.
        noisy: whether codes are rounded stochastically. Only those of the first operand can be.
    """

    rotation: Rotation | None
    format: Format
    per_index: bool
    noisy: bool = False


class Tiles(NamedTuple):
    """How programs go through a matrix: rows and columns of a tile, the most tiles of a row of tiles that a program takes,
    pipeline stages and warps."""

    height: int
    width: int
    most: int
    stages: int
    warps: int


@triton.jit
def _first_tile(program, K, TILES, WIDTH: tl.constexpr):
    """Return the row of tiles and the first tile of a program. Programs that run at a time read whole rows: with whole columns
    the cast of E takes 6 % longer."""
    across = tl.cdiv(K, TILES * WIDTH)
    return program // across, program % across * TILES


@triton.jit
def _load_tile(x, rows, columns, M, K, stride_row, stride_column):
    at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(x + at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)


@triton.jit
def _times(tile, matrix, ROTATED: tl.constexpr, NORM: tl.constexpr):
    """Return tile · matrix · NORM in float32; without ROTATED, the tile."""
    WIDE: tl.constexpr = tile.dtype == tl.float32
    y = tile
    if ROTATED:
        y = product(y if WIDE else y.to(matrix.dtype), matrix)
    y = y.to(tl.float32)
    if ROTATED:
        y = y * NORM
    return y


@triton.jit
def _raise_one(amax, most, LENGTH: tl.constexpr):
    """Raise one stored magnitude to the largest of a vector. It is reduced as a matrix: for sm_100, Triton 3.6 cannot compile
    the reduction of a vector that was reduced from a product."""
    largest = tl.reduce(tl.reshape(most, (1, LENGTH)), 1, maximum)
    tl.atomic_max(amax + tl.arange(0, 1), largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["TILES"])
def amax_of_operands(
    x, amax, amax_t, right, left,
    M, K, TILES, stride_row, stride_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    ROW_SCALE: tl.constexpr, COLUMN_SCALE: tl.constexpr, RIGHT: tl.constexpr, LEFT: tl.constexpr, ALIKE: tl.constexpr,
    WIDTH_OUT: tl.constexpr, HEIGHT_OUT: tl.constexpr, NORM: tl.constexpr, NORM_T: tl.constexpr,
):  # fmt: skip
    """Find the largest magnitudes of x [M, K] times right, and of left times x. A program takes HEIGHT rows by TILES·WIDTH
    columns.

    amax, amax_t: zeroed int32, which get float bits, of the first and of the second operand.
    ROW_SCALE, COLUMN_SCALE: 2 for magnitudes of the first operand's rows, or the second one's columns; 1 for one of all; 0
    if there is no such operand.
    RIGHT, LEFT: whether right [WIDTH, WIDTH_OUT] and left [HEIGHT, HEIGHT_OUT], which is transposed, are given. ALIKE: they
    are equal, so that shared memory holds one.
    """
    tile_row, first_tile = _first_tile(tl.program_id(0), K, TILES, WIDTH)
    rows = tile_row * HEIGHT + tl.arange(0, HEIGHT)
    h_right = load_matrix(right, WIDTH, WIDTH_OUT) if RIGHT else right
    h_left = load_matrix(left, HEIGHT, HEIGHT_OUT) if LEFT and not ALIKE else h_right
    most = tl.zeros((HEIGHT,), tl.float32)
    most_t = tl.zeros((WIDTH,), tl.float32)
    for i in tl.range(0, TILES, num_stages=STAGES):
        columns = (first_tile + i) * WIDTH + tl.arange(0, WIDTH)
        tile = _load_tile(x, rows, columns, M, K, stride_row, stride_column)
        if ROW_SCALE > 0:
            most = maximum(most, tl.reduce(tl.abs(_times(tile, h_right, RIGHT, NORM)), 1, maximum))
        if COLUMN_SCALE > 0:
            down = tl.reduce(tl.abs(_times(tl.trans(tile), h_left, LEFT, NORM_T)), 1, maximum)
            if COLUMN_SCALE == 2:
                tl.atomic_max(amax_t + columns, down.to(tl.int32, bitcast=True), mask=columns < K, sem="relaxed")
            else:
                most_t = maximum(most_t, down)
    if ROW_SCALE == 2:
        tl.atomic_max(amax + rows, most.to(tl.int32, bitcast=True), mask=rows < M, sem="relaxed")
    if ROW_SCALE == 1:
        _raise_one(amax, most, HEIGHT)
    if COLUMN_SCALE == 1:
        _raise_one(amax_t, most_t, WIDTH)


@triton.jit(do_not_specialize=["TILES"])
def cast_for_operands(
    x, amax, amax_t, seed, codes, codes_t, row_scales, column_scales, right, left,
    M, K, TILES, COLUMNS_OUT, ROWS_OUT, stride_row, stride_column, stride_codes, stride_codes_t,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    ROW_SCALE: tl.constexpr, COLUMN_SCALE: tl.constexpr, RIGHT: tl.constexpr, LEFT: tl.constexpr, ALIKE: tl.constexpr,
    WIDTH_OUT: tl.constexpr, HEIGHT_OUT: tl.constexpr, NORM: tl.constexpr, NORM_T: tl.constexpr,
    WIDTH_KEPT: tl.constexpr, HEIGHT_KEPT: tl.constexpr, WARPS: tl.constexpr, NOISY: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr, INVERSE_MAX: tl.constexpr,
    STEP: tl.constexpr,
    CODE_T: tl.constexpr, MANTISSA_T: tl.constexpr, MIN_EXPONENT_T: tl.constexpr, MAX_T: tl.constexpr,
    INVERSE_MAX_T: tl.constexpr, STEP_T: tl.constexpr,
):  # fmt: skip
    """Store codes and scales from the magnitudes and on the tiles of :func:`amax_of_operands`.

    codes [M, COLUMNS_OUT]: of x · right, of which a tile gives WIDTH_KEPT columns. NOISY rounds them stochastically, by the
    int64 at ``seed``.
    codes_t [K, ROWS_OUT]: of the transpose of left · x, of which a tile gives HEIGHT_KEPT rows. It is computed by a product
    of its own, because transposed stores of a product are miscompiled (docs/notes/quantisers.md).
    """
    # Programs go through the tiles in reverse order, because amax_of_operands has left the last ones in L2.
    tile_row, first_tile = _first_tile(tl.num_programs(0) - 1 - tl.program_id(0), K, TILES, WIDTH)
    rows = tile_row * HEIGHT + tl.arange(0, HEIGHT)
    rows_out = tile_row * HEIGHT + row_order(RIGHT, HEIGHT, WARPS)
    h_right = load_shuffled(right, WIDTH, WIDTH_OUT) if RIGHT else right
    h_left = load_shuffled(left, HEIGHT, HEIGHT_OUT) if LEFT and not ALIKE else h_right
    if ROW_SCALE > 0:
        row_scale = scale_of(amax, rows_out, M, INVERSE_MAX, ROW_SCALE, HEIGHT)
        row_inverse = tl.div_rn(tl.full((HEIGHT,), 1.0, tl.float32), row_scale)[:, None, None]
        write_scale(row_scales, unlifted(row_scale, STEP, False), rows_out, M, first_tile, ROW_SCALE)
        if NOISY:
            streams = noise_streams(seed, rows_out)[:, None, None]
    if COLUMN_SCALE == 1:
        any_column = tl.arange(0, WIDTH)
        column_scale = scale_of(amax_t, any_column, K, INVERSE_MAX_T, 1, WIDTH)
        write_scale(column_scales, unlifted(column_scale, STEP_T, False), any_column, K, tile_row + first_tile, 1)
        column_inverse = tl.div_rn(tl.full((WIDTH,), 1.0, tl.float32), column_scale)[:, None, None]
    for i in tl.range(0, TILES, num_stages=STAGES):
        tile_column = first_tile + i
        columns = tile_column * WIDTH + tl.arange(0, WIDTH)
        tile = _load_tile(x, rows, columns, M, K, stride_row, stride_column)
        if ROW_SCALE > 0:
            y = in_parts(_times(tile, h_right, RIGHT, NORM), RIGHT, HEIGHT, WIDTH_OUT, WARPS) * row_inverse
            index = column_order(WIDTH_OUT)
            first = tile_column * WIDTH_KEPT
            out = first + index
            if NOISY:
                drawn = noise(streams, first, index) if WIDTH_KEPT % 4 == 0 else noise(streams, 0, out)
                q = round_by(drawn, y, CODE, MANTISSA, MIN_EXPONENT, MAX)
            else:
                q = round_to_code(y, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
            target = codes + rows_out.to(tl.int64)[:, None, None] * stride_codes + out
            tl.store(target, q, mask=(rows_out < M)[:, None, None] & (index < WIDTH_KEPT) & (out < COLUMNS_OUT))
        if COLUMN_SCALE > 0:
            columns_out = tile_column * WIDTH + row_order(LEFT, WIDTH, WARPS)
            if COLUMN_SCALE == 2:
                column_scale = scale_of(amax_t, columns_out, K, INVERSE_MAX_T, 2, WIDTH)
                write_scale(column_scales, unlifted(column_scale, STEP_T, False), columns_out, K, tile_row, 2)
                column_inverse = tl.div_rn(tl.full((WIDTH,), 1.0, tl.float32), column_scale)[:, None, None]
            y = in_parts(_times(tl.trans(tile), h_left, LEFT, NORM_T), LEFT, WIDTH, HEIGHT_OUT, WARPS) * column_inverse
            q = round_to_code(y, CODE_T, MANTISSA_T, MIN_EXPONENT_T, MAX_T, STEP_T)
            index = column_order(HEIGHT_OUT)
            out = tile_row * HEIGHT_KEPT + index
            target = codes_t + columns_out.to(tl.int64)[:, None, None] * stride_codes_t + out
            tl.store(target, q, mask=(columns_out < K)[:, None, None] & (index < HEIGHT_KEPT) & (out < ROWS_OUT))


def fits(x: Any, first: Side | None, second: Side | None) -> bool:
    """Whether the kernels have room for both rotations of a matrix, or of what stands for one.

    A block must fit in a tile. Tiles wider than 64 spill registers in float32, and where matrix units read operands from
    registers; there float32 spills always.
    """
    edges = [side.rotation.edge for side in (first, second) if side is not None and side.rotation is not None]
    float32, wgmma = x.dtype == torch.float32, has_wgmma(x.device)
    if float32 and not wgmma and edges:
        return False
    largest = TILE // 2 if float32 or not wgmma else TILE
    return all(largest % edge == 0 for edge in edges)


def operands_quantizer(
    dtype: torch.dtype, device: torch.device, first: Side | None, second: Side | None
) -> Callable[..., tuple[Any, Any, Any, Any]]:
    """Return a function of (x [m, k], seed, into) that returns codes, transposed codes, and the scales of both, by two
    launches.

    The codes are [m, k'] of x R_first, and transposed [k, m'] of Rᵀ_second x. Codes and scales of an operand that is left
    out are None. The seed is int64 [1], or None if ``first`` is not noisy. Without ``first``, the transposed codes and scales
    of an earlier call may be given as ``into``, and are overwritten.
    """
    amax_pass, cast_pass = plan_operands(dtype, device, first, second)
    column_rotation, row_rotation = (side and side.rotation for side in (first, second))

    def quantize(
        x: torch.Tensor, seed: torch.Tensor | None = None, into: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[Any, Any, Any, Any]:
        m, k = x.shape
        of_rows = m if first is not None and first.per_index else 1
        of_columns = k if second is not None and second.per_index else 1
        # One memory for the bits of both; slices begin at multiples of 16 bytes.
        start = cdiv(of_rows, 4) * 4
        bits = x.new_zeros(start + of_columns, dtype=torch.int32)
        amax = bits[:start], bits[start:]
        codes = first and code_matrix(x, m, reference.rotated(k, column_rotation), first.format)
        new = x.new_empty if x.numel() else x.new_ones
        row_scales = first and new(m if first.per_index else (), dtype=torch.float32)
        if into is None:
            codes_t = second and code_matrix(x, k, reference.rotated(m, row_rotation), second.format)
            column_scales = second and new(k if second.per_index else (), dtype=torch.float32)
        else:
            codes_t, column_scales = into
        numbers = m, k, *x.stride()
        amax_pass(numbers, x, *amax)
        cast_pass(numbers, x, *amax, seed, codes, codes_t, row_scales, column_scales)
        return codes, codes_t, row_scales, column_scales

    return quantize


@lru_cache(maxsize=4096)
def plan_operands(
    dtype: torch.dtype, device: torch.device, first: Side | None, second: Side | None
) -> tuple[Planned, Planned]:
    """Return the launches of both passes.

    A call of either takes (rows, columns, strides of x), x, and the magnitudes of the first and of the second operand. The
    second pass also takes the seed, the codes, the transposed codes, and the scales of both.
    """
    column_rotation, row_rotation = (side and side.rotation for side in (first, second))
    none = Side(None, (first or second).format, False)  # type: ignore[union-attr]
    of_first, of_second = (format_options(side.format, device, False, side.noisy) for side in (first or none, second or none))
    fusion = {"enable_fp_fusion": of_first["enable_fp_fusion"]}
    flags = {
        "ROW_SCALE": 0 if first is None else 1 + first.per_index, "RIGHT": column_rotation is not None,
        "COLUMN_SCALE": 0 if second is None else 1 + second.per_index, "LEFT": row_rotation is not None,
        "NORM": norm(column_rotation), "NORM_T": norm(row_rotation),
    }  # fmt: skip
    rounding = of_first | {f"{name}_T": value for name, value in of_second.items() if name.isupper()}
    rounding["NOISY"] = first is not None and first.noisy

    def cast_integers(m: int, k: int, *strides: int) -> tuple[int, ...]:
        columns_out, rows_out = reference.rotated(k, column_rotation), reference.rotated(m, row_rotation)
        return columns_out, rows_out, *strides, aligned(columns_out), aligned(rows_out)

    return (
        _plan_pass(amax_of_operands, dtype, device, column_rotation, row_rotation, None, flags | fusion),
        _plan_pass(cast_for_operands, dtype, device, column_rotation, row_rotation, cast_integers, flags | fusion | rounding),
    )


def tiles_of(kernel: Any, dtype: torch.dtype, device: torch.device, edge: int, alone: bool) -> Tiles:
    """Return the tiles of a pass that rotates blocks of at most ``edge``, by measurements on one H200 (docs/notes/hot.md).

    Args:
        alone: whether one operand is left out.
    """
    casts = kernel is cast_for_operands
    if edge > TILE // 2:
        return Tiles(TILE, TILE, 4, 2, 4 if casts and not alone else 8)
    if dtype == torch.float32:
        return Tiles(TILE // 2, TILE // 2, 4, 2, 4)
    # A third stage spills registers for sm_120.
    stages = 3 if has_wgmma(device) else 2
    if casts:
        return Tiles(TILE // 2, TILE, 3, stages, 4) if alone else Tiles(TILE // 2, TILE // 2, 4, stages, 4)
    return Tiles(TILE // 2, TILE // 2, 8 if alone else 16, stages, 4)


def _plan_pass(
    kernel: Any,
    dtype: torch.dtype,
    device: torch.device,
    column_rotation: Rotation | None,
    row_rotation: Rotation | None,
    integers: Callable[..., tuple[int, ...]] | None,
    constants: dict[str, Any],
) -> Planned:
    """Return the launches of one pass. ``integers`` maps (rows, columns, strides of x) to the kernel's integers after the
    number of tiles, if they are not the strides."""
    edge = max(rotation.edge if rotation else 1 for rotation in (column_rotation, row_rotation))
    height, width, most, stages, warps = tiles_of(
        kernel, dtype, device, edge, not (constants["ROW_SCALE"] and constants["COLUMN_SCALE"])
    )
    kept_columns, kept_rows = reference.rotated(width, column_rotation), reference.rotated(height, row_rotation)
    options = {
        "HEIGHT": height, "WIDTH": width, "STAGES": stages, "num_warps": warps,
        "ALIKE": column_rotation is not None and column_rotation == row_rotation and height == width,
        "WIDTH_OUT": product_width(kept_columns), "HEIGHT_OUT": product_width(kept_rows),
    }  # fmt: skip
    if integers is not None:
        options |= {"WARPS": warps, "WIDTH_KEPT": kept_columns, "HEIGHT_KEPT": kept_rows}
    of = product_dtype(dtype, device)
    matrices = (
        block_diagonal(column_rotation, width, of, device, transposed=False) if column_rotation else None,
        block_diagonal(row_rotation, height, of, device, transposed=False) if row_rotation else None,
    )

    def sizes(m: int, k: int, *strides: int) -> tuple:
        down, across = cdiv(m, height), cdiv(k, width)
        tiles = min(most, max(1, down * across // _PROGRAMS))
        tiles = max(1, cdiv(across, max(1, cdiv(across, tiles))))  # so that all programs have about as many
        return (down * cdiv(across, tiles),), (m, k, tiles, *(strides if integers is None else integers(m, k, *strides)))

    launch = Launch(kernel, options | constants)
    return Planned(lambda _: Variant(launch, sizes, matrices))
