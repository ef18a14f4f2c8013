"""The product of at most 64 rows, as in generation, by Triton for GPUs from SM 8.0 on.

Its time is that of reading the weight's codes once. So every program multiplies all rows with a few rows of the weight, whose
codes it copies to shared memory well ahead of the products (``cp.async``). Tiles are narrow, so that all multiprocessors have
one. A narrow tile has little work for several warps; each takes a part of every step along K instead, and their sums are added
at the end. No sums are exchanged between programs: nothing needs to be zero before a launch, launches on several streams or in
CUDA graphs share no memory, and sums have a fixed order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Variant, cdiv, shared_memory
from halo_tensor.kernels.matmul.epilogue import finish
from halo_tensor.kernels.matmul.request import Request, multiprocessors


class Tile(NamedTuple):
    """An output tile of all rows and ``n`` columns, its depth k, the parts of a step, warps, and pipeline stages."""

    n: int
    k: int
    parts: int
    warps: int
    stages: int


def tile_for(n: int, few: int, multiprocessors: int, shared: int) -> Tile:
    """Return the tile of a product with ``n`` columns and at most ``few`` rows."""
    width = 16 if n <= 16 * multiprocessors else 32
    depth, stages = 512, 4
    while stages > 2 and (stages - 1) * (width + few) * depth > shared:
        stages -= 1
    return Tile(width, depth, 4, 4, stages)


@triton.jit(do_not_specialize=["M", "K"])
def few_rows_kernel(
    a, b, out, a_scale, b_scale, gain, bias,
    M, N, K, stride_a, stride_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    INTEGER: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, GAIN: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Store out [M, N] = diag(a_scale) a bᵀ diag(b_scale) diag(gain) + bias, with M at most BM.

    a [M, K] and b [N, K] are codes, whose rows begin at multiples of 16 bytes. PARTS: how many products [BN, BK / PARTS] ×
    [BK / PARTS, BM] make up a step along K. Each is a warp's, if there are as many warps. The other constants are those of
    :func:`halo_tensor.kernels.matmul.epilogue.finish`.
    """
    accumulator_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    PART: tl.constexpr = BK // PARTS
    stride_a, stride_b = tl.multiple_of(stride_a, 16), tl.multiple_of(stride_b, 16)
    first = tl.program_id(0) * BN
    rows = tl.arange(0, BM)
    # Instead of columns beyond the last one, the last one is read again, and not stored.
    columns = tl.minimum(tl.arange(0, BN), N - 1 - first)
    depth = tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    a_at = a + (rows[None, :, None] * stride_a + depth)
    b_at = b + first.to(tl.int64) * stride_b + (columns[None, :, None] * stride_b + depth)
    sums = tl.zeros((PARTS, BN, BM), dtype=accumulator_type)
    whole = K // 16 * 16
    for k in range(0, whole, BK):
        near = depth < whole - k
        b_tile = tl.load(b_at, mask=near, other=0.0)
        a_tile = tl.load(a_at, mask=(rows < M)[None, :, None] & near, other=0.0)
        sums = tl.dot(b_tile, tl.permute(a_tile, (0, 2, 1)), sums, out_dtype=accumulator_type)
        a_at += BK
        b_at += BK
    acc = tl.sum(sums, 0)
    if K > whole:  # what follows the last code of a row must not be multiplied, so these few are read one by one
        rest = tl.arange(0, 32)
        b_rest = b + first.to(tl.int64) * stride_b + whole + (columns[:, None] * stride_b + rest[None, :])
        a_rest = a + whole + (rows[:, None] * stride_a + rest[None, :])
        inside = (rest < K - whole)[None, :]
        last_b = tl.load(b_rest, mask=inside, other=0.0)
        last_a = tl.load(a_rest, mask=(rows < M)[:, None] & inside, other=0.0)
        acc = tl.dot(last_b, last_a.T, acc, out_dtype=accumulator_type)
    finish(
        tl.trans(acc), out, a_scale, b_scale, gain, bias, a, a, 0, tl.program_id(0), M, N, M, N,
        A_SCALE, B_SCALE, GAIN, BIASED, False, False, 1.0, BN,
    )  # fmt: skip


def why_not(request: Request) -> str | None:
    """Return the reason to decline: the product has more rows, or undoes a rotation. None if it has few."""
    if not request.size.few:
        return "the result has more than 64 rows"
    if request.row_rotation is not None or request.column_rotation is not None:
        return "it undoes no rotation"
    return None


def plan(request: Request) -> Variant:
    """Return the launch of a product."""
    n, device = request.n, request.device
    tile = tile_for(n, request.size.few, multiprocessors(device), shared_memory(device))
    constants = {
        "BM": request.size.few, "BN": tile.n, "BK": tile.k, "PARTS": tile.parts, **request.constants,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip

    def sizes(m: int, k: int, rows: int, stride_a: int, stride_b: int) -> tuple:
        return (cdiv(n, tile.n),), (m, n, k, stride_a, stride_b)

    return Variant(Launch(few_rows_kernel, constants), sizes)
