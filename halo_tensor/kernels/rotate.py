"""Rotate matrices in high precision, and transpose codes, by kernels that do not round to codes.

It also has what all launches on tiles share: the edge of a tile, and the dtype and the factor of rotation matrices.
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

#: Rows and columns of a tile.
TILE = 128


class Matrix(NamedTuple):
    """A matrix, as far as a plan depends on it."""

    shape: torch.Size
    stride: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: torch.Tensor) -> "Matrix":
        return cls(x.shape, (x.stride(0), x.stride(1)), x.dtype, x.device)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the rotation matrices that multiply a matrix of ``dtype``. Their elements are powers of two.

    It is bfloat16 beside float32, which the kernels cut into three bfloat16 numbers. On a CPU it is float32, because Triton's
    interpreter has no 16-bit products.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def norm(*rotations: Rotation | None) -> float:
    """Return the factor that products with the constants of these rotations need, see :func:`hadamard.norm`."""
    return prod(hadamard.norm(r) for r in rotations if r is not None)


def whole_blocks(x: torch.Tensor, column_rotation: Rotation | None) -> torch.Tensor:
    """Return a matrix, or the gain of its columns, with zeros up to whole blocks in the last dimension. Rows need no padding,
    because kernels read zeros beyond the last row."""
    missing = reference.padded(x.shape[-1], column_rotation) - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def fits_tiles(x: torch.Tensor | Matrix, row_rotation: Rotation | None, column_rotation: Rotation | None) -> bool:
    """Whether a tile is rotated within the registers: it must hold whole blocks. Registers have no room for a float32 tile
    beside a product that also reads its operands from registers."""
    if row_rotation is None and column_rotation is None:
        return True
    if x.dtype == torch.float32 and not has_wgmma(x.device):
        return False
    return all(r is None or TILE % r.edge == 0 for r in (row_rotation, column_rotation))


def transposed(codes: torch.Tensor) -> torch.Tensor:
    """Return the transpose of a row-major matrix of codes, row-major too."""
    m, k = codes.shape
    out = codes.new_empty_strided((k, m), (aligned(m), 1))
    as_bytes = (codes, out) if codes.dtype == torch.int8 else (codes.view(torch.int8), out.view(torch.int8))
    plan_transpose(codes.device)((m, k, codes.stride(0), out.stride(0)), *as_bytes)
    return out


@lru_cache
def plan_transpose(device: torch.device) -> Planned:
    """Return the launch that transposes. A call takes (rows, columns, row strides of both), then both matrices as bytes.

    Args:
        device: part of the key only, because a kernel is loaded on one device. Every dtype that a kernel is compiled for is in
            the key of its plan for the same reason.
    """
    launch = Launch(kernels.transpose_codes, {"T": TILE, "num_warps": 4})

    def sizes(m: int, k: int, stride: int, stride_out: int) -> tuple:
        return (cdiv(m, TILE), cdiv(k, TILE)), (m, k, stride, stride_out)

    return Planned(lambda _: Variant(launch, sizes))


def rotate(
    x: torch.Tensor, row_rotation: Rotation | None, column_rotation: Rotation | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return Rᵀ_row x R_column in ``dtype``, zero-padded to whole blocks."""
    x = whole_blocks(x, column_rotation)
    shape = (reference.padded(x.shape[0], row_rotation), reference.padded(x.shape[1], column_rotation))
    return _rotate(x, row_rotation, column_rotation, shape, dtype, inverse=False)


def unrotate(
    x: torch.Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return R_row x Rᵀ_column in ``dtype``, of the given ``shape``: the inverse of :func:`rotate`."""
    return _rotate(x, row_rotation, column_rotation, shape, dtype, inverse=True)


def _rotate(
    x: torch.Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    inverse: bool,
) -> torch.Tensor:
    rotations = row_rotation, column_rotation
    low_rank = any(r is not None and r.rank is not None for r in rotations)
    cuts_columns = inverse and column_rotation is not None and x.shape[1] != shape[1]
    if low_rank or cuts_columns or not fits_tiles(x, *rotations):
        y = reference.unrotate(x, *rotations, shape) if inverse else reference.rotate(x, *rotations)
        return y.to(dtype).contiguous()
    out = x.new_empty(shape, dtype=dtype)
    planned = plan_rotate(x.dtype, x.device, *rotations, dtype, inverse)
    planned((*x.shape, *x.stride(), *shape), x, out)
    return out


@lru_cache(maxsize=4096)
def plan_rotate(
    x: torch.dtype,
    device: torch.device,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    dtype: torch.dtype,
    inverse: bool,
) -> Planned:
    """Return the launch that rotates, or undoes that if ``inverse``, from the dtype ``x`` to ``dtype``.

    A call takes (rows, columns, strides of x, rows and columns of the result), x, and the result.
    """
    constants = {
        "T": TILE, "LEFT": row_rotation is not None, "RIGHT": column_rotation is not None,
        "NORM": norm(row_rotation, column_rotation), "num_warps": 8,
    }  # fmt: skip
    launch, of = Launch(kernels.rotate_tiles, constants), product_dtype(x, device)
    matrices = (
        block_diagonal(row_rotation, TILE, of, device, transposed=not inverse) if row_rotation else None,
        block_diagonal(column_rotation, TILE, of, device, transposed=inverse) if column_rotation else None,
    )

    def sizes(m: int, k: int, stride_row: int, stride_column: int, rows: int, columns: int) -> tuple:
        grid = cdiv(max(m, rows), TILE), cdiv(columns, TILE)
        return grid, (m, k, rows, stride_row, stride_column, columns)

    return Planned(lambda _: Variant(launch, sizes, matrices))
