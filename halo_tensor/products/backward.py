"""The two products of backward, and what forward saves for them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from halo_tensor.operand import matmul  # noqa: F401  defines torch.mm of two operands
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products.operands import quantize_operands
from halo_tensor.products.steps import reuses_operand
from halo_tensor.recipe import PRODUCTS, E, Recipe, W


def multiply(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(a, HadamardQuantTensor) != isinstance(b, HadamardQuantTensor):
        a, b = (t if isinstance(t, HadamardQuantTensor) else HadamardQuantTensor.plain(t) for t in (a, b))
    elif not isinstance(a, HadamardQuantTensor):
        a, b = a.to(dtype), b.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    options: Any = {} if a.dtype == b.dtype == dtype else {"out_dtype": dtype}
    return torch.mm(a, b, **options) if bias is None else torch.addmm(bias, a, b, **options)


def multiply_backward(
    recipe: Recipe,
    e: torch.Tensor,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """E_X [tokens, in] of ``x_dtype`` and G [out, in] of ``w_dtype``; None where ``w`` or ``x`` is.

    Args:
        e: E [tokens, out]. x: what X brings to grad_weight. w: the operand of W that output used, if grad_input uses it too,
            else W itself.
    """
    right, folds = {}, {}
    if w is not None:
        right["grad_input"] = w if reuses_operand(recipe) else quantize_operands(w, W, recipe, ["grad_input"])[0]
    if x is not None:
        right["grad_weight"] = x
    for product, operand in right.items():
        along = getattr(recipe, product).right.scale
        if along == PRODUCTS[product][2] and isinstance(operand, HadamardQuantTensor):
            folds[product], right[product] = operand.scale, operand.without_scale()
    left = dict(zip(right, quantize_operands(e, E, recipe, list(right), folds), strict=True))
    grad_x = None if w is None else multiply(left["grad_input"], right["grad_input"], x_dtype)
    grad_w = None if x is None else multiply(left["grad_weight"].t(), right["grad_weight"], w_dtype)
    return grad_x, grad_w


def take_apart(operand: torch.Tensor | None) -> tuple[list[torch.Tensor], Callable]:
    """The tensors to save for an operand, and the function that puts them together again. Inner tensors are saved, not the
    subclass: hooks on saved tensors (offloading, counting) see what is really kept."""
    if operand is None:
        return [], lambda tensors: None
    if not isinstance(operand, HadamardQuantTensor):
        return [operand], lambda tensors: tensors[0]
    names, attributes = operand.__tensor_flatten__()
    size, stride = operand.size(), operand.stride()

    def put_together(tensors):
        inner = dict(zip(names, tensors, strict=True))
        return HadamardQuantTensor.__tensor_unflatten__(inner, attributes, size, stride)

    return [getattr(operand, name) for name in names], put_together


def check_first_derivative() -> None:
    """Raise RuntimeError in a backward that is itself recorded, by create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError("a converted layer has no second derivatives: rounding has none. dequantize_ the model")


def backward_of_rounding(backward: Callable) -> Callable:
    """For the backward of an autograd function: it refuses second derivatives, and autocast does not reach it."""

    @wraps(backward)
    def run(ctx, grad_output):
        check_first_derivative()
        with torch.autocast(grad_output.device.type, enabled=False):
            return backward(ctx, grad_output)

    return run
