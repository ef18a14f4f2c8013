"""The end of a tile of a grouped product in Gluon for SM 9.0: undoing a rotation of columns, and storing."""

from functools import lru_cache

import torch

from halo_tensor.fences.gluon import gl, gluon, warpgroup_mma, warpgroup_mma_wait
from halo_tensor.kernels.matmul.sm90 import EDGE, _in_order, _order, _rows_of_eight
from halo_tensor.recipe import Rotation
from halo_tensor.reference.hadamard import block_diagonal

#: Columns that one product of a halved un-rotation computes.
HALF = EDGE // 2


@gluon.jit
def store(
    out, y, gain, bias, weight, place, first_column, GAIN: gl.constexpr, BIASED: gl.constexpr, WEIGHTED: gl.constexpr
):  # fmt: skip
    """Store y [rows, …] to ``out`` [·, N], from column first_column on.

    place: the expert, the row of ``out``, the first row and the end of those that exist, N, and 0 to store zeros.
    """
    expert, at_row, first, end, N, valid = place
    ROWS: gl.constexpr = y.shape[0]
    WIDTH: gl.constexpr = y.shape[1]
    columns = first_column + gl.arange(0, WIDTH, gl.SliceLayout(0, y.type.layout))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))
    if GAIN:
        y = y * gl.load(gain + columns, mask=columns < N, other=0.0)[None, :]
    if BIASED:
        of_expert = bias + gl.maximum(expert, 0).to(gl.int64) * N
        y = y + gl.load(of_expert + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
    if WEIGHTED:
        y = y * gl.load(weight + at_row + row, mask=first + row < end, other=0.0)[:, None]
    y = gl.where(valid > 0, y, 0.0)
    stored: gl.constexpr = _rows_of_eight(ROWS, WIDTH, gl.num_warps())
    y = gl.convert_layout(y.to(out.dtype.element_ty), stored)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, stored))
    columns = first_column + gl.arange(0, WIDTH, gl.SliceLayout(0, stored))
    inside = (first + rows < end)[:, None] & (columns < N)[None, :]
    gl.store(out + (at_row + rows.to(gl.int64))[:, None] * N + columns[None, :], y, mask=inside)


@gluon.jit
def split_columns(y):
    """Return both halves of the columns of y."""
    HALVES: gl.constexpr = y.shape[1] // 2
    return gl.split(y.reshape([y.shape[0], 2, HALVES]).permute([0, 2, 1]))


@gluon.jit
def start_to_undo(y, h):
    """Start to multiply y with h, and return what will be the product."""
    WIDTH: gl.constexpr = y.shape[1]
    unrotated: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    y = gl.convert_layout(y.to(gl.bfloat16), gl.DotOperandLayout(0, unrotated, 2), assert_trivial=True)
    return warpgroup_mma(y, h, gl.zeros([y.shape[0], WIDTH], gl.float32, unrotated), use_acc=False, is_async=True)


@gluon.jit
def undo_by_halves(
    out, y, h0, h1, gain, bias, weight, place, first_column,
    HALVED: gl.constexpr, GAIN: gl.constexpr, BIASED: gl.constexpr, WEIGHTED: gl.constexpr,
):  # fmt: skip
    """Undo the rotation of y [·, 128] by the matrices of :func:`halves`, and store it.

    HALVED: the rotation has blocks of 128 columns, so that a sum and a difference of halves come first.
    """
    WIDTH: gl.constexpr = y.shape[1] // 2
    y0, y1 = split_columns(y)
    if HALVED:
        y0, y1 = y0 + y1, y0 - y1
    y0 = warpgroup_mma_wait(0, deps=(start_to_undo(y0, h0),))
    store(out, _in_order(y0), gain, bias, weight, place, first_column, GAIN, BIASED, WEIGHTED)
    y1 = warpgroup_mma_wait(0, deps=(start_to_undo(y1, h1),))
    store(out, _in_order(y1), gain, bias, weight, place, first_column + WIDTH, GAIN, BIASED, WEIGHTED)


@lru_cache(maxsize=256)
def halves(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """Return what undoes a rotation of 128 columns by two products of 64, bfloat16 [128, 64]: two matrices.

    H₁₂₈ = H₂ ⊗ H₆₄, so with halves of columns y₀ and y₁, (y₀ + y₁) is multiplied with the first rows of the first half of the
    matrix, and (y₀ − y₁) with those of its second half. Smaller blocks undo each half by itself. This takes half of the
    operations of one product of 128. Columns are in the order of halo_tensor/kernels/matmul/sm90.py.
    """
    matrix = block_diagonal(rotation, EDGE, torch.bfloat16, device, transposed=True)
    rows = matrix[:HALF] if rotation.edge == EDGE else matrix[HALF:]
    order = _order()[:HALF].to(device)
    return torch.cat([matrix[:HALF, order], rows[:, HALF:][:, order]])
