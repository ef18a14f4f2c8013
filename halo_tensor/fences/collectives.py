"""Collectives that return their result, which autograd functions call in eager code and a compiler traces.

PyTorch's functions for them (``torch.distributed._functional_collectives``) are private and get other names in torch 2.13; the
ops beneath kept theirs. Tested with torch 2.11 to 2.15.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

_ops = torch.ops._c10d_functional


class Ranks(NamedTuple):
    """The ranks among which something is split.

    Attributes:
        name: of their process group, as ops take it.
        size: how many they are.
        rank: this one's number among them.
    """

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Ranks":
        return cls(group.group_name, group.size(), group.rank())


def all_gather(tensors: list[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """Return each tensor [n, …] of all ranks, [size · n, …]. All are sent before the first is waited for."""
    # gloo sends no 8-bit floats
    sent = [
        t.contiguous().view(torch.uint8 if t.dtype.itemsize == 1 and t.is_floating_point() else t.dtype) for t in tensors
    ]  # alive until they were sent
    made = [_ops.all_gather_into_tensor(t, ranks.size, ranks.name) for t in sent]
    return [_ops.wait_tensor(out).view(t.dtype) for out, t in zip(made, tensors, strict=True)]


def reduce_scatter(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Return this rank's part [n / size, …] of the sum of a tensor [n, …] over all ranks."""
    sent = tensor.contiguous()  # alive until it was sent
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(sent, "sum", ranks.size, ranks.name))


def all_reduce(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Return the sum of a tensor over all ranks."""
    sent = tensor.contiguous()
    return _ops.wait_tensor(_ops.all_reduce(sent, "sum", ranks.name))
