"""``gather_tokens``: an all-gather that a compiler drops where nothing reads its result. PyTorch's own stay in a graph, since
waiting for them counts as a side effect."""

import torch
from torch import Tensor

from halo_tensor.fences.collectives import Ranks, all_gather
from halo_tensor.ops.register import fake, op


@op("gather_tokens")
def gather_tokens(x: Tensor, dim: int, name: str, size: int) -> Tensor:
    """Return a tensor whose dimension ``dim`` is split among the ranks of a process group as a whole one.

    Args:
        x: the same shape on every rank.
        dim: its dimension.
        name: of the process group.
        size: the number of its ranks.
    """
    (parts,) = all_gather([x.reshape(-1)], Ranks(name, size, 0))
    return unsplit(parts, x.shape, dim, size).contiguous()


@fake("gather_tokens")
def _(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([*x.shape[:dim], x.shape[dim] * size, *x.shape[dim + 1 :]])


def unsplit(parts: Tensor, shape: torch.Size, dim: int, size: int) -> Tensor:
    """Return ``size`` parts of ``shape`` that lie one after another as the whole tensor that was split along ``dim``."""
    whole = parts.view(size, *shape).movedim(0, dim)
    return whole.reshape(*shape[:dim], size * shape[dim], *shape[dim + 1 :])
