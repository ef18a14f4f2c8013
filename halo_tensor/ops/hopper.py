"""The product of :mod:`halo_tensor.ops.scaled_mm` on SM 9.0, in Gluon: where Triton's compiler falls short of the unit.

Triton 3.6 waits for every integer ``wgmma`` before it issues the next, and a rotation that is undone by a product ends the
pipeline of loads (ptxas C7515). Here one ``wgmma`` is always in flight, loads run ahead from tile to tile, and a rotation is
undone by butterflies on the float32 accumulator: sums and differences of columns that one thread holds or four lanes share.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from halo_tensor.ops.device import is_hopper
from halo_tensor.ops.hadamard import rotation_signs
from halo_tensor.ops.launch import Launch, Tiles
from halo_tensor.ops.rotate import Matrix, norm
from halo_tensor.ops.schemas import INTERPRETED
from halo_tensor.ops.tile_order import place_of
from halo_tensor.recipe import Rotation

#: An output tile and its depth, and how many are loaded ahead: what fills the shared memory and the registers of an SM.
BM, BN, BK, STAGES, WARPS = 128, 256, 128, 4, 8
GROUP = 8  # see place_of
_CODES = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5}


_place_of = gluon.jit(place_of.fn)


@gluon.jit
def _load(a, b, a_tiles, b_tiles, arrived, slot, tile_m, tile_n, k, wanted):
    """Begin to load the k-th tiles of both operands into ``slot``, if ``wanted``."""
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    barrier = arrived.index(slot)
    mbarrier.expect(barrier, a.block_type.nbytes + b.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(a, [tile_m * BM, k * BK], barrier, a_tiles.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(b, [tile_n * BN, k * BK], barrier, b_tiles.index(slot), pred=wanted)


@gluon.jit
def _next(tile, tile_m, tile_n, k, steps, tiles_m, tiles_n, GROUP: gl.constexpr, PROGRAMS: gl.constexpr):
    """What this program loads after the k-th tiles of ``tile``."""
    k += 1
    if k == steps:
        k = 0
        tile += PROGRAMS
        tile_m, tile_n = _place_of(tile, tiles_m, tiles_n, GROUP, True)
    return tile, tile_m, tile_n, k


@gluon.jit
def _butterfly(y, SPAN: gl.constexpr):
    """Sums and differences of columns ``SPAN`` apart, both of which a thread holds."""
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    pairs = y.reshape([ROWS, COLUMNS // (2 * SPAN), 2, SPAN]).permute([0, 1, 3, 2])
    low, high = gl.split(pairs)
    y_new = gl.join(low + high, low - high).permute([0, 1, 3, 2]).reshape([ROWS, COLUMNS])
    return gl.convert_layout(y_new, y.type.layout, assert_trivial=True)


@gluon.jit
def _butterfly_of_lanes(y, columns, SPAN: gl.constexpr):
    """The same of columns that lanes ``SPAN`` / 2 apart hold: in an accumulator of wgmma a lane has two columns of eight."""
    LANES: gl.constexpr = SPAN // 2
    assembly: gl.constexpr = f"shfl.sync.bfly.b32 $0, $1, {LANES}, 0x1f, 0xffffffff;"
    other = gl.inline_asm_elementwise(assembly, "=r,r", [y], dtype=gl.float32, is_pure=False, pack=1)
    sign = gl.where((columns & SPAN) == 0, 1.0, -1.0)
    return y * sign[None, :] + other


@gluon.jit
def _unrotate(y, columns, BLOCK: gl.constexpr):
    """y · (I ⊗ H_BLOCK), Sylvester's H of 16 to 128."""
    y = _butterfly(y, 1)
    y = _butterfly_of_lanes(y, columns, 2)
    y = _butterfly_of_lanes(y, columns, 4)
    y = _butterfly(y, 8)
    if BLOCK > 16:
        y = _butterfly(y, 16)
    if BLOCK > 32:
        y = _butterfly(y, 32)
    if BLOCK > 64:
        y = _butterfly(y, 64)
    return y


@gluon.constexpr_function
def _rows_of_eight(m, n, warps):
    """An accumulator's layout, but that a thread holds 8 columns in a row, for wide stores: groups of four lanes exchange."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 1 << i] for i in range(5, n.bit_length() - 1)]
    above = [[16 << i, 0] for i in range(m.bit_length() - 5)]  # the rows of one instruction
    split = warps.bit_length() - 1
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers + above[split:], lanes, above[:split], [], [m, n])


@gluon.jit
def wgmma_kernel(
    a, b, out, a_scale, b_scale, gain, bias, signs,
    M, N, K,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, INTEGER: gl.constexpr, A_SCALE: gl.constexpr,
    B_SCALE: gl.constexpr, GAIN: gl.constexpr, BIASED: gl.constexpr, BLOCK: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """As :func:`halo_tensor.ops.scaled_mm.scaled_mm_kernel`, of an ``out`` [M, N] that is contiguous. BLOCK: of the rotation
    that is undone on the right, whose ``signs`` are [BLOCK]; 0 for none."""
    gl.static_assert(STAGES > 1, "with one stage there is none to load into while another is multiplied")
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    accumulator_type: gl.constexpr = gl.int32 if INTEGER else gl.float32
    # Triton's integer wgmma is at most 128 columns wide.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128 if INTEGER else 256, 32])
    stored: gl.constexpr = _rows_of_eight(BM, BN, WARPS)

    tiles_m, tiles_n, steps = gl.cdiv(M, BM), gl.cdiv(N, BN), gl.cdiv(K, BK)
    first = gl.program_id(0)
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, BN, BK], b.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()

    to_load = gl.cdiv(tiles_m * tiles_n - first, PROGRAMS) * steps
    tile_m, tile_n = _place_of(first, tiles_m, tiles_n, GROUP, True)
    ahead, ahead_m, ahead_n, ahead_k = first, tile_m, tile_n, 0
    for i in gl.static_range(STAGES - 1):
        _load(a, b, a_tiles, b_tiles, arrived, i, ahead_m, ahead_n, ahead_k, to_load > 0)
        to_load -= 1
        ahead, ahead_m, ahead_n, ahead_k = _next(ahead, ahead_m, ahead_n, ahead_k, steps, tiles_m, tiles_n, GROUP, PROGRAMS)

    slot, free, phase = 0, STAGES - 1, 0
    for tile in range(first, tiles_m * tiles_n, PROGRAMS):
        tile_m, tile_n = _place_of(tile, tiles_m, tiles_n, GROUP, True)
        acc = gl.zeros([BM, BN], accumulator_type, layout)
        for _ in range(steps):
            mbarrier.wait(arrived.index(slot), phase)
            acc = warpgroup_mma(a_tiles.index(slot), b_tiles.index(slot).permute((1, 0)), acc, is_async=True)
            # The product before this one is done, so its tiles can be overwritten: by all warps, since Triton puts a barrier
            # before a load that may meet reads of the same memory.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _load(a, b, a_tiles, b_tiles, arrived, free, ahead_m, ahead_n, ahead_k, to_load > 0)
            to_load -= 1
            ahead, ahead_m, ahead_n, ahead_k = _next(
                ahead, ahead_m, ahead_n, ahead_k, steps, tiles_m, tiles_n, GROUP, PROGRAMS
            )
            free = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))

        y = acc.to(gl.float32)
        rows = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, layout))
        columns = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
        if B_SCALE == 2:
            y = y * gl.load(b_scale + columns, mask=columns < N, other=0.0)[None, :]
        row_scale = gl.full([BM], 1.0, gl.float32, gl.SliceLayout(1, layout))
        if A_SCALE == 2:
            row_scale = gl.load(a_scale + rows, mask=rows < M, other=0.0)
        if A_SCALE == 1:
            row_scale = row_scale * gl.load(a_scale)
        if B_SCALE == 1:
            row_scale = row_scale * gl.load(b_scale)
        if BLOCK > 0:
            y = _unrotate(y, columns, BLOCK) * gl.load(signs + columns % BLOCK)[None, :]
            row_scale = row_scale * NORM
        if A_SCALE > 0 or B_SCALE == 1 or BLOCK > 0:
            y = y * row_scale[:, None]
        if GAIN:
            y = y * gl.load(gain + columns, mask=columns < N, other=0.0)[None, :]
        if BIASED:
            y = y + gl.load(bias + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]

        y = gl.convert_layout(y.to(out.dtype.element_ty), stored)
        rows = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, stored))
        columns = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, stored))
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        gl.store(out + rows.to(gl.int64)[:, None] * N + columns[None, :], y, mask=inside)


def suits(a: Matrix, b_t: Matrix, left: Rotation | None, right: Rotation | None, multiprocessors: int) -> bool:
    """Whether there is such a unit, tiles for most multiprocessors, rows that wide stores can write, and something to gain:
    fp8 without an un-rotation is as fast without (bench/NOTES.md)."""
    m, n = a.shape[0], b_t.shape[0]
    return (
        is_hopper(a.device)
        and not INTERPRETED
        and left is None
        and (a.dtype == torch.int8 or right is not None)
        and triton.cdiv(m, BM) * triton.cdiv(n, BN) >= 0.7 * multiprocessors
        and m > BM // 2
        and n % 8 == 0
    )


def plan(
    a: Matrix, b_t: Matrix, right: Rotation | None, constants: dict[str, Any], multiprocessors: int
) -> tuple[Launch, tuple]:
    """As ``scaled_mm._plan``, which gives those of the constants that both kernels have."""
    (m, k), n = a.shape, b_t.shape[0]
    programs = min(multiprocessors, triton.cdiv(m, BM) * triton.cdiv(n, BN))
    constants = {
        "STAGES": STAGES, "GROUP": GROUP, "PROGRAMS": programs, **constants,
        "BLOCK": right.edge if right else 0, "NORM": norm(None, right), "num_warps": WARPS,
    }  # fmt: skip
    tiles = Tiles((m, k), a.stride, (BM, BK)), Tiles((n, k), b_t.stride, (BN, BK))
    signs = rotation_signs(right, a.device) if right else None
    return Launch(wgmma_kernel, (programs,), (m, n, k), constants, tiles), (signs,)


@lru_cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([*block], _CODES[dtype])


def descriptor(tiles: Tiles, base: torch.Tensor) -> TensorDescriptor:
    """Gluon's, which says how tiles lie in shared memory."""
    return TensorDescriptor(base, [*tiles.shape], [*tiles.strides], [*tiles.block], _layout(tiles.block, base.dtype))
