"""The epilogue of the Triton kernels of products: scale the accumulator, undo rotations, add a bias, and store the result."""

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.matmul.request import Request
from halo_tensor.kernels.quantize.kernels import load_square
from halo_tensor.reference.hadamard import block_diagonal

#: How many columns of an output tile one rotation matrix undoes.
EDGE = 128
UNDO_EDGE = tl.constexpr(EDGE)


def matrices(request: Request, height: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the matrices that undo a product's rotations on tiles of ``height`` rows: [height, height] for rows, and
    [EDGE, EDGE] for columns; None where there is no rotation."""
    row_rotation, column_rotation, device = request.row_rotation, request.column_rotation, request.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # Triton's interpreter has no 16-bit products
    return (
        block_diagonal(row_rotation, height, dtype, device, transposed=False) if row_rotation else None,
        block_diagonal(column_rotation, EDGE, dtype, device, transposed=True) if column_rotation else None,
    )


@triton.jit
def finish(
    acc, out, a_scale, b_scale, gain, bias, left, right, tile_m, tile_n,
    M, N, ROWS_OUT, stride,
    A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, GAIN: tl.constexpr, BIASED: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, NORM: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store one tile of R_left (diag(a_scale) acc diag(b_scale)) Rᵀ_right diag(gain) + bias.

    A_SCALE, B_SCALE: 0 for none, 1 for one number, 2 for a vector.
    LEFT, RIGHT: whether left [BM, BM] and right [128, 128] undo a rotation of rows and of columns. NORM: the factor that these
    products need.
    PART: how many columns are un-rotated and stored at a time, at most 128 with RIGHT. If the accumulator is in registers, 128
    un-rotated columns beside it spill.
    """
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    rows = tile_m * BM + tl.arange(0, BM)
    first = tile_n * BN
    y = acc.to(tl.float32)
    SHIFT: tl.constexpr = 128.0 if B_SCALE == 2 and A_SCALE > 0 else 1.0  # see reference.ops.SHIFT
    if B_SCALE == 2:
        columns = first + tl.arange(0, BN)
        y = y * (tl.load(b_scale + columns, mask=columns < N, other=0.0) * (1.0 / SHIFT))[None, :]
    row_scale = tl.full((BM,), 1.0, tl.float32)
    if A_SCALE == 2:
        row_scale = tl.load(a_scale + rows, mask=rows < M, other=0.0) * SHIFT
    if A_SCALE == 1:
        row_scale = row_scale * (tl.load(a_scale) * SHIFT)
    if B_SCALE == 1:
        row_scale = row_scale * tl.load(b_scale)
    if LEFT or RIGHT:
        row_scale = row_scale * NORM
    SCALED: tl.constexpr = A_SCALE > 0 or B_SCALE == 1 or LEFT or RIGHT
    h_left = load_square(left, BM) if LEFT else left
    if RIGHT and PART < UNDO_EDGE:
        tl.static_assert(BN == UNDO_EDGE, "only one rotation matrix wide")
        depth = tl.arange(0, UNDO_EDGE)
        for i in tl.static_range(UNDO_EDGE // PART):
            part = i * PART + tl.arange(0, PART)
            h = tl.load(right + depth[:, None] * UNDO_EDGE + part[None, :])
            _store(
                out, y, row_scale, gain, bias, h_left, h, rows, first + part, ROWS_OUT, N, stride,
                SCALED, GAIN, BIASED, LEFT, RIGHT,
            )  # fmt: skip
        return
    h_right = load_square(right, UNDO_EDGE) if RIGHT else right
    if PART < BN and BN == 2 * UNDO_EDGE:
        y0, y1 = tl.split(tl.permute(tl.reshape(y, (BM, 2, UNDO_EDGE)), (0, 2, 1)))
        columns = first + tl.arange(0, UNDO_EDGE)
        _store(
            out, y0, row_scale, gain, bias, h_left, h_right, rows, columns, ROWS_OUT, N, stride,
            SCALED, GAIN, BIASED, LEFT, RIGHT,
        )  # fmt: skip
        columns += UNDO_EDGE
        _store(
            out, y1, row_scale, gain, bias, h_left, h_right, rows, columns, ROWS_OUT, N, stride,
            SCALED, GAIN, BIASED, LEFT, RIGHT,
        )  # fmt: skip
    else:
        columns = first + tl.arange(0, BN)
        _store(
            out, y, row_scale, gain, bias, h_left, h_right, rows, columns, ROWS_OUT, N, stride,
            SCALED, GAIN, BIASED, LEFT, RIGHT,
        )  # fmt: skip


@triton.jit
def _store(
    out, y, row_scale, gain, bias, h_left, h_right, rows, columns, ROWS_OUT, N, stride,
    SCALED: tl.constexpr, GAIN: tl.constexpr, BIASED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Un-rotate some columns, and store them."""
    # Products of bf16 and powers of two are exact. So an un-rotation rounds once, y to bf16, by as little as the result is
    # rounded anyway.
    if RIGHT:
        y = tl.dot(y.to(h_right.dtype), h_right, out_dtype=tl.float32)
    if SCALED:
        y = y * row_scale[:, None]
    if LEFT:
        y = tl.dot(h_left, y.to(h_left.dtype), out_dtype=tl.float32)
    if GAIN:
        y = y * tl.load(gain + columns, mask=columns < N, other=0.0)[None, :]
    if BIASED:
        y = y + tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    inside = (rows < ROWS_OUT)[:, None] & (columns < N)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * stride + columns[None, :], y.to(out.dtype.element_ty), mask=inside)
