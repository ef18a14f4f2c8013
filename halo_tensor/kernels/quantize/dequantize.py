"""Undo the rotation of transposed codes, by one kernel: the matrix whose rows were rotated and projected, as HOT saves X.

It is limited by memory: it reads each code once and writes each element once.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.quantize.codes import dense
from halo_tensor.kernels.rotate import norm
from halo_tensor.recipe import Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.hadamard import block_diagonal, power


class Tiles(NamedTuple):
    """How programs go through a matrix: rows and columns of a tile, tiles of a program, pipeline stages and warps."""

    height: int
    width: int
    steps: int
    stages: int
    warps: int


#: By measurements on one H200 (docs/notes/hot.md).
TILES = Tiles(128, 64, 4, 2, 4)
#: Matrices with fewer elements are given to programs of one tile each.
LARGE = 2**23
#: Tensor cores sum at least so many products of integers.
LEAST_SUM = 32


@triton.jit
def dequantize_kernel(
    codes_t, scale, x, matrix,
    M, ROWS_IN, K, stride_codes,
    HEIGHT: tl.constexpr, HEIGHT_IN: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, COLUMN_SCALE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store x [M, K] = matrix · the transpose of codes_t [K, ROWS_IN], times scales. A program takes STEPS tiles, each of
    HEIGHT rows of x and KEPT rows of codes.

    matrix [HEIGHT, HEIGHT_IN]: the rotation, with zeros beyond KEPT.
    COLUMN_SCALE: 2 for a scale of each column, 1 for one of all, 0 for none.
    """
    at = tl.arange(0, HEIGHT_IN)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    rotation = tl.load(matrix + tl.arange(0, HEIGHT)[:, None] * HEIGHT_IN + at[None, :])
    factor = tl.full((WIDTH,), NORM, tl.float32)
    if COLUMN_SCALE == 2:
        factor = factor * tl.load(scale + columns, mask=columns < K, other=0.0)
    if COLUMN_SCALE == 1:
        factor = factor * tl.load(scale)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        tile = tl.program_id(0) * STEPS + step
        kept = tile * KEPT + at
        source = codes_t + columns.to(tl.int64)[None, :] * stride_codes + kept[:, None]
        # Codes beyond KEPT belong to the next tile. They meet zeros.
        codes = tl.load(source, mask=(kept < ROWS_IN)[:, None] & (columns < K)[None, :], other=0)
        y = tl.dot(rotation, codes.to(rotation.dtype)).to(tl.float32) * factor[None, :]
        rows = tile * HEIGHT + tl.arange(0, HEIGHT)
        target = x + rows.to(tl.int64)[:, None] * K + columns[None, :]
        tl.store(target, y.to(x.dtype.element_ty), mask=(rows < M)[:, None] & (columns < K)[None, :])


def fits(dtype: torch.dtype, row_rotation: Rotation | None) -> bool:
    """Whether the kernel serves codes of ``dtype`` whose rows were rotated so: integers, and blocks that fit in a tile."""
    return dtype == torch.int8 and (row_rotation is None or TILES.height % row_rotation.edge == 0)


def dequantize(
    codes_t: torch.Tensor,
    scale: torch.Tensor | None,
    row_rotation: Rotation | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: Any = None,
) -> torch.Tensor:
    """Return x [m, k] for codes [k, m'] of Rᵀ x, as :func:`halo_tensor.ops.dequantize_t` does.

    Args:
        codes_t: int8.
        scale: float32 [] or [k]; None for 1.
        row_rotation: R; see :func:`fits`.
        shape: of x.
        dtype: of x.
        out: memory to write x to, row-major, of any shape; None for new memory.
    """
    (m, k), rows = shape, codes_t.shape[1]
    if out is None:
        out = codes_t.new_empty(shape, dtype=dtype)
    if rows:
        stride = codes_t.stride()
        codes_t = codes_t if stride[1] == 1 or rows == 1 else codes_t.contiguous()
        kind = 0 if scale is None else 1 + scale.ndim
        numbers = m, rows, k, codes_t.stride(0)
        plan_dequantize(dtype, codes_t.device, row_rotation, kind)(numbers, codes_t, dense(scale), out)
    return out


@lru_cache(maxsize=4096)
def plan_dequantize(dtype: torch.dtype, device: torch.device, row_rotation: Rotation | None, scales: int) -> Planned:
    """Return the launch that writes a matrix of ``dtype``.

    A call takes (rows, rows of codes, columns, row stride of the codes), the codes, their scale, and the matrix.

    Args:
        scales: 2 for one of each column, 1 for one of all, 0 for none.
    """
    height, width, steps, stages, warps = TILES
    if row_rotation is None:
        matrix, magnitude = torch.eye(height, device=device), 1.0
    else:
        matrix = block_diagonal(row_rotation, height, torch.float32, device, transposed=False)
        magnitude = power(row_rotation.edge)
    matrix = torch.nn.functional.pad(matrix, (0, max(0, LEAST_SUM - matrix.shape[1])))
    # Tensor cores sum products of integers exactly. Triton's interpreter multiplies float32.
    matrix = (matrix / magnitude).to(torch.int8 if device.type == "cuda" else torch.float32)
    constants = {
        "HEIGHT": height, "HEIGHT_IN": matrix.shape[1], "KEPT": reference.rotated(height, row_rotation), "WIDTH": width,
        "STAGES": stages, "COLUMN_SCALE": scales, "NORM": norm(row_rotation) * magnitude, "num_warps": warps,
    }  # fmt: skip

    def prepare(taken: int) -> Variant:
        launch = Launch(dequantize_kernel, constants | {"STEPS": taken})

        def sizes(m: int, rows: int, k: int, stride: int) -> tuple:
            return (cdiv(m, height * taken), cdiv(k, width)), (m, rows, k, stride)

        return Variant(launch, sizes, (matrix,))

    return Planned(prepare, lambda m, rows, k, stride: steps if m * k >= LARGE else 1)
