"""Collectives as autograd functions, for layers of which every rank holds a part."""

from typing import Any

import torch

from halo_tensor import ops
from halo_tensor.fences.collectives import Ranks, all_gather, all_reduce, reduce_scatter
from halo_tensor.ops.collectives import unsplit


def gather(tensors: list[torch.Tensor], dim: int, ranks: Ranks) -> list[torch.Tensor]:
    """Return tensors whose dimension ``dim`` is split among ranks as whole ones."""
    shapes = [t.shape for t in tensors]
    parts = all_gather([t.reshape(-1) for t in tensors], ranks)
    return [unsplit(each, shape, dim, ranks.size) for each, shape in zip(parts, shapes, strict=True)]


def gather_in_blocks(x: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
    """Do :func:`gather` with one tensor, [..., n·128], which is sent as int8 codes in rotated blocks of 128 elements."""
    codes, scales = all_gather([*ops.compress(x.contiguous(), 8)], ranks)
    parts = ops.decompress(codes, scales, [ranks.size, *x.shape], x.dtype)
    return unsplit(parts, x.shape, dim, ranks.size)


def scatter_sum(x: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
    """Return this rank's part, along ``dim``, of the sum of a tensor over ranks."""
    first = x.unflatten(dim, (ranks.size, -1)).movedim(dim, 0)
    return reduce_scatter(first.reshape(-1), ranks).view(first.shape[1:])


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return all_reduce(gradients[0], ctx.ranks), None


class _Placeholder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        shape = [*x.shape[:dim], x.shape[dim] * ranks.size, *x.shape[dim + 1 :]]
        return x.new_full((), torch.nan).expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return scatter_sum(gradients[0], ctx.dim, ctx.ranks), None, None


class _Filled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, dim: int | None, ranks: Ranks, in_blocks: bool) -> torch.Tensor:
        ctx.dim, ctx.ranks, ctx.in_blocks = dim, ranks, in_blocks
        return all_reduce(y, ranks) if dim is None else scatter_sum(y, dim, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (e,) = gradients
        if ctx.dim is not None:
            e = gather_in_blocks(e, ctx.dim, ctx.ranks) if ctx.in_blocks else gather([e], ctx.dim, ctx.ranks)[0]
        return e, None, None, None


def copied(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Return a tensor that all ranks have and use in their parts of a layer. Its gradient is the sum of theirs."""
    return _Copied.apply(x, ranks)


def placeholder(x: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
    """Return a tensor of the shape of the whole whose part along ``dim`` is ``x``. Its values are NaN, one element of memory.
    The sum of its gradients over ranks is scattered to the parts."""
    return _Placeholder.apply(x, dim, ranks)


def filled(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return ``value`` with the gradient of ``x``."""
    return _Filled.apply(x, value)


def summed(y: torch.Tensor, dim: int | None, ranks: Ranks, in_blocks: bool = False) -> torch.Tensor:
    """Return the sum over ranks: all of it, or if ``dim`` is given this rank's part along that dimension.

    Args:
        y: this rank's summand.
        dim: see above.
        ranks: over which is summed.
        in_blocks: gather the parts of the gradient as :func:`gather_in_blocks` does.
    """
    return _Summed.apply(y, dim, ranks, in_blocks)
