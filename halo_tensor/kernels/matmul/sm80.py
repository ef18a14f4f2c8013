"""The product of :mod:`halo_tensor.kernels.matmul.plan` below SM 9.0: A100, RTX 3090, RTX 4090, L40S.

These GPUs have no TMA, and Triton turns tensor descriptors into masked pointers that it does not pipeline. Here operands are
read through pointers without masks, so that Triton makes ``cp.async`` copies that run ahead of the products.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Variant, cdiv, shared_memory
from halo_tensor.kernels.matmul.epilogue import finish, matrices
from halo_tensor.kernels.matmul.request import Request, SizeClass
from halo_tensor.kernels.matmul.tile_order import place_of
from halo_tensor.kernels.rotate import norm

#: rows of tiles whose programs run at the same time: see place_of
GROUP = 16
#: columns that an epilogue un-rotates at a time: 128 spill on every one of these GPUs
PART = 64


class Tile(NamedTuple):
    """An output tile, its depth, warps, and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile_for(size: SizeClass, integer: bool, left: bool, shared: int) -> Tile:
    """The launch table (docs: bench/results/generations.md). ``shared``: bytes of shared memory that a program may have.

    Two programs share a multiprocessor, so that one multiplies while the other stores: each takes half of its shared memory.
    """
    if size.thin or not (size.tiles or left):  # a rotation on the left is undone on tiles of its block
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
    """out [ROWS_OUT, N] = R_left diag(a_scale) a bᵀ diag(b_scale) Rᵀ_right diag(gain) + bias, for codes a [M, K] and b [N, K].

    Rows of a and b begin at multiples of 16 bytes, and the 16 bytes that hold a row's last code may be read. The constants
    are those of :func:`halo_tensor.kernels.matmul.epilogue.finish`.
    """
    tile_m, tile_n = place_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    accumulator_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    stride_a, stride_b = tl.multiple_of(stride_a, 16), tl.multiple_of(stride_b, 16)
    # Rows past the last one are read as the last one again, and not stored: a mask would cost registers in the loop.
    rows = tl.minimum(tl.arange(0, BM), M - 1 - tile_m * BM)
    columns = tl.minimum(tl.arange(0, BN), N - 1 - tile_n * BN)
    depth = tl.arange(0, BK)
    a_at = a + (tile_m * BM).to(tl.int64) * stride_a + (rows[:, None] * stride_a + depth[None, :])
    b_at = b + (tile_n * BN).to(tl.int64) * stride_b + (columns[:, None] * stride_b + depth[None, :])
    acc = tl.zeros((BM, BN), dtype=accumulator_type)
    # b is read by rows and transposed in name only. Read as [BK, BN], Triton 3.9 prefetches its operands into registers, which
    # spill.
    for _ in range(K // BK):
        acc = tl.dot(tl.load(a_at), tl.load(b_at).T, acc, out_dtype=accumulator_type)
        a_at += BK
        b_at += BK
    rest = K % BK
    if rest > 0:
        # Whole vectors of 16 bytes are read, and what lies past the last code in them is replaced by zeros.
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
    """Return None: it serves every product. A GPU with TMA uses :mod:`halo_tensor.kernels.matmul.tma`, which is faster."""
    return None


def plan(request: Request) -> Variant:
    """How it is launched, with the matrices of its rotations."""
    n, device, left, right = request.n, request.device, request.left, request.right
    tile = tile_for(request.size, request.integer, left is not None, shared_memory(device))
    constants = {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": GROUP, "PART": PART, **request.constants,
        "LEFT": left is not None, "RIGHT": right is not None, "NORM": norm(left, right),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip

    def sizes(m: int, k: int, rows: int, stride_a: int, stride_b: int) -> tuple:
        return (cdiv(m, tile.m) * cdiv(n, tile.n),), (m, n, k, rows, stride_a, stride_b)

    return Variant(Launch(mma_kernel, constants), sizes, matrices(request, tile.m))
