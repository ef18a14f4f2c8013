"""``torch.mm`` and ``torch.addmm`` of two quantised operands.

Their codes are multiplied, their scales are applied, and rotations and gains of the dimensions that survive are undone. What
lies along the contracted dimension must cancel; otherwise the product is refused, with the reason.
"""

from typing import Any

import torch

from halo_tensor import ops
from halo_tensor.operand.gains import are_inverse
from halo_tensor.operand.tensor import HadamardQuantTensor

aten = torch.ops.aten


@HadamardQuantTensor.implements([aten.mm.default, aten.mm.dtype])
def _(func: Any, types: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    a, b, *rest = args
    return _multiply(a, b, None, rest[0] if rest else kwargs.get("out_dtype"))


@HadamardQuantTensor.implements([aten.addmm.default, aten.addmm.dtype])
def _(func: Any, types: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    bias, a, b, *rest = args
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        raise ValueError("addmm of HadamardQuantTensors takes alpha = beta = 1")
    return _multiply(a, b, bias, rest[0] if rest else kwargs.get("out_dtype"))


def _multiply(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    if not (isinstance(a, HadamardQuantTensor) and isinstance(b, HadamardQuantTensor)):
        raise _refusal(a, b, "quantise both with HadamardQuantTensor.from_hp, or dequantize() the other")
    obstacle = "their dtypes differ; pass out_dtype" if dtype is None and a.dtype != b.dtype else _obstacle(a, b)
    if obstacle:
        raise _refusal(a, b, obstacle)

    dtype, shape = dtype or a.dtype, (a.shape[0], b.shape[1])
    rotations = a.row_rotation, b.column_rotation
    flat = a.flat == "rows" and b.flat == "columns"
    left, right = (a.codes, b.codes_t) if flat else (a.any_codes(), b.any_codes_t())
    assert left is not None and right is not None
    if a.format is None:
        y = ops.unrotate(torch.mm(left.to(dtype), right.t().to(dtype)), *rotations, shape)
        return (y if bias is None else y + bias).to(dtype)
    if bias is not None and bias.shape != shape[1:]:  # kernels add a row
        return _multiply(a, b, None, dtype) + bias
    gain = b.undo_gain if b.gain_axis == "columns" else None
    a_scale, b_scale = a.element_scales(), b.element_scales()
    if b_scale is not None and b.granularity.is_blocked:
        b_scale = b_scale.t()
    return ops.scaled_mm(left, right, a_scale, b_scale, bias, *rotations, shape, dtype, gain, flat)


def _describe(t: torch.Tensor) -> str:
    return repr(t) if isinstance(t, HadamardQuantTensor) else f"{type(t).__name__}({list(t.shape)}, {t.dtype})"


def _refusal(a: torch.Tensor, b: torch.Tensor, reason: str) -> ValueError:
    return ValueError(f"cannot multiply {_describe(a)} with {_describe(b)}: {reason}")


def _obstacle(a: HadamardQuantTensor, b: HadamardQuantTensor) -> str | None:
    """Return why ``a @ b`` cannot be computed, or None."""
    if a.device != b.device:
        return f"they are on different devices, {a.device} and {b.device}"
    if a.shape[1] != b.shape[0]:
        return "the contracted dimensions differ in size"
    if a.column_rotation != b.row_rotation:
        return f"they carry different rotations on the contracted dimension, {a.column_rotation} and {b.row_rotation}"
    if a.gain_axis == "rows":
        return "the gain of the left one's rows is not undone; multiply the transposes"
    if not are_inverse(a.undo_gain, b.gain if b.gain_axis == "rows" else None):
        return "on the contracted dimension the gain of one must be the inverse of the other's"
    if (a.format is None) != (b.format is None):
        return "one is quantised and the other is not"
    if a.format and b.format and a.format.uniform != b.format.uniform:
        return "no unit multiplies an integer format with a floating one"
    if a.granularity.is_blocked != b.granularity.is_blocked:
        return "either both or none carry scales of blocks"
    if a.granularity.is_per("columns") or b.granularity.is_per("rows"):
        return "a scale along the contracted dimension must be folded into the other operand before that is quantised"
    return None
