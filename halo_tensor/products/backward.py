"""The two products of backward, and what forward saves for them."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch.compiler import is_compiling

from halo_tensor import ops
from halo_tensor.operand import HadamardQuantTensor
from halo_tensor.products.operands import quantize_operands
from halo_tensor.products.steps import folded_products, reuses_operand
from halo_tensor.recipe import E, Recipe, W
from halo_tensor.reference.nibbles import can_pack


def multiply(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return a b + bias in ``dtype``, of two operands, two matrices in high precision, or one of each."""
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
    """Return the gradients of X and W.

    Args:
        recipe: what the operands carry.
        e: E [tokens, out].
        x: what X brings to grad_weight; None to leave that product out.
        w: what W brings to grad_input, or W itself, which is then quantised; None to leave grad_input out.
        x_dtype, w_dtype: the dtypes of the gradients.

    Returns:
        E_X [tokens, in] and G [out, in]; None for a product that is left out.
    """
    right, folds = {}, {}
    if w is not None:
        made = reuses_operand(recipe) or isinstance(w, HadamardQuantTensor)
        right["grad_input"] = w if made else quantize_operands(w, W, recipe, ["grad_input"])[0]
    if x is not None:
        right["grad_weight"] = x
    for product in folded_products(recipe, tuple(right)):
        operand = right[product]
        assert isinstance(operand, HadamardQuantTensor)  # it has a format
        folds[product], right[product] = operand.scale, operand.without_scale()
    left = dict(zip(right, quantize_operands(e, E, recipe, list(right), folds), strict=True))
    grad_x = None if w is None else multiply(left["grad_input"], right["grad_input"], x_dtype)
    grad_w = None if x is None else multiply(left["grad_weight"].t(), right["grad_weight"], w_dtype)
    return grad_x, grad_w


def take_apart(operand: torch.Tensor | None) -> tuple[list[torch.Tensor], Callable]:
    """Return the tensors to save for an operand, and a function that makes the operand of them again.

    The tensors inside of a HadamardQuantTensor are saved, not the subclass, so that hooks on saved tensors (offloading,
    counting) see the memory that is kept.
    """
    if operand is None:
        return [], lambda tensors: None
    if not isinstance(operand, HadamardQuantTensor):
        return [operand], lambda tensors: tensors[0]
    names, attributes = operand.__tensor_flatten__()
    size, stride = operand.size(), operand.stride()

    def put_together(tensors: Sequence[torch.Tensor]) -> HadamardQuantTensor:
        inner = dict(zip(names, tensors, strict=True))
        return HadamardQuantTensor.__tensor_unflatten__(inner, attributes, size, stride)

    return [getattr(operand, name) for name in names], put_together


def take_apart_input(operand: torch.Tensor) -> tuple[list[torch.Tensor], Callable]:
    """Return what :func:`take_apart` returns, for what X brings to grad_weight.

    Only the transposed codes are saved, since grad_weight reads no others. INT4 codes are saved in half a byte each.
    """
    if not isinstance(operand, HadamardQuantTensor):
        return take_apart(operand)
    operand = operand.only("columns")
    tensors, put_together = take_apart(operand)
    if not can_pack(operand.format):
        return tensors, put_together
    at = operand.__tensor_flatten__()[0].index("codes_t")
    columns = tensors[at].shape[1]

    def put_together_unpacked(saved: Sequence[torch.Tensor]) -> HadamardQuantTensor:
        return put_together([*saved[:at], ops.unpack_nibbles(saved[at], columns), *saved[at + 1 :]])

    return [*tensors[:at], _packed(tensors[at]), *tensors[at + 1 :]], put_together_unpacked


def _packed(codes: Any) -> torch.Tensor:
    """Return packed codes. Layers that share the codes of one X save them once; a compiler finds out by itself."""
    if is_compiling():
        return ops.pack_nibbles(codes)
    packed = getattr(codes, "packed", None)
    if packed is None:
        packed = codes.packed = ops.pack_nibbles(codes)
    return packed


def check_first_derivative() -> None:
    """Raise RuntimeError in a backward that is itself recorded, by create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError("a converted layer has no second derivatives: rounding has none. dequantize_ the model")


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which autocast is off on a device. It knows no meta tensors."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def backward_of_rounding(backward: Callable) -> Callable:
    """Decorate the backward of an autograd function: refuse second derivatives, and turn autocast off."""

    @wraps(backward)
    def run(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        check_first_derivative()
        with without_autocast(grad_output.device):
            return backward(ctx, grad_output)

    return run
