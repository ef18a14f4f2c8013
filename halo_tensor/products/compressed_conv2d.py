"""``F.conv2d`` that saves its input compressed, and whose products run in high precision.

It is what convolutions follow, unless a recipe quantises their products: see :mod:`halo_tensor.products.conv2d`. Forward saves
what X brings to grad_weight, of its positions instead of its windows, as one matrix of tokens with its scales. Backward
decompresses it and computes both gradients by PyTorch's convolution.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from halo_tensor.fences.pytorch import applied, autocast_dtype, is_watched
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.operand import HadamardQuantTensor
from halo_tensor.products.backward import check_first_derivative, take_apart_input, without_autocast
from halo_tensor.products.launches import restored_columns, saved_columns
from halo_tensor.products.operands import quantize_operands
from halo_tensor.recipe import TENSOR, Operand, Recipe, Scales, X

_PER_COLUMN = Scales.per(in_features=1)
_channels_last, _row_major = torch.channels_last, torch.contiguous_format
_convolution_backward = torch.ops.aten.convolution_backward.default


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: Recipe,
        how: tuple,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.dtypes = dtype, x.dtype, weight.dtype, None if bias is None else bias.dtype
        channels_last, ctx.gaps = x.is_contiguous(memory_format=_channels_last), None
        if weight.shape[2:] == (1, 1) and how[0] != (1, 1) and not any(how[1]):
            ctx.gaps = x.shape, how[0]
            x = x[:, :, :: how[0][0], :: how[0][1]]  # it reads no other positions
            x, how = x.contiguous(memory_format=_channels_last if channels_last else _row_major), ((1, 1), *how[1:])
        if x.dtype is not dtype:
            x = x.to(dtype)
        y = F.conv2d(x, weight.to(dtype), None if bias is None else bias.to(dtype), *how)
        ctx.call = how, x.shape, channels_last
        saved: list[torch.Tensor] = []
        ctx.decompress = None
        if ctx.needs_input_grad[1]:
            saved, ctx.decompress = _compressed(x, recipe)
        ctx.save_for_backward(weight, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, e: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        check_first_derivative()
        if autocast_dtype(e.device.type) is None:
            return _backward(ctx, e)
        with without_autocast(e.device):
            return _backward(ctx, e)


def _backward(ctx: Any, e: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, *saved = ctx.saved_tensors
    (stride, padding, dilation, groups), shape, channels_last = ctx.call
    dtype, *dtypes = ctx.dtypes
    if ctx.decompress is None:  # grad_input asks only for its shape
        x = e.new_empty((), dtype=dtype).expand(shape)
    else:
        x = ctx.decompress(saved, shape)
        x = x if channels_last else x.contiguous()
    mask = ctx.needs_input_grad[:3]
    w, sizes = weight.to(dtype), [weight.shape[0]] if mask[2] else None
    made = _convolution_backward(e, x, w, sizes, stride, padding, dilation, False, [0, 0], groups, mask)
    grad_x, grad_w, grad_bias = (g if g is None or g.dtype is to else g.to(to) for g, to in zip(made, dtypes, strict=True))
    if ctx.gaps is not None and grad_x is not None:
        whole, steps = ctx.gaps
        grad_x = _with_gaps(grad_x, whole, steps, channels_last)
    return grad_x, grad_w, grad_bias, None, None, None


def _with_gaps(read: torch.Tensor, shape: torch.Size, stride: tuple[int, int], channels_last: bool) -> torch.Tensor:
    """Return the gradient of an X of ``shape``, of which only some positions were read."""
    whole = torch.empty(
        shape, dtype=read.dtype, device=read.device, memory_format=_channels_last if channels_last else _row_major
    ).zero_()
    whole[:, :, :: stride[0], :: stride[1]] = read
    return whole


_conv2d = applied(_Conv2d)


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, recipe: Recipe, how: tuple, dtype: torch.dtype
) -> torch.Tensor:
    """Compute ``F.conv2d(x, weight, bias, *how)`` in ``dtype``, and save X as ``recipe.grad_weight`` says.

    Args:
        x: [B, C, H, W].
        weight: [N, C/groups, k, k].
        bias: [N], or None.
        recipe: of which only the operand X of grad_weight is read.
        how: stride, padding, dilation and groups.
        dtype: of the products and of the result.

    Returns:
        [B, N, H', W'].
    """
    if not torch.is_grad_enabled():
        return F.conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *how)
    apply = _Conv2d.apply if is_watched() else _conv2d
    if autocast_dtype(x.device.type) is None:
        return apply(x, weight, bias, recipe, how, dtype)
    with without_autocast(x.device):
        return apply(x, weight, bias, recipe, how, dtype)


def _compressed(x: torch.Tensor, recipe: Recipe) -> tuple[list[torch.Tensor], Callable]:
    """Return the tensors to save for x [B, C, H, W], and a function that makes x again from those and its shape."""
    matrix = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view of a channels-last x, else a copy
    launches = None if is_watched() or not x.numel() else _launches_of(recipe, x)
    if launches is not None:
        return [*launches.compress((matrix.shape, matrix.stride()), matrix)], launches.decompressed
    (made,) = quantize_operands(matrix, X, recipe, ["grad_weight"])
    if not isinstance(made, HadamardQuantTensor):
        return [x], lambda saved, shape: saved[0]
    tensors, put_together = take_apart_input(made)
    return tensors, lambda saved, shape: _as_images(put_together(saved).dequantize(), shape)


def _as_images(matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a matrix of positions as images [B, C, H, W], channels last."""
    batch, channels, height, width = shape
    return matrix.view(batch, height, width, channels).permute(0, 3, 1, 2)


class _Launches:
    """How X is compressed and decompressed in eager code: launches on plain tensors, recorded once for each shape.

    Args:
        operand: what X brings to grad_weight.
        dtype: of X.
        device: where it is.
    """

    def __init__(self, operand: Operand, dtype: torch.dtype, device: torch.device):
        from halo_tensor.kernels.quantize.two_operands import Side, operands_quantizer
        from halo_tensor.kernels.recorded import Recorded

        assert operand.format is not None
        side = Side(operand.tokens, operand.format, operand.granularity == _PER_COLUMN)
        self.operand, self.dtype = operand, dtype
        self.quantize = operands_quantizer(dtype, device, None, side)
        self.compress, self.decompress = Recorded(self._compress), Recorded(self._decompress)

    def _compress(self, numbers: tuple, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return :func:`saved_columns` and scales of a matrix, whose shape and strides are ``numbers``."""
        _, codes_t, _, scale = self.quantize(matrix)
        return saved_columns(codes_t, self.operand), scale

    def _decompress(self, shape: torch.Size, saved: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        """Return images of ``shape``, channels last."""
        from halo_tensor.kernels.quantize.dequantize import dequantize

        batch, channels, height, width = shape
        positions, strides = batch * height * width, (height * width * channels, 1, width * channels, channels)
        codes_t = restored_columns(saved, self.operand, positions)
        x = codes_t.new_empty_strided(shape, strides, dtype=self.dtype)
        dequantize(codes_t, scale, self.operand.tokens, (positions, channels), self.dtype, x)
        return (x,)

    def decompressed(self, saved: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        """Return X."""
        return self.decompress(shape, *saved)[0]


_launches = lru_cache(maxsize=256)(_Launches)
#: (id of a recipe, dtype of X, device) -> the recipe, so that its id stays its own, and the launches; None if ops must be
#: called. Each layer has a recipe object of its own.
_found: dict[tuple, tuple[Recipe, _Launches | None]] = {}


def _launches_of(recipe: Recipe, x: torch.Tensor) -> _Launches | None:
    """Return the launches for an X like ``x``; None if there are none, and ops must be called."""
    key = id(recipe), x.dtype, x.device
    found = _found.get(key)
    if found is None:
        operand = recipe.grad_weight.right
        found = _found[key] = recipe, _launches(operand, x.dtype, x.device) if has_launches(operand, x) else None
    return found[1]


def has_launches(operand: Operand, x: torch.Tensor) -> bool:
    """Whether X is compressed by two launches and decompressed by one.

    Args:
        operand: what X brings to grad_weight.
        x: X, of whose dtype and device the answer depends.
    """
    if not runs_kernels(x.device) or x.dtype == torch.float64 or operand.format is None:
        return False
    from halo_tensor.kernels.quantize import dequantize, two_operands
    from halo_tensor.reference.codes import code_dtype

    return (
        operand.granularity in (TENSOR, _PER_COLUMN)
        and operand.in_features is None
        and operand.rounding == "nearest"
        and two_operands.fits(x, None, two_operands.Side(operand.tokens, operand.format, False))
        and dequantize.fits(code_dtype(operand.format), operand.tokens)
    )
