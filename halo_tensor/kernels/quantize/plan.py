"""Rotate and quantise matrices: the choice of the kernels that serve a request.

Two families of launches serve it: :mod:`~halo_tensor.kernels.quantize.whole_rows`, where a program holds whole rows, and
:mod:`~halo_tensor.kernels.quantize.tiles`, which read a matrix twice. What neither can do on the way is done in a pass before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from halo_tensor.kernels.quantize.codes import dense
from halo_tensor.kernels.quantize.tiles import quantize_tiles, tile_quantizer
from halo_tensor.kernels.quantize.two_operands import Side, fits, operands_quantizer
from halo_tensor.kernels.quantize.whole_rows import LARGEST_ROW, holds_row, quantize_rows
from halo_tensor.kernels.rotate import TILE, Matrix, fits_tiles, rotate, transposed, whole_blocks
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.hadamard import factors


def rotate_quantize(
    x: torch.Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: str,
    fold_rows: torch.Tensor | None,
    fold_columns: torch.Tensor | None,
    rows: bool,
    columns: bool,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
    seed: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Return codes, transposed codes and scales, as :func:`halo_tensor.ops.rotate_quantize` does.

    Args:
        granularity: "row", "column", "tensor" or "unit".
        rows, columns: whether to make codes, and whether to make transposed codes.
        into: the codes and scales that an earlier call returned, with ``rows`` or ``columns`` only. They are overwritten.
        seed: int64 [1], with which codes are rounded stochastically; None rounds to nearest.
        gain: float32 powers of two. A product with other numbers would be rounded to the dtype of x before the rotation.
    """
    fold_rows, fold_columns, gain = dense(fold_rows), dense(fold_columns), dense(gain)
    if x.dtype == torch.float64:
        x = x.to(torch.float32)
    plain = all(t is None for t in (fold_rows, fold_columns, gain, seed))
    if plain and columns and not rows and column_rotation is None:
        quantize = columns_quantizer(x.dtype, x.device, row_rotation, format, granularity)
        if quantize is not None:
            return None, *quantize(x, into)
    if gain is not None and x.dtype == torch.float16:
        x, gain = x * gain, None  # in float32, since the result may be outside of float16's range
    # Kernels fold along rows where scales lie along columns, and the other way round.
    folds_in_kernel = reference.folds_across(granularity, fold_rows, fold_columns)
    task = Task(x, row_rotation, column_rotation, granularity, seed is not None)
    by_transpose = folds_in_kernel and _rotates_transpose(task, rows)
    rotates_first = not folds_in_kernel or (not by_transpose and task.needs_rotation_first())
    if gain is not None and (rotates_first or not task.applies_gain()):
        x, gain = (x * gain).to(x.dtype), None
    if rotates_first:
        x, row_rotation, column_rotation = rotate(x, row_rotation, column_rotation, torch.float32), None, None
    if not folds_in_kernel:
        x = x if fold_rows is None else x * fold_rows.unsqueeze(1)
        x = x if fold_columns is None else x * fold_columns
        fold_rows = fold_columns = None
    task = Task(x, row_rotation, column_rotation, granularity, seed is not None)
    if task.takes_whole_rows():
        x, gain = whole_blocks(x, column_rotation), gain if gain is None else whole_blocks(gain, column_rotation)
        codes, scales = quantize_rows(x, column_rotation, format, gain, fold_columns, into if rows else None)
        if into is not None and not rows:
            return None, *_overwritten(into, transposed(codes), scales)
        return codes if rows else None, transposed(codes) if columns else None, scales
    made = _quantize_by_tiles(task, format, fold_rows, fold_columns, rows, columns, seed, by_transpose)
    if into is not None:
        new = made[0] if rows else made[1]
        assert new is not None
        _overwritten(into, new, made[2])
    return made


def _overwritten(
    into: tuple[torch.Tensor, torch.Tensor], codes: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy codes and scales to those of an earlier call, and return these."""
    into[0].copy_(codes)
    into[1].copy_(scales)
    return into


def quantize_pair(
    x: torch.Tensor,
    row_rotation: Rotation | None,
    format: Format,
    fold_columns: torch.Tensor | None,
    fold_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes of Rᵀ_row x diag(fold_columns) with a scale per row, and transposed codes of diag(fold_rows) x with a scale
    per column, in two reads of x.

    Returns:
        Codes, transposed codes, the scales of rows, the scales of columns.
    """
    fold_rows, fold_columns = dense(fold_rows), dense(fold_columns)
    if _rotates_pair_on_tiles(x, row_rotation):
        codes, codes_t, row_scales, column_scales = quantize_tiles(
            x, row_rotation, None, format, "row", "column", fold_columns, fold_rows, True, True
        )
    else:
        codes, _, row_scales = rotate_quantize(x, row_rotation, None, format, "row", None, fold_columns, True, False)
        _, codes_t, column_scales = rotate_quantize(x, None, None, format, "column", fold_rows, None, False, True)
    assert codes is not None and codes_t is not None
    return codes, codes_t, row_scales, column_scales


def quantize_both(
    x: torch.Tensor,
    column_rotation: Rotation | None,
    format: Format,
    granularity: str,
    row_rotation: Rotation | None,
    format_t: Format,
    granularity_t: str,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes of x R_column, transposed codes of Rᵀ_row x, and the scales of both, in two reads of x if tiles hold whole
    blocks.

    Args:
        granularity, granularity_t: "row" or "tensor" of the first operand, "column" or "tensor" of the second.
        seed: int64 [1], with which the first operand is rounded stochastically; None rounds it to nearest.
    """
    if x.dtype == torch.float64:
        x = x.to(torch.float32)
    how = column_rotation, format, granularity, row_rotation, format_t, granularity_t
    return both_quantizer(x.dtype, x.device, *how, seed is not None)(x, seed)


def both_quantizer(
    dtype: torch.dtype,
    device: torch.device,
    column_rotation: Rotation | None,
    format: Format,
    granularity: str,
    row_rotation: Rotation | None,
    format_t: Format,
    granularity_t: str,
    noisy: bool,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return :func:`quantize_both` for matrices of ``dtype``, as a function of (x, seed).

    Args:
        noisy: whether a seed is given.
    """
    first = Side(column_rotation, format, granularity == "row", noisy)
    second = Side(row_rotation, format_t, granularity_t == "column")
    if dtype != torch.float64 and fits(_like(dtype, device), first, second):
        return operands_quantizer(dtype, device, first, second)

    def one_by_one(x: torch.Tensor, seed: torch.Tensor | None) -> tuple:
        codes, _, scales = rotate_quantize(x, None, column_rotation, format, granularity, None, None, True, False, seed=seed)
        _, codes_t, scales_t = rotate_quantize(x, row_rotation, None, format_t, granularity_t, None, None, False, True)
        return codes, codes_t, scales, scales_t

    return one_by_one


def columns_quantizer(
    dtype: torch.dtype, device: torch.device, row_rotation: Rotation | None, format: Format, granularity: str
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Return a function of (x, into) that returns the transposed codes and the scales of Rᵀ_row x for matrices of ``dtype``,
    rounded to nearest, by two launches; None if other launches make them. ``into``: see :func:`rotate_quantize`."""
    second = Side(row_rotation, format, granularity == "column")
    known = row_rotation is not None and granularity in ("column", "tensor") and dtype != torch.float64
    if not known or not fits(_like(dtype, device), None, second):
        return None
    quantize = operands_quantizer(dtype, device, None, second)

    def columns(x: torch.Tensor, into: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        _, codes_t, _, scales = quantize(x, None, into)
        return codes_t, scales

    return columns


def _like(dtype: torch.dtype, device: torch.device) -> Matrix:
    """Return what stands for any matrix of ``dtype``."""
    return Matrix(torch.Size((1, 1)), (1, 1), dtype, device)


def pair_quantizer(
    dtype: torch.dtype,
    device: torch.device,
    row_rotation: Rotation | None,
    format: Format,
    folds_columns: bool,
    folds_rows: bool,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return :func:`quantize_pair` for matrices of ``dtype``, as a function of (x, fold_columns, fold_rows).

    Args:
        folds_columns, folds_rows: whether the folds are given.
    """
    if dtype == torch.float64 or not _rotates_pair_on_tiles(_like(dtype, device), row_rotation):
        return lambda x, *folds: quantize_pair(x, row_rotation, format, *folds)
    return tile_quantizer(dtype, device, row_rotation, None, format, "row", "column", folds_columns, folds_rows, True, True, 0)


def _rotates_pair_on_tiles(x: torch.Tensor | Matrix, row_rotation: Rotation | None) -> bool:
    """Whether the passes over tiles rotate the first operand of a pair themselves."""
    return row_rotation is None or (row_rotation.rank is None and fits_tiles(x, row_rotation, None))


def is_one_launch(k: int, dtype: torch.dtype, device: torch.device, column_rotation: Rotation | None, gained: bool) -> bool:
    """Whether one launch rotates and quantises rows of ``k`` numbers, each with a scale, without a pass or a copy before.

    Args:
        gained: whether a gain multiplies the columns.
    """
    task = Task(Matrix(torch.Size((1, k)), (k, 1), dtype, device), None, column_rotation, "row", False)
    if dtype == torch.float64 or not task.takes_whole_rows() or task.needs_rotation_first():
        return False
    return reference.padded(k, column_rotation) == k and (not gained or (dtype != torch.float16 and task.applies_gain()))


class Task(NamedTuple):
    """A matrix to rotate and quantise, as far as the choice of a kernel depends on it.

    Attributes:
        x: the matrix, or its shape, strides, dtype and device.
        row_rotation, column_rotation: its rotations.
        granularity: "row", "column", "tensor" or "unit".
        noisy: whether codes are rounded stochastically.
    """

    x: torch.Tensor | Matrix
    row_rotation: Rotation | None
    column_rotation: Rotation | None
    granularity: str
    noisy: bool

    def takes_whole_rows(self) -> bool:
        """Whether a program holds whole rows, so that x is read once."""
        if self.granularity != "row" or self.row_rotation is not None or self.noisy:
            return False
        low_rank = self.column_rotation is not None and self.column_rotation.rank is not None
        return not low_rank and holds_row(self.x, self.column_rotation)

    def applies_gain(self) -> bool:
        """Whether the kernel has room to multiply the gain in as it reads x, unlike beside a wide row with wide blocks."""
        rotation = self.column_rotation
        fits = rotation is None or rotation.edge <= TILE or reference.padded(self.x.shape[1], rotation) <= LARGEST_ROW // 2
        return fits and self.takes_whole_rows() and holds_row(self.x, rotation, gained=True)

    def needs_rotation_first(self) -> bool:
        """Whether no kernel rotates on the way: blocks wider than a tile, or scales that only unrotated tiles support."""
        rows, columns = self.row_rotation, self.column_rotation
        if rows is None and columns is None:
            return False
        if columns is not None and self.takes_whole_rows():
            pair = factors(columns.edge)
            whole = reference.padded(self.x.shape[1], columns)
            return pair is None or (pair[0] > 1 and (pair[1] < 16 or pair[0] > TILE or columns.edge != whole))
        low_rank = rows is not None and rows.rank is not None
        both = rows is not None and columns is not None  # the second product is of float32: no room for another tile
        return low_rank or both or self.granularity == "column" or not fits_tiles(self.x, rows, columns)


def _rotates_transpose(task: Task, rows: bool) -> bool:
    """Whether to rotate the columns of the transpose instead of the rows of x.

    There tiles support low ranks and scales along the rotated dimension, and codes that are wanted transposed need no pass of
    their own.
    """
    rotation = task.row_rotation
    if rotation is None or task.column_rotation is not None or task.granularity == "row":
        return False
    return fits_tiles(task.x, rotation, None) and (rotation.rank is not None or task.granularity == "column" or not rows)


def _quantize_by_tiles(
    task: Task,
    format: Format,
    fold_rows: torch.Tensor | None,
    fold_columns: torch.Tensor | None,
    rows: bool,
    columns: bool,
    seed: torch.Tensor | None,
    by_transpose: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Return what :func:`rotate_quantize` returns, by two passes over tiles and a transposition.

    Tiles give codes in one order, and their transpose is made from these (see :mod:`halo_tensor.kernels.quantize.kernels`).

    Args:
        by_transpose: whether to rotate the columns of the transpose, see :func:`_rotates_transpose`.
    """
    row_rotation, column_rotation, granularity = task.row_rotation, task.column_rotation, task.granularity
    x: Any = task.x  # a tensor, or what stands for one while a graph is compiled
    codes: torch.Tensor | None
    codes_t: torch.Tensor | None
    if by_transpose:
        granularity = "row" if granularity == "column" else granularity
        codes_t, _, scales, _ = quantize_tiles(
            x.t(), None, row_rotation, format, granularity, None, fold_rows, None, True, False, seed, True
        )
    elif row_rotation or column_rotation or granularity == "row" or (rows and granularity != "column"):
        codes, _, scales, _ = quantize_tiles(
            x, row_rotation, column_rotation, format, granularity, None, fold_columns, fold_rows, True, False, seed
        )
        assert codes is not None
        return codes if rows else None, transposed(codes) if columns else None, scales
    else:
        _, codes_t, _, scales = quantize_tiles(
            x, None, None, format, None, granularity, fold_columns, fold_rows, False, True, seed
        )
    assert codes_t is not None
    return transposed(codes_t) if rows else None, codes_t if columns else None, scales
