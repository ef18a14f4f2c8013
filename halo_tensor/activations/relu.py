"""``nn.ReLU`` that saves one bit an element, and computes its result and its gradient by a launch each, in eager code.

Hooks on saved tensors can pack that mask, too. But then forward reads the result once more, and backward writes the mask out
as a tensor of the result's dtype and reads it.
"""

from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from halo_tensor.activations import choice
from halo_tensor.activations.launches import launches_on, masked, relu, unpack_mask, without_gaps
from halo_tensor.activations.state import state
from halo_tensor.fences.pytorch import applied, top_saved_tensors_hooks
from halo_tensor.recipe import Activations


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = without_gaps(x)
        ctx.layout = x.shape, x.stride()
        y, mask = relu(x)
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, e: torch.Tensor) -> torch.Tensor:
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # backward is itself differentiated
            shape, strides = ctx.layout
            return torch.where(unpack_mask(mask, shape, strides, torch.bool), e, 0)
        return masked(e, mask, *ctx.layout)


_relu = applied(_ReLU)


class HaloReLU(nn.ReLU):
    """An ``nn.ReLU`` in a block whose saved tensors are compressed; its forward is nn.ReLU's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the larger of 0 and each element."""
        if is_compiling():
            return super().forward(input)
        if not self.inplace and input.requires_grad and _saves_masks() and _fits(input):
            return _relu(input)
        state.relus += 1
        try:
            return super().forward(input)
        finally:
            state.relus -= 1


def _saves_masks() -> bool:
    """Whether hooks of this library are the innermost ones on saved tensors, and compress what a ReLU saves."""
    top = top_saved_tensors_hooks()
    activations = getattr(getattr(top and top[0], "__self__", None), "activations", None)
    return isinstance(activations, Activations) and activations.inner is not None


def _fits(x: torch.Tensor) -> bool:
    return x.dtype in choice.DTYPES and x.numel() >= choice.FEWEST_ELEMENTS and type(x) is torch.Tensor and launches_on(x)
