"""The product by Gluon for SM 9.0, where Triton's compiler leaves the tensor cores idle.

Triton 3.6 waits for every integer ``wgmma`` before it issues the next, and the product that undoes a rotation ends the
pipeline of loads (ptxas C7515). Here one ``wgmma`` is always in flight, and loads run ahead from tile to tile. The product
that undoes a rotation reads the accumulator from registers. Its columns are permuted, so that threads can store them without
an exchange.
"""

from functools import lru_cache
from typing import Any

import torch

from halo_tensor.fences.fast_paths import GLUON
from halo_tensor.fences.gluon import (
    async_load,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from halo_tensor.kernels.device import INTERPRETED, is_hopper
from halo_tensor.kernels.launch import Launch, Variant, cdiv
from halo_tensor.kernels.matmul.request import Request, multiprocessors
from halo_tensor.kernels.matmul.tile_order import place_of
from halo_tensor.kernels.rotate import norm
from halo_tensor.recipe import Rotation
from halo_tensor.reference.hadamard import block_diagonal

#: An output tile, its depth, pipeline stages and warps. They fill the shared memory and the registers of a multiprocessor.
BM, BN, BK, STAGES, WARPS = 128, 256, 128, 4, 8
#: How many columns are un-rotated at once.
EDGE = BN // 2
#: Rows of tiles in a group, see place_of.
GROUP = 8

_place_of = gluon.jit(place_of.fn)


@gluon.jit
def _load(a, b, a_tiles, b_tiles, arrived, slot, tile_m, tile_n, k, wanted):
    """Start to load the k-th tiles of both operands to ``slot``, if ``wanted``."""
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    barrier = arrived.index(slot)
    mbarrier.expect(barrier, a.block_type.nbytes + b.block_type.nbytes, pred=wanted)
    async_load(a, [tile_m * BM, k * BK], barrier, a_tiles.index(slot), pred=wanted)
    async_load(b, [tile_n * BN, k * BK], barrier, b_tiles.index(slot), pred=wanted)


@gluon.jit
def _next(tile, tile_m, tile_n, k, steps, tiles_m, tiles_n, GROUP: gl.constexpr, PROGRAMS: gl.constexpr):
    """Return the tile, its place and the depth k that this program loads after the k-th tiles of ``tile``."""
    k += 1
    if k == steps:
        k = 0
        tile += PROGRAMS
        tile_m, tile_n = _place_of(tile, tiles_m, tiles_n, GROUP, True)
    return tile, tile_m, tile_n, k


@gluon.jit
def start_loading(
    a, b, a_tiles, b_tiles, arrived, first, steps, tiles_m, tiles_n,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Start to load what a program multiplies first, to all slots but one.

    first: its first tile, before the steps of PROGRAMS to the next ones. steps: tiles along K.

    Returns how many loads are left, and the tile, its place and the depth of the next one.
    """
    to_load = gl.cdiv(tiles_m * tiles_n - first, PROGRAMS) * steps
    tile_m, tile_n = _place_of(first, tiles_m, tiles_n, GROUP, True)
    ahead, ahead_m, ahead_n, ahead_k = first, tile_m, tile_n, 0
    for i in gl.static_range(STAGES - 1):
        _load(a, b, a_tiles, b_tiles, arrived, i, ahead_m, ahead_n, ahead_k, to_load > 0)
        to_load -= 1
        ahead, ahead_m, ahead_n, ahead_k = _next(ahead, ahead_m, ahead_n, ahead_k, steps, tiles_m, tiles_n, GROUP, PROGRAMS)
    return to_load, ahead, ahead_m, ahead_n, ahead_k


@gluon.jit
def multiply_tile(
    a, b, a_tiles, b_tiles, arrived, acc, slot, free, phase, to_load, ahead, ahead_m, ahead_n, ahead_k,
    steps, tiles_m, tiles_n,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Add the products of one tile to ``acc``, while later tiles are loaded. :func:`start_loading` gives the first arguments.

    slot, free: the slots to multiply next and to load to. phase: of the barriers.

    Returns ``acc``, and what changed: from ``slot`` to ``ahead_k``.
    """
    for _ in range(steps):
        mbarrier.wait(arrived.index(slot), phase)
        acc = warpgroup_mma(a_tiles.index(slot), b_tiles.index(slot).permute((1, 0)), acc, is_async=True)
        # The product before this one is done, so the next load may overwrite its tiles. It is done in all warps, because
        # Triton puts a barrier before a load to memory that others may still read.
        acc = warpgroup_mma_wait(1, deps=(acc,))
        _load(a, b, a_tiles, b_tiles, arrived, free, ahead_m, ahead_n, ahead_k, to_load > 0)
        to_load -= 1
        ahead, ahead_m, ahead_n, ahead_k = _next(ahead, ahead_m, ahead_n, ahead_k, steps, tiles_m, tiles_n, GROUP, PROGRAMS)
        free = slot
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, slot, free, phase, to_load, ahead, ahead_m, ahead_n, ahead_k


@gluon.constexpr_function
def _rows_of_eight(m: int, n: int, warps: int) -> Any:
    """Return a layout like that of an accumulator, in which a thread holds 8 neighbouring columns, for wide stores. To convert
    to it, groups of four lanes exchange elements."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 1 << i] for i in range(5, n.bit_length() - 1)]
    above = [[16 << i, 0] for i in range(m.bit_length() - 5)]  # the rows of one instruction
    split = warps.bit_length() - 1
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers + above[split:], lanes, above[:split], [], [m, n])


@gluon.jit
def _in_order(y):
    """Return an accumulator with its columns, multiplied in :func:`_order`, in their own order. Nothing moves, because each
    thread already holds 8 neighbouring columns."""
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    y = y.reshape([ROWS, COLUMNS // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, COLUMNS])
    return gl.convert_layout(y, _rows_of_eight(ROWS, COLUMNS, gl.num_warps()), assert_trivial=True)


@gluon.jit
def _store(out, y, gain, bias, tile_m, first, M, N, GAIN: gl.constexpr, BIASED: gl.constexpr):
    """Store y [BM, …] to ``out`` [M, N], from column ``first`` on."""
    BM: gl.constexpr = y.shape[0]
    WIDTH: gl.constexpr = y.shape[1]
    columns = first + gl.arange(0, WIDTH, gl.SliceLayout(0, y.type.layout))
    if GAIN:
        y = y * gl.load(gain + columns, mask=columns < N, other=0.0)[None, :]
    if BIASED:
        y = y + gl.load(bias + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
    stored: gl.constexpr = _rows_of_eight(BM, WIDTH, gl.num_warps())
    y = gl.convert_layout(y.to(out.dtype.element_ty), stored)
    rows = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, stored))
    columns = first + gl.arange(0, WIDTH, gl.SliceLayout(0, stored))
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    gl.store(out + rows.to(gl.int64)[:, None] * N + columns[None, :], y, mask=inside)


@gluon.jit(do_not_specialize=["K"])
def wgmma_kernel(
    a, b, out, a_scale, b_scale, gain, bias, right,
    M, N, K,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, INTEGER: gl.constexpr, A_SCALE: gl.constexpr,
    B_SCALE: gl.constexpr, GAIN: gl.constexpr, BIASED: gl.constexpr, RIGHT: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """Do what :func:`halo_tensor.kernels.matmul.tma.scaled_mm_kernel` does, for a contiguous ``out`` [M, N].

    RIGHT: ``right`` [BN / 2, BN / 2], with its columns in :func:`_order`, undoes a rotation of columns. Scales are not shifted
    as they are there, because no registers are left: the scale of a column times its sums of codes must be in float32's range.
    """
    gl.static_assert(STAGES > 1, "with one stage there is none to load into while another is multiplied")
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    EDGE: gl.constexpr = BN // 2
    WARPS: gl.constexpr = gl.num_warps()
    accumulator_type: gl.constexpr = gl.int32 if INTEGER else gl.float32
    # Triton's integer wgmma is at most 128 columns wide.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128 if INTEGER else 256, 32])
    unrotated: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])

    tiles_m, tiles_n, steps = gl.cdiv(M, BM), gl.cdiv(N, BN), gl.cdiv(K, BK)
    first = gl.program_id(0)
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, BN, BK], b.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if RIGHT:
        at: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
        row, column = gl.arange(0, EDGE, gl.SliceLayout(1, at)), gl.arange(0, EDGE, gl.SliceLayout(0, at))
        matrix = gl.load(right + row[:, None] * EDGE + column[None, :])
        swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([EDGE, EDGE], gl.bfloat16)
        h = gl.allocate_shared_memory(gl.bfloat16, [EDGE, EDGE], swizzled, matrix)
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()

    to_load, ahead, ahead_m, ahead_n, ahead_k = start_loading(
        a, b, a_tiles, b_tiles, arrived, first, steps, tiles_m, tiles_n, STAGES, GROUP, PROGRAMS
    )
    slot, free, phase = 0, STAGES - 1, 0
    for tile in range(first, tiles_m * tiles_n, PROGRAMS):
        tile_m, tile_n = _place_of(tile, tiles_m, tiles_n, GROUP, True)
        acc, slot, free, phase, to_load, ahead, ahead_m, ahead_n, ahead_k = multiply_tile(
            a, b, a_tiles, b_tiles, arrived, gl.zeros([BM, BN], accumulator_type, layout), slot, free, phase,
            to_load, ahead, ahead_m, ahead_n, ahead_k, steps, tiles_m, tiles_n, STAGES, GROUP, PROGRAMS,
        )  # fmt: skip

        y = acc.to(gl.float32)
        rows = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, layout))
        if B_SCALE == 2:
            columns = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
            y = y * gl.load(b_scale + columns, mask=columns < N, other=0.0)[None, :]
        row_scale = gl.full([BM], 1.0, gl.float32, gl.SliceLayout(1, layout))
        if A_SCALE == 2:
            row_scale = gl.load(a_scale + rows, mask=rows < M, other=0.0)
        if A_SCALE == 1:
            row_scale = row_scale * gl.load(a_scale)
        if B_SCALE == 1:
            row_scale = row_scale * gl.load(b_scale)
        if RIGHT:
            row_scale = row_scale * NORM
        if A_SCALE > 0 or B_SCALE == 1 or RIGHT:
            y = y * row_scale[:, None]
        if RIGHT:
            y0, y1 = gl.split(y.to(gl.bfloat16).reshape([BM, 2, EDGE]).permute([0, 2, 1]))
            operand: gl.constexpr = gl.DotOperandLayout(0, unrotated, 2)
            nothing = gl.zeros([BM, EDGE], gl.float32, unrotated)
            y0 = warpgroup_mma(gl.convert_layout(y0, operand, assert_trivial=True), h, nothing, use_acc=False, is_async=True)
            y1 = warpgroup_mma(gl.convert_layout(y1, operand, assert_trivial=True), h, nothing, use_acc=False, is_async=True)
            y0 = warpgroup_mma_wait(1, deps=(y0,))
            _store(out, _in_order(y0), gain, bias, tile_m, tile_n * BN, M, N, GAIN, BIASED)
            y1 = warpgroup_mma_wait(0, deps=(y1,))
            _store(out, _in_order(y1), gain, bias, tile_m, tile_n * BN + EDGE, M, N, GAIN, BIASED)
        else:
            _store(out, y, gain, bias, tile_m, tile_n * BN, M, N, GAIN, BIASED)


def why_not(request: Request) -> str | None:
    """Return the reason to decline: this kernel cannot serve the product, or is not faster. None if it is."""
    if not is_hopper(request.device) or INTERPRETED:
        return "it is for GPUs of SM 9.0"
    if request.row_rotation is not None:
        return "it undoes no rotation of rows"
    if not request.integer and request.column_rotation is None:
        return "fp8 without an un-rotation is as fast without it (docs/notes/products.md)"
    if request.n % 8:
        return "wide stores write rows of multiples of 8"
    lacks_tiles = request.size.wide_tiles == 0 or request.size.few
    return "it has no tiles for most multiprocessors" if lacks_tiles else None


def plan(request: Request) -> Variant | None:
    """Return the launch of a product, with the matrix of its rotation; None after a warning if the kernel does not compile."""
    return GLUON.attempt(_plan, request)


def _plan(request: Request) -> Variant:
    """Return the launch of a product. The kernel is compiled here, where another one can still replace it."""
    n, rotation, most = request.n, request.column_rotation, multiprocessors(request.device)
    constants = {
        "STAGES": STAGES, "GROUP": GROUP, "PROGRAMS": most, **request.constants,
        "RIGHT": rotation is not None, "NORM": norm(rotation), "num_warps": WARPS,
    }  # fmt: skip

    def sizes(m: int, k: int, rows: int, stride_a: int, stride_b: int) -> tuple:
        programs = min(most, cdiv(m, BM) * cdiv(n, BN))
        return (programs,), (m, n, k), ((m, k, stride_a), (n, k, stride_b))

    matrix = _matrix(rotation, request.device) if rotation else None
    launch = Launch(wgmma_kernel, constants, ((BM, BK), (BN, BK)))
    dtypes = request.a, request.b, request.dtype, *_arguments(constants, request)
    launch.compile(request.device, dtypes, launch.sizes(*sizes(BM, BK, BM, BK, BK)))  # these sizes are examples
    return Variant(launch, sizes, (matrix,))


def _arguments(constants: dict[str, Any], request: Request) -> list[torch.dtype]:
    """Return the dtypes of the scales, the gain, the bias and the matrix. Those that are not given have the dtype of a."""
    there = [constants["A_SCALE"], constants["B_SCALE"], constants["GAIN"], constants["BIASED"], constants["RIGHT"]]
    dtypes = [torch.float32, torch.float32, torch.float32, request.bias, torch.bfloat16]
    return [dtype if is_there and dtype else request.a for is_there, dtype in zip(there, dtypes, strict=True)]


def _order() -> torch.Tensor:
    """Return the column of the result that is multiplied at each place.

    In an accumulator, lane c of the four that share a row holds columns 2c and 2c + 1 of every 8. In this order these are the
    8 neighbouring columns from 8c on, of every 32.
    """
    return torch.arange(EDGE).view(-1, 4, 4, 2).transpose(1, 2).flatten()


@lru_cache(maxsize=256)
def _matrix(column_rotation: Rotation, device: torch.device) -> torch.Tensor:
    """Return the matrix [EDGE, EDGE] that undoes a rotation, with its columns in :func:`_order`."""
    return block_diagonal(column_rotation, EDGE, torch.bfloat16, device, transposed=True)[:, _order()].contiguous()
