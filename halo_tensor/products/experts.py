"""The products of experts: each token is multiplied with the weights of the experts that it is routed to.

X is quantised once per token, before its codes are copied to experts, and grad_weight reads the same codes. The gate between
the two products of an expert is computed inside of the quantiser that reads its result, and so is its derivative. A routing
weight multiplies the result of its expert in the product, and the sum over a token's experts is one pass. So for backward a
layer saves the codes of X and of the gate's result, and h, the input of the gate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from halo_tensor import ops
from halo_tensor.operand.experts import ExpertsOperand
from halo_tensor.operand.gains import Gains
from halo_tensor.products.backward import backward_of_rounding
from halo_tensor.products.linear import product_dtype, refuse_tracing
from halo_tensor.recipe import Format, Gate, Recipe, Rotation, why_not_grouped
from halo_tensor.reference import experts as reference
from halo_tensor.reference import hadamard


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


def route(top_k_index: torch.Tensor, experts: int) -> Routing:
    """Sort the copies of tokens by expert, without a synchronisation with the device.

    Args:
        top_k_index: integers [tokens, top_k]. Numbers below 0 or from ``experts`` on stand for no expert here, as expert
            parallelism writes them for experts of other ranks; such copies are not computed.
        experts: how many experts there are.
    """
    flat = top_k_index.reshape(-1).to(torch.int32)
    ids = torch.where((flat < 0) | (flat > experts), experts, flat)
    by_expert, order = torch.sort(ids, stable=True)
    bounds = torch.arange(experts, dtype=torch.int32, device=ids.device)
    offs = torch.searchsorted(by_expert, bounds, right=True, out_int32=True)
    rows = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    position = torch.empty_like(rows).scatter_(0, order, rows).view(top_k_index.shape)
    source = (order // top_k_index.shape[1]).to(torch.int32)
    return Routing(offs, *ops.group_tiles(offs, ids.shape[0]), source, position, order)


class _Stack(NamedTuple):
    """The weights of all experts, as products read them.

    Attributes:
        codes, scales: codes [experts, out, in], and float32 [experts, out].
        turned: codes [experts, in, out]; None if they are to be made.
        rotation: of in_features.
        gains: of in_features.
        format: of the codes.
        in_features_first: whether the parameter, and so its gradient, is [experts, in, out].
        dtype: of the gradient.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    turned: torch.Tensor | None
    rotation: Rotation | None
    gains: Gains | None
    format: Format
    in_features_first: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Any, recipe: Recipe, in_features_first: bool) -> "_Stack":
        operand = getattr(weight, "operand", None)
        if operand is None:
            master = getattr(weight, "master", weight)
            operand = stack_operand(master, recipe, in_features_first=in_features_first)
        assert operand.format is not None
        return cls(
            operand.stacked_codes(), operand.stacked_scales(), operand.turned, operand.column_rotation, operand.gains,
            operand.format, operand.in_features_first, weight.dtype,
        )  # fmt: skip

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """What to save for backward."""
        gains = self.gains or (None, None)
        return [self.codes, self.scales, self.turned, *gains]

    def with_tensors(self, tensors: tuple) -> "_Stack":
        codes, scales, turned, gain, undo = tensors
        return self._replace(codes=codes, scales=scales, turned=turned, gains=None if gain is None else (gain, undo))

    def without_tensors(self) -> "_Stack":
        nothing: Any = None
        return self._replace(codes=nothing, scales=nothing, turned=None, gains=None)

    def gain(self, undo: bool) -> torch.Tensor | None:
        return None if self.gains is None else self.gains[undo]

    def turned_codes(self) -> torch.Tensor:
        return ops.turn_stack(self.codes) if self.turned is None else self.turned

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        return g.transpose(1, 2) if self.in_features_first else g


_STACK_TENSORS = 5


def stack_operand(
    master: torch.Tensor,
    recipe: Recipe,
    gains: Gains | None = None,
    *,
    in_features_first: bool = False,
    turned: bool = False,
) -> ExpertsOperand:
    """Return what the weights of experts bring to the products.

    Args:
        master: [experts, out, in], or [experts, in, out] if ``in_features_first``.
        recipe: what they carry.
        gains: of in_features.
        in_features_first: the order of the dimensions of ``master``.
        turned: hold the codes in the order of grad_input too.

    Raises:
        ValueError: experts cannot follow the recipe, or have widths that are no multiples of 16.
    """
    if reason := misfit(tuple(master.shape), recipe):
        raise ValueError(f"experts [{', '.join(map(str, master.shape))}] cannot follow this recipe: {reason}")
    operand = recipe.output.right
    assert operand.format is not None
    rotation = hadamard.carried(operand, "in_features", master.shape[1 if in_features_first else 2])
    return ExpertsOperand.from_stack(
        master, operand.format, rotation, gains, in_features_first=in_features_first, turned=turned
    )


def misfit(shape: tuple[int, ...], recipe: Recipe) -> str | None:
    """Return why weights of experts of this shape cannot follow a recipe, or None if they can."""
    if len(shape) != 3:
        return "they must be [experts, out_features, in_features]"
    if any(width % 16 for width in shape[1:]):
        return f"out_features and in_features must be multiples of 16; got {shape[1]} and {shape[2]}"
    return why_not_grouped(recipe)


def _quantize_tokens(x: torch.Tensor, stack: _Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and scales of X, once per token."""
    codes, _, scales = ops.rotate_quantize(
        x, None, stack.rotation, stack.format, "row", rows=True, columns=False, gain=stack.gain(undo=True)
    )
    assert codes is not None
    return codes, scales


def _grad_input(
    e: torch.Tensor, scale: torch.Tensor, stack: _Stack, routing: Routing, dtype: torch.dtype
) -> torch.Tensor:
    """Return E_X of quantised rows of E."""
    turned, undo = stack.turned_codes(), stack.gain(undo=True)
    return ops.grouped_mm(
        e, turned, routing.tiles, routing.starts, scale, None, None, None, stack.rotation, dtype, undo
    )  # fmt: skip


def _grad_weight(
    e_t: torch.Tensor, scale: torch.Tensor, x_t: torch.Tensor, stack: _Stack, routing: Routing
) -> torch.Tensor:
    """Return G of transposed codes."""
    g = ops.grouped_grad(e_t, x_t, routing.starts, scale, stack.rotation, stack.dtype, stack.gain(undo=False))
    return stack.gradient(g)


def _turned_rotated(
    e: torch.Tensor, recipe: Recipe, stack: _Stack, routing: Routing, dtype: torch.dtype
) -> torch.Tensor:
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
        routing, stack = Routing(*routing_tensors), _Stack.of(weight, recipe, in_features_first)
        codes, scales = _quantize_tokens(x, stack)
        rows, row_scales = codes, scales
        if routing.source is not None:
            rows, row_scales = ops.gather_codes(codes, scales, routing.source)
        y = ops.grouped_mm(
            rows, stack.codes, routing.tiles, routing.starts, row_scales, stack.scales, bias, None, None, dtype
        )  # fmt: skip
        wants_w = trains and ctx.needs_input_grad[1]
        saved_x = [codes, scales] if wants_w else [None, None]
        ctx.save_for_backward(*saved_x, *stack.tensors, *routing)
        ctx.stack, ctx.recipe, ctx.x_dtype = stack.without_tensors(), recipe, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @backward_of_rounding
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (codes, scales), saved = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        stack, routing = ctx.stack.with_tensors(saved[:_STACK_TENSORS]), Routing(*saved[_STACK_TENSORS:])
        e, tiles, starts = grad_output.contiguous(), routing.tiles, routing.starts
        wants_x, wants_w, wants_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if wants_x:
            if ctx.recipe.grad_input.left.tokens is not None:
                grad_x = _turned_rotated(e, ctx.recipe, stack, routing, ctx.x_dtype)
            else:
                quantised = ops.quantize_groups(e, None, stack.scales, tiles, stack.format)
                grad_x = _grad_input(*quantised, stack, routing, ctx.x_dtype)
            if routing.position is not None:
                grad_x = ops.combine(grad_x, routing.position, ctx.x_dtype)
        if wants_w or wants_bias:
            fold = torch.ones_like(e[:, 0], dtype=torch.float32) if scales is None else scales
            if routing.source is not None and scales is not None:
                fold = scales[routing.source.long()]
            e_t, e_scales, sums = ops.quantize_groups_t(e, None, None, fold, tiles, starts, wants_bias, stack.format)
            grad_bias = sums.to(ctx.bias_dtype) if wants_bias else None
        if wants_w:
            grad_w = _grad_weight(e_t, e_scales, ops.turn_codes(codes, routing.source, tiles), stack, routing)
        return grad_x, grad_w, grad_bias, *[None] * (len(ctx.needs_input_grad) - 3)


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
        routing = Routing(*routing_tensors)
        first, second = (_Stack.of(w, r, in_features_first) for w, r in zip((gate_up, down), recipes, strict=True))
        tiles, starts = routing.tiles, routing.starts
        codes, scales = _quantize_tokens(x, first)
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
            ctx.save_for_backward(
                *x_saved, *a_saved, h, weight, b_saved, *first.tensors, *second.tensors, *routing
            )
        ctx.stacks, ctx.gate, ctx.x_dtype = (first.without_tensors(), second.without_tensors()), gate, x.dtype
        ctx.bias_dtypes = tuple(None if b is None else b.dtype for b in (gate_up_bias, down_bias))
        return y

    @staticmethod
    @backward_of_rounding
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, row_scales, a_codes, a_scales, h, weight, down_bias, *rest = ctx.saved_tensors
        first = ctx.stacks[0].with_tensors(tuple(rest[:_STACK_TENSORS]))
        second = ctx.stacks[1].with_tensors(tuple(rest[_STACK_TENSORS : 2 * _STACK_TENSORS]))
        routing = Routing(*rest[2 * _STACK_TENSORS :])
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
            grads[3] = _grad_weight(e_t, e_scales, ops.turn_codes(a_codes, None, tiles), second, routing)
        if wants_x or wants_weight or wants_first or wants_bias:
            quantised = ops.quantize_groups(e, routing.source, second.scales, tiles, second.format)
            grad_a = _grad_input(*quantised, second, routing, h.dtype)
        if wants_x or wants_weight:
            e_h, e_h_scales, dots = ops.quantize_gated_grad(h, grad_a, weight, gate, first.scales, tiles, first.format)
            grads[1] = _grad_routing(dots, e, down_bias, routing) if wants_weight else None
        if wants_x:
            grads[0] = _grad_input(e_h, e_h_scales, first, routing, ctx.x_dtype)
            if routing.position is not None:
                grads[0] = ops.combine(grads[0], routing.position, ctx.x_dtype)
        if wants_first or wants_bias:
            fold = h.new_ones(h.shape[0], dtype=torch.float32) if row_scales is None else row_scales
            e_t, e_scales, sums = ops.quantize_gated_grad_t(
                h, grad_a, weight, gate, fold, tiles, starts, wants_bias, first.format
            )  # fmt: skip
            grads[4] = sums.to(ctx.bias_dtypes[0]) if wants_bias else None
        if wants_first:
            grads[2] = _grad_weight(e_t, e_scales, ops.turn_codes(codes, routing.source, tiles), first, routing)
        return *grads, *[None] * (len(ctx.needs_input_grad) - 6)


def _grad_routing(
    dots: torch.Tensor, e: torch.Tensor, down_bias: torch.Tensor | None, routing: Routing
) -> torch.Tensor:
    """Return the gradient of the routing weights of rows: E · y, where y = (a Wᵀ + bias) before the weight multiplied it."""
    if down_bias is None:
        return dots
    row = torch.arange(dots.shape[0], device=dots.device, dtype=torch.int32)
    expert = torch.searchsorted(routing.offs, row, right=True)
    there = expert < routing.offs.shape[0]
    of_token = e.to(torch.float32) @ down_bias.to(torch.float32).t()  # [tokens, experts]
    token = row.long() if routing.source is None else routing.source.long()
    return dots + torch.where(there, of_token[token, expert.clamp(max=routing.offs.shape[0] - 1)], 0.0)


def _product(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    recipe: Recipe | None,
    in_features_first: bool,
    *routing: torch.Tensor | None,
) -> torch.Tensor:
    dtype = product_dtype("experts", x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _GroupedLinear.apply(
            x, weight, bias, recipe or weight.recipe, dtype, in_features_first, torch.is_grad_enabled(), *routing
        )


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
    recipes = (recipe or gate_up.recipe, recipe or down.recipe)
    with torch.autocast(x.device.type, enabled=False):
        return _Experts.apply(
            x, weight, gate_up, down, gate_up_bias, down_bias, Gate.of(gate), recipes, dtype, in_features_first,
            torch.is_grad_enabled(), *routing,
        )  # fmt: skip


# Dynamo puts the calls into its graph as they stand, and AOTAutograd traces through them, backward included.
_product_in_graph = torch.compiler.allow_in_graph(_product)
_fused_in_graph = torch.compiler.allow_in_graph(_fused)


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
    _check_rows(x, weight, offs, bias, in_features_first)
    offs = offs.to(torch.int32)
    routing = Routing(offs, *ops.group_tiles(offs, x.shape[0]))
    return _product_in_graph(x, weight, bias, recipe, in_features_first, *routing)


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
    count, (out, _) = gate_up.shape[0], _features(gate_up, in_features_first)
    routing = route(top_k_index, count)
    _check_rows(hidden_states, gate_up, routing.offs, gate_up_bias, in_features_first)
    assert routing.order is not None
    weight = top_k_weights.reshape(-1).to(torch.float32)[routing.order]
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
    recipes = [recipe or gate_up.recipe, recipe or down.recipe]
    _check_pair(gate_up, down, gate, in_features_first)
    if isinstance(gate, Gate) and not any(r.grad_input.left.tokens for r in recipes):
        return _fused_in_graph(
            x, weight, gate_up, down, gate_up_bias, down_bias, str(gate), recipe, in_features_first, *routing
        )
    h = _product_in_graph(x, gate_up, gate_up_bias, recipe, in_features_first, *routing)
    a = reference.activate(h, gate) if isinstance(gate, Gate) else gate(h)
    of_rows = Routing(routing.offs, routing.tiles, routing.starts)
    y = _product_in_graph(a, down, down_bias, recipe, in_features_first, *of_rows)
    if weight is not None:
        y = (y * weight.unsqueeze(1)).to(y.dtype)
    return y if routing.position is None else _Combine.apply(y, routing.source, routing.position)


class _Combine(torch.autograd.Function):
    """The sum over the rows of each token."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, source: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(source)
        return ops.combine(y, position, y.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return grad_output[source.long()], None, None


def _features(weight: Any, in_features_first: bool) -> tuple[int, int]:
    """Return (out_features, in_features) of the weights of experts."""
    operand = getattr(weight, "operand", None)
    if operand is not None:
        return operand.features
    return (weight.shape[2], weight.shape[1]) if in_features_first else (weight.shape[1], weight.shape[2])


def _check_rows(
    x: torch.Tensor, weight: Any, offs: torch.Tensor, bias: torch.Tensor | None, in_features_first: bool
) -> None:
    """Raise ValueError if operands do not fit each other."""
    if weight.ndim != 3 or x.ndim != 2:
        raise ValueError(f"experts: need x [rows, in] and a weight of three dimensions; got {list(x.shape)}, {list(weight.shape)}")
    out, width = _features(weight, in_features_first)
    if x.shape[1] != width:
        raise ValueError(f"experts: an input of shape {list(x.shape)} does not fit weights of {width} in_features")
    if offs.shape != weight.shape[:1]:
        raise ValueError(f"experts: offs of shape {list(offs.shape)} does not fit {weight.shape[0]} experts")
    if bias is not None and tuple(bias.shape) != (weight.shape[0], out):
        raise ValueError(f"experts: a bias of shape {list(bias.shape)} does not fit {weight.shape[0]} experts of {out} features")
    if devices := {str(t.device) for t in (weight, offs, bias) if t is not None and t.device != x.device}:
        raise ValueError(f"experts: the input is on {x.device} and the layer on {', '.join(sorted(devices))}; move one of them")


def _check_pair(gate_up: Any, down: Any, gate: Any, in_features_first: bool) -> None:
    out, _ = _features(gate_up, in_features_first)
    _, width = _features(down, in_features_first)
    if isinstance(gate, Gate) and out != 2 * width or gate_up.shape[0] != down.shape[0]:
        raise ValueError(
            f"experts: gate_up {list(gate_up.shape)} and down {list(down.shape)} do not fit: the gate makes {out // 2} features "
            f"of {out}, and down reads {width}"
        )
