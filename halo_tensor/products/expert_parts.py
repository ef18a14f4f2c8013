"""The products of experts one by one, with what the fused function cannot take: LoRA's factors, and a norm of results.

LoRA's products stay in high precision: their rank is small, and quantising their operands would cost more than it saves.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from halo_tensor.products.grouped import check_rows, product_in_graph
from halo_tensor.products.routing import Combine, Routing, Sorted, route
from halo_tensor.recipe import Gate
from halo_tensor.reference.experts import activate


class LowRank(NamedTuple):
    """What is added to the product of an expert: scale · (rows @ down) @ up.

    Attributes:
        down: [experts, in, r].
        up: [experts, r, out].
        scale: a number.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float


class Part(NamedTuple):
    """One product of experts: a converted weight, its bias [experts, out] and what is added to it."""

    weight: Any
    bias: torch.Tensor | None = None
    low_rank: LowRank | None = None


def experts_in_parts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    first: Part,
    second: Part,
    gate: Gate | Callable[[torch.Tensor], torch.Tensor],
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute experts as :func:`halo_tensor.products.experts.experts` does, product by product.

    Args:
        x: [tokens, d].
        top_k_index: [tokens, top_k].
        top_k_weights: [tokens, top_k].
        first, second: the products.
        gate: between them.
        norm: of the rows [rows, d] of the second product, before the routing weights multiply them.
    """
    routing = route(top_k_index, first.weight.shape[0])
    check_rows(x, first.weight, routing.offs, first.bias, first.weight.in_features_first)
    assert routing.source is not None and routing.order is not None
    there = (torch.arange(routing.order.shape[0], device=x.device) < routing.offs[-1]).unsqueeze(1)
    h = _product(x, first, routing)
    if first.low_rank is not None:
        h = h + _low_rank(x[routing.source.long()], first.low_rank, routing, there).to(h.dtype)
    a = activate(h, gate) if isinstance(gate, Gate) else gate(h)
    y = _product(a, second, Routing(routing.offs, routing.tiles, routing.starts))
    if second.low_rank is not None:
        y = y + _low_rank(a, second.low_rank, routing, there).to(y.dtype)
    y = y if norm is None else norm(y)
    weight: torch.Tensor = Sorted.apply(top_k_weights, routing.order, routing.position)  # type: ignore[no-untyped-call]
    y = torch.where(there, y * weight.unsqueeze(1), 0.0).to(y.dtype)
    return Combine.apply(y, routing.source, routing.position)  # type: ignore[no-untyped-call]


def _product(x: torch.Tensor, part: Part, routing: Routing) -> torch.Tensor:
    return product_in_graph(x, part.weight, part.bias, None, part.weight.in_features_first, *routing)


def _low_rank(rows: torch.Tensor, low_rank: LowRank, routing: Routing, there: torch.Tensor) -> torch.Tensor:
    """Return scale · (rows @ down) @ up, zeros in rows of no expert."""
    rows = torch.where(there, rows, 0.0)
    middle = torch.where(there, _grouped(rows, low_rank.down, routing.offs), 0.0)
    return torch.where(there, _grouped(middle, low_rank.up, routing.offs), 0.0) * low_rank.scale


def _grouped(rows: torch.Tensor, stack: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return the product of rows [rows, k] with the matrix [k, n] of their expert, in high precision.

    PyTorch's grouped product takes bf16 with rows of whole pieces of 16 bytes. Other ones are computed expert by expert, which
    waits for the device.
    """
    stack = stack.to(rows.dtype)
    aligned = all(side * rows.element_size() % 16 == 0 for side in stack.shape[1:])
    if rows.dtype is torch.bfloat16 and aligned and rows.is_cuda:
        return F.grouped_mm(rows, stack, offs=offs)
    ends = [0, *offs.tolist()]
    parts = [rows[a:b] @ stack[i] for i, (a, b) in enumerate(pairwise(ends))]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], stack.shape[2])])
