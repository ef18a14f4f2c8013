"""The product by Triton for GPUs below SM 9.0, such as A100, RTX 3090, RTX 4090 and L40S.

These GPUs have no TMA, and Triton turns tensor descriptors into masked pointers, which it does not pipeline. Here the kernel
reads operands through pointers without masks, so that Triton makes ``cp.async`` copies that run ahead of the products.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Variant, cdiv, shared_memory
from halo_tensor.kernels.matmul.epilogue import finish, matrices
from halo_tensor.kernels.matmul.request import Request, SizeClass
from halo_tensor.kernels.matmul.tile_order import place_of
from halo_tensor.kernels.rotate import norm

#: Rows of tiles in a group, see place_of.
GROUP = 16
#: How many columns an epilogue un-rotates at a time. 128 spill registers on all of these GPUs.
PART = 64


class Tile(NamedTuple):
    """An output tile [m, n], its depth k, warps, and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile_for(size: SizeClass, integer: bool, rotated_rows: bool, shared: int) -> Tile:
    """Return the tile of a product, from measurements (bench/results/generations.md).

    Two programs share a multiprocessor, so that one multiplies while the other stores. Each takes half of its shared memory.

    Args:
        integer: whether the codes are int8.
        rotated_rows: whether a rotation of rows is undone, which needs tiles as high as its block.
        shared: bytes of shared memory that a program may have.
    """
    if size.few or not (size.tiles or rotated_rows):
        return Tile(64, 128, 128, 4, 4 if shared >= 160 * 1024 else 3)
    if not integer:
        return Tile(128, 128, 64, 8, 4)
    return Tile(128, 128, 128, 4, 3) if shared >= 160 * 1024 else Tile(128, 128, 64, 4, 4)


@triton.jit(do_not_specialize=["K"])
def mma_kernel(
    a, b, out, a_scale, b_scale, gain, bias, left, right,
    M, N, K, ROWS_OUT, stride_a, stride_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    INTEGER: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, GAIN: tl.constexpr, BIASED: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store out [ROWS_OUT, N] = R_left diag(a_scale) a bᵀ diag(b_scale) Rᵀ_right diag(gain) + bias.

    a [M, K] and b [N, K] are codes. Their rows begin at multiples of 16 bytes, and the 16 bytes that hold the last code of a
    row must be readable. The constants are those of :func:`halo_tensor.kernels.matmul.epilogue.finish`.
    """
    tile_m, tile_n = place_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    accumulator_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    stride_a, stride_b = tl.multiple_of(stride_a, 16), tl.multiple_of(stride_b, 16)
    # Instead of rows beyond the last one, the last one is read again, and not stored. A mask would take registers in the loop.
    rows = tl.minimum(tl.arange(0, BM), M - 1 - tile_m * BM)
    columns = tl.minimum(tl.arange(0, BN), N - 1 - tile_n * BN)
    depth = tl.arange(0, BK)
    a_at = a + (tile_m * BM).to(tl.int64) * stride_a + (rows[:, None] * stride_a + depth[None, :])
    b_at = b + (tile_n * BN).to(tl.int64) * stride_b + (columns[:, None] * stride_b + depth[None, :])
    acc = tl.zeros((BM, BN), dtype=accumulator_type)
    # b is read by rows, and its transpose moves nothing. If b is read as [BK, BN], Triton 3.9 prefetches its operands into
    # registers, which spill.
    for _ in range(K // BK):
        acc = tl.dot(tl.load(a_at), tl.load(b_at).T, acc, out_dtype=accumulator_type)
        a_at += BK
        b_at += BK
    rest = K % BK
    if rest > 0:
        # Whole vectors of 16 bytes are read, and zeros replace what follows the last code in them.
        near = depth < tl.multiple_of((rest + 15) // 16 * 16, 16)
        inside = depth < rest
        a_tile = tl.load(a_at, mask=near[None, :], other=0.0)
        b_tile = tl.load(b_at, mask=near[None, :], other=0.0)
        a_tile = tl.where(inside[None, :], a_tile, tl.zeros_like(a_tile))
        b_tile = tl.where(inside[None, :], b_tile, tl.zeros_like(b_tile))
        acc = tl.dot(a_tile, b_tile.T, acc, out_dtype=accumulator_type)
    finish(
        acc, out, a_scale, b_scale, gain, bias, left, right, tile_m, tile_n, M, N, ROWS_OUT, N,
        A_SCALE, B_SCALE, GAIN, BIASED, LEFT, RIGHT, NORM, PART,
    )  # fmt: skip


def why_not(request: Request) -> str | None:
    """Return None, because it serves every product. :mod:`halo_tensor.kernels.matmul.tma` is faster and is asked first."""
    return None


def plan(request: Request) -> Variant:
    """Return the launch of a product, with the matrices of its rotations."""
    n, device, rotations = request.n, request.device, (request.row_rotation, request.column_rotation)
    rotated_rows, rotated_columns = (rotation is not None for rotation in rotations)
    tile = tile_for(request.size, request.integer, rotated_rows, shared_memory(device))
    constants = {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": GROUP, "PART": PART, **request.constants,
        "LEFT": rotated_rows, "RIGHT": rotated_columns, "NORM": norm(*rotations),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip

    def sizes(m: int, k: int, rows: int, stride_a: int, stride_b: int) -> tuple:
        return (cdiv(m, tile.m) * cdiv(n, tile.n),), (m, n, k, rows, stride_a, stride_b)

    return Variant(Launch(mma_kernel, constants), sizes, matrices(request, tile.m))
