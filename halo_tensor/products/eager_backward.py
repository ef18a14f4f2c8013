"""Layers with a plain forward, as HOT's, in eager code: PyTorch's product, and launches on plain tensors for the rest.

Forward quantises X for grad_weight, and backward is a recording of
:class:`~halo_tensor.products.lowered.LoweredBackward`. A 1×1 convolution is a linear layer of its positions. As in
:mod:`halo_tensor.products.eager`, results are those of the operand path, bit for bit, also those that depend on torch's random
numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F

from halo_tensor.fences.pytorch import applied, autocast_dtype, is_watched, unwrap_if_dead
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.products.backward import check_first_derivative, without_autocast
from halo_tensor.products.launches import Layer
from halo_tensor.products.lowered import LoweredBackward, can_lower_backward
from halo_tensor.recipe import Recipe

_is_grad_enabled = torch.is_grad_enabled
_unsafe_view = torch.ops.aten._unsafe_view.default
#: Types of weights and biases that launches may read.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None,
        lowered: LoweredBackward,
        shape: torch.Size,
    ) -> torch.Tensor:
        wants_x, wants_w, *_ = ctx.needs_input_grad
        _, columns, scale = lowered.quantize_x(x, shape) if wants_w else (None, None, None)
        # Hooks on saved tensors need not see the codes that a weight holds, which are no memory of the graph.
        w, held = None, weight.grad_input_operand
        if wants_x and held is not None:
            w = held.codes_t, held.scale, held.codes_t._version, held.scale._version
        ctx.save_for_backward(columns, scale, weight.master if wants_x and w is None else None)
        ctx.call = lowered, shape, w
        return _product(x, weight.master, bias, shape, lowered.layer.output)

    @staticmethod
    def backward(ctx: Any, e: torch.Tensor) -> Any:
        check_first_derivative()
        lowered, shape, w = ctx.call
        columns, scale, master = ctx.saved_tensors
        codes = w_scale = None
        if w is not None:
            check_versions(*w)
            codes, w_scale, *_ = w
        elif master is not None:
            master = master.detach()
        saved = columns, scale, codes, w_scale, master
        grad_x, grad_w = _in_high_precision(lowered.backward, e.device, shape, e, *saved)
        grad_bias = gradient_of_bias(e, lowered.layer.bias) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None, None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lowered: LoweredBackward,
        stride: tuple[int, ...],
    ) -> torch.Tensor:
        wants_x, wants_w, *_ = ctx.needs_input_grad
        dtype = lowered.layer.output
        columns = scale = None
        if wants_w:
            matrix = _rows(x, stride)
            _, columns, scale = lowered.quantize_x.quantize((matrix.shape, matrix.stride()), matrix, None)
        ctx.save_for_backward(columns, scale, weight if wants_x else None)
        ctx.call = lowered, x.shape, stride
        return _convolution(x, weight, bias, stride, dtype)

    @staticmethod
    def backward(ctx: Any, e: torch.Tensor) -> Any:
        check_first_derivative()
        lowered, (batch, channels, *size), stride = ctx.call
        columns, scale, weight = ctx.saved_tensors
        layer, rows = lowered.layer, _rows(e, (1, 1))
        w = None if weight is None else weight.detach().view(layer.out_features, channels)
        saved = columns, scale, None, None, w
        grad_x, grad_w = _in_high_precision(lowered.backward, e.device, (len(rows), channels), rows, *saved)
        if grad_x is not None:
            grad_x = grad_x.view(batch, *e.shape[2:], channels)
            if stride != (1, 1):
                whole = grad_x.new_zeros((batch, *size, channels))
                _every(whole, stride).copy_(grad_x)
                grad_x = whole
            grad_x = grad_x.permute(0, 3, 1, 2)
        grad_w = None if grad_w is None else grad_w.view(layer.out_features, 1, 1, channels).permute(0, 3, 1, 2)
        grad_bias = e.sum((0, 2, 3), dtype=torch.float32).to(layer.bias) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None, None


def check_versions(codes: torch.Tensor, scale: torch.Tensor, codes_version: int, scale_version: int) -> None:
    """Raise RuntimeError if codes of a weight were written to since they had these versions."""
    if codes._version != codes_version or scale._version != scale_version:
        raise RuntimeError(
            "a weight that is needed for gradient computation has been modified by an inplace operation: it was written to "
            "between forward and backward"
        )


def gradient_of_bias(e: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the sum of E [..., out] over tokens."""
    return e.reshape(-1, e.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


def _in_high_precision(function: Any, device: torch.device, *arguments: Any) -> Any:
    """Call a function without autocast, since some recipes rotate by PyTorch's products."""
    if autocast_dtype(device.type) is None:
        return function(*arguments)
    with without_autocast(device):
        return function(*arguments)


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``F.linear(x, weight, bias)`` in ``dtype`` for x [..., in] of this ``shape``."""
    if x.dtype is not dtype or weight.dtype is not dtype:
        x, weight = x.to(dtype), weight.to(dtype)
    bias = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
    if len(shape) == 2:
        return F.linear(x, weight, bias)
    y = F.linear(x.reshape(-1, shape[-1]), weight, bias)
    return _unsafe_view(y, (*shape[:-1], y.shape[1]))  # a view may not be written to where a function returns it


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return ``F.conv2d(x, weight, bias, stride)`` in ``dtype``."""
    if x.dtype is not dtype or weight.dtype is not dtype:
        x, weight = x.to(dtype), weight.to(dtype)
    return F.conv2d(x, weight, bias if bias is None or bias.dtype is dtype else bias.to(dtype), stride)


def _rows(x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Return x [B, C, H, W] as [B·H'·W', C], of every stride-th position: a view of a channels-last x, else a copy."""
    x = x.permute(0, 2, 3, 1)
    return (x if stride == (1, 1) else _every(x, stride)).reshape(-1, x.shape[3])


def _every(x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Return ``x[:, ::stride[0], ::stride[1]]``, which PyTorch makes by several ops."""
    (batch, *size, channels), (first, *steps, last) = x.shape, x.stride()
    sizes = [-(-n // s) for n, s in zip(size, stride, strict=True)]
    return x.as_strided((batch, *sizes, channels), (first, *(n * s for n, s in zip(steps, stride, strict=True)), last))


_linear, _pointwise = applied(_Linear), applied(_Pointwise)

#: (id of a recipe, widths, dtypes, device) -> the recipe, so that its id stays its own, and the layer; None if its backward
#: cannot be lowered.
_lowered: dict[tuple, tuple[Recipe, LoweredBackward | None]] = {}


def _lower(recipe: Recipe, *layer: Any) -> LoweredBackward | None:
    """Return the launches of a layer with the other fields of :class:`Layer`."""
    key = id(recipe), *layer
    found = _lowered.get(key)
    if found is None:
        lowered = LoweredBackward(Layer(recipe, *layer)) if can_lower_backward(recipe) else None
        found = _lowered[key] = recipe, lowered
    return found[1]


def _can_launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether launches read these tensors. Where they do not, the operand path raises the errors."""
    device = x.device
    if not runs_kernels(device) or type(weight) not in _PLAIN or weight.device != device:
        return False
    return bias is None or (bias.shape == weight.shape[:1] and type(bias) in _PLAIN and bias.device == device)


def linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """``F.linear(x, weight, bias)`` of a HaloWeight in step with its master, whose recipe has a plain output; None if the
    operand path must be taken.

    Args:
        x: [..., in], a plain tensor that no tracer and no mode watches.
        weight: [out, in].
        bias: [out], or None.
    """
    master, shape = weight.master, x.shape
    if master is None or master.ndim != 2 or not shape or shape[-1] != master.shape[1] or 0 in shape:
        return None
    if not _can_launch(x, master, bias):
        return None
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        dtype = x.dtype
        if master.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
            return None
    function: Any = _product
    arguments: tuple = x, master, bias, shape, dtype
    if _is_grad_enabled():
        with torch._C.DisableTorchFunctionSubclass():
            trains_w = weight.requires_grad
        if trains_w or x.requires_grad or (bias is not None and bias.requires_grad):
            bias_dtype = None if bias is None else bias.dtype
            lowered = _lower(weight.recipe, *master.shape, x.dtype, master.dtype, dtype, bias_dtype, x.device)
            if lowered is None:
                return None
            function, arguments = _linear, (x, weight, bias, lowered, shape)
    return _in_high_precision(function, x.device, *arguments)


def pointwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    recipe: Recipe,
    stride: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """``F.conv2d(x, weight, bias, stride)`` of a 1×1 kernel without padding or groups; None if the operand path must be taken.
    Autocast is off.

    Args:
        x: [B, C, H, W].
        weight: [N, C, 1, 1].
        bias: [N], or None.
        recipe: with a plain output.
        stride: vertical, horizontal.
        dtype: of the result.
    """
    if type(x) is not torch.Tensor or is_watched():
        return None
    x = unwrap_if_dead(x)
    shape = x.shape
    if len(shape) != 4 or 0 in shape or shape[1] != weight.shape[1] or not _can_launch(x, weight, bias):
        return None
    if _is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        bias_dtype = None if bias is None else bias.dtype
        lowered = _lower(recipe, *weight.shape[:2], x.dtype, weight.dtype, dtype, bias_dtype, x.device)
        if lowered is None:
            return None
        return _pointwise(x, weight, bias, lowered, stride)
    return _convolution(x, weight, bias, stride, dtype)
