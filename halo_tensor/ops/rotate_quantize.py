"""Launches the quantisation kernels: which one serves a request, and on what tiles.

Codes are laid out with rows of a multiple of 16 bytes, what TMA and vector loads want, whatever the matrix's width.
"""

from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from halo_tensor.ops import quantize_kernels as kernels
from halo_tensor.ops import reference
from halo_tensor.ops.formats import code_dtype
from halo_tensor.ops.hadamard import block_diagonal, factors, hadamard_factor, rotation_signs
from halo_tensor.recipe import FP8_E4M3, FP8_E5M2, Format, Rotation

TILE = 128
LARGEST_ROW = 32768  # elements that a program of whole_rows holds in registers
#: where cast_tiles and amax_tiles find or put a scale
ALONG = {"row": 2, "column": 2, "tensor": 1, "unit": 0}


def code_matrix(like: torch.Tensor, rows: int, columns: int, format: Format) -> torch.Tensor:
    """An uninitialised [rows, columns] of codes whose rows begin at multiples of 16 bytes."""
    stride = (columns + 15) // 16 * 16
    return like.new_empty_strided((rows, columns), (stride, 1), dtype=code_dtype(format))


@lru_cache
def _format_options(format: Format, saturate: bool = False) -> dict[str, Any]:
    native = format in (FP8_E4M3, FP8_E5M2)
    return {
        "CODE": tl.int8 if format.uniform else tl.float8e5 if format is FP8_E5M2 else tl.float8e4nv,
        "MANTISSA": -1 if format.uniform else 0 if native else format.mantissa_bits,
        "MIN_EXPONENT": format.min_exponent,
        "MAX": format.max if saturate else 0.0,
        "INVERSE_MAX": 1.0 / format.max,
    }


def _norm(*rotations: Rotation | None) -> float:
    return prod(r.edge**-0.5 for r in rotations if r is not None)


@lru_cache
def _padded_factor(n: int, edge: int, device: torch.device) -> torch.Tensor:
    """H_nᵀ in the corner of an [edge, edge] of zeros."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.nn.functional.pad(hadamard_factor(n, device).t(), (0, edge - n, 0, edge - n)).to(dtype).contiguous()


def _matrix_dtype(x: torch.Tensor) -> torch.dtype:
    """In which x is multiplied with ±1. Triton's interpreter, on a CPU, has no 16-bit products."""
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) and x.is_cuda else torch.float32


def rotate_quantize(
    x: torch.Tensor,
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    scale: str,
    fold_rows: torch.Tensor | None,
    fold_columns: torch.Tensor | None,
    rows: bool,
    columns: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """See :func:`halo_tensor.ops.library.rotate_quantize`. ``scale`` is "row", "column", "tensor" or "unit"."""
    if x.dtype == torch.float64:
        x = x.to(torch.float32)
    if _needs_rotating_first(x, left, right, scale, fold_rows):
        x, left, right = rotate(x, left, right, torch.float32), None, None
    if scale == "row" and left is None and fold_rows is None and x.shape[1] <= LARGEST_ROW:
        return _whole_rows(x, right, format, fold_columns, rows, columns)
    if scale == "row" or left or right:
        # Row-major codes first; their transpose, if it is wanted, from them.
        codes, _, scales, _ = _tiles(x, left, right, format, scale, None, fold_columns, fold_rows, True, False)
        return codes if rows else None, transposed(codes, format) if columns else None, scales
    if scale == "column":
        _, codes_t, _, scales = _tiles(x, None, None, format, None, scale, fold_columns, fold_rows, False, True)
        return transposed(codes_t, format) if rows else None, codes_t if columns else None, scales
    codes, codes_t, *scales = _tiles(x, None, None, format, scale, scale, fold_columns, fold_rows, rows, columns)
    return codes, codes_t, scales[0 if rows else 1]


def quantize_pair(
    x: torch.Tensor, left: Rotation | None, format: Format, fold_columns: torch.Tensor | None, fold_rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row-scaled codes of Rᵀ_left x diag(fold_columns) and column-scaled transposed codes of diag(fold_rows) x, in two reads
    of x: (codes, codes_t, row scales, column scales)."""
    if left is not None and left.edge > TILE:
        codes, _, row_scales = rotate_quantize(x, left, None, format, "row", None, fold_columns, True, False)
        _, codes_t, column_scales = rotate_quantize(x, None, None, format, "column", fold_rows, None, False, True)
        return codes, codes_t, row_scales, column_scales
    return _tiles(x, left, None, format, "row", "column", fold_columns, fold_rows, True, True)


def _needs_rotating_first(x, left, right, scale, fold_rows) -> bool:
    """Whether no kernel can rotate on the way: the wider blocks on tiles, and scales or folds that only plain tiles know."""
    if left is None and right is None:
        return False
    if right is not None and left is None and scale == "row" and fold_rows is None and x.shape[1] <= LARGEST_ROW:
        pair = factors(right.edge)
        return pair is None or (pair[0] > 1 and (pair[1] < 16 or pair[0] > TILE or right.edge != x.shape[1]))
    widest = max(r.edge for r in (left, right) if r is not None)
    return widest > TILE or TILE % widest != 0 or scale == "column" or fold_rows is not None


def _whole_rows(x, right, format, fold, keep_rows, transpose):
    m, k = x.shape
    a, b = (right and factors(right.edge)) or (1, 0)
    full = a > 1
    matrix = left_matrix = signs = x
    if full:
        width, chunks = b, max(triton.next_power_of_2(a), 16)
        matrix = hadamard_factor(b, x.device).to(_matrix_dtype(x))
        left_matrix = _padded_factor(a, chunks, x.device)
        signs = rotation_signs(right, x.device)
    else:
        width = b if b > TILE else min(TILE, max(triton.next_power_of_2(k), 16))
        chunks = triton.next_power_of_2(triton.cdiv(k, width))
        if right is not None:
            matrix = block_diagonal(right, width, _matrix_dtype(x), x.device, transposed=False)
    rows, steps, warps, stages = _row_launch(m, chunks * width, chunks, full, transpose)
    codes = code_matrix(x, m, k, format)
    codes_t = code_matrix(x, k, m, format) if transpose else codes
    scales = x.new_empty(m, dtype=torch.float32)
    if m:
        kernels.whole_rows[(triton.cdiv(m, rows * steps),)](
            x, matrix, left_matrix, signs, x if fold is None else fold, codes, codes_t, scales,
            m, k, *x.stride(), codes.stride(0), codes_t.stride(0),
            ROWS=rows, STEPS=steps, CHUNKS=chunks, WIDTH=width, STAGES=stages,
            ROTATE=right is not None, FULL=full, FOLD=fold is not None, TRANSPOSE=transpose,
            NORM=_norm(right), **_format_options(format), num_warps=warps,
        )  # fmt: skip
    return codes if keep_rows else None, codes_t if transpose else None, scales


def _row_launch(m: int, row: int, chunks: int, full: bool, transpose: bool) -> tuple[int, int, int, int]:
    """(rows at a time, times, warps, stages) for rows padded to ``row`` elements. Measured on one H100: bench/NOTES.md."""
    rows = 1 if full else max(1, 16384 // row)
    while rows > 1 and rows * chunks > 512:  # many narrow pieces
        rows //= 2
    in_all = 32 if transpose else 16
    warps = 4 if rows * row <= 4096 else 8 if rows * row <= 16384 else 16
    return rows, max(1, in_all // rows), warps, 3 if rows * row <= 16384 else 2


def _amax_launch(tiles: int) -> tuple[int, int, int]:
    """(tiles of a program, stages, warps) for a row of so many tiles."""
    return (8 if tiles >= 8 else 1), 3, 8


def _cast_launch(tiles: int) -> tuple[int, int, int]:
    return (2 if tiles >= 2 else 1), 2, 8


def _tiles(x, left, right, format, row_scale, column_scale, fold_columns, fold_rows, rows, columns):
    """Both passes over tiles. ``row_scale``: "row", "tensor", "unit" or None, of the row-major codes; ``column_scale``:
    "column", "tensor", "unit" or None, of the transposed ones (where both are "tensor", it is one scale)."""
    m, k = x.shape
    m_out = reference.padded(m, left)
    tiles_m, tiles_k = triton.cdiv(m_out, TILE), triton.cdiv(k, TILE)
    one = row_scale == column_scale == "tensor"
    measure_columns = ALONG[column_scale] if column_scale and not one else 0
    # float bits; rows (padded to whole tiles), then columns
    amax = x.new_zeros(tiles_m * TILE + (k if measure_columns == 2 else 1), dtype=torch.int32)
    row_amax, column_amax = amax[: tiles_m * TILE], amax[tiles_m * TILE :]
    codes = code_matrix(x, m_out, k, format) if rows else None
    codes_t = code_matrix(x, k, m, format) if columns else None
    row_scales = x.new_ones(m_out if row_scale == "row" else (), dtype=torch.float32)
    column_scales = x.new_ones(k if column_scale == "column" else (), dtype=torch.float32)
    matrix_dtype = _matrix_dtype(x)
    left_matrix = block_diagonal(left, TILE, matrix_dtype, x.device, transposed=True) if left else x
    right_matrix = block_diagonal(right, TILE, matrix_dtype, x.device, transposed=False) if right else x
    operands = (
        x,
        left_matrix,
        right_matrix,
        x if fold_columns is None else fold_columns,
        x if fold_rows is None else fold_rows,
    )
    flags = {
        "T": TILE,
        "LEFT": left is not None,
        "RIGHT": right is not None,
        "FOLD_COLUMNS": fold_columns is not None,
        "FOLD_ROWS": fold_rows is not None,
        "NORM": _norm(left, right),
    }
    measure_rows = ALONG[row_scale] if row_scale else 0
    if m_out and k:
        if measure_rows or measure_columns:
            per_program, stages, warps = _amax_launch(tiles_k)
            kernels.amax_tiles[(tiles_m, triton.cdiv(tiles_k, per_program))](
                *operands, row_amax, column_amax, m, k, *x.stride(), TILES=per_program, STAGES=stages,
                ALONG_ROWS=measure_rows, ALONG_COLUMNS=measure_columns, **flags, num_warps=warps,
            )  # fmt: skip
        per_program, stages, warps = _cast_launch(tiles_k)
        kernels.cast_tiles[(tiles_m, triton.cdiv(tiles_k, per_program))](
            *operands, row_amax, row_amax if one else column_amax,
            x if codes is None else codes, x if codes_t is None else codes_t, row_scales, column_scales,
            m, k, m_out, *x.stride(), 0 if codes is None else codes.stride(0), 0 if codes_t is None else codes_t.stride(0),
            TILES=per_program, STAGES=stages, ROWS=rows, COLUMNS=columns,
            ROW_SCALE=measure_rows, COLUMN_SCALE=ALONG[column_scale] if column_scale else 0,
            **_format_options(format, saturate="unit" in (row_scale, column_scale)), **flags, num_warps=warps,
        )  # fmt: skip
    return codes, codes_t, row_scales, column_scales


def transposed(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """The transpose of a matrix of codes, in memory."""
    m, k = codes.shape
    out = code_matrix(codes, k, m, format)
    if m and k:
        grid = (triton.cdiv(m, TILE), triton.cdiv(k, TILE))
        kernels.transpose_codes[grid](codes, out, m, k, codes.stride(0), out.stride(0), T=TILE, num_warps=4)
    return out


def rotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None, dtype: torch.dtype) -> torch.Tensor:
    """Rᵀ_left x R_right, zero-padded to whole blocks."""
    return _rotate(
        x, left, right, (reference.padded(x.shape[0], left), reference.padded(x.shape[1], right)), dtype, inverse=False
    )


def unrotate(
    x: torch.Tensor, left: Rotation | None, right: Rotation | None, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of :func:`rotate`, of the given ``shape``."""
    return _rotate(x, left, right, shape, dtype, inverse=True)


def _rotate(x, left, right, shape, dtype, inverse):
    widest = max((r.edge for r in (left, right) if r is not None), default=0)
    if widest > TILE or (widest and TILE % widest) or (inverse and right is not None and x.shape[1] != shape[1]):
        y = reference.unrotate(x, left, right, shape) if inverse else reference.rotate(x, left, right)
        return y.to(dtype).contiguous()
    out = x.new_empty(shape, dtype=dtype)
    left_matrix = block_diagonal(left, TILE, _matrix_dtype(x), x.device, transposed=not inverse) if left else x
    right_matrix = block_diagonal(right, TILE, _matrix_dtype(x), x.device, transposed=inverse) if right else x
    if x.numel() and out.numel():
        rows = max(x.shape[0], shape[0])
        kernels.rotate_tiles[(triton.cdiv(rows, TILE), triton.cdiv(shape[1], TILE))](
            x, left_matrix, right_matrix, out, *x.shape, shape[0], *x.stride(), out.stride(0),
            T=TILE, LEFT=left is not None, RIGHT=right is not None, NORM=_norm(left, right), num_warps=8,
        )  # fmt: skip
    return out
