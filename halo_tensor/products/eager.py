"""``F.linear`` of a converted weight in eager code: launches on plain tensors.

The operand path (:mod:`halo_tensor.products.operands`, and ``torch.mm`` of two HadamardQuantTensors) makes tensor subclasses,
and calls the dispatcher several times for each kernel. For short inputs this takes the CPU longer than the GPU takes to
multiply. Here a call looks up the :class:`~halo_tensor.products.lowered.Lowered` of its layer, which only allocates and
launches. Both paths give the same results, bit for bit. What a tracer or a dispatch mode must see takes the operand path.
"""

from typing import Any

import torch

from halo_tensor.fences.pytorch import is_recorded, is_transformed
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products.backward import check_first_derivative
from halo_tensor.products.lowered import Codes, Layer, Lowered, can_lower
from halo_tensor.recipe import Recipe


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, lowered: Lowered, w: Codes, gains: Any, codes: Any
    ) -> torch.Tensor:
        wants_x, wants_w = ctx.needs_input_grad[:2]
        operand = codes or lowered.quantized_x(x, gains and gains[1], wants_w)
        saved_x = (operand.columns, operand.scale) if wants_w else (None, None)
        saved_w = (w.rows, w.scale) if wants_x else (None, None)
        ctx.quantises_w = wants_x and weight.operand is None
        if ctx.quantises_w:  # codes that are saved take as much memory as codes that are held
            saved_w = weight.master, None
        ctx.save_for_backward(*saved_x, *saved_w)
        ctx.lowered, ctx.gains, ctx.x_shape = lowered, gains or (None, None), x.shape
        return lowered.output(x.shape, operand.rows, operand.scale, w.rows, w.scale, bias)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        check_first_derivative()
        (e,), lowered = gradients, ctx.lowered
        x_columns, x_scale, w_rows, w_scale = ctx.saved_tensors
        if ctx.quantises_w:
            w_rows, _, w_scale = lowered.quantize_w(w_rows.detach())
        numbers = ctx.x_shape, e.stride(), x_columns is None, w_rows is None
        grad_x, grad_w = lowered.backward(numbers, e, x_columns, x_scale, w_rows, w_scale, *ctx.gains)
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = e.reshape(-1, e.shape[-1]).sum(0, dtype=torch.float32).to(lowered.layer.bias)
        return grad_x, grad_w, grad_bias, None, None, None, None


#: (id of a recipe, widths, dtypes, device, …) -> the recipe, so that its id stays its own, and the layer; None if it
#: cannot be lowered.
_lowered: dict[tuple, tuple[Recipe, Lowered | None]] = {}


def linear(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None, operand_x: HadamardQuantTensor | None = None
) -> torch.Tensor | None:
    """``F.linear(x, weight, bias)`` of a HaloWeight in step with its master; None if the operand path must be taken, which
    also raises the errors.

    Args:
        operand_x: the codes of ``x``, in columns too if grad_weight is wanted, if there are any.
    """
    if type(x) is not torch.Tensor or not runs_kernels(x.device) or is_recorded() or is_transformed():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        recipe, operand, master = weight.recipe, weight.operand, weight.master
        out_features, in_features = weight.shape
        dtype, output = weight.dtype, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            output = torch.get_autocast_dtype(x.device.type)
        elif output != dtype or (bias is not None and bias.dtype != output):
            return None
        balanced = operand is not None and operand.gain is not None
        bias_dtype = None if bias is None else bias.dtype
        row, packed = 0, False
        if operand is not None and operand.codes is not None:
            row, packed = operand.codes.stride(0), operand.is_packed
        key = (id(recipe), out_features, in_features, x.dtype, dtype, output, bias_dtype, x.device, balanced, row, packed)
        _, lowered = _lowered.get(key) or _lower(recipe, key)
        trains = torch.is_grad_enabled()
        trains_w = trains and weight.requires_grad
        if (
            lowered is None
            or x.ndim == 0
            or x.shape[-1] != in_features
            or x.numel() == 0
            or weight.device != x.device
            or (bias is not None and (bias.shape != (out_features,) or bias.device != x.device or bias.stride(0) != 1))
            or (trains_w and master is None and not weight.is_gathered)
            or (operand is not None and operand.codes is None)
            or (operand is not None and operand.scale.ndim > 0 and operand.scale.stride(0) != 1)
        ):
            return None
        if operand is None:
            w, gains = lowered.quantize_w(master.detach()), None
        else:
            w, gains = Codes(operand.codes, None, operand.scale), operand.gains
        codes = None
        if operand_x is not None and operand_x.scale is not None:
            codes = Codes(operand_x.codes, operand_x.codes_t, operand_x.scale)
        if trains_w or (trains and (x.requires_grad or (bias is not None and bias.requires_grad))):
            return _Linear.apply(x, weight, bias, lowered, w, gains, codes)
        rows, _, scale = codes or lowered.quantized_x(x, gains and gains[1], False)
        return lowered.output(x.shape, rows, scale, w.rows, w.scale, bias)[0]


def _lower(recipe: Recipe, key: tuple) -> tuple[Recipe, Lowered | None]:
    found = _lowered[key] = recipe, Lowered(Layer(recipe, *key[1:])) if can_lower(recipe) else None
    return found
