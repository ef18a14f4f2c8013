"""Trial: sm90.py with rotations of 128 columns undone by halves. Grouped products by Gluon for SM 9.0: the pipeline of :mod:`halo_tensor.kernels.matmul.sm90`, over tiles of groups.

Loads run ahead from tile to tile, also across experts. Which rows, columns and depths a tile has is read from the device.
"""

from functools import lru_cache
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
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.matmul.request import multiprocessors
from halo_tensor.kernels.matmul.sm90 import EDGE, _in_order, _order, _rows_of_eight
from halo_tensor.kernels.matmul.tile_order import place_of
from halo_tensor.recipe import Rotation
from halo_tensor.reference.experts import TILE
from halo_tensor.reference.hadamard import block_diagonal


class Config(NamedTuple):
    """How a product is cut: the columns of a tile of TILE rows and its depth, pipeline stages, warps, programs that share a
    multiprocessor, and the rows of tiles in a group (see place_of)."""

    columns: int
    depth: int
    stages: int
    warps: int
    resident: int
    group: int


#: The tile of products of rows, and of those along tokens.
ROWS, TOKENS = Config(256, 128, 4, 8, 1, 8), Config(256, 128, 4, 8, 1, 8)

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


@gluon.jit
def _store(
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
def _halves(y, HALVED: gl.constexpr):
    """Return both halves of the columns of y [·, 128]. HALVED: their sum and their difference, which is the first step of an
    un-rotation of 128 columns; products with 64 rows of its matrix are the rest."""
    y0, y1 = gl.split(y.reshape([y.shape[0], 2, 64]).permute([0, 2, 1]))
    if HALVED:
        return y0 + y1, y0 - y1
    else:
        return y0, y1


@gluon.jit
def _undo(
    out, y, h, gain, bias, weight, place, first_column, GAIN: gl.constexpr, BIASED: gl.constexpr, WEIGHTED: gl.constexpr
):  # fmt: skip
    """Multiply y [·, 64] with h, and store it."""
    unrotated: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 64, 16])
    y = gl.convert_layout(y.to(gl.bfloat16), gl.DotOperandLayout(0, unrotated, 2), assert_trivial=True)
    nothing = gl.zeros([y.shape[0], 64], gl.float32, unrotated)
    y = warpgroup_mma(y, h, nothing, use_acc=False, is_async=True)
    y = warpgroup_mma_wait(0, deps=(y,))
    _store(out, _in_order(y), gain, bias, weight, place, first_column, GAIN, BIASED, WEIGHTED)


@gluon.jit(do_not_specialize=["ROWS", "EXPERTS", "TILES"])
def grouped_wgmma_kernel(
    a, b, out, tiles, starts, a_scale, b_scale, bias, weight, gain, right,
    ROWS, EXPERTS, TILES, M, N, K, stride_a, stride_b,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, T: gl.constexpr,
    ALONG_TOKENS: gl.constexpr, INTEGER: gl.constexpr, SCALED: gl.constexpr, BIASED: gl.constexpr, WEIGHTED: gl.constexpr,
    GAIN: gl.constexpr, RIGHT: gl.constexpr, NORM: gl.constexpr, HALVED: gl.constexpr,
):  # fmt: skip
    """Do what :func:`halo_tensor.kernels.experts.triton_products.grouped_kernel` does.

    RIGHT: ``right`` [2, 64, 64], of :func:`_undoing`, undoes a rotation of columns. HALVED: its blocks have 128 columns.
    """
    gl.static_assert(STAGES > 1, "with one stage there is none to load into while another is multiplied")
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
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
        at: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
        row, column = gl.arange(0, 64, gl.SliceLayout(1, at)), gl.arange(0, 64, gl.SliceLayout(0, at))
        matrix = right + row[:, None] * 64 + column[None, :]
        swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
        h0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], swizzled, gl.load(matrix))
        h1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], swizzled, gl.load(matrix + 64 * 64))
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()

    # What is loaded next: step ahead_k of tile ``ahead``.
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
        if RIGHT:
            if BN == 128:
                y0, y1 = _halves(y, HALVED)
                _undo(out, y0, h0, gain, bias, weight, place, tile_n * BN, GAIN, BIASED, WEIGHTED)
                _undo(out, y1, h1, gain, bias, weight, place, tile_n * BN + 64, GAIN, BIASED, WEIGHTED)
            else:
                left, right_half = gl.split(y.reshape([BM, 2, 128]).permute([0, 2, 1]))
                y0, y1 = _halves(left, HALVED)
                _undo(out, y0, h0, gain, bias, weight, place, tile_n * BN, GAIN, BIASED, WEIGHTED)
                _undo(out, y1, h1, gain, bias, weight, place, tile_n * BN + 64, GAIN, BIASED, WEIGHTED)
                y0, y1 = _halves(right_half, HALVED)
                _undo(out, y0, h0, gain, bias, weight, place, tile_n * BN + 128, GAIN, BIASED, WEIGHTED)
                _undo(out, y1, h1, gain, bias, weight, place, tile_n * BN + 192, GAIN, BIASED, WEIGHTED)
        else:
            _store(out, y, gain, bias, weight, place, tile_n * BN, GAIN, BIASED, WEIGHTED)


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
    made = _variant(request, TOKENS if request.along_tokens else ROWS)
    return Planned(lambda _: made)


def _variant(request: GroupedRequest, config: Config) -> Variant:
    most = multiprocessors(request.device) * config.resident
    constants = {
        "STAGES": config.stages, "GROUP": config.group, "PROGRAMS": most, "T": TILE, **request.constants,
        "HALVED": request.rotation is not None and request.rotation.edge == 128, "num_warps": config.warps,
    }  # fmt: skip

    def sizes(rows: int, experts: int, tiles: int, m: int, n: int, k: int, stride_a: int, stride_b: int) -> tuple:
        height, b_rows = (m, n) if request.along_tokens else (rows, experts * n)
        tiles_m = experts * cdiv(m, TILE) if request.along_tokens else tiles
        grid = (min(most, tiles_m * cdiv(n, config.columns)),)
        extents = ((height, k, stride_a), (b_rows, k, stride_b))
        return grid, (rows, experts, tiles, m, n, k, stride_a, stride_b), extents

    matrix = _undoing(request.rotation, request.device) if request.rotation else None
    launch = Launch(grouped_wgmma_kernel, constants, ((TILE, config.depth), (config.columns, config.depth)))
    example = launch.sizes(*sizes(TILE, 16, 16, TILE, EDGE, TILE, TILE, TILE))
    launch.compile(request.device, _dtypes(request), example)
    return Variant(launch, sizes, (matrix,))


@lru_cache(maxsize=256)
def _undoing(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """Return what undoes a rotation of 128 columns by two products of 64, bfloat16 [2, 64, 64].

    H₁₂₈ = H₂ ⊗ H₆₄, so with halves of columns y₀ and y₁, (y₀ + y₁) is multiplied with the first rows of the first half of the
    matrix, and (y₀ − y₁) with those of its second half. Smaller blocks undo each half by itself. This takes half of the
    operations of one product of 128. Columns are in the order of halo_tensor/kernels/matmul/sm90.py.
    """
    matrix = block_diagonal(rotation, EDGE, torch.bfloat16, device, transposed=True)
    first, second = matrix[:64, :64], matrix[:64, 64:] if rotation.edge == EDGE else matrix[64:, 64:]
    order = _order()[:64].to(device)
    return torch.stack([first[:, order], second[:, order]]).contiguous()


def _dtypes(request: GroupedRequest) -> tuple[torch.dtype, ...]:
    """Return the dtypes of a launch's tensors. Those that are not given have the dtype of a."""
    vectors = {
        "tiles": None if request.along_tokens else torch.int32, "starts": torch.int32, "a_scale": torch.float32,
        "b_scale": torch.float32 if request.scaled else None, "bias": request.bias,
        "weight": torch.float32 if request.weighted else None, "gain": torch.float32 if request.gain else None,
        "right": torch.bfloat16 if request.rotation else None,
    }  # fmt: skip
    return request.code, request.code, request.dtype, *(dtype or request.code for dtype in vectors.values())
