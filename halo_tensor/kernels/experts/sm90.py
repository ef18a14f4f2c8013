"""Grouped products by Gluon for SM 9.0: the pipeline of :mod:`halo_tensor.kernels.matmul.sm90`, over tiles of groups.

Loads run ahead from tile to tile, also across experts. Which rows, columns and depths a tile has is read from the device.
"""

from typing import NamedTuple

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
from halo_tensor.kernels.experts.request import GroupedRequest
from halo_tensor.kernels.experts.sm90_epilogue import HALF, halves, split_columns, start_to_undo, store, undo_by_halves
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.matmul.request import multiprocessors
from halo_tensor.kernels.matmul.sm90 import EDGE, _in_order, _matrix
from halo_tensor.kernels.matmul.tile_order import place_of
from halo_tensor.reference.experts import TILE


class Config(NamedTuple):
    """How a product is cut: the columns of a tile of TILE rows and its depth, pipeline stages, warps, programs that share a
    multiprocessor, and the rows of tiles in a group (see place_of)."""

    columns: int
    depth: int
    stages: int
    warps: int
    resident: int
    group: int


#: The tile of products of rows and of those along tokens; and that of int8 products of rows without an un-rotation that sum
#: at most SHORT elements, where a second program multiplies while one stores (docs/notes/experts.md).
ROWS, TOKENS, SHORT_ROWS = Config(256, 128, 4, 8, 1, 8), Config(256, 128, 4, 8, 1, 8), Config(128, 128, 3, 4, 2, 8)
SHORT = 4096

_place_of = gluon.jit(place_of.fn)


@gluon.jit
def _work(
    tile, total, tiles, starts, tiles_m, tiles_n, steps, N,
    GROUP: gl.constexpr, ALONG_TOKENS: gl.constexpr, T: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Return of a tile of the result: its expert, its first row, the end of its rows, its column of tiles, the first row of b,
    the first element along the contraction, and how many steps there are.

    There is at least one step, so that loads need not skip tiles; the result of a tile without rows or tokens is replaced by
    zeros. Without ALONG_TOKENS an expert of −1 stands for rows of no expert. With it the end is the number of tiles of tokens.
    """
    tile = gl.minimum(tile, total - 1)
    if ALONG_TOKENS:
        of_one = tiles_m * tiles_n
        expert = tile // of_one
        tile_m, tile_n = _place_of(tile - expert * of_one, tiles_m, tiles_n, GROUP, True)
        begin = gl.load(starts + expert)
        end = gl.load(starts + expert + 1) - begin
        first = tile_m * T
        b_row = tile_n * BN
        k_first = begin * T
        count = gl.maximum(end * (T // BK), 1)
    else:
        tile_m, tile_n = _place_of(tile, tiles_m, tiles_n, GROUP, True)
        expert = gl.load(tiles + tile_m * 4)
        first = gl.load(tiles + tile_m * 4 + 1)
        end = gl.load(tiles + tile_m * 4 + 2)
        b_row = gl.maximum(expert, 0) * N + tile_n * BN
        k_first = 0
        count = gl.where(expert < 0, 1, steps)
    return expert, first, end, tile_n, b_row, k_first, count


@gluon.jit
def _load(a, b, a_tiles, b_tiles, arrived, slot, a_row, b_row, k, wanted):
    """Start to load tiles of both operands to ``slot``, if ``wanted``."""
    barrier = arrived.index(slot)
    mbarrier.expect(barrier, a.block_type.nbytes + b.block_type.nbytes, pred=wanted)
    async_load(a, [a_row, k], barrier, a_tiles.index(slot), pred=wanted)
    async_load(b, [b_row, k], barrier, b_tiles.index(slot), pred=wanted)


@gluon.jit(do_not_specialize=["ROWS", "EXPERTS", "TILES"])
def grouped_wgmma_kernel(
    a, b, out, tiles, starts, a_scale, b_scale, bias, weight, gain, right,
    ROWS, EXPERTS, TILES, M, N, K, stride_a, stride_b,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, T: gl.constexpr,
    ALONG_TOKENS: gl.constexpr, INTEGER: gl.constexpr, SCALED: gl.constexpr, BIASED: gl.constexpr, WEIGHTED: gl.constexpr,
    GAIN: gl.constexpr, RIGHT: gl.constexpr, NORM: gl.constexpr, HALVED: gl.constexpr, UNDONE: gl.constexpr,
):  # fmt: skip
    """Do what :func:`halo_tensor.kernels.experts.triton_products.grouped_kernel` does.

    RIGHT: ``right`` [128, UNDONE], with its columns in the order of halo_tensor/kernels/matmul/sm90.py, undoes a rotation of
    columns, UNDONE at once: 128; or 64 along tokens, see :func:`halo_tensor.kernels.experts.sm90_epilogue.undo_by_halves`.
    """
    gl.static_assert(STAGES > 1, "with one stage there is none to load into while another is multiplied")
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    WIDE: gl.constexpr = BN // 2
    WARPS: gl.constexpr = gl.num_warps()
    accumulator_type: gl.constexpr = gl.int32 if INTEGER else gl.float32
    # Triton's integer wgmma is at most 128 columns wide.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128 if INTEGER else BN, 32])

    steps, tiles_n = gl.cdiv(K, BK), gl.cdiv(N, BN)
    if ALONG_TOKENS:
        tiles_m = gl.cdiv(M, BM)
        total = EXPERTS * tiles_m * tiles_n
    else:
        tiles_m = gl.load(starts + EXPERTS + 1)
        total = tiles_m * tiles_n
    tile = gl.program_id(0)
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, BN, BK], b.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if RIGHT:
        gl.static_assert(BN == 256, "a rotation is undone in two parts of 128 columns")
        at: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16] if UNDONE == 128 else [4, 8], [WARPS, 1], [1, 0])
        row, column = gl.arange(0, UNDONE, gl.SliceLayout(1, at)), gl.arange(0, UNDONE, gl.SliceLayout(0, at))
        matrix = right + row[:, None] * UNDONE + column[None, :]
        swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([UNDONE, UNDONE], gl.bfloat16)
        h0 = gl.allocate_shared_memory(gl.bfloat16, [UNDONE, UNDONE], swizzled, gl.load(matrix))
        h1 = h0
        if UNDONE == 64:
            h1 = gl.allocate_shared_memory(gl.bfloat16, [UNDONE, UNDONE], swizzled, gl.load(matrix + UNDONE * UNDONE))
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()

    # The next load is of step ahead_k of tile ``ahead``.
    ahead, ahead_k = tile, 0
    _, a_row, _, _, b_row, k_first, count = _work(
        ahead, total, tiles, starts, tiles_m, tiles_n, steps, N, GROUP, ALONG_TOKENS, T, BN, BK
    )
    for i in gl.static_range(STAGES - 1):
        _load(a, b, a_tiles, b_tiles, arrived, i, a_row, b_row, k_first + ahead_k * BK, ahead < total)
        ahead_k += 1
        if ahead_k >= count:
            ahead_k = 0
            ahead += PROGRAMS
            _, a_row, _, _, b_row, k_first, count = _work(
                ahead, total, tiles, starts, tiles_m, tiles_n, steps, N, GROUP, ALONG_TOKENS, T, BN, BK
            )

    slot, free, phase = 0, STAGES - 1, 0
    for tile in range(gl.program_id(0), total, PROGRAMS):
        expert, first, end, tile_n, _, _, mine = _work(
            tile, total, tiles, starts, tiles_m, tiles_n, steps, N, GROUP, ALONG_TOKENS, T, BN, BK
        )
        acc = gl.zeros([BM, BN], accumulator_type, layout)
        for _ in range(mine):
            mbarrier.wait(arrived.index(slot), phase)
            acc = warpgroup_mma(a_tiles.index(slot), b_tiles.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _load(a, b, a_tiles, b_tiles, arrived, free, a_row, b_row, k_first + ahead_k * BK, ahead < total)
            ahead_k += 1
            if ahead_k >= count:
                ahead_k = 0
                ahead += PROGRAMS
                _, a_row, _, _, b_row, k_first, count = _work(
                    ahead, total, tiles, starts, tiles_m, tiles_n, steps, N, GROUP, ALONG_TOKENS, T, BN, BK
                )
            free = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))

        y = acc.to(gl.float32)
        rows = gl.arange(0, BM, gl.SliceLayout(1, layout))
        if SCALED:
            columns = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
            of_expert = b_scale + gl.maximum(expert, 0).to(gl.int64) * N
            y = y * gl.load(of_expert + columns, mask=columns < N, other=0.0)[None, :]
        if ALONG_TOKENS:
            valid = end
            at_row = expert.to(gl.int64) * M + first
            beyond = M
        else:
            valid = expert + 1
            at_row = first.to(gl.int64)
            beyond = end
        row_scale = gl.load(a_scale + at_row + rows, mask=(first + rows < beyond) & (expert >= 0), other=0.0)
        if RIGHT:
            row_scale = row_scale * NORM
        y = y * row_scale[:, None]
        place = (expert, at_row, first, beyond, N, valid)
        if RIGHT and ALONG_TOKENS:
            y0, y1 = split_columns(y)
            undo_by_halves(
                out, y0, h0, h1, gain, bias, weight, place, tile_n * BN, HALVED, GAIN, BIASED, WEIGHTED
            )  # fmt: skip
            undo_by_halves(
                out, y1, h0, h1, gain, bias, weight, place, tile_n * BN + WIDE, HALVED, GAIN, BIASED, WEIGHTED
            )  # fmt: skip
        elif RIGHT:
            y0, y1 = split_columns(y.to(gl.bfloat16))
            y0, y1 = start_to_undo(y0, h0), start_to_undo(y1, h0)
            y0 = warpgroup_mma_wait(1, deps=(y0,))
            store(out, _in_order(y0), gain, bias, weight, place, tile_n * BN, GAIN, BIASED, WEIGHTED)
            y1 = warpgroup_mma_wait(0, deps=(y1,))
            store(out, _in_order(y1), gain, bias, weight, place, tile_n * BN + WIDE, GAIN, BIASED, WEIGHTED)
        else:
            store(out, y, gain, bias, weight, place, tile_n * BN, GAIN, BIASED, WEIGHTED)


def why_not(request: GroupedRequest) -> str | None:
    """Return the reason to decline: this kernel cannot serve the product. None if it can."""
    if not is_hopper(request.device) or INTERPRETED:
        return "it is for GPUs of SM 9.0"
    return None


def plan(request: GroupedRequest) -> Planned | None:
    """Return the launches of a product; None after a warning if the kernel does not compile.

    A call takes (rows, experts, tiles, m, n, k, row strides of a and of b).
    """
    return GLUON.attempt(_plan, request)


def _plan(request: GroupedRequest) -> Planned:
    usual = _variant(request, TOKENS if request.along_tokens else ROWS)
    if request.along_tokens or request.rotation is not None or not request.integer:
        return Planned(lambda _: usual)
    short = _variant(request, SHORT_ROWS)

    def is_short(rows: int, experts: int, tiles: int, m: int, n: int, k: int, *strides: int) -> bool:
        return k <= SHORT

    return Planned(lambda is_short: short if is_short else usual, is_short)


def _variant(request: GroupedRequest, config: Config) -> Variant:
    """Return the launch of products that are cut as ``config`` says. The kernel is compiled here, where another backend can
    still take its place."""
    most = multiprocessors(request.device) * config.resident
    constants = {
        "STAGES": config.stages, "GROUP": config.group, "PROGRAMS": most, "T": TILE, **request.constants,
        "HALVED": request.rotation is not None and request.rotation.edge == EDGE,
        "UNDONE": HALF if request.along_tokens else EDGE, "num_warps": config.warps,
    }  # fmt: skip

    def sizes(rows: int, experts: int, tiles: int, m: int, n: int, k: int, stride_a: int, stride_b: int) -> tuple:
        height, b_rows = (m, n) if request.along_tokens else (rows, experts * n)
        tiles_m = experts * cdiv(m, TILE) if request.along_tokens else tiles
        grid = (min(most, tiles_m * cdiv(n, config.columns)),)
        extents = ((height, k, stride_a), (b_rows, k, stride_b))
        return grid, (rows, experts, tiles, m, n, k, stride_a, stride_b), extents

    undoing = halves if request.along_tokens else _matrix
    matrix = undoing(request.rotation, request.device) if request.rotation else None
    launch = Launch(grouped_wgmma_kernel, constants, ((TILE, config.depth), (config.columns, config.depth)))
    example = launch.sizes(*sizes(TILE, 16, 16, TILE, EDGE, TILE, TILE, TILE))
    launch.compile(request.device, _dtypes(request), example)
    return Variant(launch, sizes, (matrix,))


def _dtypes(request: GroupedRequest) -> tuple[torch.dtype, ...]:
    """Return the dtypes of a launch's tensors. Those that are not given have the dtype of a."""
    vectors = {
        "tiles": None if request.along_tokens else torch.int32, "starts": torch.int32, "a_scale": torch.float32,
        "b_scale": torch.float32 if request.scaled else None, "bias": request.bias,
        "weight": torch.float32 if request.weighted else None, "gain": torch.float32 if request.gain else None,
        "right": torch.bfloat16 if request.rotation else None,
    }  # fmt: skip
    return request.code, request.code, request.dtype, *(dtype or request.code for dtype in vectors.values())
