"""Which tokens go to which expert, and back: rows sorted by expert, and the sum over a token's rows."""

from typing import Any, NamedTuple

import torch

from halo_tensor import ops


class Routing(NamedTuple):
    """Which rows belong to which expert.

    Attributes:
        offs: int32 [experts], the end of each expert's rows.
        tiles, starts: see :func:`halo_tensor.reference.experts.group_tiles`.
        source: int32 [rows], the token of each row; None if rows are tokens.
        position: int32 [tokens, top_k], the rows of each token; None if rows are tokens.
        order: int64 [rows], the place of each row in the flat ``top_k_index``; None if rows are tokens.
    """

    offs: torch.Tensor
    tiles: torch.Tensor
    starts: torch.Tensor
    source: torch.Tensor | None = None
    position: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @classmethod
    def of(cls, tensors: Any) -> "Routing":
        """Return the routing of which ``tensors`` are the attributes."""
        return cls(*tensors)


def route(top_k_index: torch.Tensor, experts: int) -> Routing:
    """Sort the copies of tokens by expert, without a synchronisation with the device.

    Args:
        top_k_index: integers [tokens, top_k]. Numbers below 0 or from ``experts`` on stand for no expert here, as expert
            parallelism writes them for experts of other ranks; such copies are not computed.
        experts: how many experts there are.
    """
    flat = top_k_index.reshape(-1).to(torch.int32)
    ids = torch.where((flat < 0) | (flat > experts), experts, flat)
    # A GPU sorts in as many passes as a key has bytes.
    key = torch.uint8 if experts < 2**8 else torch.int16 if experts < 2**15 else torch.int32
    by_expert, order = torch.sort(ids.to(key), stable=True)
    bounds = torch.arange(experts, dtype=torch.int32, device=ids.device)
    offs = torch.searchsorted(by_expert.to(torch.int32), bounds, right=True, out_int32=True)
    rows = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    position = torch.empty_like(rows).scatter_(0, order, rows).view(top_k_index.shape)
    source = (order // top_k_index.shape[1]).to(torch.int32)
    return Routing(offs, *ops.group_tiles(offs, ids.shape[0]), source, position, order)


class Sorted(torch.autograd.Function):
    """The routing weights [tokens, top_k] in the order of rows, in float32. Backward moves each gradient, and adds nothing."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, order: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(position)
        ctx.dtype = weights.dtype
        return weights.reshape(-1)[order].to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (position,) = ctx.saved_tensors
        return grad_output[position.long()].to(ctx.dtype), None, None


class Combine(torch.autograd.Function):
    """The sum over the rows of each token."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, source: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(source)
        return ops.combine(y, position, y.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return grad_output[source.long()], None, None
