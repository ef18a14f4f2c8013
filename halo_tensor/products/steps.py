"""Decide which quantisations a recipe asks for, before there is a tensor.

The operand path (:mod:`halo_tensor.products.operands`) and the eager path (:mod:`halo_tensor.products.eager`) follow the same
steps. So one set of rules says what X, W and E are quantised to.
"""

from dataclasses import replace
from typing import NamedTuple

from halo_tensor.recipe import PRODUCTS, TENSOR, E, Format, Operand, Recipe, Rotation, Scales

Dims = tuple[str, str]


class Step(NamedTuple):
    """One quantisation of a matrix.

    Attributes:
        operand: the format, scale and rotations.
        products: the products that its result serves.
        folded: whether the scale of the other operand is multiplied in first.
    """

    operand: Operand
    products: tuple[str, ...]
    folded: bool

    @property
    def contracted(self) -> set[str]:
        """The dimensions along which its products sum."""
        return {PRODUCTS[product][2] for product in self.products}


class Pair(NamedTuple):
    """Both operands that backward makes of E, from one function that reads E twice instead of four times.

    Attributes:
        format: of both.
        tokens: the rotation of the operand for grad_input, whose scales lie along tokens. The operand for grad_weight has
            scales along out_features and no rotation.
    """

    format: Format
    tokens: Rotation | None


class Both(NamedTuple):
    """Both operands that backward makes of E, of different rotations or formats, from one function that reads E twice.

    Attributes:
        grad_input: the operand for grad_input. It has one scale, or one per token, and no rotation of tokens.
        grad_weight: the operand for grad_weight. It has one scale, or one per out_feature, no rotation of out_features, and is
            rounded to nearest.
    """

    grad_input: Operand
    grad_weight: Operand


def steps_for(recipe: Recipe, dims: Dims, products: tuple[str, ...], folded: tuple[str, ...] = ()) -> tuple[Step, ...]:
    """Return the quantisations of the matrix over ``dims`` that serve ``products``. Products that want the same operand, with
    nothing folded in, share one.

    Args:
        folded: the products into whose operand a scale is folded.
    """
    wanted: dict[tuple[Operand, str | None], list[str]] = {}
    for product in products:
        key = recipe.operand(product, dims), product if product in folded else None
        wanted.setdefault(key, []).append(product)
    return tuple(Step(operand, tuple(served), fold is not None) for (operand, fold), served in wanted.items())


def as_pair(dims: Dims, steps: tuple[Step, ...]) -> Pair | None:
    """Return the pair that two steps are, if they are one."""
    if dims != E or [step.products for step in steps] != [("grad_input",), ("grad_weight",)]:
        return None
    first, second = (step.operand for step in steps)
    if not (first.granularity.is_per(dims[0]) and second.granularity.is_per(dims[1])):
        return None
    alike = second == replace(first, granularity=second.granularity, tokens=None)
    if first.format is None or first.out_features is not None or not alike or first.rounding != "nearest":
        return None
    return Pair(first.format, first.tokens)


def as_both(dims: Dims, steps: tuple[Step, ...]) -> Both | None:
    """Return the operands that two steps make, if one function makes both. :func:`as_pair` has those with folded scales."""
    if dims != E or [step.products for step in steps] != [("grad_input",), ("grad_weight",)] or any(s.folded for s in steps):
        return None
    both = Both(*(step.operand for step in steps))
    layouts = ((TENSOR, Scales.per(**{dim: 1})) for dim in dims)  # type: ignore[arg-type]
    if any(o.format is None or o.granularity not in known for o, known in zip(both, layouts, strict=True)):
        return None
    if both.grad_input.tokens or both.grad_weight.out_features or both.grad_weight.rounding != "nearest":
        return None
    return both


def folded_products(recipe: Recipe, products: tuple[str, ...]) -> tuple[str, ...]:
    """Return the products whose right operand has its scale along the contracted dimension, so that it is folded into E."""
    return tuple(
        product
        for product in products
        if (right := getattr(recipe, product).right).format is not None and right.granularity.is_per(PRODUCTS[product][2])
    )


def holds_for_grad_input(recipe: Recipe) -> bool:
    """Whether a weight can hold an operand that only grad_input multiplies with: output takes the weight as it is, as in HOT,
    and each quantisation of the weight gives the same codes."""
    w = recipe.grad_input.right
    return recipe.output.right.is_plain and w.format is not None and w.rounding == "nearest"


def reuses_operand(recipe: Recipe) -> bool:
    """Whether grad_input multiplies with the operand of W that output did."""
    return recipe.grad_input.right == recipe.output.right
