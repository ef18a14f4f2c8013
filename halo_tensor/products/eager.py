"""``F.linear`` of a converted weight in eager code: launches on plain tensors.

The operand path (:mod:`halo_tensor.products.operands`, and ``torch.mm`` of two HadamardQuantTensors) makes tensor subclasses,
and calls the dispatcher several times for each kernel. For short inputs this takes the CPU longer than the GPU takes to
multiply. Here a call looks up the :class:`~halo_tensor.products.lowered.Lowered` of its layer, which only allocates and
launches. A weight remembers what its last call found. Both paths give the same results, bit for bit. What a tracer or a
dispatch mode must see takes the operand path. Layers with a plain forward, as in HOT, are in
:mod:`halo_tensor.products.eager_backward`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from halo_tensor.fences.pytorch import applied, autocast_dtype, is_watched, unwrap_if_dead
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products import eager_backward
from halo_tensor.products.backward import check_first_derivative
from halo_tensor.products.eager_backward import check_versions, gradient_of_bias
from halo_tensor.products.launches import Codes, Layer
from halo_tensor.products.lowered import Lowered, can_lower
from halo_tensor.recipe import Recipe

_is_grad_enabled = torch.is_grad_enabled


@dataclass(eq=False, slots=True)
class Ready:
    """What a call found, and what that depends on.

    Attributes:
        recipe: of the weight.
        x: the dtype of X.
        device, device_type: where all tensors are.
        autocast: the dtype of autocast, or None.
        bias: dtype, device, shape and strides of the bias, or None.
        codes, scale, gain: of the weight's operand.
        undo_gain: the inverse of ``gain``.
        lowered: the launches.
        holds_codes: whether the weight does; otherwise codes and scale were made for one call.
    """

    recipe: Recipe
    x: torch.dtype
    device: torch.device
    device_type: str
    autocast: torch.dtype | None
    bias: tuple | None
    codes: torch.Tensor
    scale: torch.Tensor
    gain: torch.Tensor | None
    undo_gain: torch.Tensor | None
    lowered: Lowered
    holds_codes: bool


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None,
        ready: Ready,
        shape: torch.Size,
        given: Codes | None = None,
    ) -> torch.Tensor:
        wants_x, wants_w, *_ = ctx.needs_input_grad
        lowered, codes, scale = ready.lowered, ready.codes, ready.scale
        rows, columns, x_scale = given or lowered.quantized_x(x, shape, ready.undo_gain, wants_w)
        saved_x = (columns, x_scale) if wants_w else (None, None)
        # A weight's own codes are no memory of the graph: hooks on saved tensors, which checkpointing has too, need not see
        # them. Codes of a weight that holds none would be, so its master is saved, and quantised again.
        w = (codes, scale, codes._version, scale._version) if wants_x and ready.holds_codes else None
        ctx.save_for_backward(*saved_x, weight.master if wants_x and w is None else None)
        ctx.call = lowered, shape, w, ready.gain, ready.undo_gain
        return lowered.output(shape, rows, x_scale, codes, scale, bias)[0]

    @staticmethod
    def backward(ctx: Any, e: torch.Tensor) -> Any:
        check_first_derivative()
        lowered, shape, w, *gains = ctx.call
        x_columns, x_scale, master = ctx.saved_tensors
        w_rows = w_scale = None
        if w is not None:
            w_rows, w_scale, *versions = w
            check_versions(w_rows, w_scale, *versions)
        elif master is not None:
            w_rows, _, w_scale = lowered.quantize_w(master.detach())
        grad_x = grad_w = None
        if w_rows is not None or x_columns is not None:
            # Hooks on saved tensors may give back a copy, of other strides.
            numbers = shape, e.stride(), None if x_columns is None else x_columns.stride(), w_rows is None
            grad_x, grad_w = lowered.backward(numbers, e, x_columns, x_scale, w_rows, w_scale, *gains)
        grad_bias = gradient_of_bias(e, lowered.layer.bias) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None, None, None


_linear = applied(_Linear)

#: (id of a recipe, widths, dtypes, device, …) -> the recipe, so that its id stays its own, and the layer; None if it
#: cannot be lowered.
_lowered: dict[tuple, tuple[Recipe, Lowered | None]] = {}


def linear(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None, operand_x: HadamardQuantTensor | None = None
) -> torch.Tensor | None:
    """``F.linear(x, weight, bias)`` of a HaloWeight in step with its master; None if the operand path must be taken, which
    also raises the errors.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out], or None.
        operand_x: what ``x`` brings to output and grad_weight, if it is quantised already. Values of ``x`` are not read then.
    """
    if type(x) is not torch.Tensor or is_watched():
        return None
    x = unwrap_if_dead(x)
    if weight.recipe.has_plain_output:
        return eager_backward.linear(x, weight, bias) if operand_x is None else None
    operand, ready, shape = weight.operand, weight.codes_state.ready, x.shape
    if (
        ready is None
        or operand is None
        or ready.codes is not operand.codes
        or ready.scale is not operand.scale
        or ready.gain is not operand.gain
        or ready.recipe is not weight.recipe
        or ready.x is not x.dtype
        or ready.device != x.device
        or ready.autocast is not autocast_dtype(ready.device_type)
        or ready.bias != (None if bias is None else _described(bias))
    ):
        ready = _look_up(x, weight, bias)
        if ready is None:
            return None
        weight.codes_state.ready = ready if ready.holds_codes else None
    lowered = ready.lowered
    if not shape or shape[-1] != lowered.layer.in_features or 0 in shape:
        return None
    given = None
    if operand_x is not None and (given := _codes_of(operand_x)) is None:
        return None
    if _is_grad_enabled():
        with torch._C.DisableTorchFunctionSubclass():
            trains_w = weight.requires_grad
        if trains_w and weight.master is None and not weight.is_gathered:
            return None
        if trains_w or x.requires_grad or (bias is not None and bias.requires_grad):
            if given is not None and trains_w and given.columns is None:
                return None
            return _linear(x, weight, bias, ready, shape, given)
    if x.is_leaf and given is None:
        numbers = shape, x.stride()
        return lowered.evaluate(numbers, x, ready.undo_gain, ready.codes, ready.scale, bias)[0]
    rows, _, scale = given or lowered.quantized_x(x, shape, ready.undo_gain, False)
    return lowered.output(shape, rows, scale, ready.codes, ready.scale, bias)[0]


def _codes_of(operand: HadamardQuantTensor) -> Codes | None:
    """Return an operand as launches take it; None if they cannot."""
    if operand.codes is None or operand.scale is None or operand.is_packed:
        return None
    return Codes(operand.codes, operand.codes_t, operand.scale)


def _described(bias: torch.Tensor) -> tuple:
    return bias.dtype, bias.device, bias.shape, bias.stride()


def _look_up(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> Ready | None:
    """Return the launches for a call; None if the operand path must be taken, whatever the shape of X is."""
    if not runs_kernels(x.device):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        recipe, operand, device = weight.recipe, weight.operand, x.device
        out_features, in_features = weight.shape
        dtype, w_device = weight.dtype, weight.device
    autocast = autocast_dtype(device.type)
    output = x.dtype if autocast is None else autocast
    if autocast is None and (output != dtype or (bias is not None and bias.dtype != output)):
        return None
    codes, scale, gains = (None, None, None) if operand is None else (operand.codes, operand.scale, operand.gains)
    bias_dtype = None if bias is None else bias.dtype
    row, packed = (0, False) if codes is None else (codes.stride(0), operand.is_packed)
    key = (id(recipe), out_features, in_features, x.dtype, dtype, output, bias_dtype, device, gains is not None, row, packed)
    _, lowered = _lowered.get(key) or _lower(recipe, key)
    if (
        lowered is None
        or w_device != device
        or (bias is not None and (bias.shape != (out_features,) or bias.device != device or bias.stride(0) != 1))
        or (operand is not None and codes is None)
        or (scale is not None and scale.ndim > 0 and scale.stride(0) != 1)
    ):
        return None
    if operand is None:
        codes, _, scale = lowered.quantize_w(weight.master.detach())
    gain, undo_gain = gains or (None, None)
    assert codes is not None and scale is not None
    how = recipe, x.dtype, device, device.type, autocast, None if bias is None else _described(bias)
    return Ready(*how, codes, scale, gain, undo_gain, lowered, holds_codes=operand is not None)


def _lower(recipe: Recipe, key: tuple) -> tuple[Recipe, Lowered | None]:
    found = _lowered[key] = recipe, Lowered(Layer(recipe, *key[1:])) if can_lower(recipe) else None
    return found
