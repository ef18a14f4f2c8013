"""Matrices rotated in high precision, and codes transposed: launches of the kernels that do no rounding.

Also what every launch on tiles shares.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton

from halo_tensor.kernels.device import has_wgmma
from halo_tensor.kernels.launch import Launch
from halo_tensor.kernels.quantize import kernels
from halo_tensor.recipe import Rotation
from halo_tensor.reference import hadamard
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import aligned
from halo_tensor.reference.hadamard import block_diagonal

TILE = 128


class Matrix(NamedTuple):
    """What a launch needs to know of a matrix."""

    shape: torch.Size
    stride: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: torch.Tensor) -> "Matrix":
        return cls(x.shape, (x.stride(0), x.stride(1)), x.dtype, x.device)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the rotation matrices, of powers of two, that it is multiplied with: bfloat16 beside float32, which the
        kernels cut into three bfloat16 numbers. Triton's interpreter, on a CPU, has no 16-bit products."""
        if self.device.type != "cuda":
            return torch.float32
        return torch.float16 if self.dtype == torch.float16 else torch.bfloat16


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
    _plan_transpose(m, k, codes.stride(0), out.stride(0), codes.device)(codes.view(torch.int8), out.view(torch.int8))
    return out


@lru_cache(maxsize=4096)
def _plan_transpose(m: int, k: int, stride: int, stride_out: int, device: torch.device) -> Launch:
    """``device``: a kernel is loaded on one. Likewise every dtype that a kernel is compiled for is in its plan."""
    grid = (triton.cdiv(m, TILE), triton.cdiv(k, TILE))
    return Launch(kernels.transpose_codes, grid, (m, k, stride, stride_out), {"T": TILE, "num_warps": 4})


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
    launch, matrices = _plan_rotate(Matrix.of(x), left, right, tuple(shape), dtype, inverse)
    launch(x, *(out if matrix is None else matrix for matrix in matrices), out)
    return out


@lru_cache(maxsize=4096)
def _plan_rotate(x: Matrix, left, right, shape: tuple[int, int], dtype: torch.dtype, inverse: bool) -> tuple[Launch, tuple]:
    matrices = (
        block_diagonal(left, TILE, x.product_dtype, x.device, transposed=not inverse) if left else None,
        block_diagonal(right, TILE, x.product_dtype, x.device, transposed=inverse) if right else None,
    )
    constants = {"T": TILE, "LEFT": left is not None, "RIGHT": right is not None, "NORM": norm(left, right), "num_warps": 8}
    grid = (triton.cdiv(max(x.shape[0], shape[0]), TILE), triton.cdiv(shape[1], TILE))
    integers = (*x.shape, shape[0], *x.stride, shape[1])
    return Launch(kernels.rotate_tiles, grid, integers, constants), matrices
