"""``nn.Conv2d`` under a recipe whose forward is plain, as HOT's is: the recipe governs what is saved and the two backward
products.

A convolution is a linear layer whose tokens are output positions and whose in_features are the C·k·k elements of a window.
A 1×1 convolution is exactly that. A larger one must not save its windows, which hold each element of X up to k² times. So X
itself, [B·H·W, C], is compressed and saved, and backward decompresses and unfolds it. The grad_weight product of a larger
convolution takes all sequencies of the tokens: X has lost the fast ones when it was compressed, and dropping them again after
it was unfolded would save nothing.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from halo_tensor.compiler import loaded_partition
from halo_tensor.operand import HadamardQuantTensor
from halo_tensor.products.backward import backward_of_rounding, multiply_backward, take_apart
from halo_tensor.products.linear import product_dtype, refuse_tracing
from halo_tensor.products.operands import quantize_operands
from halo_tensor.recipe import Operand, Product, Recipe, X


class Geometry(NamedTuple):
    """The arguments of a convolution, each as (vertical, horizontal); ``groups`` splits its channels."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def is_pointwise(self) -> bool:
        """Whether a window is one position."""
        return self.kernel == (1, 1)

    @property
    def is_identity(self) -> bool:
        """Whether each window is the position of its output."""
        return self.is_pointwise and self.stride == (1, 1) and self.padding == (0, 0)

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [B, C, H, W] as [B·H'·W', C·k·k], with a row for each output position."""
        if self.is_identity:
            return positions(x)
        columns = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])

    def fold(self, windows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return the transpose of :meth:`windows`: an x of ``shape``, each element of which is the sum of its occurrences."""
        batch, size = shape[0], tuple(shape[2:])
        if batch == 0:
            return windows.new_zeros(shape)
        if self.is_identity:
            return windows.view(batch, *size, -1).permute(0, 3, 1, 2)
        columns = windows.view(batch, -1, windows.shape[1]).transpose(1, 2)
        return F.fold(columns, size, self.kernel, self.dilation, self.padding, self.stride)


def positions(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, C, H, W] as [B·H·W, C]: a view of a channels-last x, else a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _whole_rank(recipe: Recipe) -> Recipe:
    """Return the recipe with all sequencies in grad_weight."""

    def whole(operand: Operand) -> Operand:
        return operand if operand.tokens is None else replace(operand, tokens=replace(operand.tokens, rank=None))

    left, right = recipe.grad_weight.left, recipe.grad_weight.right
    return replace(recipe, grad_weight=Product(whole(left), whole(right)))


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: Recipe,
        geometry: Geometry,
        dtype: torch.dtype,
        trains: bool,
    ) -> torch.Tensor:
        ctx.recipe, ctx.geometry, ctx.x_shape, ctx.x_dtype = recipe, geometry, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        wants_x, wants_w = (trains and needed for needed in ctx.needs_input_grad[:2])
        y = F.conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *geometry[1:])
        tensors: list = []
        ctx.put_together = []
        for part in x.chunk(geometry.groups, 1) if wants_w else ():
            matrix = geometry.windows(part) if geometry.is_pointwise else positions(part)
            (operand,) = quantize_operands(matrix, X, recipe, ["grad_weight"])
            operand = operand.only("columns") if isinstance(operand, HadamardQuantTensor) else operand
            inner, put_together = take_apart(operand)
            ctx.put_together.append((len(tensors), len(tensors) + len(inner), put_together))
            tensors += inner
        ctx.save_for_backward(weight, *tensors)
        ctx.wants_x = wants_x
        return y

    @staticmethod
    @backward_of_rounding
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        geometry, (weight, *saved) = ctx.geometry, ctx.saved_tensors
        recipe = ctx.recipe if geometry.is_pointwise else _whole_rank(ctx.recipe)
        xs: list = [put_together(saved[start:stop]) for start, stop, put_together in ctx.put_together]
        x_shape = torch.Size((ctx.x_shape[0], ctx.x_shape[1] // geometry.groups, *ctx.x_shape[2:]))
        grads_x: list = []
        grads_w: list = []
        for i, (e, w) in enumerate(zip(grad_output.chunk(geometry.groups, 1), weight.chunk(geometry.groups), strict=True)):
            x = xs[i] if xs else None
            if x is not None and not geometry.is_pointwise:
                x = x.dequantize() if isinstance(x, HadamardQuantTensor) else x
                windows = geometry.windows(x.view(x_shape[0], *x_shape[2:], x_shape[1]).permute(0, 3, 1, 2))
                (x,) = quantize_operands(windows, X, recipe, ["grad_weight"])
            w = w.flatten(1) if ctx.wants_x else None
            grad_x, grad_w = multiply_backward(recipe, positions(e), x, w, ctx.x_dtype, weight.dtype)
            grads_x.append(None if grad_x is None else geometry.fold(grad_x, x_shape))
            grads_w.append(grad_w)
        grad_x = torch.cat(grads_x, 1) if ctx.wants_x else None
        grad_w = torch.cat(grads_w).view_as(weight) if xs else None
        grad_bias = grad_output.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None, None, None, None


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, recipe: Recipe, geometry: Geometry
) -> torch.Tensor:
    """Compute ``F.conv2d`` under a recipe whose output is plain. Each group of channels is a layer of its own.

    Args:
        x: [B, C, H, W].
        weight: [N, C/groups, k, k].
        bias: [N], or None.
        recipe: of the two backward products.
        geometry: stride, padding, dilation and groups.

    Returns:
        [B, N, H', W'].

    Raises:
        ValueError: the dtypes differ outside of autocast.
        RuntimeError: inside of ``torch.jit.trace``.
    """
    refuse_tracing()
    if recipe.activations is not None and (partition := loaded_partition()) is not None:
        partition.request(recipe.activations)
    dtype = product_dtype("conv2d", x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _Conv2d.apply(x, weight, bias, recipe, geometry, dtype, torch.is_grad_enabled())
