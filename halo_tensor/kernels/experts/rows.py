"""Kernels that move rows and tiles of experts: how groups are cut, copies of codes, and the sum over a token's experts.

:mod:`halo_tensor.reference.experts` defines what they compute. Codes are moved as bytes.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.reference.experts import TILE, tile_count

#: Tiles whose experts a program finds at a time.
_BLOCK = 16


@triton.jit(do_not_specialize=["ROWS", "EXPERTS", "TILES"])
def tiles_kernel(
    offs, tiles, starts, ROWS, EXPERTS, TILES, WIDTH: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Store the tiles of groups that end at offs [EXPERTS]. WIDTH: a power of two, at least EXPERTS + 2."""
    e = tl.arange(0, WIDTH)
    ends = tl.load(offs + e, mask=e < EXPERTS, other=ROWS)
    # The rows after the last group are a group of their own, and there are none beyond it.
    begins = tl.load(offs + e - 1, mask=(e > 0) & (e <= EXPERTS), other=0)
    begins = tl.where(e > EXPERTS, ROWS, begins)
    counts = tl.maximum(ends - begins + (T - 1), 0) // T
    after = tl.cumsum(counts, 0)
    first = after - counts
    if tl.program_id(0) == 0:
        tl.store(starts + e, first, mask=e < EXPERTS + 2)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((after[None, :] <= tile[:, None]).to(tl.int32), 1)
    mine = expert[:, None] == e[None, :]
    place = tile - tl.sum(tl.where(mine, first[None, :], 0), 1)
    row = tl.sum(tl.where(mine, begins[None, :], 0), 1) + place * T
    end = tl.minimum(row + T, tl.sum(tl.where(mine, ends[None, :], 0), 1))
    there = expert <= EXPERTS
    at, inside = tiles + tile * 4, tile < TILES
    tl.store(at, tl.where(expert < EXPERTS, expert, -1), mask=inside)
    tl.store(at + 1, tl.where(there, row, 0), mask=inside)
    tl.store(at + 2, tl.where(there, end, 0), mask=inside)
    tl.store(at + 3, tl.zeros_like(tile), mask=inside)


@triton.jit(do_not_specialize=["ROWS"])
def gather_kernel(codes, scales, index, out, out_scales, ROWS, stride, stride_out, C, BM: tl.constexpr, BC: tl.constexpr):
    """Store rows of codes [·, C] and of scales that index [ROWS] names. A program takes BM rows and BC columns."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    at = tl.load(index + rows, mask=rows < ROWS, other=0)
    inside = (rows < ROWS)[:, None] & (columns < C)[None, :]
    block = tl.load(codes + at.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0)
    tl.store(out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :], block, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(out_scales + rows, tl.load(scales + at, mask=rows < ROWS, other=0.0), mask=rows < ROWS)


@triton.jit
def turn_kernel(codes, index, tiles, codes_t, stride, stride_t, C, INDEXED: tl.constexpr, T: tl.constexpr, BC: tl.constexpr):
    """Store the transpose of one tile's rows of codes [·, C], BC columns of it, and zeros up to T rows."""
    tile = tl.program_id(0)
    expert, first, end = load_tile(tiles, tile)
    if expert >= 0:
        rows = first + tl.arange(0, T)
        columns = tl.program_id(1) * BC + tl.arange(0, BC)
        at = rows
        if INDEXED:
            at = tl.load(index + rows, mask=rows < end, other=0)
        inside = (rows < end)[:, None] & (columns < C)[None, :]
        block = tl.load(codes + at.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0)
        place = tile * T + tl.arange(0, T)
        target = codes_t + columns.to(tl.int64)[:, None] * stride_t + place[None, :]
        tl.store(target, tl.trans(block), mask=(columns < C)[:, None] & (place >= 0)[None, :])


@triton.jit
def load_tile(tiles, tile):
    """Return expert, first row and end of a tile."""
    at = tiles + tile * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def turn_stack_kernel(codes, turned, N, K, stride, T: tl.constexpr):
    """Store the transposes of matrices [N, K], whose rows lie ``stride`` apart. A program takes a [T, T] tile of one."""
    rows = tl.program_id(1) * T + tl.arange(0, T)
    columns = tl.program_id(0) * T + tl.arange(0, T)
    matrix = tl.program_id(2).to(tl.int64) * N
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    block = tl.load(codes + (matrix + rows)[:, None] * stride + columns[None, :], mask=inside, other=0)
    target = turned + matrix * K + columns.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(target, tl.trans(block), mask=tl.trans(inside))


@triton.jit(do_not_specialize=["TOKENS"])
def combine_kernel(y, position, out, TOKENS, D, TOP_K: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Store the sums of TOP_K rows of y [·, D] for BM tokens, BD columns of them, added in order in float32."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (tokens < TOKENS)[:, None] & (columns < D)[None, :]
    total = tl.zeros((BM, BD), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(position + tokens * TOP_K + j, mask=tokens < TOKENS, other=0).to(tl.int64)
        total += tl.load(y + row[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + tokens.to(tl.int64)[:, None] * D + columns[None, :], total.to(out.dtype.element_ty), mask=inside)


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Return 8-bit codes as int8."""
    return codes if codes.dtype == torch.int8 else codes.view(torch.int8)


def group_tiles(offs: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Do :func:`halo_tensor.reference.experts.group_tiles`."""
    experts = offs.shape[0]
    count = tile_count(rows, experts)
    tiles, starts = offs.new_empty((count, 4)), offs.new_empty(experts + 2)
    _plan_tiles(offs.device, triton.next_power_of_2(experts + 2))((rows, experts, count), offs, tiles, starts)
    return tiles, starts


@lru_cache
def _plan_tiles(device: torch.device, width: int) -> Planned:
    launch = Launch(tiles_kernel, {"WIDTH": width, "BLOCK": _BLOCK, "T": TILE, "num_warps": 4})
    return Planned(lambda _: Variant(launch, lambda rows, experts, count: ((cdiv(count, _BLOCK),), (rows, experts, count))))


def gather_codes(codes: torch.Tensor, scales: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of codes and of scales that ``index`` names."""
    out = codes.new_empty((index.shape[0], codes.shape[1]))
    out_scales = scales.new_empty(index.shape[0])
    numbers = (index.shape[0], codes.stride(0), out.stride(0), codes.shape[1])
    _plan_gather(codes.device)(numbers, as_bytes(codes), scales, index, as_bytes(out), out_scales)
    return out, out_scales


@lru_cache
def _plan_gather(device: torch.device) -> Planned:
    launch = Launch(gather_kernel, {"BM": 8, "BC": 2048, "num_warps": 4})

    def sizes(rows: int, stride: int, stride_out: int, c: int) -> tuple:
        return (cdiv(rows, 8), cdiv(c, 2048)), (rows, stride, stride_out, c)

    return Planned(lambda _: Variant(launch, sizes))


def turn_codes(codes: torch.Tensor, index: torch.Tensor | None, tiles: torch.Tensor) -> torch.Tensor:
    """Do :func:`halo_tensor.reference.experts.turn_codes`, without writing tiles that are not needed."""
    c, count = codes.shape[1], tiles.shape[0]
    codes_t = codes.new_empty((c, TILE * count))
    numbers = (codes.stride(0), TILE * count, c, count)
    _plan_turn(codes.device, index is not None)(numbers, as_bytes(codes), index, tiles, as_bytes(codes_t))
    return codes_t


@lru_cache
def _plan_turn(device: torch.device, indexed: bool) -> Planned:
    launch = Launch(turn_kernel, {"INDEXED": indexed, "T": TILE, "BC": 128, "num_warps": 4})

    def sizes(stride: int, stride_t: int, c: int, count: int) -> tuple:
        return (count, cdiv(c, 128)), (stride, stride_t, c)

    return Planned(lambda _: Variant(launch, sizes))


def turn_stack(codes: torch.Tensor, turned: torch.Tensor | None = None) -> torch.Tensor:
    """Return codes or gradients [experts, n, k] transposed in memory, [experts, k, n], or write them to ``turned``."""
    experts, n, k = codes.shape
    turned = codes.new_empty((experts, k, n)) if turned is None else turned
    if codes.element_size() > 1:
        _plan_turn_stack(codes.device, codes.dtype)((n, k, codes.stride(1), experts), codes, turned)
    else:
        _plan_turn_stack(codes.device, torch.int8)((n, k, codes.stride(1), experts), as_bytes(codes), as_bytes(turned))
    return turned


@lru_cache
def _plan_turn_stack(device: torch.device, dtype: torch.dtype) -> Planned:
    side = 128 // dtype.itemsize
    launch = Launch(turn_stack_kernel, {"T": side, "num_warps": 8 // dtype.itemsize})

    def sizes(n: int, k: int, stride: int, experts: int) -> tuple:
        return (cdiv(k, side), cdiv(n, side), experts), (n, k, stride)

    return Planned(lambda _: Variant(launch, sizes))


def combine(y: torch.Tensor, position: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Do :func:`halo_tensor.reference.experts.combine`."""
    tokens, top_k = position.shape
    out = y.new_empty((tokens, y.shape[1]), dtype=dtype)
    _plan_combine(y.device, y.dtype, dtype, top_k)((tokens, y.shape[1]), y, position, out)
    return out


@lru_cache
def _plan_combine(device: torch.device, y: torch.dtype, out: torch.dtype, top_k: int) -> Planned:
    launch = Launch(combine_kernel, {"TOP_K": top_k, "BM": 1, "BD": 1024, "num_warps": 4})
    return Planned(lambda _: Variant(launch, lambda tokens, d: ((tokens, cdiv(d, 1024)), (tokens, d))))
