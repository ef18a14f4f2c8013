"""``linear_cross_entropy``: the head of a language model and its loss as one function, forward and backward."""

from typing import Any

import torch
from torch.compiler import is_compiling
from torch.distributed.tensor import DTensor

from halo_tensor import ops
from halo_tensor.fences.pytorch import is_symbolic
from halo_tensor.kernels.device import check_device, runs
from halo_tensor.products.backward import backward_of_rounding
from halo_tensor.products.linear import product_dtype, refuse_tracing
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference.hadamard import carried, fit

FORWARDS, BACKWARDS, REDUCTIONS = ("int8", "bf16"), ("fp8", "bf16", None), ("mean", "sum", "none")
#: Tokens that are taken at a time, and bytes for their logits and the gradients of these. Both trade memory for speed.
CHUNK, SCRATCH = 16384, 15 * 2**25
_NAME = "linear_cross_entropy"
_compute: Any = ops.linear_cross_entropy


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | torch.Tensor | None = None,
    forward: str = "int8",
    backward: str | None = None,
    chunk: int = CHUNK,
    scratch: int = SCRATCH,
) -> torch.Tensor:
    """Return the cross-entropy of ``F.linear(hidden, weight, bias)`` without making its logits as a whole.

    Logits exist for one part of the vocabulary at a time, and forward computes the gradients with the loss. By default the
    product of forward is in int8 with rotated in_features, as HALO-1, and those of backward are in fp8 (e4m3). A softmax less
    a one-hot spans many powers of two within a row, which int8 does not hold, rotated or not.

    Args:
        hidden: hidden states [..., D], of the weight's dtype, except under autocast.
        weight: [V, D], a parameter or a :class:`~halo_tensor.HaloWeight`, whose int8 codes are used if it has them. It may be
            tied to an embedding. V may be any number.
        targets: int64 [...], indices below V, or ``ignore_index``. They are not shifted. A target out of range gives a NaN.
        bias: [V], or None.
        ignore_index: the target of tokens without a loss.
        label_smoothing: from 0 to below 1, as in :func:`torch.nn.functional.cross_entropy`.
        softcap: bounds the logits: ``softcap * tanh(logits / softcap)``, as in Gemma 2; None for no bound.
        logit_scale: multiplies the logits, before the softcap.
        z_loss: the factor of the square of log Σ exp(logits), which is added to the loss of each token (arXiv 2204.02311).
        reduction: "mean" over the tokens that are not ignored, "sum", or "none" for the loss of each token, [...].
        num_items_in_batch: what the sum of all losses is divided by, instead of the number of tokens; transformers' trainer
            passes it.
        forward: "int8", or "bf16" for a product in the dtype of the tensors. int8 logits are rounded to float16, so that one
            beyond ±65504 gives an Inf.
        backward: "fp8", or "bf16" for products in the dtype of the tensors; None for fp8 where the device multiplies it.
        chunk: the most tokens that are taken at a time. Fewer need less memory and take longer.
        scratch: bytes for logits and their gradients. Where all logits do not fit, they are computed twice: more bytes are
            faster, up to two for each token and index of the vocabulary.

    Returns:
        The loss, float32: a number, or [...] with reduction "none".

    Raises:
        ValueError: shapes or dtypes do not fit, or a value is not valid; the message lists the valid ones.
        TypeError: ``weight`` is a DTensor, or ``targets`` are no integers.
        RuntimeError: the device multiplies no int8 or no fp8; or a second backward through one loss, if it is a number.

    Example:
        >>> import torch
        >>> from halo_tensor import linear_cross_entropy
        >>> head = torch.nn.Linear(128, 1000, bias=False)
        >>> hidden = torch.randn(2, 16, 128, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, head.weight, torch.randint(1000, (2, 16)))
        >>> loss.backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([2, 16, 128]), torch.Size([1000, 128]))
    """
    function = _run_in_graph if is_compiling() else _run
    return function(
        hidden, weight, targets, bias, num_items_in_batch, reduction, forward, backward, softcap,
        (logit_scale, label_smoothing, z_loss), ignore_index, chunk, scratch,
    )  # fmt: skip


def _run(
    hidden: torch.Tensor,
    weight: Any,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    count: int | torch.Tensor | None,
    reduction: str,
    forward: str,
    backward: str | None,
    softcap: float | None,
    factors: tuple[float, float, float],
    ignore_index: int,
    chunk: int,
    scratch: int,
) -> torch.Tensor:
    """Do :func:`linear_cross_entropy`, as one node of a compiler's graph."""
    refuse_tracing()
    logit_scale, label_smoothing, z_loss = factors
    _check_values(reduction, count, forward, backward, label_smoothing, softcap, z_loss, chunk, scratch)
    _check_tensors(hidden, weight, targets, bias)
    device = hidden.device
    dtype = product_dtype(_NAME, hidden, weight, bias)
    backward = backward or ("fp8" if runs((FP8_E4M3,), device) else "bf16")
    check_device((INT8,) * (forward == "int8") + (FP8_E4M3,) * (backward == "fp8"), device)
    if count is not None:
        count = count.to(device) if isinstance(count, torch.Tensor) else torch.full((), count, device=device)
    objective = logit_scale, softcap or 0.0, label_smoothing, z_loss
    options = forward, backward, dtype, objective, ignore_index, chunk, scratch
    matrix, indices = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(torch.int64)
    with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):
        losses = _LinearCrossEntropy.apply(matrix, weight, bias, indices, count, reduction, options, torch.is_grad_enabled())
    return losses.reshape(targets.shape) if reduction == "none" else losses


#: Dynamo puts the call into its graph as it stands, and AOTAutograd traces through it, backward included.
_run_in_graph = torch.compiler.allow_in_graph(_run)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        count: torch.Tensor | None,
        reduction: str,
        options: tuple,
        trains: bool,
    ) -> torch.Tensor:
        tensors, rotation = _head_of(weight, options[0])
        is_counted = targets != options[4]
        if count is None and reduction == "mean":
            count = is_counted.sum()
        weights = is_counted.to(torch.float32)
        if count is not None:
            weights = torch.where(is_counted, 1 / count.to(torch.float32), weights)
        wants = [trains and needed for needed in ctx.needs_input_grad[:3]]
        # Gradients in float16 are computed in backward, where the factor of a GradScaler is known: without it they underflow.
        now = reduction != "none" and torch.float16 not in (hidden.dtype, weight.dtype)
        arguments: Any = (hidden, *tensors, bias, targets)
        computed = [wanted and now for wanted in wants]
        losses, *gradients = _compute(*arguments, weights, rotation, *options, *computed)
        ctx.reduction, ctx.rotation, ctx.options, ctx.wants = reduction, rotation, options, wants
        ctx.gradients = [g if wanted else None for g, wanted in zip(gradients, wants, strict=True)] if now else None
        ctx.now = now
        if not now and any(wants):
            ctx.save_for_backward(*arguments, weights)
        if reduction == "none":
            return losses
        return losses.sum() if count is None else losses.sum() / count

    @staticmethod
    @backward_of_rounding
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.now:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                raise RuntimeError(
                    f"{_NAME}: forward has computed the gradients, and the first backward has taken them. Compute the loss "
                    "again for a second one, or use reduction='none', which computes them in backward"
                )
            scaled = [None if gradient is None else _scaled(gradient, grad_output) for gradient in gradients]
            return *scaled, None, None, None, None, None
        arguments: Any
        *arguments, weights = ctx.saved_tensors
        _, *gradients = _compute(*arguments, weights * grad_output, ctx.rotation, *ctx.options, *ctx.wants)
        wanted = [g if needed else None for g, needed in zip(gradients, ctx.wants, strict=True)]
        return *wanted, None, None, None, None, None


def _scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return a gradient times a number. In eager code its memory is used again."""
    if is_symbolic():
        return (gradient * factor).to(gradient.dtype)
    ops.scale_(gradient, factor.to(torch.float32))
    return gradient


def _head_of(weight: Any, forward: str) -> tuple[tuple[torch.Tensor | None, ...], Rotation | None]:
    """Return the dense weight, its int8 codes, their scales and what undoes its gain, or None for these; and the rotation."""
    master: Any = getattr(weight, "master", weight)
    operand: Any = getattr(weight, "operand", None)
    dense = operand.dequantize() if master is None else master
    if operand is not None and forward == "int8":
        right = weight.recipe.output.right
        if right.format is INT8 and right.granularity.is_per("out_features"):
            if master is not None and not is_symbolic():
                weight.follow()
            rotation = carried(right, "in_features", weight.shape[1])
            return (dense, operand.codes, operand.scale, operand.undo_gain), rotation
    return (dense, None, None, None), fit(Rotation(), weight.shape[1])


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    if isinstance(weight, DTensor):
        raise TypeError(f"{_NAME}: the weight is a DTensor, a part of a matrix: call it where FSDP has gathered the weight")
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{_NAME}: hidden states {list(hidden.shape)} do not fit a weight of {list(weight.shape)} [V, D]")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{_NAME}: targets {list(targets.shape)} do not fit hidden states {list(hidden.shape)} [..., D]")
    if targets.dtype.is_floating_point or targets.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"{_NAME}: targets are indices of the vocabulary; got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{_NAME}: a bias of {list(bias.shape)} does not fit a weight of {list(weight.shape)} [V, D]")
    if devices := {str(t.device) for t in (weight, targets, bias) if t is not None and t.device != hidden.device}:
        raise ValueError(f"{_NAME}: hidden states are on {hidden.device}, and other tensors on {', '.join(sorted(devices))}")


def _check_values(
    reduction: str,
    num_items_in_batch: Any,
    forward: str,
    backward: str | None,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    chunk: int,
    scratch: int,
) -> None:
    named = {"reduction": (reduction, REDUCTIONS), "forward": (forward, FORWARDS)}
    for name, (value, valid) in named.items():
        if value not in valid:
            raise ValueError(f"{_NAME}: {name} must be one of {', '.join(map(repr, valid))}; got {value!r}")
    if backward not in BACKWARDS:
        why = ", whose uniform grid wrecks the gradient of a head" if backward == "int8" else ""
        raise ValueError(f"{_NAME}: backward must be 'fp8', 'bf16' or None; got {backward!r}{why}")
    if reduction == "none" and num_items_in_batch is not None:
        raise ValueError(f"{_NAME}: num_items_in_batch divides a sum: use reduction='mean' or 'sum', not 'none'")
    if not 0 <= label_smoothing < 1 or not z_loss >= 0 or not (softcap is None or softcap > 0):
        raise ValueError(
            f"{_NAME}: label_smoothing must be from 0 to below 1, z_loss at least 0 and softcap above 0 or None; got "
            f"{label_smoothing}, {z_loss} and {softcap}"
        )
    if chunk < 1 or scratch < 1:
        raise ValueError(f"{_NAME}: chunk, in tokens, and scratch, in bytes, must be positive; got {chunk} and {scratch}")
