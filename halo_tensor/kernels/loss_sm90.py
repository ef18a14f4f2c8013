"""Statistics of int8 logits straight from the accumulators of their product, in Gluon for SM 9.0: no logits are written.

The main loop is that of :mod:`halo_tensor.kernels.matmul.sm90`. Instead of storing a tile, the epilogue reduces each of its
rows to three numbers, and a second kernel merges those of all tiles.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from halo_tensor.fences.fast_paths import GLUON
from halo_tensor.fences.gluon import fence_async_shared, gl, gluon, mbarrier
from halo_tensor.kernels.device import INTERPRETED, is_hopper
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.matmul.request import multiprocessors
from halo_tensor.kernels.matmul.sm90 import BK, BM, BN, GROUP, STAGES, WARPS, _place_of, multiply_tile, start_loading
from halo_tensor.reference.loss import Objective

LOG2_E = tl.constexpr(1.4426950408889634)
#: Tokens that a program of the second kernel merges.
MERGED = 64


@gluon.jit(do_not_specialize=["M", "K"])
def logit_statistics(
    a, b, partials, statistics, a_scale, b_scale, bias, targets,
    M, N, K, FIRST,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, BIASED: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """Reduce each row of each tile of diag(a_scale) a bᵀ diag(b_scale) + bias, whose logits are rounded to float16.

    The largest logit, the sum of exponentials and the largest logit but the target's go to partials [3, tiles, M], and the
    logits of targets to row 3 of statistics [5, M]. a [M, K] and b [N, K] are descriptors of int8 codes. FIRST: the index in
    the vocabulary of the first row of b.
    """
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 32])

    tiles_m, tiles_n, steps = gl.cdiv(M, BM), gl.cdiv(N, BN), gl.cdiv(K, BK)
    first = gl.program_id(0)
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, BN, BK], b.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
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
            a, b, a_tiles, b_tiles, arrived, gl.zeros([BM, BN], gl.int32, layout), slot, free, phase,
            to_load, ahead, ahead_m, ahead_n, ahead_k, steps, tiles_m, tiles_n, STAGES, GROUP, PROGRAMS,
        )  # fmt: skip

        rows = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, layout))
        columns = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))
        y = acc.to(gl.float32) * gl.load(b_scale + columns, mask=columns < N, other=0.0)[None, :]
        y = y * gl.load(a_scale + rows, mask=rows < M, other=0.0)[:, None]
        if BIASED:
            y = y + gl.load(bias + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
        y = y.to(gl.float16).to(gl.float32)
        if SCALE != 1.0:
            y = y * SCALE
        y = gl.where((columns < N)[None, :], y, float("-inf"))
        target = (gl.load(targets + rows, mask=rows < M, other=-1) - FIRST).to(gl.int32)
        mine = columns[None, :] == target[:, None]
        other = gl.max(gl.where(mine, float("-inf"), y), 1)
        chosen = gl.max(gl.where(mine, y, float("-inf")), 1)
        top = gl.maximum(other, chosen)
        safe = gl.where(top == float("-inf"), 0.0, top)
        total = gl.sum(gl.exp2((y - safe[:, None]) * LOG2_E), 1)
        at = tile_n * M + rows
        gl.store(partials + at, top, mask=rows < M)
        gl.store(partials + tiles_n * M + at, total, mask=rows < M)
        gl.store(partials + 2 * tiles_n * M + at, other, mask=rows < M)
        here = (target >= tile_n * BN) & (target < tile_n * BN + BN) & (target < N)
        gl.store(statistics + 3 * M + rows, chosen, mask=(rows < M) & here)


@triton.jit(do_not_specialize=["M", "TILES"])
def merge_statistics(partials, statistics, M, TILES, ROWS: tl.constexpr):
    """Add partials [3, TILES, M] to the first three rows of statistics [5, M]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < M
    at = statistics + rows
    most = tl.load(at, mask=inside, other=0.0)
    total = tl.load(at + M, mask=inside, other=0.0)
    other = tl.load(at + 2 * M, mask=inside, other=0.0)
    for i in range(TILES):
        new = partials + i * M + rows
        their_most = tl.load(new, mask=inside, other=0.0)
        their_total = tl.load(new + TILES * M, mask=inside, other=0.0)
        other = tl.maximum(other, tl.load(new + 2 * TILES * M, mask=inside, other=0.0))
        top = tl.maximum(most, their_most)
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2((most - safe) * LOG2_E) + their_total * tl.exp2((their_most - safe) * LOG2_E)
        most = top
    tl.store(at, most, mask=inside)
    tl.store(at + M, total, mask=inside)
    tl.store(at + 2 * M, other, mask=inside)


def why_not(device: torch.device, tokens: int, columns: int, objective: Objective) -> str | None:
    """Return the reason why these kernels cannot serve a head or are not faster, or None."""
    if not is_hopper(device) or INTERPRETED:
        return "they are for GPUs of SM 9.0"
    if objective.softcap or objective.smoothing:
        return "they compute no tanh and no sum of all logits"
    if cdiv(tokens, BM) * cdiv(columns, BN) < multiprocessors(device):
        return "there are no tiles for all multiprocessors"
    return "they failed to compile, and a warning said so" if _plan(device, None, objective.scale) is None else None


def update_statistics_(
    statistics: torch.Tensor,
    codes: torch.Tensor,
    w_codes: torch.Tensor,
    scales: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    first: int,
    objective: Objective,
) -> None:
    """Add the logits diag(scales) codes w_codesᵀ diag(w_scales) + bias, in float16, to the statistics.

    Args:
        statistics: float32 [5, M], as :func:`halo_tensor.reference.loss.update_statistics_` updates them.
        codes, w_codes: int8 [M, K] and [N, K], in rows that begin at multiples of 16 bytes.
        scales, w_scales: float32 [M] and [N].
        targets: int64 [M]. first: the vocabulary's index of the first row of w_codes.
    """
    (m, k), n = codes.shape, w_codes.shape[0]
    tiles = cdiv(n, BN)
    partials = statistics.new_empty(3, tiles, m)
    product = _plan(codes.device, None if bias is None else bias.dtype, objective.scale)
    assert product is not None
    numbers = m, n, k, first, codes.stride(0), w_codes.stride(0)
    product(numbers, codes, w_codes, partials, statistics, scales, w_scales, bias, targets)
    _plan_merge(codes.device)((m, tiles), partials, statistics)


@lru_cache
def _plan(device: torch.device, bias: torch.dtype | None, scale: float) -> Planned | None:
    """Return the launch of the product; None after a warning if it does not compile."""
    return GLUON.attempt(_compiled, device, bias, scale)


def _compiled(device: torch.device, bias: torch.dtype | None, scale: float) -> Planned:
    most = multiprocessors(device)
    constants: dict[str, Any] = {
        "STAGES": STAGES, "GROUP": GROUP, "PROGRAMS": most, "BIASED": bias is not None, "SCALE": scale, "num_warps": WARPS,
    }  # fmt: skip
    launch = Launch(logit_statistics, constants, ((BM, BK), (BN, BK)))

    def sizes(m: int, n: int, k: int, first: int, stride_a: int, stride_b: int) -> tuple:
        programs = min(most, cdiv(m, BM) * cdiv(n, BN))
        return (programs,), (m, n, k, first), ((m, k, stride_a), (n, k, stride_b))

    f32 = torch.float32
    dtypes = torch.int8, torch.int8, f32, f32, f32, f32, bias or torch.int8, torch.int64
    launch.compile(device, dtypes, launch.sizes(*sizes(BM, BN, BK, 0, BK, BK)))  # these sizes are examples
    return Planned(lambda _: Variant(launch, sizes))


@lru_cache
def _plan_merge(device: torch.device) -> Planned:
    launch = Launch(merge_statistics, {"ROWS": MERGED, "num_warps": 2})
    return Planned(lambda _: Variant(launch, lambda m, tiles: ((cdiv(m, MERGED),), (m, tiles))))
