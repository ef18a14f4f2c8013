"""Rotate a matrix without quantising it: ``rotate`` and ``unrotate``, which have gradients; ``dequantize_t``, which undoes the
rotation of codes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.register import LIBRARY, fake, op
from halo_tensor.recipe import Rotation
from halo_tensor.reference import ops as reference


@op("rotate")
def rotate(x: Tensor, row_rotation: Rotation | None, column_rotation: Rotation | None) -> Tensor:
    """Return Rᵀ_row x R_column, zero-padded to whole blocks, in the dtype of ``x`` [r, c]."""
    if runs_kernels(x.device):
        from halo_tensor.kernels import rotate as kernels

        return kernels.rotate(x, row_rotation, column_rotation, x.dtype)
    return reference.rotate(x, row_rotation, column_rotation).to(x.dtype, copy=True).contiguous()


@fake("rotate")
def _(x: Tensor, row_rotation: Rotation | None, column_rotation: Rotation | None) -> Tensor:
    return x.new_empty(reference.rotated(x.shape[0], row_rotation), reference.rotated(x.shape[1], column_rotation))


@op("unrotate")
def unrotate(x: Tensor, row_rotation: Rotation | None, column_rotation: Rotation | None, shape: Sequence[int]) -> Tensor:
    """Return R_row x Rᵀ_column without the padding, the inverse of :func:`rotate`, of the given ``shape`` and x's dtype."""
    rows, columns = shape
    if runs_kernels(x.device):
        from halo_tensor.kernels import rotate as kernels

        return kernels.unrotate(x, row_rotation, column_rotation, (rows, columns), x.dtype)
    return reference.unrotate(x, row_rotation, column_rotation, (rows, columns)).to(x.dtype, copy=True).contiguous()


@fake("unrotate")
def _(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


# Rotations are linear. Up to padding, each of the two ops is the transpose of the other, and so its gradient.


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.rotations, ctx.shape = inputs[1:3], inputs[0].shape


def _gradient_of_rotate(ctx: Any, gradient: Tensor) -> tuple:
    return torch.ops.halo.unrotate(gradient, *ctx.rotations, ctx.shape), None, None


def _gradient_of_unrotate(ctx: Any, gradient: Tensor) -> tuple:
    return torch.ops.halo.rotate(gradient, *ctx.rotations), None, None, None


torch.library.register_autograd("halo::rotate", _gradient_of_rotate, setup_context=_remember, lib=LIBRARY)
torch.library.register_autograd("halo::unrotate", _gradient_of_unrotate, setup_context=_remember, lib=LIBRARY)


@op("dequantize_t")
def dequantize_t(
    codes_t: Tensor, scale: Tensor | None, row_rotation: Rotation | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Return the matrix x that transposed codes stand for: R (codes · scale), without the padding.

    Args:
        codes_t: [c, r'], the transpose of the codes of Rᵀ x.
        scale: float32 [] or [c]; None for 1.
        row_rotation: R. Of a projection, the part that the rank has dropped is zero.
        shape: [r, c].
        dtype: of the result.
    """
    rows, columns = shape
    if runs_kernels(codes_t.device):
        from halo_tensor.kernels.quantize import dequantize

        if dequantize.fits(codes_t.dtype, row_rotation):
            return dequantize.dequantize(codes_t, scale, row_rotation, (rows, columns), dtype)
    y = codes_t.t().to(torch.float32)
    y = y if scale is None else y * scale
    return reference.unrotate(y, row_rotation, None, (rows, columns)).to(dtype, copy=True).contiguous()


@fake("dequantize_t")
def _(codes_t: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return codes_t.new_empty(shape, dtype=dtype)
