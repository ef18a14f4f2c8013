"""The product of two matrices of codes: ``scaled_mm``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.quantizers import unflattened
from halo_tensor.ops.register import fake, op
from halo_tensor.recipe import Rotation
from halo_tensor.reference import ops as reference


@op("scaled_mm")
def scaled_mm(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    gain: Tensor | None = None,
    flat: bool = False,
) -> Tensor:
    """Return R_row (diag(a_scale) a b_tᵀ diag(b_scale)) Rᵀ_column diag(gain) + bias, as
    :func:`halo_tensor.reference.ops.scaled_mm` defines it, by the fastest backend of the device.

    Args:
        a: codes [m', k'].
        b_t: codes [n', k'] of the right operand's transpose.
        a_scale, b_scale: float32 numbers, vectors [m'] and [n'], or matrices for blocks, which only the reference multiplies;
            None stands for 1.
        bias: [n], or None.
        row_rotation, column_rotation: the rotations to undo on the result.
        shape, dtype: of the result.
        gain: float32 [n], or None.
        flat: whether ``a`` and ``b_t`` are given as their memory, two vectors, as transposed codes are if the number of tokens
            is a symbol: see :func:`halo_tensor.ops.quantizers.lies_flat`.

    Raises:
        RuntimeError: if the device has no matrix unit for the codes; it names the device and what it can multiply.
    """
    rows, columns = shape
    if flat:
        a = unflattened(a, reference.rotated(rows, row_rotation))
        b_t = unflattened(b_t, reference.rotated(columns, column_rotation))
    blocks = a_scale is not None and a_scale.ndim == 2
    if runs_kernels(a.device) and not blocks:
        from halo_tensor.kernels.matmul import plan

        return plan.scaled_mm(a, b_t, a_scale, b_scale, bias, row_rotation, column_rotation, (rows, columns), dtype, gain)
    y = reference.scaled_mm(a, b_t, a_scale, b_scale, bias, row_rotation, column_rotation, (rows, columns), dtype, gain)
    return y.contiguous()


@fake("scaled_mm")
def _(a: Tensor, b_t: Tensor, shape: Sequence[int], dtype: torch.dtype, flat: bool) -> Tensor:
    if not flat:
        torch._check(a.shape[1] == b_t.shape[1], lambda: f"scaled_mm: {list(a.shape)} with {list(b_t.shape)} transposed")
    return a.new_empty(shape, dtype=dtype)


@register_flop_formula(torch.ops.halo.scaled_mm)
def _count_flops(a_shape: Sequence[int], b_t_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Count two operations per multiply-accumulate, as for aten.mm; undoing a rotation is not counted."""
    m, n = args[5]
    return 2 * a_shape[0] * b_t_shape[0] * a_shape[1] if len(a_shape) == 2 else 2 * a_shape[0] // m * m * n
