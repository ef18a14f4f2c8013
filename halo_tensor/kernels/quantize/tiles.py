"""Launch the two passes over tiles: the first finds the largest magnitudes, and the second scales and quantises.

They serve scales that need more than a row, rotations of rows, and two copies of one matrix with different scales.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from halo_tensor.kernels.device import is_hopper
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.quantize import kernels
from halo_tensor.kernels.quantize.codes import format_options
from halo_tensor.kernels.rotate import TILE, norm, product_dtype
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import aligned, code_dtype
from halo_tensor.reference.hadamard import block_diagonal, product_width

#: A granularity -> what kernels know of it: 2 one scale per row or column, 1 one for all, 0 none.
_ALONG = {"row": 2, "column": 2, "tensor": 1, "unit": 0, None: 0}


def quantize_tiles(
    x: torch.Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    row_granularity: str | None,
    column_granularity: str | None,
    fold_columns: torch.Tensor | None,
    fold_rows: torch.Tensor | None,
    rows: bool,
    columns: bool,
    seed: torch.Tensor | None = None,
    swapped: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return what the function of :func:`tile_quantizer` returns for x [m, k].

    Args:
        fold_columns: multiplies the columns of the rotated matrix whose codes are row-major.
        fold_rows: multiplies the rows of x whose codes are transposed.
        seed: int64 [1], with which codes are rounded stochastically.
        swapped: whether x is the transpose of the matrix that is quantised, whose elements' positions give the noise.
    """
    noisy = 0 if seed is None else 2 if swapped else 1
    quantize = tile_quantizer(
        x.dtype, x.device, row_rotation, column_rotation, format, row_granularity, column_granularity,
        fold_columns is not None, fold_rows is not None, rows, columns, noisy,
    )  # fmt: skip
    return quantize(x, fold_columns, fold_rows, seed)


def tile_quantizer(
    dtype: torch.dtype,
    device: torch.device,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    row_granularity: str | None,
    column_granularity: str | None,
    folds_columns: bool,
    folds_rows: bool,
    rows: bool,
    columns: bool,
    noisy: int,
) -> Callable[..., tuple]:
    """Return a function of a matrix [m, k] that returns its codes, transposed codes, and the scales of both, by two launches.

    Its arguments are the matrix, the fold of columns, the fold of rows, and the seed; all but the first may be None.

    Args:
        row_rotation, column_rotation: the rotations of the row-major codes. Transposed codes are not rotated.
        row_granularity: "row", "tensor", "unit" or None, for the row-major codes.
        column_granularity: "column", "tensor", "unit" or None, for the transposed codes.
        folds_columns, folds_rows: whether the folds are given.
        rows: whether to make row-major codes [m', k'].
        columns: whether to make transposed codes [k, m]. If both are made, they must differ: see
            :mod:`halo_tensor.kernels.quantize.kernels`.
        noisy: 0 to round to nearest; 1 to round stochastically, which needs a seed; 2 if moreover the matrix is a transpose.
    """
    amax_pass, cast_pass = plan_tiles(
        dtype, device, row_rotation, column_rotation, format, row_granularity, column_granularity, folds_columns, folds_rows,
        rows, columns, noisy,
    )  # fmt: skip
    unit = "unit" in (row_granularity, column_granularity)
    along_rows, along_columns = row_granularity == "row", column_granularity == "column"
    code = code_dtype(format)

    def quantize(
        x: torch.Tensor,
        fold_columns: torch.Tensor | None = None,
        fold_rows: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        m, k = x.shape
        m_out, k_out = reference.rotated(m, row_rotation), reference.rotated(k, column_rotation)
        padded_rows = cdiv(m_out, TILE) * TILE
        # Float bits, of rows (padded to whole tiles) and then of columns.
        amax = x.new_zeros(padded_rows + (k if along_columns else 1), dtype=torch.int32)
        row_amax, column_amax = amax[:padded_rows], amax[padded_rows:]
        codes = x.new_empty_strided((m_out, k_out), (aligned(k_out), 1), dtype=code) if rows else None
        codes_t = x.new_empty_strided((k, m), (aligned(m), 1), dtype=code) if columns else None
        new = x.new_ones if unit or not x.numel() else x.new_empty
        row_scales = new(m_out if along_rows else (), dtype=torch.float32)
        column_scales = new(k if along_columns else (), dtype=torch.float32)
        numbers, operands = (m, k, *x.stride()), (x, fold_columns, fold_rows, row_amax, column_amax)
        if amax_pass is not None:
            amax_pass(numbers, *operands)
        cast_pass(numbers, *operands, seed, codes, codes_t, row_scales, column_scales)
        return codes, codes_t, row_scales, column_scales

    return quantize


@lru_cache(maxsize=4096)
def plan_tiles(
    dtype: torch.dtype,
    device: torch.device,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    row_granularity: str | None,
    column_granularity: str | None,
    folds_columns: bool,
    folds_rows: bool,
    rows: bool,
    columns: bool,
    noisy: int,
) -> tuple[Planned | None, Planned]:
    """Return the launches of both passes; None for the first if no scale is computed. Arguments: see :func:`tile_quantizer`.

    A call of either takes (rows, columns, strides of x), x, the folds of columns and of rows, and the magnitudes of rows and
    of columns. The second pass also takes the seed, the codes, the transposed codes, and the scales of rows and of columns.
    """
    measured_rows, measured_columns = _ALONG[row_granularity], _ALONG[column_granularity]
    rotations = row_rotation, column_rotation
    flags = {
        "LEFT": row_rotation is not None, "RIGHT": column_rotation is not None, "NORM": norm(*rotations),
        "FOLD_COLUMNS": folds_columns, "FOLD_ROWS": folds_rows,
    }  # fmt: skip

    def amax_integers(m: int, k: int, *strides: int) -> tuple[int, ...]:
        return m, k, reference.rotated(k, column_rotation), *strides

    def cast_integers(m: int, k: int, *strides: int) -> tuple[int, ...]:
        rows_out, columns_out = reference.rotated(m, row_rotation), reference.rotated(k, column_rotation)
        return m, k, rows_out, columns_out, *strides, aligned(columns_out), aligned(m)

    amax_pass = None
    if measured_rows or measured_columns:
        constants = flags | {"ALONG_ROWS": measured_rows, "ALONG_COLUMNS": measured_columns}
        amax_pass = _plan_pass(kernels.amax_tiles, dtype, device, *rotations, amax_integers, constants)
    constants = flags | {
        "ROWS": rows, "COLUMNS": columns, "ROW_SCALE": measured_rows, "COLUMN_SCALE": measured_columns, "NOISY": noisy,
        **format_options(format, device, "unit" in (row_granularity, column_granularity), noisy > 0),
    }  # fmt: skip
    return amax_pass, _plan_pass(kernels.cast_tiles, dtype, device, *rotations, cast_integers, constants)


def _plan_pass(
    kernel: Any,
    dtype: torch.dtype,
    device: torch.device,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    integers: Callable[..., tuple[int, ...]],
    constants: dict[str, Any],
) -> Planned:
    """Return the launches of one pass. ``integers`` maps (rows, columns, strides of x) to the kernel's integers."""
    rotated = TILE if row_rotation or column_rotation else 0
    edge, most, stages, warps = _tile_launch(kernel, rotated)
    # Noise takes as many registers as the tile, and a float32 tile twice its own; off SM 9.0, so do operands of products.
    wide = rotated and (dtype == torch.float32 or not is_hopper(device))
    warps *= 2 if constants.get("NOISY") or wide else 1
    kept = edge if column_rotation is None else reference.rotated(edge, column_rotation)
    options = {"T": edge, "WIDTH": product_width(kept), "KEPT": kept, "STAGES": stages, "num_warps": warps}
    of = product_dtype(dtype, device)
    matrices = (
        block_diagonal(row_rotation, rotated, of, device, transposed=True) if row_rotation else None,
        block_diagonal(column_rotation, rotated, of, device, transposed=False) if column_rotation else None,
    )

    def tiles_for(m: int, k: int, *strides: int) -> int:
        """Return the class of ``k`` columns: how many tiles of a row of tiles a program takes, a power of two."""
        return min(most, 1 << max(cdiv(k, edge) - 1, 0).bit_length())

    def prepare(tiles: int) -> Variant:
        def sizes(m: int, k: int, *strides: int) -> tuple:
            grid = cdiv(reference.rotated(m, row_rotation), edge), cdiv(k, edge * tiles)
            return grid, integers(m, k, *strides)

        return Variant(Launch(kernel, options | {"TILES": tiles} | constants), sizes, matrices)

    return Planned(prepare, tiles_for)


def _tile_launch(kernel: Any, rotated: int) -> tuple[int, int, int, int]:
    """Return the edge of a tile, the most tiles that a program takes, stages and warps, by measurements on one H100
    (docs/notes/quantisers.md). ``rotated``: the edge of a rotated tile, or 0 if tiles are not rotated."""
    if kernel is kernels.amax_tiles:
        return (rotated, 8, 2, 4) if rotated else (TILE, 1, 1, 4)
    return (rotated, 1, 1, 4) if rotated else (64, 1, 1, 2)
