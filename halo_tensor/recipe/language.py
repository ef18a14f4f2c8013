"""The language that describes a low-precision training method.

A linear layer has three named dimensions, ``tokens`` (M), ``in_features`` (K) and ``out_features`` (N). It has three operands,
each a matrix over two of them, and three products, each of which contracts one of them:

    ============  =======  ==========================  ============  =====================
    product       formula  operands                    contracts     result
    ============  =======  ==========================  ============  =====================
    output        X Wᵀ     X[tokens, in], W[out, in]   in_features   Y[tokens, out]
    grad_input    E W      E[tokens, out], W[out, in]  out_features  E_X[tokens, in]
    grad_weight   Eᵀ X     E[tokens, out], X           tokens        G[out, in]
    ============  =======  ==========================  ============  =====================

where E = dL/dY. A :class:`Recipe` says what each operand carries in each product: a number format, the layout of its scales,
and a rotation on any of its dimensions. Two rules define the result:

*Rotations.* On the contracted dimension both operands carry the same rotation, and the two cancel. On a surviving dimension
the rotation is undone on the result. A rotation with a ``rank`` keeps only the slowest part of its dimension: a contracted
dimension then gives the product of two projections, a surviving one a projection of the product.

*Scales.* A scale for each index of a surviving dimension multiplies the result. A scale for each index of the contracted
dimension is folded into the other operand before that one is quantised: Eᵀ X = (diag(s_x) E)ᵀ X_q for X = diag(s_x) X_q. So X
and W can be quantised once and serve two products each. Blocks of scales along the contracted dimension are applied to both
operands before they are multiplied, as matrix units for MXFP8 and NVFP4 do.

*Experts.* The weights of a mixture have a fourth dimension, ``experts``: W[experts, out, in]. It groups the tokens: each
belongs to one expert, and is multiplied with that expert's matrix only. So the three products are those of a dense layer,
once for each group. A recipe says nothing new for them. A scale is never shared by two experts, unless it lies along tokens,
whose scales stay with them: of W there is one for each (expert, out_feature), and so of E in grad_weight. What is folded in
is that of the group. Rotations are the same for all experts, since X is rotated and quantised before it is known which experts
read it. A rotation of tokens begins anew in each group. :func:`why_not_grouped` says which recipes experts can follow.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from halo_tensor.recipe.activations import Activations
from halo_tensor.recipe.formats import Constant, Format
from halo_tensor.recipe.scales import AXES, TENSOR, Scales

DIMENSIONS = ("tokens", "in_features", "out_features")
#: The dimension of a weight [experts, out_features, in_features] by which tokens are grouped.
EXPERTS = "experts"
X, W, E = ("tokens", "in_features"), ("out_features", "in_features"), ("tokens", "out_features")
#: product -> (dimensions of its left operand, dimensions of its right operand, the contracted dimension)
PRODUCTS = {
    "output": (X, W, "in_features"),
    "grad_input": (E, W, "out_features"),
    "grad_weight": (E, X, "tokens"),
}

#: Which convolutions multiply in few bits.
CONVOLUTIONS = ("none", "pointwise", "all")


@dataclass(frozen=True)
class Rotation(Constant):
    """A block-diagonal orthogonal matrix R = D·(I ⊗ H/√block) of random signs D and Hadamard blocks H.

    Attributes:
        block: the edge of a block; None for the full width of the dimension, whatever that is.
        seed: chooses the signs, which are the same in every block and on every machine; None for no signs.
        rank: keep this many columns of each block, those of the lowest sequency (fewest changes of sign). R is then a
            projection, [width, width·rank/block] with RᵀR = 1. A rank needs a power-of-two block of at most 256 and no
            signs, which would mix slow and fast columns.
    """

    block: int | None = 128
    seed: int | None = 0
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 2:
            raise ValueError(f"a rotation's block must be at least 2 wide, or None for the full width; got {self.block}")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ValueError(f"a rotation's seed must be None or in [0, 2³¹); got {self.seed}")
        if self.rank is not None:
            block = self.block or 0
            if self.seed is not None or not 2 <= block <= 256 or block & (block - 1) or not 1 <= self.rank <= block:
                raise ValueError(
                    "a rotation of low rank takes a power-of-two block from 2 to 256, seed=None and a rank from 1 to the "
                    f"block; got block {self.block}, seed {self.seed}, rank {self.rank}"
                )

    @property
    def edge(self) -> int:
        """The block as a number. ``reference.hadamard.fit`` returns rotations that have one.

        Raises:
            ValueError: the block is None.
        """
        if self.block is None:
            raise ValueError("this rotation spans a width that is not known yet; take hadamard.fit(rotation, width)")
        return self.block

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"·rank{self.rank}"
        return f"H{'full' if self.block is None else self.block}" + ("" if self.seed is None else f"·seed{self.seed}") + rank


@dataclass(frozen=True)
class Operand:
    """How one operand enters one product.

    Attributes:
        format: the number format of its codes; None for high precision.
        granularity: the layout of its scales over the recipe's dimensions, such as ``Scales.per(tokens=1)``. Without an
            orientation (``TENSOR``, ``UNIT``, square blocks) it needs no names of dimensions.
        tokens, in_features, out_features: the rotations that it carries.
        rounding: "nearest", or "stochastic": up or down with probabilities that keep the mean, by torch's random numbers.

    Raises:
        ValueError: an unknown rounding, or a granularity that is no Scales or names rows or columns.
    """

    format: Format | None = None
    granularity: Scales = TENSOR
    tokens: Rotation | None = None
    in_features: Rotation | None = None
    out_features: Rotation | None = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"an operand's rounding must be nearest or stochastic; got {self.rounding!r}")
        if not isinstance(self.granularity, Scales):
            raise ValueError(
                "an operand's granularity must be a layout of scales, such as Scales.per(tokens=1) or TENSOR; got "
                f"{self.granularity!r}"
            )
        if not self.granularity.is_square and any(self.granularity.length(axis) for axis in AXES):
            raise ValueError(
                f"an operand's scales lie along {', '.join(DIMENSIONS)}, not along rows or columns; got {self.granularity!r}"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle of this version, or of 0.1.0, where the granularity was a string, ``scale``."""
        state = dict(state)
        if "scale" in state:
            scale = state.pop("scale")
            state["granularity"] = Scales.of("32x32" if scale == "block" else scale)
        self.__dict__.update(state)

    def rotation(self, dimension: str) -> Rotation | None:
        """Return the rotation of a dimension."""
        return getattr(self, dimension)

    @property
    def is_plain(self) -> bool:
        """Whether the operand enters its product as it is."""
        return self.format is None and not any(self.rotation(d) for d in DIMENSIONS)


PLAIN = Operand()


@dataclass(frozen=True)
class Product:
    """The two operands of a product."""

    left: Operand = PLAIN
    right: Operand = PLAIN


@dataclass(frozen=True)
class Recipe(Constant):
    """A training method: what each operand of the three products carries.

    Attributes:
        output, grad_input, grad_weight: the products.
        activations: how the tensors between converted layers are saved for backward; None saves them as they are.
        quantized_convolutions: which convolutions compute their backward products in few bits: "none", "pointwise" (1×1) or
            "all". The others save X as ``grad_weight`` says, and compute with the decompressed X in high precision.

    Raises:
        ValueError: an operand or a product breaks a rule of the language; the message says which.
    """

    output: Product = Product()
    grad_input: Product = Product()
    grad_weight: Product = Product()
    activations: Activations | None = None
    quantized_convolutions: str = "none"

    def __post_init__(self) -> None:
        if self.quantized_convolutions not in CONVOLUTIONS:
            raise ValueError(
                f"quantized_convolutions must be one of {', '.join(CONVOLUTIONS)}; got {self.quantized_convolutions!r}"
            )
        for name, (left_dims, right_dims, contracted) in PRODUCTS.items():
            product = getattr(self, name)
            _check_operand(name, "left", product.left, left_dims)
            _check_operand(name, "right", product.right, right_dims)
            _check_product(name, product, contracted)

    def operand(self, product: str, dims: tuple[str, str]) -> Operand:
        """Return what X, W or E, given by its dimensions, carries in a product that multiplies it."""
        sides = getattr(self, product)
        return sides.left if PRODUCTS[product][0] == dims else sides.right

    @cached_property
    def is_identity(self) -> bool:
        """Whether all products are computed in high precision, without rotations."""
        return all(p.left.is_plain and p.right.is_plain for p in (self.output, self.grad_input, self.grad_weight))

    def quantizes_convolution(self, pointwise: bool) -> bool:
        """Whether a convolution computes its backward products in few bits.

        Args:
            pointwise: whether it is a 1×1 convolution.
        """
        return self.quantized_convolutions in (("pointwise", "all") if pointwise else ("all",))

    def of_convolution(self, pointwise: bool) -> "Recipe":
        """Return what the products of a convolution follow: this recipe, or high precision."""
        if self.quantizes_convolution(pointwise):
            return self
        return Recipe(self.output, activations=self.activations, quantized_convolutions=self.quantized_convolutions)

    @property
    def formats(self) -> tuple[Format, ...]:
        """The number formats that the products use, each once."""
        return tuple(dict.fromkeys(o.format for o in self._operands if o.format is not None))

    @property
    def granularities(self) -> tuple[Scales, ...]:
        """The layouts of scales that the products use, each once."""
        return tuple(dict.fromkeys(o.granularity for o in self._operands if o.format is not None))

    @cached_property
    def has_plain_output(self) -> bool:
        """Whether output is computed in high precision, without rotations."""
        return self.output.left.is_plain and self.output.right.is_plain

    @property
    def _operands(self) -> list[Operand]:
        products = [getattr(self, name) for name in PRODUCTS]
        return [operand for product in products for operand in (product.left, product.right)]


def _check_operand(name: str, side: str, operand: Operand, dims: tuple[str, str]) -> None:
    foreign = [d for d in DIMENSIONS if d not in dims and (operand.rotation(d) or operand.granularity.length(d))]
    if foreign:
        raise ValueError(
            f"{name}: its {side} operand is a matrix over {dims[0]} and {dims[1]}, so it cannot carry a rotation or a "
            f"scale on {foreign[0]}"
        )


def _check_product(name: str, product: Product, contracted: str) -> None:
    left, right = product.left, product.right
    if left.rotation(contracted) != right.rotation(contracted):
        raise ValueError(
            f"{name} contracts {contracted}, where both operands must carry the same rotation for it to cancel; got "
            f"{left.rotation(contracted)} on the left and {right.rotation(contracted)} on the right"
        )
    if (left.format is None) != (right.format is None) or (
        left.format and right.format and left.format.uniform != right.format.uniform
    ):
        raise ValueError(
            f"{name} multiplies {left.format or 'high precision'} with {right.format or 'high precision'}, which no matrix "
            "unit does: take two integer formats, two floating ones, or high precision on both sides"
        )
    if left.granularity.is_per(contracted) or (name == "output" and right.granularity.is_per(contracted)):
        raise ValueError(
            f"{name} contracts {contracted}: a scale along it can only be folded into an operand that is quantised "
            "later, and only E is. Put it on the other dimension, or use TENSOR"
        )
    _check_blocks(name, product, contracted)
    if name == "output" and right.rounding == "stochastic":
        raise ValueError("output: the codes of a weight are kept in step with it, so they are rounded to nearest")


def _check_blocks(name: str, product: Product, contracted: str) -> None:
    left, right = (
        operand.granularity.on(dims) if operand.granularity.is_blocked else None
        for operand, dims in zip((product.left, product.right), PRODUCTS[name][:2], strict=True)
    )
    if (left is None) != (right is None):
        raise ValueError(f"{name}: either both operands or none carry scales of blocks")
    if left is None or right is None:
        return
    lengths = [
        granularity.length(AXES[dims.index(contracted)])
        for granularity, dims in zip((left, right), PRODUCTS[name][:2], strict=True)
    ]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"{name} contracts {contracted}, where the blocks of both operands must be equally long; got {lengths[0]} on the "
            f"left and {lengths[1]} on the right"
        )


def why_not_grouped(recipe: Recipe) -> str | None:
    """Return why the experts of a mixture cannot follow a recipe, or None if they can.

    Their products quantise X once per token, before tokens are copied to experts, and W once per out_feature of each expert.
    HALO's recipes with scales per row ask for that.
    """
    x, w = recipe.output.left, recipe.output.right
    e_rows, e_columns = recipe.grad_input.left, recipe.grad_weight.left
    if x.format is None or not (x.granularity.is_per("tokens") and w.granularity.is_per("out_features")):
        return "X needs one scale per token and W one per out_feature (granularity='row')"
    if recipe.grad_input.right != w or recipe.grad_weight.right != x:
        return "all three products must read the same codes of X and of W"
    if not (e_rows.granularity.is_per("tokens") and e_columns.granularity.is_per("out_features")):
        return "E needs one scale per token in grad_input and one per out_feature in grad_weight"
    if any(o.rounding != "nearest" for o in (x, w, e_rows, e_columns)):
        return "codes must be rounded to nearest"
    if x.tokens or w.out_features or e_rows.out_features or e_columns.tokens or e_columns.out_features:
        return "only in_features may be rotated, and the tokens of E in grad_input"
    if e_rows.tokens is not None and (e_rows.tokens.rank or 128 % (e_rows.tokens.block or 1)):
        return f"the rotation of tokens must have blocks that divide 128; got {e_rows.tokens}"
    return None
