"""The product by Triton for GPUs with TMA, SM 9.0 and newer, and for Triton's interpreter.

Loads through tensor descriptors use TMA. Persistent programs, one or two per multiprocessor, compute output tiles in groups
that share operand rows, so that they find them in L2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.device import INTEGERS_ON_SM100, has_tma
from halo_tensor.kernels.launch import Launch, Variant, cdiv
from halo_tensor.kernels.matmul.epilogue import EDGE, finish, matrices
from halo_tensor.kernels.matmul.request import Request, SizeClass, multiprocessors
from halo_tensor.kernels.matmul.tile_order import place_of
from halo_tensor.kernels.rotate import norm

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


class Tile(NamedTuple):
    """How a product is cut into tiles.

    Attributes:
        m, n, k: an output tile [m, n] and its depth.
        group: rows of tiles in a group, see place_of.
        warps, stages: Triton's launch options.
        resident: programs that share a multiprocessor.
        part: how many columns an epilogue stores at a time.
        flatten: whether the loops over tiles and over k become one.
    """

    m: int
    n: int
    k: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3
    resident: int = 1
    part: int = EDGE
    flatten: bool = False


def tile_for(
    generation: int, size: SizeClass, integer: bool, rotated_rows: bool, rotated_columns: bool, wide_output: bool
) -> Tile:
    """Return the tile of a product.

    Those of SM 9.0 were measured on an H100 (docs/notes/products.md). Those of SM 10.x and 12.x are the largest whose kernels
    spill no registers; they were compiled, but not run.

    Args:
        generation: the major compute capability, 9, 10 or 12.
        integer: whether the codes are int8.
        rotated_rows: whether a rotation of rows is undone, which needs tiles as high as its block.
        rotated_columns: whether a rotation of columns is undone.
        wide_output: whether the result is float32.
    """
    undo = rotated_rows or rotated_columns
    if size.few:
        return Tile(64, 128, warps=4, stages=4, flatten=not undo)
    if not size.tiles and not rotated_rows:
        return Tile(64, 128, warps=4, stages=4, resident=2, flatten=not undo)
    if generation == 12:  # 100 KB of shared memory for two programs, and accumulators in registers
        return Tile(128, 128, 64, warps=4, stages=4, resident=2, part=32)
    if generation == 10 and integer and _VERSION < INTEGERS_ON_SM100:  # as on SM 8.0
        return Tile(128, 128, warps=4, stages=3, resident=2, part=64)
    if generation == 10:
        return Tile(128, 256, stages=4) if undo and not (wide_output or integer) else Tile(128, 128, stages=4)
    # With one loop, the loads of the next tile overlap the epilogue of this one. But ptxas (C7515) serialises all wgmma if
    # another product reads an accumulator inside the loop, as an un-rotation does.
    whole = Tile(128, 256, stages=4) if undo else Tile(128, 256, stages=4, part=256, flatten=True)
    # Triton waits for every int8 product before it issues the next. A second program fills the gaps.
    if integer or size.wide_tiles < 2:
        return Tile(128, 128, warps=4, stages=3, resident=2, flatten=not undo)
    if wide_output and not undo:  # float32 results need the shared memory of the larger tile
        return Tile(128, 128, warps=8, stages=4, flatten=True)
    return whole


@triton.jit(do_not_specialize=["K"])
def scaled_mm_kernel(
    a, b, out, a_scale, b_scale, gain, bias, left, right,
    M, N, K, ROWS_OUT, stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    INTEGER: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, GAIN: tl.constexpr, BIASED: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, NORM: tl.constexpr, PART: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Store what :func:`halo_tensor.kernels.matmul.epilogue.finish` makes of a bᵀ, tile by tile.

    a [M, K] and b [N, K] are descriptors of codes. The constants are those of ``finish``.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    accumulator_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BM, BN), dtype=accumulator_type)
        for k in range(tl.cdiv(K, BK)):
            a_tile = a.load([tile_m * BM, k * BK])
            b_tile = b.load([tile_n * BN, k * BK])
            acc = tl.dot(a_tile, b_tile.T, acc, out_dtype=accumulator_type)

        finish(
            acc, out, a_scale, b_scale, gain, bias, left, right, tile_m, tile_n, M, N, ROWS_OUT, stride,
            A_SCALE, B_SCALE, GAIN, BIASED, LEFT, RIGHT, NORM, PART,
        )  # fmt: skip


def why_not(request: Request) -> str | None:
    """Return the reason why this kernel cannot serve the product, or None."""
    return None if has_tma(request.device) else "the GPU has no TMA"


def plan(request: Request) -> Variant:
    """Return the launch of a product, with the matrices of its rotations."""
    n, device, rotations = request.n, request.device, (request.row_rotation, request.column_rotation)
    rotated_rows, rotated_columns = (rotation is not None for rotation in rotations)
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    wide_output = request.dtype.itemsize > 2
    tile = tile_for(generation, request.size, request.integer, rotated_rows, rotated_columns, wide_output)
    programs = multiprocessors(device) * tile.resident
    constants = {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group, "PROGRAMS": programs, **request.constants,
        "LEFT": rotated_rows, "RIGHT": rotated_columns, "NORM": norm(*rotations),
        "FLATTEN": tile.flatten, "PART": min(tile.part, tile.n),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip

    def sizes(m: int, k: int, rows: int, stride_a: int, stride_b: int) -> tuple:
        grid = (min(programs, cdiv(m, tile.m) * cdiv(n, tile.n)),)
        return grid, (m, n, k, rows, n), ((m, k, stride_a), (n, k, stride_b))

    launch = Launch(scaled_mm_kernel, constants, ((tile.m, tile.k), (tile.n, tile.k)))
    return Variant(launch, sizes, matrices(request, tile.m))
