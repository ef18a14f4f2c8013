"""Activation checkpointing that keeps products and repeats the rest: norms, activations, rotations, quantisation.

What lies between two products costs little time to make again, and as much memory as the products to keep: of a Llama block's
saved bytes a third, X's codes among them.
"""

from functools import cache, partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from halo_tensor import ops  # noqa: F401  defines torch.ops.halo

aten = torch.ops.aten
#: Of a shorter contraction (an adapter's) the result takes longer to write than to compute.
SHORTEST_CONTRACTION = 512
_CONTRACTED = {  # matrix product -> the argument whose last dimension it contracts
    torch.ops.halo.scaled_mm.default: 0,
    aten.mm.default: 0,
    aten.mm.dtype: 0,
    aten.addmm.default: 1,
    aten.addmm.dtype: 1,
    aten.bmm.default: 0,
}
_CONTRACTED |= {  # private, and so perhaps not there in every version
    getattr(aten, name).default: 0 for name in ("_scaled_mm", "_scaled_mm_v2") if hasattr(aten, name)
}


@cache
def _is_kept(op) -> bool:
    """Whether the results of an op that is no matrix product are kept: those of convolutions and of attention. Attention's ops
    are private and differ between versions of torch, so they are recognised by how their names begin."""
    attention = str(op).startswith("aten._scaled_dot_product_") and "backward" not in str(op)
    return op is aten.convolution.default or attention


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    keep = _is_kept(op)
    if op in _CONTRACTED:
        keep = args[_CONTRACTED[op]].shape[-1] >= SHORTEST_CONTRACTION
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


#: The ``context_fn`` of ``torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=keep_products)``, eager
#: or compiled: backward has the results of matrix products, convolutions and attention, and repeats what lies between.
keep_products = partial(create_selective_checkpoint_contexts, _policy)
