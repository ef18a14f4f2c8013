"""Matrices rotated in high precision, and codes transposed: launches of the kernels that do no rounding.

Also what every launch on tiles shares.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from halo_tensor.kernels.device import has_wgmma
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.quantize import kernels
from halo_tensor.recipe import Rotation
from halo_tensor.reference import hadamard
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import aligned
from halo_tensor.reference.hadamard import block_diagonal

TILE = 128


class Matrix(NamedTuple):
    """What a plan for one matrix needs to know of it."""

    shape: torch.Size
    stride: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: torch.Tensor) -> "Matrix":
        return cls(x.shape, (x.stride(0), x.stride(1)), x.dtype, x.device)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the rotation matrices, of powers of two, that a matrix of ``dtype`` is multiplied with: bfloat16 beside
    float32, which the kernels cut into three bfloat16 numbers. Triton's interpreter, on a CPU, has no 16-bit products."""
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def norm(*rotations: Rotation | None) -> float:
    """The factor that products with the constants of these rotations still need, see :func:`hadamard.norm`."""
    return prod(hadamard.norm(r) for r in rotations if r is not None)


def whole_blocks(x: torch.Tensor, right: Rotation | None) -> torch.Tensor:
    """x, a matrix or what multiplies its columns, with zeros up to whole blocks. Rows need none: kernels read zeros beyond the
    last."""
    missing = reference.padded(x.shape[-1], right) - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def fits_tiles(x: torch.Tensor | Matrix, left: Rotation | None, right: Rotation | None) -> bool:
    """Whether a tile holds whole blocks, and registers hold the tile: a float32 one, beside a product whose operands are in
    registers too, they do not."""
    if left is None and right is None:
        return True
    if x.dtype == torch.float32 and not has_wgmma(x.device):
        return False
    return all(r is None or TILE % r.edge == 0 for r in (left, right))


def transposed(codes: torch.Tensor) -> torch.Tensor:
    """The transpose of a row-major matrix of codes, in memory."""
    m, k = codes.shape
    out = codes.new_empty_strided((k, m), (aligned(m), 1))
    as_bytes = (codes, out) if codes.dtype == torch.int8 else (codes.view(torch.int8), out.view(torch.int8))
    plan_transpose(codes.device)((m, k, codes.stride(0), out.stride(0)), *as_bytes)
    return out


@lru_cache
def plan_transpose(device: torch.device) -> Planned:
    """Takes (rows, columns, row strides of both), bytes of codes, and those of their transpose.

    ``device``: a kernel is loaded on one. Likewise every dtype that a kernel is compiled for is in the key of its plan."""
    launch = Launch(kernels.transpose_codes, {"T": TILE, "num_warps": 4})

    def sizes(m: int, k: int, stride: int, stride_out: int) -> tuple:
        return (cdiv(m, TILE), cdiv(k, TILE)), (m, k, stride, stride_out)

    return Planned(lambda _: Variant(launch, sizes))


def rotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None, dtype: torch.dtype) -> torch.Tensor:
    """Rᵀ_left x R_right, zero-padded to whole blocks."""
    x = whole_blocks(x, right)
    shape = (reference.padded(x.shape[0], left), reference.padded(x.shape[1], right))
    return _rotate(x, left, right, shape, dtype, inverse=False)


def unrotate(
    x: torch.Tensor, left: Rotation | None, right: Rotation | None, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of :func:`rotate`, of the given ``shape``."""
    return _rotate(x, left, right, shape, dtype, inverse=True)


def _rotate(x, left, right, shape, dtype, inverse):
    low = any(r is not None and r.rank is not None for r in (left, right))
    if low or not fits_tiles(x, left, right) or (inverse and right is not None and x.shape[1] != shape[1]):
        y = reference.unrotate(x, left, right, shape) if inverse else reference.rotate(x, left, right)
        return y.to(dtype).contiguous()
    out = x.new_empty(shape, dtype=dtype)
    planned = plan_rotate(x.dtype, x.device, left, right, dtype, inverse)
    planned((*x.shape, *x.stride(), *shape), x, out)
    return out


@lru_cache(maxsize=4096)
def plan_rotate(
    x: torch.dtype,
    device: torch.device,
    left: Rotation | None,
    right: Rotation | None,
    dtype: torch.dtype,
    inverse: bool,
) -> Planned:
    """From the dtype ``x`` to ``dtype``. Takes (rows, columns, strides of x, rows and columns of the result), x, and the
    result."""
    constants = {"T": TILE, "LEFT": left is not None, "RIGHT": right is not None, "NORM": norm(left, right), "num_warps": 8}
    launch, of = Launch(kernels.rotate_tiles, constants), product_dtype(x, device)
    matrices = (
        block_diagonal(left, TILE, of, device, transposed=not inverse) if left else None,
        block_diagonal(right, TILE, of, device, transposed=inverse) if right else None,
    )

    def sizes(m: int, k: int, stride_row: int, stride_column: int, rows: int, columns: int) -> tuple:
        grid = cdiv(max(m, rows), TILE), cdiv(columns, TILE)
        return grid, (m, k, rows, stride_row, stride_column, columns)

    return Planned(lambda _: Variant(launch, sizes, matrices))
