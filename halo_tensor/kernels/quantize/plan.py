"""Launches the quantisation kernels: which one serves a request, and on what tiles.

Codes are laid out with rows that begin at multiples of 16 bytes, what TMA and vector loads want, whatever the matrix's width.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.device import PRODUCER_INPUTS, has_wgmma, is_hopper, rounds_to_fp8
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv, shared_memory
from halo_tensor.kernels.quantize import kernels
from halo_tensor.kernels.rotate import TILE, Matrix, fits_tiles, norm, product_dtype, rotate, transposed, whole_blocks
from halo_tensor.recipe import FP8_E4M3, FP8_E5M2, Format, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import aligned, code_dtype, lift
from halo_tensor.reference.hadamard import block_diagonal, factors, hadamard_factor, product_width, rotation_signs

LARGEST_ROW = 32768  # elements that a program of whole_rows holds in registers
#: how many scales: 2 one per row or column, 1 one for all, 0 unit
ALONG = {"row": 2, "column": 2, "tensor": 1, "unit": 0}


def code_matrix(like: torch.Tensor, rows: int, columns: int, format: Format) -> torch.Tensor:
    """An uninitialised [rows, columns] of codes."""
    return like.new_empty_strided((rows, columns), (aligned(columns), 1), dtype=code_dtype(format))


@lru_cache
def format_options(format: Format, device: torch.device, saturate: bool = False, noisy: bool = False) -> dict[str, Any]:
    native = format in (FP8_E4M3, FP8_E5M2) and rounds_to_fp8(device) and not noisy
    code_lift = 1.0 if saturate or noisy else lift(format)  # without a scale nothing is lifted; noise is one of whole codes
    return {
        "CODE": tl.int8 if format.uniform else tl.float8e5 if format is FP8_E5M2 else tl.float8e4nv,
        "MANTISSA": -1 if format.uniform else -2 if native else format.mantissa_bits,
        "MIN_EXPONENT": format.min_exponent,
        "MAX": format.max if saturate or noisy else 0.0,
        "INVERSE_MAX": code_lift / format.max,
        "STEP": 1.0 / code_lift,
        "enable_fp_fusion": False,  # a fused multiply-add would round y·(1/s) and the code in one step, unlike the reference
    }


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
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
    seed: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """See :func:`halo_tensor.ops.rotate_quantize`. ``scale`` is "row", "column", "tensor" or "unit". ``into``: the
    codes and the scales to write to, from an earlier call with rows only. ``seed``: int64 [1], to round stochastically.
    ``gain``: powers of two, for other products would be rounded to the dtype of x before they are rotated."""
    fold_rows, fold_columns, gain = dense(fold_rows), dense(fold_columns), dense(gain)
    if x.dtype == torch.float64:
        x = x.to(torch.float32)
    if gain is not None and x.dtype == torch.float16:
        x, gain = x * gain, None  # float32, since float16 may not hold it
    folds_on_the_way = reference.folds_across(scale, fold_rows, fold_columns)
    turns = folds_on_the_way and _turns(x, left, right, scale, rows)
    noisy = seed is not None
    rotates_first = not folds_on_the_way or (not turns and needs_rotating_first(x, left, right, scale, noisy))
    if gain is not None and (rotates_first or not gains_on_the_way(x, left, right, scale, noisy)):
        x, gain = (x * gain).to(x.dtype), None
    if rotates_first:
        x, left, right = rotate(x, left, right, torch.float32), None, None
    if not folds_on_the_way:
        x = x if fold_rows is None else x * fold_rows.unsqueeze(1)
        x = x if fold_columns is None else x * fold_columns
        fold_rows = fold_columns = None
    if takes_whole_rows(x, left, right, scale, noisy):
        x, gain = whole_blocks(x, right), gain if gain is None else whole_blocks(gain, right)
        codes, scales = _whole_rows(x, right, format, gain, fold_columns, into)
        codes_t = transposed(codes) if columns else None
        return codes if rows else None, codes_t, scales
    if turns:
        scale = "row" if scale == "column" else scale
        codes_t, _, scales, _ = _tiles(x.t(), None, left, format, scale, None, fold_rows, None, True, False, seed)
        result = transposed(codes_t) if rows else None, codes_t if columns else None, scales
    elif left or right or scale == "row" or (rows and scale != "column"):
        # Row-major codes first; their transpose, if it is wanted, from them. See quantize_kernels.
        codes, _, scales, _ = _tiles(x, left, right, format, scale, None, fold_columns, fold_rows, True, False, seed)
        result = codes if rows else None, transposed(codes) if columns else None, scales
    else:
        _, codes_t, _, scales = _tiles(x, None, None, format, None, scale, fold_columns, fold_rows, False, True, seed)
        result = transposed(codes_t) if rows else None, codes_t if columns else None, scales
    if into is not None:
        assert result[0] is not None
        into[0].copy_(result[0])
        into[1].copy_(result[2])
    return result


def quantize_pair(
    x: torch.Tensor, left: Rotation | None, format: Format, fold_columns: torch.Tensor | None, fold_rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row-scaled codes of Rᵀ_left x diag(fold_columns) and column-scaled transposed codes of diag(fold_rows) x, in two reads
    of x: (codes, codes_t, row scales, column scales)."""
    fold_rows, fold_columns = dense(fold_rows), dense(fold_columns)
    if left is not None and (left.rank is not None or not fits_tiles(x, left, None)):
        codes, _, row_scales = rotate_quantize(x, left, None, format, "row", None, fold_columns, True, False)
        _, codes_t, column_scales = rotate_quantize(x, None, None, format, "column", fold_rows, None, False, True)
    else:
        codes, codes_t, row_scales, column_scales = _tiles(
            x, left, None, format, "row", "column", fold_columns, fold_rows, True, True
        )
    assert codes is not None and codes_t is not None
    return codes, codes_t, row_scales, column_scales


def pair_quantizer(
    dtype: torch.dtype, device: torch.device, left: Rotation | None, format: Format, fold_columns: bool, fold_rows: bool
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """:func:`quantize_pair` of matrices of ``dtype``, as a function of (x, fold_columns, fold_rows)."""
    like = Matrix(torch.Size((1, 1)), (1, 1), dtype, device)
    if dtype == torch.float64 or (left is not None and (left.rank is not None or not fits_tiles(like, left, None))):
        return lambda x, *folds: quantize_pair(x, left, format, *folds)
    return tile_quantizer(dtype, device, left, None, format, "row", "column", fold_columns, fold_rows, True, True, False)


def is_one_launch(k: int, dtype: torch.dtype, device: torch.device, right: Rotation | None, gained: bool) -> bool:
    """Whether one launch rotates and quantises rows of ``k`` numbers, each with a scale, and reads them as they are."""
    like = Matrix(torch.Size((1, k)), (k, 1), dtype, device)
    row = (like, None, right, "row", False)
    fits = dtype != torch.float64 and takes_whole_rows(*row) and not needs_rotating_first(*row)
    return fits and reference.padded(k, right) == k and (not gained or (dtype != torch.float16 and gains_on_the_way(*row)))


def dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    """As kernels read scales, folds and biases: one after the other."""
    return vector if vector is None or vector.ndim == 0 or vector.stride(0) == 1 else vector.contiguous()


def _turns(x, left, right, scale, rows) -> bool:
    """Whether a rotation from the left is done to the transpose of x, from the right. There tiles know low ranks and scales
    along what is rotated; and codes are stored as they come where they are wanted transposed."""
    if left is None or right is not None or scale == "row" or not fits_tiles(x, left, None):
        return False
    return left.rank is not None or scale == "column" or not rows


def takes_whole_rows(x, left, right, scale, noisy) -> bool:
    low = right is not None and right.rank is not None
    return scale == "row" and left is None and not low and not noisy and _holds_row(x, right)


def _holds_row(x: torch.Tensor | Matrix, right: Rotation | None, gain: bool = False) -> bool:
    """Whether a program has room for a whole row of x, rotated by ``right``, and perhaps for a gain of its columns."""
    k = reference.padded(x.shape[1], right)
    if k > LARGEST_ROW:
        return False
    return right is None or x.device.type != "cuda" or _holds_rotated_row(k, x.dtype, x.device, right, gain)


@lru_cache(maxsize=4096)
def _holds_rotated_row(k: int, dtype: torch.dtype, device: torch.device, right: Rotation, gain: bool) -> bool:
    """:func:`_holds_row` for rows of ``k`` elements on a GPU. Eager ops ask in every call."""
    a, b = factors(right.edge) or (1, right.edge)
    if not has_wgmma(device) and (dtype == torch.float32 or a > 1):
        return False  # it would spill registers
    # Bytes of bfloat16: the rotation's one or two matrices, and as many operands. Float32 rows are multiplied in parts.
    operands = max(b, TILE) ** 2 + triton.next_power_of_2(k)
    if a > 1:
        operands += max(triton.next_power_of_2(a), 16) ** 2 + triton.next_power_of_2(k)
    if gain and not has_wgmma(device):
        operands += triton.next_power_of_2(k)
    return 2 * operands <= shared_memory(device)


def gains_on_the_way(x, left, right, scale, noisy) -> bool:
    """Whether a gain is multiplied with where x is read: a wide row, and a matrix wider than a tile, leave no room for it."""
    fits = right is None or right.edge <= TILE or reference.padded(x.shape[1], right) <= LARGEST_ROW // 2
    return fits and takes_whole_rows(x, left, right, scale, noisy) and _holds_row(x, right, gain=True)


def needs_rotating_first(x, left, right, scale, noisy) -> bool:
    """Whether no kernel can rotate on the way: the wider blocks on tiles, and scales that only plain tiles know."""
    if left is None and right is None:
        return False
    if right is not None and takes_whole_rows(x, left, right, scale, noisy):
        pair = factors(right.edge)
        whole = reference.padded(x.shape[1], right)
        return pair is None or (pair[0] > 1 and (pair[1] < 16 or pair[0] > TILE or right.edge != whole))
    low = left is not None and left.rank is not None
    both = left is not None and right is not None  # the second product is of float32, which leaves no room for another tile
    return low or both or scale == "column" or not fits_tiles(x, left, right)


# Whole rows.


def _whole_rows(x, right, format, gain, fold, into):
    function, inputs = None, [x]
    if right is None or right.edge <= TILE:  # larger matrices leave no room
        # What stands for x in a compiled graph may have a producer, whose inputs are read instead.
        function, inputs = getattr(x, "producer", None) or (None, [x])
    inputs = [*inputs, *[None] * (PRODUCER_INPUTS - len(inputs))]
    quantize = row_quantizer(x.shape[1], x.dtype, x.device, right, format, gain is not None, fold is not None, function)
    return quantize(x, gain, fold, into, inputs)


@lru_cache(maxsize=4096)
def row_quantizer(
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    right: Rotation | None,
    format: Format,
    gained: bool,
    folded: bool,
    producer: Any = None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function of a matrix [rows, k] that returns its codes and scales from one launch. All that does not depend on the
    number of rows is decided here."""
    planned = plan_whole_rows(k, dtype, device, right, format, gained, folded, producer)
    code, stride = code_dtype(format), aligned(k)
    nothing = (None,) * (PRODUCER_INPUTS - 1)

    def quantize(x, gain=None, fold=None, into=None, inputs=None):
        m = x.shape[0]
        if into is None:
            codes, scales = x.new_empty_strided((m, k), (stride, 1), dtype=code), x.new_empty(m, dtype=torch.float32)
        else:
            codes, scales = into
        numbers = (m, *x.stride(), codes.stride(0))
        planned(numbers, *(inputs or (x, *nothing)), gain, fold, codes, scales)
        return codes, scales

    return quantize


@lru_cache(maxsize=4096)
def plan_whole_rows(
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    right: Rotation | None,
    format: Format,
    gained: bool,
    folded: bool,
    producer: Any = None,
) -> Planned:
    """For rows of ``k`` numbers of ``dtype``. Takes (rows, strides of x, row stride of the codes), then x or what ``producer``
    reads, PRODUCER_INPUTS tensors in all, the gain, the fold, the codes and the scales."""
    how, constants, matrices = row_constants(k, dtype, device, right, format, gained, folded, producer)

    def prepare(steps: int) -> Variant:
        def sizes(m: int, stride_row: int, stride_column: int, stride_codes: int) -> tuple:
            return (cdiv(m, how.rows * steps),), (m, k, stride_row, stride_column, stride_codes)

        return Variant(Launch(kernels.whole_rows, constants | {"STEPS": steps}), sizes, matrices)

    return Planned(prepare, lambda m, *strides: how.steps_for(m))


def row_constants(
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    right: Rotation | None,
    format: Format,
    gained: bool,
    folded: bool,
    producer: Any = None,
) -> tuple["_RowLaunch", dict[str, Any], tuple]:
    """How rows are launched, the constants of the kernel but STEPS, and its matrices."""
    a, b = (right and factors(right.edge)) or (1, 0)
    full = a > 1
    matrix = left_matrix = signs = None
    if full:
        width, chunks = b, max(triton.next_power_of_2(a), 16)
        matrix = hadamard_factor(b, device).to(product_dtype(dtype, device))
        left_matrix = _padded_factor(a, chunks, device)
        signs = rotation_signs(right, device)
    else:
        width = b if b > TILE else min(TILE, max(triton.next_power_of_2(k), 16))
        chunks = triton.next_power_of_2(max(cdiv(k, width), 1))
        if right is not None:
            matrix = block_diagonal(right, width, product_dtype(dtype, device), device, transposed=False)
    rotated, produced = right is not None, producer is not None
    how = _row_launch(chunks * width, chunks, full or width > TILE, rotated, produced)
    constants = {
        "ROWS": how.rows, "CHUNKS": chunks, "WIDTH": width, "STAGES": how.stages,
        "GAIN": gained, "ROTATE": rotated, "FULL": full, "FOLD": folded, "NORM": norm(right), "num_warps": how.warps,
        "PRODUCER": producer, **format_options(format, device),
    }  # fmt: skip
    return how, constants, (matrix, left_matrix, signs)


@lru_cache
def _padded_factor(n: int, edge: int, device: torch.device) -> torch.Tensor:
    """H_nᵀ in the corner of an [edge, edge] of zeros."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.nn.functional.pad(hadamard_factor(n, device).t(), (0, edge - n, 0, edge - n)).to(dtype).contiguous()


class _RowLaunch(NamedTuple):
    """How a program goes through rows: how many at a time, how many times (0 if the number of rows decides), warps, stages."""

    rows: int
    steps: int
    warps: int
    stages: int

    def steps_for(self, m: int) -> int:
        """The class of a number of rows: how many times a program takes some. It is a power of two, for up to 16 rows in all,
        and leaves 256 programs if there are rows for them."""
        return self.steps or 1 << max(min(16, m // 256) // self.rows, 1).bit_length() - 1


def _row_launch(row: int, chunks: int, large: bool, rotate: bool, produced: bool) -> _RowLaunch:
    """For rows padded to ``row`` elements. Measured on one H100: docs/notes. ``large``: the matrices of the rotation leave no
    shared memory for pipelining. ``produced``: a row is computed, from two that are read, and other programs hide that better
    than a pipeline."""
    if large:
        return _RowLaunch(1, 16, 8 if row <= 16384 else 16, 1)
    rows = max(1, (8192 if row <= 4096 or (rotate and produced) else 16384) // row)
    while rows > 1 and rows * chunks > 512:  # many narrow pieces
        rows //= 2
    tile = rows * row
    warps = 4 if tile <= 8192 else 8 if tile <= 16384 else 16
    if not rotate or produced:
        return _RowLaunch(rows, 1, 16 if produced and not rotate and tile > 8192 else warps, 1)
    return _RowLaunch(rows, 0, warps, 3 if tile <= 16384 else 2)


# Tiles.


def _tiles(x, left, right, format, row_scale, column_scale, fold_columns, fold_rows, rows, columns, seed=None):
    quantize = tile_quantizer(
        x.dtype, x.device, left, right, format, row_scale, column_scale, fold_columns is not None, fold_rows is not None,
        rows, columns, seed is not None,
    )  # fmt: skip
    return quantize(x, fold_columns, fold_rows, seed)


@lru_cache(maxsize=4096)
def tile_quantizer(
    dtype: torch.dtype,
    device: torch.device,
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    row_scale: str | None,
    column_scale: str | None,
    fold_columns: bool,
    fold_rows: bool,
    rows: bool,
    columns: bool,
    noisy: bool,
) -> Callable[..., tuple]:
    """A function of a matrix that returns its codes, their transpose, and the scales of both, from both passes over tiles.
    ``row_scale``: "row", "tensor", "unit" or None, of the row-major codes; ``column_scale``: "column", "tensor", "unit" or
    None, of the transposed ones. If both are wanted, they must differ: see quantize_kernels."""
    amax_pass, cast_pass = plan_tiles(
        dtype, device, left, right, format, row_scale, column_scale, fold_columns, fold_rows, rows, columns, noisy
    )  # fmt: skip
    unit, along_rows, along_columns = "unit" in (row_scale, column_scale), row_scale == "row", column_scale == "column"
    code = code_dtype(format)

    def quantize(x, fold_columns=None, fold_rows=None, seed=None):
        m, k = x.shape
        m_out, k_out = reference.rotated(m, left), reference.rotated(k, right)
        padded_rows = cdiv(m_out, TILE) * TILE
        # Float bits: of rows (padded to whole tiles), then of columns.
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


def _tile_launch(kernel, rotated: int) -> tuple[int, int, int, int]:
    """(edge of a tile, tiles in a row a program, stages, warps). Measured on one H100: docs/notes. ``rotated``: the edge
    of a rotated tile, or 0."""
    if kernel is kernels.amax_tiles:
        return (rotated, 8, 2, 4) if rotated else (TILE, 1, 1, 4)
    return (rotated, 1, 1, 4) if rotated else (64, 1, 1, 2)


@lru_cache(maxsize=4096)
def plan_tiles(
    x: torch.dtype,
    device: torch.device,
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    row_scale: str | None,
    column_scale: str | None,
    fold_columns: bool,
    fold_rows: bool,
    rows: bool,
    columns: bool,
    noisy: bool,
) -> tuple[Planned | None, Planned]:
    """Both passes, the first of which finds no magnitudes if no scale wants them. Both take (rows, columns, strides of x); the
    first then x, the folds of columns and of rows, and the magnitudes of rows and of columns; the second these, the seed, the
    codes, the transposed codes, and the scales of rows and of columns."""
    measure_rows = ALONG[row_scale] if row_scale else 0
    measure_columns = ALONG[column_scale] if column_scale else 0
    rotated = TILE if left or right else 0
    flags = {
        "LEFT": left is not None, "RIGHT": right is not None, "NORM": norm(left, right),
        "FOLD_COLUMNS": fold_columns, "FOLD_ROWS": fold_rows,
    }  # fmt: skip
    of = product_dtype(x, device)
    matrices = (
        block_diagonal(left, rotated, of, device, transposed=True) if left else None,
        block_diagonal(right, rotated, of, device, transposed=False) if right else None,
    )

    def tiled(kernel, integers, **constants) -> Planned:
        edge, most, stages, warps = _tile_launch(kernel, rotated)
        # Registers: noise takes as many as the tile, a float32 tile two times its own, and off SM 9.0 a product's operands do.
        wide = rotated and (x == torch.float32 or not is_hopper(device))
        warps *= 2 if constants.get("NOISY") or wide else 1
        kept = edge if right is None else reference.rotated(edge, right)
        options = {"T": edge, "WIDTH": product_width(kept), "KEPT": kept, "STAGES": stages, "num_warps": warps}

        def tiles_for(m: int, k: int, *strides: int) -> int:
            """The class of a number of columns: how many tiles in a row a program takes, a power of two."""
            return min(most, 1 << max(cdiv(k, edge) - 1, 0).bit_length())

        def prepare(tiles: int) -> Variant:
            def sizes(m: int, k: int, *strides: int) -> tuple:
                grid = cdiv(reference.rotated(m, left), edge), cdiv(k, edge * tiles)
                return grid, integers(m, k, *strides)

            return Variant(Launch(kernel, options | {"TILES": tiles} | flags | constants), sizes, matrices)

        return Planned(prepare, tiles_for)

    def of_amax(m: int, k: int, *strides: int) -> tuple[int, ...]:
        return m, k, reference.rotated(k, right), *strides

    def of_cast(m: int, k: int, *strides: int) -> tuple[int, ...]:
        rows_out, columns_out = reference.rotated(m, left), reference.rotated(k, right)
        return m, k, rows_out, columns_out, *strides, aligned(columns_out), aligned(m)

    amax_pass = None
    if measure_rows or measure_columns:
        amax_pass = tiled(kernels.amax_tiles, of_amax, ALONG_ROWS=measure_rows, ALONG_COLUMNS=measure_columns)
    cast_pass = tiled(
        kernels.cast_tiles, of_cast, ROWS=rows, COLUMNS=columns, ROW_SCALE=measure_rows, COLUMN_SCALE=measure_columns,
        NOISY=noisy, **format_options(format, device, "unit" in (row_scale, column_scale), noisy),
    )  # fmt: skip
    return amax_pass, cast_pass
