"""Activation checkpointing that keeps the results of products and repeats the rest: norms, activations, rotations,
quantisation.

The ops between two products take little time, and their results as much memory as those of products. In a Llama block they
are a third of the saved bytes, X's codes included.
"""

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from halo_tensor import ops  # noqa: F401  defines torch.ops.halo

aten = torch.ops.aten
#: The result of a shorter contraction, such as an adapter's, takes longer to write than to compute.
SHORTEST_CONTRACTION = 512
_CONTRACTED = {  # matrix product -> the argument whose last dimension it contracts
    torch.ops.halo.scaled_mm.default: 0,
    torch.ops.halo.grouped_mm.default: 0,
    aten.mm.default: 0,
    aten.mm.dtype: 0,
    aten.addmm.default: 1,
    aten.addmm.dtype: 1,
    aten.bmm.default: 0,
}
_CONTRACTED |= {  # private names, which a version of torch may lack
    getattr(aten, name).default: 0 for name in ("_scaled_mm", "_scaled_mm_v2") if hasattr(aten, name)
}


@cache
def _is_kept(op: Any) -> bool:
    """Whether the results of an op that is no matrix product are kept: of a convolution or of attention.

    The ops of attention are private and differ between versions of torch, so they are recognised by the prefix of their names.
    """
    attention = str(op).startswith("aten._scaled_dot_product_") and "backward" not in str(op)
    return op is aten.convolution.default or attention


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = _is_kept(op)
    if op in _CONTRACTED:
        keep = args[_CONTRACTED[op]].shape[-1] >= SHORTEST_CONTRACTION
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def keep_products() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Save the results of matrix products, convolutions and attention for backward, which repeats all other ops.

    Pass it to ``torch.utils.checkpoint.checkpoint`` as ``context_fn``, in eager or compiled code.

    Returns:
        The context of forward, and that of the repetition in backward.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> from halo_tensor import halo_config, keep_products, quantize_
        >>> block = torch.nn.Sequential(torch.nn.RMSNorm(512), torch.nn.Linear(512, 512))
        >>> report = quantize_(block, halo_config(level=1, dtype="int8"))
        >>> x = torch.randn(16, 512, requires_grad=True)
        >>> y = checkpoint(block, x, use_reentrant=False, context_fn=keep_products)
        >>> y.sum().backward()
    """
    return create_selective_checkpoint_contexts(_policy)
