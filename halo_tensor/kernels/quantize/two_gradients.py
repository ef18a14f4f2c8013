"""Quantise two gradients of one elementwise function, each in both orders, without writing them.

The backward of a gated MLP computes the gradients E of gate and of up from the same three matrices: the gradient of their
product, gate and up. If they are written first, they cost nine passes over a matrix: three reads and two writes to compute
them, and two reads of each to quantise, because the scale of a column depends on all tokens. Here both passes compute both
gradients from the three matrices, in six reads. :mod:`halo_tensor.compiler.producers` makes the function.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.device import PRODUCER_INPUTS
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.quantize.codes import code_matrix, dense, format_options
from halo_tensor.kernels.quantize.fast_math import reciprocal
from halo_tensor.kernels.quantize.kernels import load_vector, scale_of, write_scale
from halo_tensor.kernels.quantize.plan import quantize_pair
from halo_tensor.kernels.quantize.rounding import FOLD_LIFT, maximum, round_to_code, unlifted
from halo_tensor.recipe import Format
from halo_tensor.reference.codes import aligned

#: A kernel -> rows and columns of a tile, tiles per program, stages, warps. Measured on one H100: docs/notes/quantisers.md.
TILES = {"amax_of_two": (16, 128, 8, 2, 2), "cast_two": (32, 64, 4, 2, 4)}


@triton.jit
def _raise(amax, index, count, most):
    """Raise stored magnitudes to at least ``most``. As int32, the bits of non-negative floats have the order of the floats."""
    tl.atomic_max(amax + index, most.to(tl.int32, bitcast=True), mask=index < count, sem="relaxed")


@triton.jit
def _inside(rows, columns, M, K, EVEN: tl.constexpr):
    """Return the mask of a tile. EVEN: whether all tiles are whole, so that loads and stores need no mask."""
    if EVEN:
        return tl.full((rows.shape[0], columns.shape[0]), True, tl.int1)
    return (rows < M)[:, None] & (columns < K)[None, :]


@triton.jit
def amax_of_two(
    x0, x1, x2, fold_rows_a, fold_rows_b, fold_columns_a, fold_columns_b, amax, M, K,
    T: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    PRODUCER: tl.constexpr,
):  # fmt: skip
    """Find the largest magnitudes of a and b [M, K], which PRODUCER computes from x0, x1 and x2.

    amax: zeroed int32 [2 (M + K)], which gets float bits: M for the rows of a diag(fold_columns_a), K for the columns of
    diag(fold_rows_a) a, and the same for b. A program takes STEPS times T rows by WIDTH columns.
    """
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    by_column_a = (load_vector(fold_columns_a, columns, K) * FOLD_LIFT)[None, :]
    by_column_b = (load_vector(fold_columns_b, columns, K) * FOLD_LIFT)[None, :]
    amax_b = amax + M + K
    most_a = tl.zeros((T, WIDTH), tl.float32)
    most_b = tl.zeros((T, WIDTH), tl.float32)
    for i in tl.range(0, STEPS, num_stages=STAGES):
        rows = (tl.program_id(0) * STEPS + i) * T + tl.arange(0, T)
        inside = _inside(rows, columns, M, K, EVEN)
        a, b = PRODUCER(x0, x1, x2, rows.to(tl.int64)[:, None], columns[None, :], inside)
        a, b = a.to(tl.float32), b.to(tl.float32)
        most_a = maximum(most_a, tl.abs(a * (load_vector(fold_rows_a, rows, M) * FOLD_LIFT)[:, None]))
        most_b = maximum(most_b, tl.abs(b * (load_vector(fold_rows_b, rows, M) * FOLD_LIFT)[:, None]))
        _raise(amax, rows, M, tl.reduce(tl.abs(a * by_column_a), 1, maximum))
        _raise(amax_b, rows, M, tl.reduce(tl.abs(b * by_column_b), 1, maximum))
    _raise(amax + M, columns, K, tl.reduce(most_a, 0, maximum))
    _raise(amax_b + M, columns, K, tl.reduce(most_b, 0, maximum))


@triton.jit
def _inverse(amax, scales, index, count, other_tile, INVERSE_MAX: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """Return 1 / lifted scale of WIDTH rows or columns. The program of their first tile stores the scale."""
    scale = scale_of(amax, index, count, INVERSE_MAX, 2, WIDTH)
    write_scale(scales, unlifted(scale, STEP, True), index, count, other_tile, 2)
    return reciprocal(scale)


@triton.jit
def _cast(
    x, inside, fold_rows, by_column, inverse, amax, codes, codes_t, scales, rows, columns, tile_column, M,
    stride_codes, stride_codes_t, T: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr, INVERSE_MAX: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Store the codes of one tile of a or b, and their transpose."""
    y = x.to(tl.float32) * by_column * _inverse(amax, scales, rows, M, tile_column, INVERSE_MAX, STEP, T)[:, None]
    q = round_to_code(y, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
    tl.store(codes + rows.to(tl.int64)[:, None] * stride_codes + columns[None, :], q, mask=inside)
    y = x.to(tl.float32) * (load_vector(fold_rows, rows, M) * FOLD_LIFT)[:, None] * inverse
    q = round_to_code(y, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
    target = codes_t + columns.to(tl.int64)[:, None] * stride_codes_t + rows[None, :]
    tl.store(target, tl.trans(q), mask=tl.trans(inside))


@triton.jit
def cast_two(
    x0, x1, x2, fold_rows_a, fold_rows_b, fold_columns_a, fold_columns_b, amax,
    codes_a, codes_t_a, row_scales_a, column_scales_a, codes_b, codes_t_b, row_scales_b, column_scales_b,
    M, K, stride_codes, stride_codes_t,
    T: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    PRODUCER: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr, INVERSE_MAX: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Store codes [M, K], transposed codes [K, M] and scales of both matrices, from the magnitudes and on the tiles of
    :func:`amax_of_two`."""
    # In reverse order, because amax_of_two has left the last tiles in L2.
    tile_row, tile_column = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    columns = tile_column * WIDTH + tl.arange(0, WIDTH)
    by_column_a = (load_vector(fold_columns_a, columns, K) * FOLD_LIFT)[None, :]
    by_column_b = (load_vector(fold_columns_b, columns, K) * FOLD_LIFT)[None, :]
    amax_b = amax + M + K
    inverse_a = _inverse(amax + M, column_scales_a, columns, K, tile_row, INVERSE_MAX, STEP, WIDTH)[None, :]
    inverse_b = _inverse(amax_b + M, column_scales_b, columns, K, tile_row, INVERSE_MAX, STEP, WIDTH)[None, :]
    for i in tl.range(0, STEPS, num_stages=STAGES):
        rows = (tile_row * STEPS + i) * T + tl.arange(0, T)
        inside = _inside(rows, columns, M, K, EVEN)
        a, b = PRODUCER(x0, x1, x2, rows.to(tl.int64)[:, None], columns[None, :], inside)
        _cast(
            a, inside, fold_rows_a, by_column_a, inverse_a, amax, codes_a, codes_t_a, row_scales_a, rows, columns,
            tile_column, M, stride_codes, stride_codes_t, T, CODE, MANTISSA, MIN_EXPONENT, MAX, INVERSE_MAX, STEP,
        )  # fmt: skip
        _cast(
            b, inside, fold_rows_b, by_column_b, inverse_b, amax_b, codes_b, codes_t_b, row_scales_b, rows, columns,
            tile_column, M, stride_codes, stride_codes_t, T, CODE, MANTISSA, MIN_EXPONENT, MAX, INVERSE_MAX, STEP,
        )  # fmt: skip


def quantize_pairs(
    a: torch.Tensor,
    b: torch.Tensor,
    format: Format,
    columns_a: torch.Tensor,
    rows_a: torch.Tensor,
    columns_b: torch.Tensor,
    rows_b: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return :func:`~halo_tensor.kernels.quantize.plan.quantize_pair` of a [m, k] and of b [m, k], without a rotation.

    Args:
        columns_a, rows_a, columns_b, rows_b: float32 [k] and [m], the folds of columns and of rows of a and of b.
    """
    # In a compiled graph, the stand-in for a may have the producer of both.
    function, inputs = getattr(a, "producer", None) or (None, [])
    if function is None or 0 in a.shape:
        return (*quantize_pair(a, None, format, columns_a, rows_a), *quantize_pair(b, None, format, columns_b, rows_b))
    m, k = a.shape
    amax_pass, cast_pass = plan_pairs(format, a.device, function)
    amax = a.new_zeros(2 * (m + k), dtype=torch.int32)
    inputs = [*inputs, *[amax] * (PRODUCER_INPUTS - len(inputs))]  # any pointer for a tensor that is not given
    operands = [*inputs, *map(dense, (rows_a, rows_b, columns_a, columns_b)), amax]
    amax_pass((m, k), *operands)
    made_of_a, made_of_b = (
        (
            code_matrix(x, m, k, format),
            code_matrix(x, k, m, format),
            x.new_empty(m, dtype=torch.float32),
            x.new_empty(k, dtype=torch.float32),
        )
        for x in (a, b)
    )
    cast_pass((m, k, aligned(k), aligned(m)), *operands, *made_of_a, *made_of_b)
    return (*made_of_a, *made_of_b)


@lru_cache(maxsize=4096)
def plan_pairs(format: Format, device: torch.device, producer: Any) -> tuple[Planned, Planned]:
    """Return the launches of both passes.

    A call takes the numbers, (m, k) in the first pass and (m, k, row strides of codes and codes_t) in the second, and then the
    tensors of its kernel.

    Args:
        producer: a Triton function that computes both matrices from the tensors of PRODUCER_INPUTS.
    """
    options = format_options(format, device)
    return (
        _tiled(amax_of_two, producer, {"enable_fp_fusion": options["enable_fp_fusion"]}),
        _tiled(cast_two, producer, options),
    )


def _tiled(kernel: Any, producer: Any, options: dict[str, Any]) -> Planned:
    """Return the launches of one pass."""
    height, width, steps, stages, warps = TILES[kernel.fn.__name__]

    def are_whole(m: int, k: int, *strides: int) -> bool:
        """Return the class of sizes: whether no tile reaches past the matrix."""
        return m % (height * steps) == 0 and k % width == 0

    def sizes(m: int, k: int, *strides: int) -> tuple:
        return (cdiv(m, height * steps), cdiv(k, width)), (m, k, *strides)

    def prepare(even: bool) -> Variant:
        constants = {
            "T": height, "WIDTH": width, "STEPS": steps, "STAGES": stages, "EVEN": even, "PRODUCER": producer,
            "num_warps": warps,
        }  # fmt: skip
        return Variant(Launch(kernel, constants | options), sizes)

    return Planned(prepare, are_whole)
