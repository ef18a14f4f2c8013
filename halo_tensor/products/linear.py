"""The linear layer's three products, as a recipe says.

Forward quantises X and reads W as the codes that :class:`~halo_tensor.weight.tensor.HaloWeight` holds. Backward quantises E
and multiplies it with the same operands, or, as in HOT, with codes of W that the weight holds for grad_input alone. For
backward, forward saves the codes of X that grad_weight reads, and references to W. Of a weight that holds no codes, forward
saves the master, and backward quantises it again: codes that are saved would take as much memory as codes that are held.
"""

from typing import Any

import torch

from halo_tensor.compiler import loaded_partition
from halo_tensor.operand import HadamardQuantTensor
from halo_tensor.products.backward import (
    backward_of_rounding,
    multiply,
    multiply_backward,
    take_apart,
    take_apart_input,
    without_autocast,
)
from halo_tensor.products.operands import quantize_operands, weight_operand
from halo_tensor.products.steps import reuses_operand
from halo_tensor.recipe import Recipe, X


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: Recipe,
        dtype: torch.dtype,
        trains: bool,
        gain: torch.Tensor | None,
        operand_x: HadamardQuantTensor | None,
    ) -> torch.Tensor:
        master, operand = getattr(weight, "master", weight), getattr(weight, "operand", None)
        holds_no_codes = operand is None and not recipe.output.right.is_plain
        if holds_no_codes:
            operand = weight_operand(master, recipe)
        w = master if operand is None else operand
        wants_x, wants_w = (trains and needed for needed in ctx.needs_input_grad[:2])
        products = ["output", "grad_weight"] if wants_w else ["output"]
        # X carries the inverse of W's gain, so that the two cancel.
        gains = getattr(operand, "gains", None)
        gains = gains and (gains[1] if gain is None else gain, gains[0])
        x_operands: list[torch.Tensor]
        if operand_x is None:
            x_operands = quantize_operands(x.reshape(-1, x.shape[-1]), X, recipe, products, owner=x, gains=gains)
        else:
            x_operands = [operand_x] * len(products)
        y = multiply(x_operands[0], w.t(), dtype, bias)

        w_saved = w if reuses_operand(recipe) and not holds_no_codes else getattr(weight, "grad_input_operand", None)
        w_saved = (master if w_saved is None else w_saved) if wants_x else None
        ctx.quantises_w = wants_x and holds_no_codes and reuses_operand(recipe)
        x_tensors, ctx.put_x_together = take_apart_input(x_operands[1]) if wants_w else take_apart(None)
        w_tensors, ctx.put_w_together = take_apart(w_saved)
        ctx.save_for_backward(*x_tensors, *w_tensors)
        ctx.x_count = len(x_tensors)
        ctx.recipe, ctx.x_shape, ctx.x_dtype, ctx.w_dtype = recipe, x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Not a view: autograd forbids writes to views that a function returns, and ReLU(inplace=True) writes.
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    @backward_of_rounding
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recipe, saved = ctx.recipe, ctx.saved_tensors
        x, w = ctx.put_x_together(saved[: ctx.x_count]), ctx.put_w_together(saved[ctx.x_count :])
        w = weight_operand(w, recipe) if ctx.quantises_w else w
        e = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x, grad_w = multiply_backward(recipe, e, x, w, ctx.x_dtype, ctx.w_dtype)
        grad_x = None if grad_x is None else grad_x.view(ctx.x_shape)
        grad_bias = e.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None, None, None, None, None


def product_dtype(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype:
    """Return the dtype that a layer computes in: autocast's, or the one that all three tensors have.

    Raises:
        ValueError: the dtypes differ outside of autocast.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"{name}: input {x.dtype}, weight {weight.dtype} and bias {None if bias is None else bias.dtype} must be of one "
            "dtype; convert the model or the input with .to(dtype), or use torch.autocast"
        )
    return x.dtype


def refuse_tracing() -> None:
    """Raise RuntimeError inside of ``torch.jit.trace``: TorchScript cannot hold a Python autograd function, and crashes when
    it saves what it traced."""
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace knows no converted layers: call dequantize_(model) first")


def linear(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    recipe: Recipe | None = None,
    gain: torch.Tensor | None = None,
    operand_x: HadamardQuantTensor | None = None,
) -> torch.Tensor:
    """Compute ``F.linear(x, weight, bias)`` as a recipe says.

    Args:
        x: [..., in], of the weight's dtype, except under autocast: X and W are then quantised from their own precision.
        weight: a HaloWeight [out, in]; or any weight, if ``recipe`` is given.
        bias: [out], one number, or None.
        recipe: of a weight that has none of its own. Every call quantises such a weight, if the recipe's output does.
        gain: the ``undo_gain`` of ``weight`` once more, if it has one, as an input of its own. A compiler knows whether two
            inputs are the same tensor, but not whether two tensors inside of subclasses are, and so quantises X once for all
            layers that share a gain.
        operand_x: what ``x`` brings to output and grad_weight, if it is quantised already.

    Returns:
        [..., out], of autocast's dtype or that of ``x``.

    Raises:
        ValueError: the shapes do not fit; the devices differ, or the dtypes outside of autocast; or W is held as codes only
            and is to be trained.
        RuntimeError: inside of ``torch.jit.trace``.
    """
    refuse_tracing()
    if recipe is None:
        check_trainable("linear", weight)
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: an input of shape {list(x.shape)} does not fit a weight of {list(weight.shape)} [out, in]")
    if bias is not None and bias.numel() == 1:
        bias = bias.expand(weight.shape[:1])
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: a bias of shape {list(bias.shape)} does not fit a weight of {list(weight.shape)} [out, in]")
    if devices := {str(t.device) for t in (weight, bias) if t is not None and t.device != x.device}:
        raise ValueError(f"linear: the input is on {x.device} and the layer on {', '.join(sorted(devices))}; move one of them")
    recipe = recipe or weight.recipe
    if recipe.activations is not None and (partition := loaded_partition()) is not None:
        partition.request(recipe.activations)
    dtype = product_dtype("linear", x, weight, bias)
    with without_autocast(x.device):
        return _Linear.apply(x, weight, bias, recipe, dtype, torch.is_grad_enabled(), gain, operand_x)


def check_trainable(name: str, weight: Any) -> None:
    """Raise ValueError if a weight is to be trained but is held as codes only."""
    if weight.master is not None or not weight.requires_grad or weight.is_gathered:
        return
    if weight.grad_fn is not None:  # SHiRA adds its adapter to a clone
        raise ValueError(
            f"{name}: something trainable was added to this weight, which was frozen when it was converted and is held "
            "as codes only: the sum would be rounded to codes in every forward, and small changes lost. Convert its layer "
            "with frozen=False in the config, which keeps the high-precision weight, or leave it out (skip, filter_fn)"
        )
    raise ValueError(
        f"{name}: this weight was frozen when it was converted and is held as codes only, so it cannot be trained. Call "
        "dequantize_(model), then requires_grad_(True), then quantize_(model, ...)"
    )
