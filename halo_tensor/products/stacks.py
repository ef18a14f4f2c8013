"""The weights of all experts of a layer, as operands of their products."""

from typing import Any, NamedTuple

import torch

from halo_tensor import ops
from halo_tensor.operand.experts import ExpertsOperand, unpacked
from halo_tensor.operand.gains import Gains
from halo_tensor.products.routing import Routing
from halo_tensor.recipe import Format, Recipe, Rotation, why_not_grouped
from halo_tensor.reference import hadamard


class Stack(NamedTuple):
    """The weights of all experts, as products read them.

    Attributes:
        held: the codes of the matrix of all rows as the weight holds them, perhaps packed. Backward gets these, so unpacked
            codes are not kept.
        scales: float32 [experts, out].
        turned: codes [experts, in, out]; None if they are to be made.
        rotation: of in_features.
        gains: of in_features.
        format: of the codes.
        in_features_first: whether the parameter, and so its gradient, is [experts, in, out].
        dtype: of the gradient.
    """

    held: torch.Tensor
    scales: torch.Tensor
    turned: torch.Tensor | None
    rotation: Rotation | None
    gains: Gains | None
    format: Format
    in_features_first: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Any, recipe: Recipe, in_features_first: bool) -> "Stack":
        operand = getattr(weight, "operand", None)
        if operand is None:
            master = getattr(weight, "master", weight)
            operand = stack_operand(master, recipe, in_features_first=in_features_first)
        assert operand.format is not None and operand.codes is not None
        return cls(
            operand.codes, operand.stacked_scales(), operand.turned_stack, operand.column_rotation, operand.gains,
            operand.format, operand.in_features_first, weight.dtype,
        )  # fmt: skip

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """What to save for backward."""
        gains = self.gains or (None, None)
        return [self.held, self.scales, self.turned, *gains]

    def with_tensors(self, tensors: tuple) -> "Stack":
        held, scales, turned, gain, undo = tensors
        return self._replace(held=held, scales=scales, turned=turned, gains=None if gain is None else (gain, undo))

    def without_tensors(self) -> "Stack":
        nothing: Any = None
        return self._replace(held=nothing, scales=nothing, turned=None, gains=None)

    @property
    def codes(self) -> torch.Tensor:
        """The codes that a matrix unit reads, [experts, out, in]."""
        return unpacked(self.held, self.format).unflatten(0, (self.scales.shape[0], -1))

    def gain(self, undo: bool) -> torch.Tensor | None:
        return None if self.gains is None else self.gains[undo]

    def turned_codes(self) -> torch.Tensor:
        return ops.turn_stack(self.codes) if self.turned is None else self.turned

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        # Autograd would copy a transposed view into the parameter's layout by a slow general copy.
        return ops.turn_stack(g) if self.in_features_first else g


#: How many tensors a stack saves for backward.
STACK_TENSORS = 5


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


def quantize_tokens(x: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and scales of X, once per token."""
    codes, _, scales = ops.rotate_quantize(
        x, None, stack.rotation, stack.format, "row", rows=True, columns=False, gain=stack.gain(undo=True)
    )
    assert codes is not None
    return codes, scales


def grad_input(e: torch.Tensor, scale: torch.Tensor, stack: Stack, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """Return E_X of quantised rows of E."""
    turned, undo = stack.turned_codes(), stack.gain(undo=True)
    return ops.grouped_mm(
        e, turned, routing.tiles, routing.starts, scale, None, None, None, stack.rotation, dtype, undo
    )  # fmt: skip


def grad_weight(e_t: torch.Tensor, scale: torch.Tensor, x_t: torch.Tensor, stack: Stack, routing: Routing) -> torch.Tensor:
    """Return G of transposed codes."""
    g = ops.grouped_grad(e_t, x_t, routing.starts, scale, stack.rotation, stack.dtype, stack.gain(undo=False))
    return stack.gradient(g)


def features(weight: Any, in_features_first: bool) -> tuple[int, int]:
    """Return (out_features, in_features) of the weights of experts."""
    operand = getattr(weight, "operand", None)
    if operand is not None:
        return operand.features
    return (weight.shape[2], weight.shape[1]) if in_features_first else (weight.shape[1], weight.shape[2])
