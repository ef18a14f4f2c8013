"""``nn.Conv2d`` under a recipe whose forward is plain, as HOT's is: the recipe governs what is saved and the two backward
products.

A convolution is a linear layer whose tokens are output positions and whose in_features are the C·k·k elements of a window.
A 1×1 convolution is exactly that. A larger one must not save its windows, which hold each element of X up to k² times. So X
itself, [B·H·W, C], is compressed and saved, and backward decompresses it.

By default both gradients are then computed in high precision (:mod:`halo_tensor.products.compressed_conv2d`): that takes less
time than to quantise the operands. This module serves recipes that quantise the products of 1×1 convolutions ("pointwise"),
or of "all", for studies of the published method. Of a larger one the grad_weight product takes all sequencies of the tokens:
X has lost the fast ones when it was compressed, and dropping them again in its windows would save nothing.

There are never the windows of a whole batch. Backward goes through chunks of images. Each chunk is a layer of its own, with
its own scales: one for each operand of a chunk, where the recipe says one for each operand.
"""

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from halo_tensor.compiler import loaded_partition
from halo_tensor.operand import HadamardQuantTensor
from halo_tensor.products import eager_backward
from halo_tensor.products.backward import backward_of_rounding, multiply_backward, take_apart_input
from halo_tensor.products.compressed_conv2d import conv2d as compressed_conv2d
from halo_tensor.products.linear import product_dtype, refuse_tracing
from halo_tensor.products.operands import quantize_operands
from halo_tensor.recipe import Operand, Product, Recipe, X

#: The most elements of windows that exist at a time, unless one image has more: 256 MiB in bfloat16. Compiled code has
#: the operations of each chunk, so many chunks compile for long.
LARGEST = 2**27


class Geometry(NamedTuple):
    """The arguments of a convolution, each as (vertical, horizontal); ``groups`` splits its channels."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def span(self) -> tuple[int, ...]:
        """The edges of a window, which dilation spreads."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def is_pointwise(self) -> bool:
        """Whether a window is one position."""
        return self.kernel == (1, 1)

    @property
    def is_identity(self) -> bool:
        """Whether each window is the position of its output."""
        return self.is_pointwise and self.stride == (1, 1) and self.padding == (0, 0)

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [B, C, H, W] as [B·H'·W', k·k·C], with a row for each output position."""
        if self.is_identity:
            return positions(x)
        (up, left), x = self.padding, x.permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, left, left, up, up)) if up or left else x
        for dim in (0, 1):
            x = x.unfold(1 + dim, self.span[dim], self.stride[dim])
        x = x[..., :: self.dilation[0], :: self.dilation[1]].permute(0, 1, 2, 4, 5, 3)
        return x.reshape(x.shape[:3].numel(), x.shape[3:].numel())

    def fold(self, windows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return the transpose of :meth:`windows`: an x of ``shape``, each element of which is the sum of its occurrences."""
        batch, channels, *size = shape
        if self.is_identity:
            return windows.view(batch, *size, channels).permute(0, 3, 1, 2)
        (up, left), places = self.padding, self.places(shape)
        padded = [n + 2 * p for n, p in zip(size, self.padding, strict=True)]
        x = windows.new_zeros((batch, *padded, channels), dtype=torch.float32)
        parts = windows.view(batch, *places, *self.kernel, channels)
        for i, j in product(*map(range, self.kernel)):
            starts = i * self.dilation[0], j * self.dilation[1]
            rows, columns = (
                slice(start, start + s * (n - 1) + 1, s) for start, s, n in zip(starts, self.stride, places, strict=True)
            )
            x[:, rows, columns] += parts[:, :, :, i, j]
        return x[:, up : up + size[0], left : left + size[1]].permute(0, 3, 1, 2).to(windows.dtype)

    def places(self, shape: torch.Size) -> list[int]:
        """Return H', W' of the output of an x of ``shape``."""
        sizes = zip(shape[2:], self.padding, self.span, self.stride, strict=True)
        return [(n + 2 * p - span) // s + 1 for n, p, span, s in sizes]

    def chunk(self, shape: torch.Size) -> int:
        """Return how many images of an x of ``shape`` are unfolded at a time."""
        rows, columns = self.places(shape)
        return max(1, LARGEST // max(1, rows * columns * self.kernel[0] * self.kernel[1] * shape[1]))


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
            inner, put_together = take_apart_input(operand)
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
            w = positions(w).view(len(w), -1) if ctx.wants_x else None
            if geometry.is_pointwise:
                grad_x, grad_w = multiply_backward(recipe, positions(e), x, w, ctx.x_dtype, weight.dtype)
                grad_x = None if grad_x is None else geometry.fold(grad_x, x_shape)
            else:
                grad_x, grad_w = _by_chunks(recipe, geometry, e, x, w, x_shape, ctx.x_dtype)
            grads_x.append(grad_x)
            grads_w.append(grad_w)
        grad_x = torch.cat(grads_x, 1) if ctx.wants_x else None
        grad_w = torch.cat(grads_w).view(len(weight), *geometry.kernel, -1).permute(0, 3, 1, 2) if xs else None
        grad_w = None if grad_w is None else grad_w.to(weight.dtype)
        grad_bias = grad_output.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None, None, None, None


def _by_chunks(
    recipe: Recipe,
    geometry: Geometry,
    e: torch.Tensor,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    x_shape: torch.Size,
    dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of X and W of a group of channels, of whose X few images are unfolded at a time.

    Args:
        recipe: what the operands carry.
        geometry: of the convolution.
        e: E [B, N, H', W'].
        x: X as it was saved, [B·H·W, C]; None to leave grad_weight out.
        w: W [N, k·k·C]; None to leave grad_input out.
        x_shape: [B, C, H, W].
        dtype: of the gradient of X.

    Returns:
        E_X [B, C, H, W], and G [N, k·k·C] in float32; None for a product that is left out.
    """
    size = geometry.chunk(x_shape)
    grads_x: list = []
    grad_w = None
    if x is not None:
        x = x.dequantize() if isinstance(x, HadamardQuantTensor) else x
        x = x.view(x_shape[0], *x_shape[2:], x_shape[1]).permute(0, 3, 1, 2)
    for start in range(0, max(x_shape[0], 1), size):
        part, operand = e[start : start + size], None
        if x is not None:
            (operand,) = quantize_operands(geometry.windows(x[start : start + size]), X, recipe, ["grad_weight"])
        grad_x, more = multiply_backward(recipe, positions(part), operand, w, dtype, torch.float32)
        if grad_x is not None:
            grads_x.append(geometry.fold(grad_x, torch.Size((len(part), *x_shape[1:]))))
        if more is not None:
            grad_w = more if grad_w is None else grad_w + more
    return (torch.cat(grads_x) if grads_x else None), grad_w


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, recipe: Recipe, geometry: Geometry
) -> torch.Tensor:
    """Compute ``F.conv2d`` under a recipe whose output is plain.

    Each group of channels is a layer of its own, but for the scales of an X of which no windows are quantised.

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
    if not recipe.quantizes_convolution(geometry.is_pointwise):
        return compressed_conv2d(x, weight, bias, recipe, geometry[1:], dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = None
        if geometry.is_pointwise and geometry.groups == 1 and geometry.padding == (0, 0):
            y = eager_backward.pointwise(x, weight, bias, recipe, geometry.stride, dtype)
        return _Conv2d.apply(x, weight, bias, recipe, geometry, dtype, torch.is_grad_enabled()) if y is None else y
