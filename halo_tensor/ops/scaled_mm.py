"""The Triton matrix product of quantised operands: R_left (diag(s_a) A Bᵀ diag(s_b)) Rᵀ_right + bias.

Both operands are read K-major, which is the only order that 8-bit tensor cores take. One persistent program per multiprocessor
walks the output tiles in groups that share operand rows (so that they meet in L2); tensor descriptors make the loads TMA on
SM ≥ 9.0 and masked pointer loads below. Scales, the undoing of the right rotation, the bias and the cast happen on the
accumulator, before anything is written.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from halo_tensor.ops.device import check_device
from halo_tensor.ops.hadamard import block_diagonal
from halo_tensor.ops.launch import Launch
from halo_tensor.ops.rotate_quantize import transposed, unrotate
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation


class Tile(NamedTuple):
    """How one product is cut: output tile, depth, grouping of tiles, warps, pipeline stages."""

    m: int
    n: int
    k: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3


def tile_for(m: int, n: int, integer: bool, undo: int, wide_output: bool, multiprocessors: int) -> tuple[Tile, int]:
    """The launch table, measured on one H100 (bench/NOTES.md): the tile, and how many programs share a multiprocessor."""
    if m <= 64:
        return Tile(64, 128, warps=4, stages=4), 1
    few = triton.cdiv(m, 128) * triton.cdiv(n, 256) < multiprocessors
    if few or integer:  # Triton waits for every int8 product before the next: a second program fills the gaps
        return Tile(128, 128, warps=4, stages=3), 2
    if wide_output and not undo:  # float32 results need the shared memory of the larger tile
        return Tile(128, 128, warps=8, stages=4), 1
    return Tile(128, 256, stages=4), 1


@triton.jit
def _undo(y, matrix, U: tl.constexpr):
    # ±1 times bf16 is exact, so the only rounding is that of y to bf16, as small as the result's own.
    offsets = tl.arange(0, U)
    h = tl.load(matrix + offsets[:, None] * U + offsets[None, :])
    return tl.dot(y.to(h.dtype), h, out_dtype=tl.float32)


@triton.jit
def _store(out, y, row_scale, bias, rows, columns, M, N, stride, SCALED: tl.constexpr, BIASED: tl.constexpr):
    if SCALED:
        y = y * row_scale[:, None]
    if BIASED:
        y = y + tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * stride + columns[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def scaled_mm_kernel(
    a, b, out, a_scale, b_scale, bias, matrix,
    M, N, K, stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    INTEGER: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, BIASED: tl.constexpr, UNDO: tl.constexpr,
    NORM: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """``A_SCALE``, ``B_SCALE``: 0 none, 1 one number, 2 a vector. ``UNDO``: edge of the matrix that undoes the right rotation,
    or 0; ``NORM`` is that rotation's 1/√block."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    accumulator_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        group = tile // (GROUP * tiles_n)
        height = min(tiles_m - group * GROUP, GROUP)
        tile_m = group * GROUP + (tile % (GROUP * tiles_n)) % height
        tile_n = (tile % (GROUP * tiles_n)) // height

        acc = tl.zeros((BM, BN), dtype=accumulator_type)
        for k in range(tl.cdiv(K, BK)):
            a_tile = a.load([tile_m * BM, k * BK])
            b_tile = b.load([tile_n * BN, k * BK])
            acc = tl.dot(a_tile, b_tile.T, acc, out_dtype=accumulator_type)

        rows = tile_m * BM + tl.arange(0, BM)
        y = acc.to(tl.float32)
        if B_SCALE == 2:
            columns = tile_n * BN + tl.arange(0, BN)
            y = y * tl.load(b_scale + columns, mask=columns < N, other=0.0)[None, :]
        row_scale = tl.full((BM,), 1.0, tl.float32)
        if A_SCALE == 2:
            row_scale = tl.load(a_scale + rows, mask=rows < M, other=0.0)
        if A_SCALE == 1:
            row_scale = row_scale * tl.load(a_scale)
        if B_SCALE == 1:
            row_scale = row_scale * tl.load(b_scale)
        if UNDO:
            row_scale = row_scale * NORM
        SCALED: tl.constexpr = A_SCALE > 0 or B_SCALE == 1 or UNDO > 0

        first = tile_n * BN
        if UNDO == 0 or UNDO == BN:
            if UNDO:
                y = _undo(y, matrix, UNDO)
            columns = first + tl.arange(0, BN)
            _store(out, y, row_scale, bias, rows, columns, M, N, stride, SCALED, BIASED)
        else:  # BN = 2·UNDO or 4·UNDO
            HALF: tl.constexpr = BN // 2
            y0, y1 = tl.split(tl.permute(tl.reshape(y, (BM, 2, HALF)), (0, 2, 1)))
            if UNDO == HALF:
                columns = first + tl.arange(0, UNDO)
                _store(out, _undo(y0, matrix, UNDO), row_scale, bias, rows, columns, M, N, stride, SCALED, BIASED)
                _store(out, _undo(y1, matrix, UNDO), row_scale, bias, rows, columns + HALF, M, N, stride, SCALED, BIASED)
            else:
                columns = first + tl.arange(0, UNDO)
                y00, y01 = tl.split(tl.permute(tl.reshape(y0, (BM, 2, UNDO)), (0, 2, 1)))
                y10, y11 = tl.split(tl.permute(tl.reshape(y1, (BM, 2, UNDO)), (0, 2, 1)))
                _store(out, _undo(y00, matrix, UNDO), row_scale, bias, rows, columns, M, N, stride, SCALED, BIASED)
                _store(out, _undo(y01, matrix, UNDO), row_scale, bias, rows, columns + UNDO, M, N, stride, SCALED, BIASED)
                columns += HALF
                _store(out, _undo(y10, matrix, UNDO), row_scale, bias, rows, columns, M, N, stride, SCALED, BIASED)
                _store(out, _undo(y11, matrix, UNDO), row_scale, bias, rows, columns + UNDO, M, N, stride, SCALED, BIASED)


def fits_epilogue(rotation: Rotation) -> bool:
    """Whether a rotation can be undone on an output tile."""
    return rotation.edge in (16, 32, 64, 128)


def scaled_mm(
    a: torch.Tensor,
    b_t: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    left: Rotation | None,
    right: Rotation | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`halo_tensor.ops.reference.scaled_mm`; scales are numbers or vectors."""
    in_epilogue = right if right is not None and fits_epilogue(right) and b_t.shape[0] == shape[1] else None
    afterwards = None if in_epilogue else right
    if left is None and afterwards is None:
        return _product(a, b_t, a_scale, b_scale, bias, in_epilogue, dtype)
    # What the epilogue cannot undo is undone in a pass of its own, before the bias is added.
    y = _product(a, b_t, a_scale, b_scale, None, in_epilogue, dtype)
    y = unrotate(y, left, afterwards, shape, dtype)
    return y if bias is None else y.add_(bias)


def _product(a, b_t, a_scale, b_scale, bias, right: Rotation | None, dtype: torch.dtype) -> torch.Tensor:
    out = a.new_empty((a.shape[0], b_t.shape[0]), dtype=dtype)
    if a.shape[1] == 0 or out.numel() == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    a, b_t = _readable(a), _readable(b_t)
    launch, tile, matrix = _plan(
        a.shape, b_t.shape[0], a.dtype, b_t.dtype, _kind(a_scale), _kind(b_scale), None if bias is None else bias.dtype, right,
        dtype, a.device,
    )  # fmt: skip
    left = TensorDescriptor(a, a.shape, a.stride(), [tile.m, tile.k])
    right_t = TensorDescriptor(b_t, b_t.shape, b_t.stride(), [tile.n, tile.k])
    launch(left, right_t, out, *(a if t is None else t for t in (a_scale, b_scale, bias, matrix)))
    return out


@lru_cache(maxsize=4096)
def _plan(
    a_shape, n, a_dtype, b_dtype, a_kind, b_kind, bias_dtype, right, dtype, device
) -> tuple[Launch, Tile, torch.Tensor | None]:
    """The launch for a product; the dtypes are here to be told apart."""
    m, k = a_shape
    integer, undo = a_dtype == torch.int8, 0 if right is None else max(right.edge, 64)
    check_device((INT8 if integer else FP8_E4M3,), device)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    tile, resident = tile_for(m, n, integer, undo, dtype.itemsize > 2, multiprocessors)
    programs = min(multiprocessors * resident, triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n))
    matrix_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # Triton's interpreter has no 16-bit products
    matrix = block_diagonal(right, undo, matrix_dtype, device, transposed=True) if right else None
    constants = {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group, "PROGRAMS": programs, "INTEGER": integer,
        "A_SCALE": a_kind, "B_SCALE": b_kind, "BIASED": bias_dtype is not None, "UNDO": undo,
        "NORM": 1.0 if right is None else right.edge**-0.5,
        # Flattened, the loads of the next tile overlap the epilogue of this one. But ptxas (C7515) serialises all wgmma where
        # an accumulator meets another product inside a loop that is still running.
        "FLATTEN": not undo,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return Launch(scaled_mm_kernel, (programs,), (m, n, k, n), constants), tile, matrix


def _kind(scale: torch.Tensor | None) -> int:
    return 0 if scale is None else 1 + scale.ndim


def _readable(codes: torch.Tensor) -> torch.Tensor:
    """``codes`` as a descriptor can read them: contiguous rows that begin at multiples of 16 bytes. 8-bit tensor cores take
    their operands in no other order, so a transposed view is transposed in memory first."""
    if codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0:
        return codes
    if codes.stride(0) == 1:  # the transpose of a row-major matrix
        return transposed(codes.t())
    stride = (codes.shape[1] + 15) // 16 * 16
    return codes.new_empty_strided(codes.shape, (stride, 1)).copy_(codes)
