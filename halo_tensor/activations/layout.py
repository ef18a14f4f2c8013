"""The order in which the elements of a tensor lie in memory, which is the order in which they are compressed."""

from collections.abc import Sequence

import torch


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """Return the dimensions of a tensor, the slowest first, if its elements fill their memory without gaps; else None."""
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
    expected = 1
    for d in reversed(order):
        if shape[d] != 1 and strides[d] != expected:
            return None
        expected *= shape[d]
    return order


def inverse(order: Sequence[int]) -> list[int]:
    """Return the permutation that undoes ``order``."""
    return [order.index(d) for d in range(len(order))]


def in_memory_order(x: torch.Tensor) -> tuple[torch.Tensor, list[int] | None]:
    """Return a contiguous tensor with the elements of ``x``, and the order of dimensions that makes it.

    It is a view, if ``x`` has no gaps, else a copy in the order of ``x``, with None.
    """
    order = memory_order(x.shape, x.stride())
    return (x.contiguous(), None) if order is None else (x.permute(order), order)
