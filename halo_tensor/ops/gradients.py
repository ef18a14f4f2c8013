"""Quantise the gradient of a layer's output for both products of backward.

``quantize_pair`` does it for one gradient, and ``quantize_pairs`` for two at once; ``quantize_both`` for one whose operands
have different rotations and formats.
"""

import torch
from torch import Tensor

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.quantizers import empty_codes, empty_transpose, flattened
from halo_tensor.ops.register import fake, op
from halo_tensor.recipe import Format, Rotation, Scales
from halo_tensor.reference import ops as reference
from halo_tensor.reference.noise import uniform


@op("quantize_pair")
def quantize_pair(
    x: Tensor,
    row_rotation: Rotation | None,
    format: Format,
    fold_columns: Tensor | None,
    fold_rows: Tensor | None,
    flat: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise a matrix twice, with scales per row and with scales per column. A kernel reads it twice instead of four times.

    Args:
        x: matrix [r, c].
        row_rotation: rotation of its first dimension for the first operand; r' is the size afterwards.
        format: number format of the codes.
        fold_columns, fold_rows: float32 [c] and [r], which multiply the first operand's columns and the second one's rows.
        flat: whether to return the transposed codes as their memory: see :func:`halo_tensor.ops.quantizers.lies_flat`.

    Returns:
        Codes [r', c] of Rᵀ_row x diag(fold_columns), transposed codes [c, r] of diag(fold_rows) x, and their float32 scales
        [r'] and [c].
    """
    if runs_kernels(x.device):
        from halo_tensor.kernels.quantize import plan

        codes, codes_t, row_scales, column_scales = plan.quantize_pair(x, row_rotation, format, fold_columns, fold_rows)
        return codes, flattened(codes_t) if flat else codes_t, row_scales, column_scales
    return _pair(x, row_rotation, format, fold_columns, fold_rows, flat)


def _pair(
    x: Tensor,
    row_rotation: Rotation | None,
    format: Format,
    fold_columns: Tensor | None,
    fold_rows: Tensor | None,
    flat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, row_scales = reference.rotate_quantize(x, row_rotation, None, format, "row", None, fold_columns)
    codes_of_columns, column_scales = reference.rotate_quantize(x, None, None, format, "column", fold_rows, None)
    codes_t = codes_of_columns.contiguous().t()
    return codes.contiguous(), flattened(codes_t) if flat else codes_t, row_scales, column_scales


@fake("quantize_pair")
def _empty_pair(x: Tensor, row_rotation: Rotation | None, format: Format, flat: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (r, c), r_padded = x.shape, reference.rotated(x.shape[0], row_rotation)
    return (
        empty_codes(x, r_padded, c, format),
        empty_transpose(x, c, r, format, flat),
        x.new_empty([r_padded], dtype=torch.float32),
        x.new_empty([c], dtype=torch.float32),
    )


@op("quantize_pairs")
def quantize_pairs(
    a: Tensor,
    b: Tensor,
    format: Format,
    columns_a: Tensor,
    rows_a: Tensor,
    columns_b: Tensor,
    rows_b: Tensor,
    flat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do :func:`quantize_pair` for two matrices of one shape, without a rotation. Only a pass over compiled graphs calls it.

    Args:
        a, b: matrices [r, c].
        format: number format of the codes.
        columns_a, rows_a, columns_b, rows_b: ``fold_columns`` and ``fold_rows`` of a and of b.
        flat: as of :func:`quantize_pair`.

    Returns:
        The four results of a, and the four of b.
    """
    if runs_kernels(a.device):
        from halo_tensor.kernels.quantize import two_gradients

        made = two_gradients.quantize_pairs(a, b, format, columns_a, rows_a, columns_b, rows_b)
        return tuple(flattened(x) if flat and i in (1, 5) else x for i, x in enumerate(made))  # type: ignore[return-value]
    return *_pair(a, None, format, columns_a, rows_a, flat), *_pair(b, None, format, columns_b, rows_b, flat)


@fake("quantize_pairs")
def _(a: Tensor, b: Tensor, format: Format, flat: bool) -> tuple[Tensor, ...]:
    return (*_empty_pair(a, None, format, flat), *_empty_pair(b, None, format, flat))


@op("quantize_both")
def quantize_both(
    x: Tensor,
    column_rotation: Rotation | None,
    format: Format,
    granularity: Scales,
    row_rotation: Rotation | None,
    format_t: Format,
    granularity_t: Scales,
    seed: Tensor | None,
    flat: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise a matrix for two products, one of which rotates its columns and the other its rows. Kernels read it twice.

    Args:
        x: matrix [r, c].
        column_rotation, format: of the first operand; c' is the size of its columns afterwards.
        granularity: of the first operand, ROW or TENSOR.
        row_rotation, format_t: of the second operand; r' is the size of its rows afterwards.
        granularity_t: of the second operand, COLUMN or TENSOR.
        seed: int64 [1], with which the first operand is rounded stochastically (:mod:`halo_tensor.reference.noise`); None to
            round it to nearest.
        flat: as of :func:`quantize_pair`.

    Returns:
        Codes [r, c'] of x R_column, transposed codes [c, r'] of Rᵀ_row x, and their float32 scales.
    """
    if runs_kernels(x.device):
        from halo_tensor.kernels.quantize import plan

        codes, codes_t, scales, scales_t = plan.quantize_both(
            x, column_rotation, format, granularity.name, row_rotation, format_t, granularity_t.name, seed
        )
        return codes, flattened(codes_t) if flat else codes_t, scales, scales_t
    noise = None if seed is None else uniform(seed, x.shape[0], reference.rotated(x.shape[1], column_rotation))
    codes, scales = reference.rotate_quantize(x, None, column_rotation, format, granularity, noise=noise)
    codes_of_rows, scales_t = reference.rotate_quantize(x, row_rotation, None, format_t, granularity_t)
    codes_t = codes_of_rows.contiguous().t()
    return codes.contiguous(), flattened(codes_t) if flat else codes_t, scales, scales_t


@fake("quantize_both")
def _(
    x: Tensor,
    column_rotation: Rotation | None,
    format: Format,
    granularity: Scales,
    row_rotation: Rotation | None,
    format_t: Format,
    granularity_t: Scales,
    flat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (r, c) = x.shape
    r_out, c_out = reference.rotated(r, row_rotation), reference.rotated(c, column_rotation)
    return (
        empty_codes(x, r, c_out, format),
        empty_transpose(x, c, r_out, format_t, flat),
        x.new_empty(granularity.shape(r, c_out), dtype=torch.float32),
        x.new_empty(granularity_t.shape(r_out, c), dtype=torch.float32),
    )
