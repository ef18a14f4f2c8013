"""The head of a language model with its cross-entropy, ``linear_cross_entropy``, and what scales its gradients, ``scale_``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.loss_passes import Gradients, Head, run
from halo_tensor.ops.register import fake, op
from halo_tensor.recipe import Rotation
from halo_tensor.reference.loss import Objective


@op("linear_cross_entropy")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    undo_gain: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    rotation: Rotation | None,
    forward: str,
    backward: str,
    dtype: torch.dtype,
    objective: Sequence[float],
    ignore_index: int,
    chunk: int,
    scratch: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss of each token, and the gradients of their weighted sum.

    Args:
        hidden: [tokens, D].
        weight: [V, D]. codes, scales, undo_gain, bias, rotation, forward, backward, dtype: see :class:`Head`.
        targets: int64 [tokens].
        weights: float32 [tokens].
        objective: the scale of the logits, the softcap or 0, the label smoothing and the factor of the z-loss.
        ignore_index: the target of tokens without a loss.
        chunk: how many tokens are taken at a time.
        scratch: bytes for logits and their gradients.
        wants_hidden, wants_weight, wants_bias: which gradients are wanted.

    Returns:
        Losses, float32 [tokens], not weighted; and the gradients of hidden, weight and bias in their dtypes, empty if they are
        not wanted.
    """
    wants = zip((hidden, weight, bias), (wants_hidden, wants_weight, wants_bias), strict=True)
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) if w and t is not None else None for t, w in wants]
    scale, softcap, smoothing, z_loss = objective
    of_logits = Objective(scale, softcap, smoothing, z_loss, ignore_index)
    head = Head(weight, codes, scales, undo_gain, bias, forward, backward, rotation, dtype, of_logits)
    losses = run(head, hidden, targets, weights, chunk, scratch, Gradients(*gradients))
    return losses, *(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


@fake("linear_cross_entropy")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants_hidden: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape[:1], dtype=torch.float32),
        hidden.new_empty(hidden.shape if wants_hidden else [0]),
        weight.new_empty(weight.shape) if wants_weight else hidden.new_empty([0]),
        bias.new_empty(bias.shape) if wants_bias and bias is not None else hidden.new_empty([0]),
    )


@register_flop_formula(torch.ops.halo.linear_cross_entropy)
def _count_flops(hidden_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Count two operations per multiply-accumulate of each product of the layer, without logits that are multiplied again."""
    wants_hidden, wants_weight = args[14:16]
    return 2 * hidden_shape[0] * weight_shape[0] * hidden_shape[1] * (1 + bool(wants_hidden) + bool(wants_weight))


@op("scale_", mutates=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by one float32 number, in place. On a GPU a factor of 1 costs nothing."""
    if runs_kernels(x.device):
        from halo_tensor.kernels import loss as kernels

        kernels.scale_(x, factor)
    else:
        x.mul_(factor)
