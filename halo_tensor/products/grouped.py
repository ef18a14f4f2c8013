"""The product of rows with the matrix of their expert, as a recipe says.

It is a dense layer for each group of rows: X is quantised once per token, W is read as the codes that it holds, and backward
quantises E twice, with the scales of its group folded in.
"""

from typing import Any

import torch

from halo_tensor import ops
from halo_tensor.products.backward import backward_of_rounding
from halo_tensor.products.linear import product_dtype, refuse_tracing
from halo_tensor.products.routing import Routing
from halo_tensor.products.stacks import STACK_TENSORS, Stack, features, grad_input, grad_weight, prepare, quantize_tokens
from halo_tensor.recipe import Recipe
from halo_tensor.reference import experts as reference


def _rotated_grad_input(e: torch.Tensor, recipe: Recipe, stack: Stack, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """Return E_X of a recipe that rotates the tokens of E, in blocks that begin anew in each group.

    Each tile is rotated on its own, as TILE rows with zeros after the last.
    """
    rotation, (tiles, starts) = recipe.grad_input.left.tokens, (routing.tiles, routing.starts)
    tile = reference.TILE
    inside = torch.arange(tile, device=e.device)
    rows = tiles[:, 1:2] + inside  # [tiles, TILE]
    there = (tiles[:, 0:1] >= 0) & (rows < tiles[:, 2:3])
    at = torch.where(there, rows, 0).flatten()
    fold = stack.scales[tiles[:, 0].clamp(min=0).long()] * there.any(1, keepdim=True)
    padded = (e[at].to(torch.float32) * there.view(-1, 1)).view(-1, tile, e.shape[1]) * (fold * 128.0).unsqueeze(1)
    codes, _, scales = ops.rotate_quantize(padded.flatten(0, 1), rotation, None, stack.format, "row")
    assert codes is not None
    numbers = torch.arange(tiles.shape[0], device=e.device, dtype=torch.int32) * tile
    padded_tiles = torch.stack([tiles[:, 0], numbers, numbers + tile, tiles[:, 3]], 1)
    y = ops.grouped_mm(
        codes, stack.turned_codes(), padded_tiles, starts, scales * (1.0 / 128.0), None, None, None, stack.rotation,
        torch.float32 if dtype == torch.float16 else dtype, stack.gain(undo=True),
    )  # fmt: skip
    y = ops.unrotate(y, rotation, None, y.shape).to(dtype)
    # The row of each of e's rows: that of its tile, and its place there.
    row = torch.arange(e.shape[0], device=e.device, dtype=torch.int32)
    expert = torch.searchsorted(routing.offs, row, right=True, out_int32=True)
    before = torch.cat([torch.zeros_like(routing.offs[:1]), routing.offs])
    return y[(starts[expert] * tile + row - before[expert]).long()]


class _GroupedLinear(torch.autograd.Function):
    """The product of rows with their expert's matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: Recipe,
        dtype: torch.dtype,
        in_features_first: bool,
        trains: bool,
        *routing_tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        routing, stack = Routing.of(routing_tensors), Stack.of(weight, recipe, in_features_first)
        codes, scales = quantize_tokens(x, stack)
        rows, row_scales = codes, scales
        if routing.source is not None:
            rows, row_scales = ops.gather_codes(codes, scales, routing.source)
        y = ops.grouped_mm(
            rows, stack.codes, routing.tiles, routing.starts, row_scales, stack.scales, bias, None, None, dtype
        )  # fmt: skip
        wants_x, wants_w = (trains and needed for needed in ctx.needs_input_grad[:2])
        saved_x = [codes, scales] if wants_w else [None, None]
        ctx.save_for_backward(*saved_x, *stack.saved(wants_x), *routing)
        ctx.stack, ctx.recipe, ctx.x_dtype = stack.without_tensors(), recipe, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @backward_of_rounding
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scales, *saved = ctx.saved_tensors  # read once: selective checkpointing allows no more
        stack, routing = ctx.stack.with_saved(tuple(saved[:STACK_TENSORS])), Routing.of(saved[STACK_TENSORS:])
        e, tiles, starts = grad_output.contiguous(), routing.tiles, routing.starts
        wants_x, wants_w, wants_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if wants_x:
            if ctx.recipe.grad_input.left.tokens is not None:
                grad_x = _rotated_grad_input(e, ctx.recipe, stack, routing, ctx.x_dtype)
            else:
                quantised = ops.quantize_groups(e, None, stack.scales, tiles, stack.format)
                grad_x = grad_input(*quantised, stack, routing, ctx.x_dtype)
            if routing.position is not None:
                grad_x = ops.combine(grad_x, routing.position, ctx.x_dtype)
        if wants_w or wants_bias:
            fold = torch.ones_like(e[:, 0], dtype=torch.float32) if scales is None else scales
            if routing.source is not None and scales is not None:
                fold = scales[routing.source.long()]
            e_t, e_scales, sums = ops.quantize_groups_t(e, None, None, fold, tiles, starts, wants_bias, stack.format)
            grad_bias = sums.to(ctx.bias_dtype) if wants_bias else None
        if wants_w:
            grad_w = grad_weight(e_t, e_scales, ops.turn_codes(codes, routing.source, tiles), stack, routing)
        return grad_x, grad_w, grad_bias, *[None] * (len(ctx.needs_input_grad) - 3)


def _product(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    recipe: Recipe | None,
    in_features_first: bool,
    *routing: torch.Tensor | None,
) -> torch.Tensor:
    recipe, dtype = prepare(weight, recipe), product_dtype("experts", x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _GroupedLinear.apply(x, weight, bias, recipe, dtype, in_features_first, torch.is_grad_enabled(), *routing)


# Dynamo puts the call into its graph as it stands, and AOTAutograd traces through it, backward included.
product_in_graph = torch.compiler.allow_in_graph(_product)


def grouped_linear(
    x: torch.Tensor,
    weight: Any,
    offs: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    recipe: Recipe | None = None,
    in_features_first: bool = False,
) -> torch.Tensor:
    """Multiply rows with the transposed matrix of their expert, as ``torch._grouped_mm`` does, with the three products of a
    recipe.

    Args:
        x: [rows, in], sorted by expert.
        weight: a HaloWeight of experts; or any weight [experts, out, in], if ``recipe`` is given.
        offs: int32 [experts], the end of each expert's rows. Rows after the last end are not computed.
        bias: [experts, out], or None.
        recipe: of a weight that has none of its own, which is quantised in every call.
        in_features_first: whether such a weight is [experts, in, out].

    Returns:
        [rows, out], zeros in rows of no expert, of autocast's dtype or that of ``x``. An expert without rows gets a gradient
        of exact zeros.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the weight cannot follow the recipe.
        RuntimeError: inside of ``torch.jit.trace``.

    Example:
        >>> import torch
        >>> from halo_tensor.products.experts import grouped_linear
        >>> from halo_tensor.recipe import INT8, halo
        >>> x, w = torch.randn(6, 32), torch.randn(3, 16, 32)
        >>> offs = torch.tensor([2, 2, 6], dtype=torch.int32)  # two rows, none, four
        >>> y = grouped_linear(x, w, offs, recipe=halo(1, INT8))
        >>> y.shape
        torch.Size([6, 16])
    """
    refuse_tracing()
    check_rows(x, weight, offs, bias, in_features_first)
    offs = offs.to(torch.int32)
    routing = Routing(offs, *ops.group_tiles(offs, x.shape[0]))
    return product_in_graph(x, weight, bias, recipe, in_features_first, *routing)


def check_rows(x: torch.Tensor, weight: Any, offs: torch.Tensor, bias: torch.Tensor | None, in_features_first: bool) -> None:
    """Raise ValueError if operands do not fit each other."""
    if weight.ndim != 3 or x.ndim != 2:
        raise ValueError(
            f"experts: need x [rows, in] and a weight of three dimensions; got {list(x.shape)}, {list(weight.shape)}"
        )
    out, width = features(weight, in_features_first)
    if x.shape[1] != width:
        raise ValueError(f"experts: an input of shape {list(x.shape)} does not fit weights of {width} in_features")
    if offs.shape != weight.shape[:1]:
        raise ValueError(f"experts: offs of shape {list(offs.shape)} does not fit {weight.shape[0]} experts")
    if bias is not None and tuple(bias.shape) != (weight.shape[0], out):
        raise ValueError(
            f"experts: a bias of shape {list(bias.shape)} does not fit {weight.shape[0]} experts of {out} features"
        )
    if devices := {str(t.device) for t in (weight, offs, bias) if t is not None and t.device != x.device}:
        raise ValueError(
            f"experts: the input is on {x.device} and the layer on {', '.join(sorted(devices))}; move one of them"
        )
