"""The product of at most 64 rows, as in generation, by Triton for GPUs from SM 8.0 on.

Its time is that of reading the weight's codes once. So every program multiplies all rows with a few rows of the weight, whose
codes it copies to shared memory well ahead of the products (``cp.async``). Tiles are narrow, so that all multiprocessors have
one. The narrowest have little work for several warps; each takes a part of every step along K instead, and their sums are
added at the end. No sums are exchanged between programs: nothing needs to be zero before a launch, launches on several streams
or in CUDA graphs share no memory, and sums have a fixed order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from halo_tensor.kernels.device import has_dependent_launches, has_wgmma, is_hopper
from halo_tensor.kernels.launch import Launch, Variant, cdiv, shared_memory
from halo_tensor.kernels.matmul.request import Request, multiprocessors


class Tile(NamedTuple):
    """An output tile of all rows and ``n`` columns, its depth k, the parts of a step, and pipeline stages."""

    n: int
    k: int
    parts: int
    stages: int


def tile_for(n: int, few: int, by_wgmma: bool, multiprocessors: int, shared: int) -> Tile:
    """Return the tile of a product with ``n`` columns, by measurements on one H200 (docs/notes/products.md).

    Args:
        few: 16, 32 or 64, the most rows.
        by_wgmma: whether only ``wgmma`` multiplies the codes without converting them, as for fp8 on SM 9.0. Its tiles have at
            least 64 columns.
        multiprocessors: of the GPU.
        shared: bytes of shared memory that a program may have.
    """
    columns = n / multiprocessors  # for each multiprocessor
    if columns <= 16:
        tile = Tile(16, 512, 4, {16: 6, 32: 4, 64: 3}[few])
    elif columns <= 32 and few < 64 and not by_wgmma:
        tile = Tile(32, 512, 1, 4)
    elif few < 64:
        tile = Tile(64, 256, 1, 5 if few == 16 and columns <= 64 else 4)
    else:
        tile = Tile(64, 128, 1, 8 if columns <= 64 else 6)
    room = shared // ((tile.n + few) * tile.k)
    return tile._replace(stages=min(tile.stages, room + 1))  # the tiles that are being multiplied are in registers


@triton.jit(do_not_specialize=["M", "K"])
def few_rows_kernel(
    a, b, out, a_scale, b_scale, gain, bias,
    M, N, K, stride_a, stride_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
    INTEGER: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, GAIN: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Store out [M, N] = diag(a_scale) a bᵀ diag(b_scale) diag(gain) + bias, with M at most BM.

    a [M, K] and b [N, K] are codes, whose rows begin at multiples of 16 bytes. PARTS: how many parts a step along K has.
    DEPENDENT: whether programs may start before the kernel ahead of this one is done. The other constants are those of
    :func:`halo_tensor.kernels.matmul.epilogue.finish`, which computes the same. A tile is computed transposed, [BN, BM].
    """
    if DEPENDENT:  # nothing may be read or written before the wait; what follows this kernel waits for it in the same way
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    accumulator_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    stride_a, stride_b = tl.multiple_of(stride_a, 16), tl.multiple_of(stride_b, 16)
    first = tl.program_id(0) * BN
    rows, columns = tl.arange(0, BM), first + tl.arange(0, BN)
    # Load scales, gain and bias before the main loop: for a small weight, their latency is a large part of the time.
    SHIFT: tl.constexpr = 128.0 if B_SCALE == 2 and A_SCALE > 0 else 1.0  # see reference.ops.SHIFT
    if B_SCALE == 2:
        by_column = tl.load(b_scale + columns, mask=columns < N, other=0.0) * (1.0 / SHIFT)
    by_row = tl.full((BM,), 1.0, tl.float32)
    if A_SCALE == 2:
        by_row = tl.load(a_scale + rows, mask=rows < M, other=0.0) * SHIFT
    if A_SCALE == 1:
        by_row = by_row * (tl.load(a_scale) * SHIFT)
    if B_SCALE == 1:
        by_row = by_row * tl.load(b_scale)
    if GAIN:
        by_gain = tl.load(gain + columns, mask=columns < N, other=0.0)
    if BIASED:
        added = tl.load(bias + columns, mask=columns < N, other=0.0)
    # Instead of columns beyond the last one, the last one is read again, and not stored.
    within = tl.minimum(tl.arange(0, BN), N - 1 - first)
    b += first.to(tl.int64) * stride_b
    whole = K // 16 * 16
    if PARTS == 1:
        acc = _product(a, b, rows, within, M, whole, stride_a, stride_b, BK, accumulator_type)
    else:
        acc = _product_in_parts(a, b, rows, within, M, whole, stride_a, stride_b, BK, PARTS, accumulator_type)
    if whole < K:  # what follows the last code of a row must not be multiplied, so these few are read one by one
        rest = tl.arange(0, 32)
        inside = (rest < K - whole)[None, :]
        last_b = tl.load(b + whole + (within[:, None] * stride_b + rest), mask=inside, other=0.0)
        last_a = tl.load(a + whole + (rows[:, None] * stride_a + rest), mask=(rows < M)[:, None] & inside, other=0.0)
        acc = tl.dot(last_b, last_a.T, acc, out_dtype=accumulator_type)
    y = acc.to(tl.float32)
    if B_SCALE == 2:
        y = y * by_column[:, None]
    if A_SCALE > 0 or B_SCALE == 1:
        y = y * by_row[None, :]
    if GAIN:
        y = y * by_gain[:, None]
    if BIASED:
        y = y + added.to(tl.float32)[:, None]
    y = tl.trans(y).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * N + columns[None, :], y, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _product(a, b, rows, within, M, K, stride_a, stride_b, BK: tl.constexpr, TYPE: tl.constexpr):
    """Return the tile b aᵀ [BN, BM] of the first K codes, a multiple of 16. ``within``: the rows of b."""
    depth = tl.arange(0, BK)
    a_at, b_at = a + (rows[:, None] * stride_a + depth), b + (within[:, None] * stride_b + depth)
    acc = tl.zeros((within.shape[0], rows.shape[0]), dtype=TYPE)
    for k in range(0, K, BK):
        near = (depth < K - k)[None, :]
        b_tile = tl.load(b_at, mask=near, other=0.0)
        a_tile = tl.load(a_at, mask=(rows < M)[:, None] & near, other=0.0)
        acc = tl.dot(b_tile, a_tile.T, acc, out_dtype=TYPE)
        a_at += BK
        b_at += BK
    return acc


@triton.jit
def _product_in_parts(a, b, rows, within, M, K, stride_a, stride_b, BK: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """Do :func:`_product`. Every step is a batch of PARTS products, each of which is a warp's if there are as many warps."""
    PART: tl.constexpr = BK // PARTS
    depth = tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    a_at, b_at = a + (rows[None, :, None] * stride_a + depth), b + (within[None, :, None] * stride_b + depth)
    sums = tl.zeros((PARTS, within.shape[0], rows.shape[0]), dtype=TYPE)
    for k in range(0, K, BK):
        near = depth < K - k
        b_tile = tl.load(b_at, mask=near, other=0.0)
        a_tile = tl.load(a_at, mask=(rows < M)[None, :, None] & near, other=0.0)
        sums = tl.dot(b_tile, tl.permute(a_tile, (0, 2, 1)), sums, out_dtype=TYPE)
        a_at += BK
        b_at += BK
    return tl.sum(sums, 0)


def why_not(request: Request) -> str | None:
    """Return the reason to decline: more rows, a rotation to undo, or a GPU on which the kernel was not run; else None."""
    if not request.size.few:
        return "the result has more than 64 rows"
    if request.row_rotation is not None or request.column_rotation is not None:
        return "it undoes no rotation"
    if request.device.type == "cuda" and not is_hopper(request.device):  # tests compile it for other GPUs
        return "it was run on SM 9.0 only"
    return None


def plan(request: Request) -> Variant:
    """Return the launch of a product."""
    n, few, device = request.n, request.size.few, request.device
    by_wgmma = not request.integer and has_wgmma(device)
    most = multiprocessors(device)
    tile = tile_for(n, few, by_wgmma, most, shared_memory(device))
    programs = cdiv(n, tile.n)
    # A dependent launch saved time only where the programs are not more than the multiprocessors (docs/notes/products.md).
    dependent = has_dependent_launches(device) and programs <= most
    constants = {
        "BM": few, "BN": tile.n, "BK": tile.k, "PARTS": tile.parts, "DEPENDENT": dependent, **request.constants,
        "num_warps": 4, "num_stages": tile.stages, **({"launch_pdl": True} if dependent else {}),
    }  # fmt: skip

    def sizes(m: int, k: int, rows: int, stride_a: int, stride_b: int) -> tuple:
        return (programs,), (m, n, k, stride_a, stride_b)

    return Variant(Launch(few_rows_kernel, constants), sizes)
