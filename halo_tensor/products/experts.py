"""The products of experts: each token is multiplied with the weights of the experts that it is routed to.

X is quantised once per token, before its codes are copied to experts, and grad_weight reads the same codes. The gate between
the two products of an expert is computed inside of the quantiser that reads its result, and so is its derivative. A routing
weight multiplies the result of its expert in the product, and the sum over a token's experts is one pass. So for backward a
layer saves the codes of X and of the gate's result, and h, the input of the gate.
"""

from collections.abc import Callable
from typing import Any

import torch

from halo_tensor import ops
from halo_tensor.products.backward import backward_of_rounding
from halo_tensor.products.grouped import check_rows, grouped_linear, product_in_graph
from halo_tensor.products.linear import product_dtype, refuse_tracing
from halo_tensor.products.routing import Combine, Routing, Sorted, route
from halo_tensor.products.stacks import (
    STACK_TENSORS,
    Stack,
    features,
    grad_input,
    grad_weight,
    misfit,
    prepare,
    quantize_tokens,
    stack_operand,
)
from halo_tensor.recipe import Gate, Recipe
from halo_tensor.reference import experts as reference

__all__ = ["Routing", "experts", "experts_of_rows", "grouped_linear", "misfit", "route", "stack_operand"]


class _Experts(torch.autograd.Function):
    """Both products of experts, with the gate between them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        gate: Gate,
        recipes: tuple[Recipe, Recipe],
        dtype: torch.dtype,
        in_features_first: bool,
        trains: bool,
        *routing_tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        routing = Routing.of(routing_tensors)
        first, second = (Stack.of(w, r, in_features_first) for w, r in zip((gate_up, down), recipes, strict=True))
        tiles, starts = routing.tiles, routing.starts
        codes, scales = quantize_tokens(x, first)
        rows, row_scales = codes, scales
        if routing.source is not None:
            rows, row_scales = ops.gather_codes(codes, scales, routing.source)
        h = ops.grouped_mm(rows, first.codes, tiles, starts, row_scales, first.scales, gate_up_bias, None, None, dtype)
        a_codes, a_scales = ops.quantize_gated(h, gate, second.rotation, second.format, second.gain(undo=True))
        y = ops.grouped_mm(a_codes, second.codes, tiles, starts, a_scales, second.scales, down_bias, weight, None, dtype)
        if routing.position is not None:
            y = ops.combine(y, routing.position, dtype)
        if trains:
            needs = ctx.needs_input_grad
            x_saved = [codes, row_scales] if needs[2] else [None, None]
            a_saved = [a_codes, a_scales] if needs[3] else [None, None]
            # The gradient of a routing weight reads the bias that it multiplies.
            b_saved = down_bias if weight is not None and needs[1] else None
            first_saved, second_saved = (stack.saved(any(needs[:3]) or needs[4]) for stack in (first, second))
            ctx.save_for_backward(*x_saved, *a_saved, h, weight, b_saved, *first_saved, *second_saved, *routing)
        ctx.stacks, ctx.gate, ctx.x_dtype = (first.without_tensors(), second.without_tensors()), gate, x.dtype
        ctx.bias_dtypes = tuple(None if b is None else b.dtype for b in (gate_up_bias, down_bias))
        return y

    @staticmethod
    @backward_of_rounding
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, row_scales, a_codes, a_scales, h, weight, down_bias, *rest = ctx.saved_tensors
        first = ctx.stacks[0].with_saved(tuple(rest[:STACK_TENSORS]))
        second = ctx.stacks[1].with_saved(tuple(rest[STACK_TENSORS : 2 * STACK_TENSORS]))
        routing = Routing.of(rest[2 * STACK_TENSORS :])
        wants_x, wants_weight, wants_first, wants_second, wants_bias, wants_down_bias = ctx.needs_input_grad[:6]
        e, tiles, starts, gate = grad_output.contiguous(), routing.tiles, routing.starts, ctx.gate
        grads: list[torch.Tensor | None] = [None] * 6
        if wants_second or wants_down_bias:
            ones = None if a_scales is not None else e.new_ones(h.shape[0], dtype=torch.float32)
            fold = a_scales if ones is None else ones
            e_t, e_scales, sums = ops.quantize_groups_t(
                e, routing.source, weight, fold, tiles, starts, wants_down_bias, second.format
            )  # fmt: skip
            grads[5] = sums.to(ctx.bias_dtypes[1]) if wants_down_bias else None
        if wants_second:
            grads[3] = grad_weight(e_t, e_scales, ops.turn_codes(a_codes, None, tiles), second, routing)
        if wants_x or wants_weight or wants_first or wants_bias:
            quantised = ops.quantize_groups(e, routing.source, second.scales, tiles, second.format)
            grad_a = grad_input(*quantised, second, routing, h.dtype)
            kept = wants_first or wants_bias
            e_h, e_h_scales, dots, grad_h = ops.quantize_gated_grad(
                h, grad_a, weight, gate, first.scales, tiles, kept, first.format
            )
            del quantised, grad_a  # large, and as all that follows needed no longer
            grads[1] = _grad_routing(dots, e, down_bias, routing) if wants_weight else None
        if wants_x:
            grad_x = grad_input(e_h, e_h_scales, first, routing, ctx.x_dtype)
            del e_h
            grads[0] = grad_x if routing.position is None else ops.combine(grad_x, routing.position, ctx.x_dtype)
        if wants_first or wants_bias:
            fold = h.new_ones(h.shape[0], dtype=torch.float32) if row_scales is None else row_scales
            e_t, e_scales, sums = ops.quantize_groups_t(grad_h, None, None, fold, tiles, starts, wants_bias, first.format)
            del grad_h
            grads[4] = sums.to(ctx.bias_dtypes[0]) if wants_bias else None
        if wants_first:
            grads[2] = grad_weight(e_t, e_scales, ops.turn_codes(codes, routing.source, tiles), first, routing)
        return *grads, *[None] * (len(ctx.needs_input_grad) - 6)


def _grad_routing(dots: torch.Tensor, e: torch.Tensor, down_bias: torch.Tensor | None, routing: Routing) -> torch.Tensor:
    """Return the gradient of the routing weights of rows: E · y, where y = (a Wᵀ + bias) before the weight multiplied it."""
    if down_bias is None:
        return dots
    row = torch.arange(dots.shape[0], device=dots.device, dtype=torch.int32)
    expert = torch.searchsorted(routing.offs, row, right=True)
    there = expert < routing.offs.shape[0]
    of_token = e.to(torch.float32) @ down_bias.to(torch.float32).t()  # [tokens, experts]
    token = row.long() if routing.source is None else routing.source.long()
    return dots + torch.where(there, of_token[token, expert.clamp(max=routing.offs.shape[0] - 1)], 0.0)


def _fused(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate_up: Any,
    down: Any,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: str,
    recipe: Recipe | None,
    in_features_first: bool,
    *routing: torch.Tensor | None,
) -> torch.Tensor:
    dtype = product_dtype("experts", x, gate_up, gate_up_bias)
    recipes = prepare(gate_up, recipe), prepare(down, recipe)
    with torch.autocast(x.device.type, enabled=False):
        return _Experts.apply(
            x, weight, gate_up, down, gate_up_bias, down_bias, Gate.of(gate), recipes, dtype, in_features_first,
            torch.is_grad_enabled(), *routing,
        )  # fmt: skip


# Dynamo puts the call into its graph as it stands, and AOTAutograd traces through it, backward included.
_fused_in_graph = torch.compiler.allow_in_graph(_fused)


def experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Any,
    down: Any,
    gate: Gate | Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    in_features_first: bool = False,
) -> torch.Tensor:
    """Compute the experts of a mixture: Σ over a token's experts of weight · (gate(x W_gate_upᵀ) W_downᵀ).

    Args:
        hidden_states: [tokens, d].
        top_k_index: integers [tokens, top_k]. Numbers outside of [0, experts) stand for no expert here, see :func:`route`.
        top_k_weights: [tokens, top_k], any floating dtype.
        gate_up: a HaloWeight of experts [experts, 2f, d], or of any number of out_features if ``gate`` is a function; or any
            weight, if ``recipe`` is given.
        down: of [experts, d, f], likewise.
        gate: between the two products; ``Gate()`` by default, which is SwiGLU. A function of [rows, out] that returns
            [rows, f] is called as it is, and nothing is fused with it.
        gate_up_bias, down_bias: [experts, 2f] and [experts, d], or None.
        recipe: of weights that have none of their own, which are quantised in every call.
        in_features_first: whether such weights are [experts, in, out].

    Returns:
        [tokens, d], of autocast's dtype or that of ``hidden_states``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a weight cannot follow the recipe.
        RuntimeError: inside of ``torch.jit.trace``.

    Example:
        >>> import torch
        >>> from halo_tensor.products.experts import experts
        >>> from halo_tensor.recipe import INT8, halo
        >>> x, index = torch.randn(5, 32), torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0]])
        >>> weights = torch.full((5, 2), 0.5)
        >>> y = experts(x, index, weights, torch.randn(3, 64, 32), torch.randn(3, 32, 32), recipe=halo(1, INT8))
        >>> y.shape
        torch.Size([5, 32])
    """
    refuse_tracing()
    routing = route(top_k_index, gate_up.shape[0])
    check_rows(hidden_states, gate_up, routing.offs, gate_up_bias, in_features_first)
    weight: torch.Tensor = Sorted.apply(top_k_weights, routing.order, routing.position)  # type: ignore[no-untyped-call]
    return experts_of_rows(
        hidden_states, weight, gate_up, down, routing, gate, gate_up_bias=gate_up_bias, down_bias=down_bias, recipe=recipe,
        in_features_first=in_features_first,
    )  # fmt: skip


def experts_of_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate_up: Any,
    down: Any,
    routing: Routing,
    gate: Gate | Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    in_features_first: bool = False,
) -> torch.Tensor:
    """Compute :func:`experts` of a routing that is known.

    Args:
        x: [tokens, d]; or rows that are sorted by expert, if the routing has no ``source``.
        weight: float32 [rows], which multiplies the results of rows; None for 1.
        routing: of :func:`route`, or ``Routing(offs, *ops.group_tiles(offs, rows))``.

    The other arguments are those of :func:`experts`.
    """
    gate = Gate() if gate is None else gate
    recipes = [recipe or getattr(w, "recipe", None) for w in (gate_up, down)]
    _check_pair(gate_up, down, gate, in_features_first)
    if isinstance(gate, Gate) and not any(r and r.grad_input.left.tokens for r in recipes):
        return _fused_in_graph(
            x, weight, gate_up, down, gate_up_bias, down_bias, str(gate), recipe, in_features_first, *routing
        )
    h = product_in_graph(x, gate_up, gate_up_bias, recipe, in_features_first, *routing)
    a = reference.activate(h, gate) if isinstance(gate, Gate) else gate(h)
    of_rows = Routing(routing.offs, routing.tiles, routing.starts)
    y = product_in_graph(a, down, down_bias, recipe, in_features_first, *of_rows)
    if weight is not None:
        y = (y * weight.unsqueeze(1)).to(y.dtype)
    return y if routing.position is None else Combine.apply(y, routing.source, routing.position)


def _check_pair(gate_up: Any, down: Any, gate: Any, in_features_first: bool) -> None:
    out, _ = features(gate_up, in_features_first)
    _, width = features(down, in_features_first)
    if (isinstance(gate, Gate) and out != 2 * width) or gate_up.shape[0] != down.shape[0]:
        raise ValueError(
            f"experts: gate_up {list(gate_up.shape)} and down {list(down.shape)} do not fit: the gate makes {out // 2} "
            f"features of {out}, and down reads {width}"
        )
