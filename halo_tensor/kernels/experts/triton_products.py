"""Grouped products by Triton, for every GPU and for Triton's interpreter.

Persistent programs compute tiles of results. Which expert a tile belongs to is read from the device, so the numbers of tokens
of experts are never known to the CPU. Where the GPU has TMA, operands are read through descriptors, and else by pointers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from halo_tensor.fences.fast_paths import TMA
from halo_tensor.kernels.device import has_tma
from halo_tensor.kernels.experts.request import GroupedRequest
from halo_tensor.kernels.experts.rows import load_tile
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.matmul.request import multiprocessors
from halo_tensor.kernels.matmul.tile_order import place_of
from halo_tensor.kernels.quantize.kernels import load_square
from halo_tensor.reference.experts import TILE
from halo_tensor.reference.hadamard import block_diagonal

#: How many columns one rotation matrix undoes, which is the width of a tile.
EDGE = 128


class Tile(NamedTuple):
    """The depth of a tile of 128×128, with warps, pipeline stages, programs that share a multiprocessor, and how many columns
    are un-rotated at a time."""

    k: int
    warps: int
    stages: int
    resident: int
    part: int


def tile_for(generation: int, integer: bool) -> Tile:
    """Return the tile of a product: that of dense products (halo_tensor/kernels/matmul/tma.py, sm80.py) whose kernels spill no
    registers."""
    if generation == 9:
        return Tile(128, 4, 3, 2, 64)
    if generation == 10:
        return Tile(128, 4 if integer else 8, 3, 2, 64)
    if generation == 12:
        return Tile(64, 4, 4, 2, 32)
    return Tile(64, 4, 4, 2, 64) if integer else Tile(64, 8, 4, 1, 64)


@triton.jit
def place_of_tile(
    tile, tiles, starts, tiles_m, tiles_n, K, N, GROUP: tl.constexpr, ALONG_TOKENS: tl.constexpr, T: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return of a tile of the result: its expert, its first row, the end of its rows, its column of tiles, the first row of
    b, the first element along the contraction, and how many steps of BK there are.

    An expert of −1 stands for rows of no expert, which get zeros. Without ALONG_TOKENS rows are those of a and of the result.
    With it they are rows of one expert's matrix, and the end tells how many tiles of tokens the expert has.
    """
    if ALONG_TOKENS:
        of_one = tiles_m * tiles_n
        expert = tile // of_one
        tile_m, tile_n = place_of(tile - expert * of_one, tiles_m, tiles_n, GROUP)
        begin = tl.load(starts + expert)
        count = tl.load(starts + expert + 1) - begin
        return expert, tile_m * BM, count, tile_n, tile_n * BN, begin * T, count * (T // BK)
    else:
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n, GROUP)
        expert, first, end = load_tile(tiles, tile_m)
        steps = tl.where(expert < 0, 0, tl.cdiv(K, BK))
        return expert, first, end, tile_n, tl.maximum(expert, 0) * N + tile_n * BN, 0, steps


@triton.jit
def _load(
    x, row, k, beyond, width, stride, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Load a tile of codes [BM, BK]. Rows from ``beyond`` on, and with MASKED columns from ``width`` on, are of no matter or
    zeros."""
    if TMA:
        return x.load([row, k])
    else:
        rows = tl.minimum(row + tl.arange(0, BM), beyond - 1)
        columns = k + tl.arange(0, BK)
        at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        if MASKED:
            return tl.load(at, mask=(columns < width)[None, :], other=0)
        return tl.load(at)


@triton.jit(do_not_specialize=["ROWS", "EXPERTS", "TILES"])
def grouped_kernel(
    a, b, out, tiles, starts, a_scale, b_scale, bias, weight, gain, right,
    ROWS, EXPERTS, TILES, M, N, K, stride_a, stride_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    PART: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    ALONG_TOKENS: tl.constexpr, INTEGER: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr,
    GAIN: tl.constexpr, RIGHT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store grouped products.

    Without ALONG_TOKENS: a is [ROWS, K] and b [EXPERTS · N, K]; out [ROWS, N]. With it: a is [M, K] and b [N, K], where K is
    T · TILES; out [EXPERTS · M, N]. EVEN: K is whole tiles of BK.
    """
    accumulator_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    tiles_n = tl.cdiv(N, BN)
    if ALONG_TOKENS:
        tiles_m = tl.cdiv(M, BM)
        total = EXPERTS * tiles_m * tiles_n
        rows_b = N
        rows_a = M
    else:
        tiles_m = tl.load(starts + EXPERTS + 1)
        total = tiles_m * tiles_n
        rows_b = EXPERTS * N
        rows_a = ROWS
    for tile in tl.range(tl.program_id(0), total, PROGRAMS):
        expert, first, end, tile_n, b_row, k_first, steps = place_of_tile(
            tile, tiles, starts, tiles_m, tiles_n, K, N, GROUP, ALONG_TOKENS, T, BM, BN, BK
        )
        acc = tl.zeros((BM, BN), dtype=accumulator_type)
        for k in range(steps):
            a_tile = _load(a, first, k_first + k * BK, rows_a, K, stride_a, BM, BK, TMA, not EVEN)
            b_tile = _load(b, b_row, k_first + k * BK, rows_b, K, stride_b, BN, BK, TMA, not EVEN)
            acc = tl.dot(a_tile, b_tile.T, acc, out_dtype=accumulator_type)
        # A result row's scale and place. Rows of no expert have neither scales nor products.
        row = first + tl.arange(0, BM)
        if ALONG_TOKENS:
            there = row < M
            at_row = expert.to(tl.int64) * M + row
            row_scale = tl.load(a_scale + at_row, mask=there, other=0.0)
        else:
            there = row < end
            at_row = row.to(tl.int64)
            row_scale = tl.load(a_scale + at_row, mask=there & (expert >= 0), other=0.0)
        _finish(
            acc, out, row_scale, b_scale, bias, weight, gain, right, at_row, there, expert, tile_n * BN, N,
            SCALED, BIASED and not ALONG_TOKENS, WEIGHTED, GAIN, RIGHT, NORM, PART,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, out, row_scale, b_scale, bias, weight, gain, right, at_row, there, expert, first, N,
    SCALED: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr, GAIN: tl.constexpr, RIGHT: tl.constexpr,
    NORM: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store a tile of ((diag(row_scale) acc diag(b_scale)) Rᵀ_right diag(gain) + bias) · weight."""
    BN: tl.constexpr = acc.shape[1]
    y = acc.to(tl.float32)
    SHIFT: tl.constexpr = 128.0 if SCALED else 1.0  # see reference.ops.SHIFT
    if SCALED:
        columns = first + tl.arange(0, BN)
        of_expert = b_scale + expert.to(tl.int64) * N
        y = y * (tl.load(of_expert + columns, mask=(columns < N) & (expert >= 0), other=0.0) * (1.0 / SHIFT))[None, :]
    row_scale = row_scale * (SHIFT * NORM)
    if RIGHT:
        if PART < BN:
            depth = tl.arange(0, BN)
            for i in tl.static_range(BN // PART):
                part = i * PART + tl.arange(0, PART)
                h = tl.load(right + depth[:, None] * BN + part[None, :])
                z = tl.dot(y.to(h.dtype), h, out_dtype=tl.float32) * row_scale[:, None]
                _store(out, z, bias, weight, gain, at_row, there, expert, first + part, N, BIASED, WEIGHTED, GAIN)
        else:
            h = load_square(right, BN)
            z = tl.dot(y.to(h.dtype), h, out_dtype=tl.float32) * row_scale[:, None]
            _store(
                out, z, bias, weight, gain, at_row, there, expert, first + tl.arange(0, BN), N, BIASED, WEIGHTED, GAIN
            )  # fmt: skip
    else:
        z = y * row_scale[:, None]
        _store(out, z, bias, weight, gain, at_row, there, expert, first + tl.arange(0, BN), N, BIASED, WEIGHTED, GAIN)


@triton.jit
def _store(
    out, y, bias, weight, gain, at_row, there, expert, columns, N,
    BIASED: tl.constexpr, WEIGHTED: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    if GAIN:
        y = y * tl.load(gain + columns, mask=columns < N, other=0.0)[None, :]
    if BIASED:
        of_expert = bias + expert.to(tl.int64) * N
        y = y + tl.load(of_expert + columns, mask=(columns < N) & (expert >= 0), other=0.0).to(tl.float32)[None, :]
    if WEIGHTED:
        y = y * tl.load(weight + at_row, mask=there, other=0.0)[:, None]
    inside = there[:, None] & (columns < N)[None, :]
    tl.store(out + at_row[:, None] * N + columns[None, :], y.to(out.dtype.element_ty), mask=inside)


def why_not(request: GroupedRequest) -> str | None:
    """Return None, because it serves every product."""
    return None


def plan(request: GroupedRequest) -> Planned:
    """Return the launches of a product. A call takes (rows, experts, tiles, m, n, k, row strides of a and of b)."""
    device = request.device
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    tile = tile_for(generation, request.integer)
    # The kernel reads operands through pointers if the GPU has no TMA, or if HALO_DISABLE names it.
    programs, tma = multiprocessors(device) * tile.resident, has_tma(device) and TMA.why_off() is None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # Triton's interpreter has no 16-bit products
    matrix = block_diagonal(request.rotation, EDGE, dtype, device, transposed=True) if request.rotation else None

    def prepare(even: bool) -> Variant:
        constants = {
            "BM": TILE, "BN": EDGE, "BK": tile.k, "T": TILE, "GROUP": 8, "PROGRAMS": programs, "PART": tile.part, "TMA": tma,
            "EVEN": even or tma, **request.constants, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        blocks = ((TILE, tile.k), (EDGE, tile.k)) if tma else ()
        return Variant(Launch(grouped_kernel, constants, blocks), sizes, (matrix,))

    def sizes(rows: int, experts: int, tiles: int, m: int, n: int, k: int, stride_a: int, stride_b: int) -> tuple:
        height, b_rows = (m, n) if request.along_tokens else (rows, experts * n)
        tiles_m = experts * cdiv(m, TILE) if request.along_tokens else tiles
        grid = (min(programs, tiles_m * cdiv(n, EDGE)),)
        extents = ((height, k, stride_a), (b_rows, k, stride_b)) if tma else ()
        return grid, (rows, experts, tiles, m, n, k, stride_a, stride_b), extents

    def classify(rows: int, experts: int, tiles: int, m: int, n: int, k: int, *strides: int) -> bool:
        return k % tile.k == 0

    return Planned(prepare, classify)
