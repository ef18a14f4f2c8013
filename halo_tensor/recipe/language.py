"""The language in which a low-precision training method is written down.

A linear layer has three named dimensions, ``tokens`` (M), ``in_features`` (K) and ``out_features`` (N); three operands, each
a matrix over two of them; and three products, each contracting the third:

    ============  =======  ==========================  ============  =====================
    product       formula  operands                    contracts     result
    ============  =======  ==========================  ============  =====================
    output        X Wᵀ     X[tokens, in], W[out, in]   in_features   Y[tokens, out]
    grad_input    E W      E[tokens, out], W[out, in]  out_features  E_X[tokens, in]
    grad_weight   Eᵀ X     E[tokens, out], X           tokens        G[out, in]
    ============  =======  ==========================  ============  =====================

where E = dL/dY. A :class:`Recipe` says what each operand carries in each product: a number format, where its scales live,
and a rotation on any of its dimensions. Two rules give every recipe its meaning:

*Rotations.* On the contracted dimension both operands carry the same rotation, and it cancels. On a surviving dimension
the rotation is undone on the result. A rotation with a ``rank`` keeps only the slowest part of its dimension: then the first
is the product of two projections, the second a projection of the product.

*Scales.* A scale along a surviving dimension is applied to the result. A scale along the contracted dimension is folded
into the other operand before that one is quantised: Eᵀ X = (diag(s_x) E)ᵀ X_q for X = diag(s_x) X_q. So X and W are
quantised once and serve two products each.
"""

from dataclasses import dataclass, fields

from halo_tensor.recipe.formats import Constant, Format

DIMENSIONS = ("tokens", "in_features", "out_features")
X, W, E = ("tokens", "in_features"), ("out_features", "in_features"), ("tokens", "out_features")
#: product name -> (dimensions of its left operand, of its right operand, the contracted dimension)
PRODUCTS = {
    "output": (X, W, "in_features"),
    "grad_input": (E, W, "out_features"),
    "grad_weight": (E, X, "tokens"),
}


@dataclass(frozen=True)
class Rotation(Constant):
    """A block-diagonal orthogonal matrix R = D·(I ⊗ H/√block): random signs D, then Hadamard blocks H.

    ``block`` is the edge of a block; None stands for the full width, whatever it will be. ``seed`` chooses the signs (the
    same ones in every block, on every machine and rank); None leaves them out. ``rank`` keeps that many columns of each block,
    those of the lowest sequency (fewest changes of sign): R is then a projection, [width, width·rank/block] with RᵀR = 1. It
    takes a power-of-two block of at most 256, and no signs, which would scramble what is slow and what is fast.
    """

    block: int | None = 128
    seed: int | None = 0
    rank: int | None = None

    def __post_init__(self):
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
        """The block, where it must be definite: on a tensor. ``ops.hadamard.fit`` makes it so."""
        if self.block is None:
            raise ValueError("this rotation spans a width that is not known yet; take hadamard.fit(rotation, width)")
        return self.block

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"·rank{self.rank}"
        return f"H{'full' if self.block is None else self.block}" + ("" if self.seed is None else f"·seed{self.seed}") + rank


@dataclass(frozen=True)
class Operand:
    """How one operand enters one product.

    ``format`` None keeps it in high precision. ``scale`` is "tensor" (one scale), "unit" (no scale: a bare cast), "block"
    (one per 32×32 block), or the name of a dimension: one scale per index of that dimension. ``tokens``, ``in_features`` and
    ``out_features`` are the rotations it carries. ``rounding`` is "nearest", or "stochastic": up or down so that the mean is
    exact, with torch's random numbers.
    """

    format: Format | None = None
    scale: str = "tensor"
    tokens: Rotation | None = None
    in_features: Rotation | None = None
    out_features: Rotation | None = None
    rounding: str = "nearest"

    def __post_init__(self):
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"an operand's rounding must be nearest or stochastic; got {self.rounding!r}")
        valid = ("tensor", "unit", "block", *DIMENSIONS)
        if self.scale not in valid:
            raise ValueError(f"an operand's scale must be one of {', '.join(valid)}; got {self.scale!r}")

    def rotation(self, dimension: str) -> Rotation | None:
        return getattr(self, dimension)

    @property
    def is_plain(self) -> bool:
        """True if the operand enters its product as it is."""
        return self.format is None and not any(self.rotation(d) for d in DIMENSIONS)


PLAIN = Operand()


@dataclass(frozen=True)
class Product:
    left: Operand = PLAIN
    right: Operand = PLAIN


@dataclass(frozen=True)
class Recipe(Constant):
    """A training method: what each operand of the three products carries. Checked on construction."""

    output: Product = Product()
    grad_input: Product = Product()
    grad_weight: Product = Product()

    def __post_init__(self):
        for name, (left_dims, right_dims, contracted) in PRODUCTS.items():
            product = getattr(self, name)
            _check_operand(name, "left", product.left, left_dims)
            _check_operand(name, "right", product.right, right_dims)
            _check_product(name, product, contracted)

    def operand(self, product: str, dims: tuple[str, str]) -> Operand:
        """What X, W or E, named by its dimensions, carries in a product that it takes part in."""
        sides = getattr(self, product)
        return sides.left if PRODUCTS[product][0] == dims else sides.right

    @property
    def is_identity(self) -> bool:
        return all(p.left.is_plain and p.right.is_plain for p in (self.output, self.grad_input, self.grad_weight))

    @property
    def formats(self) -> tuple[Format, ...]:
        """The number formats that this recipe's products use, each once."""
        products = [getattr(self, f.name) for f in fields(self)]
        return tuple(dict.fromkeys(o.format for p in products for o in (p.left, p.right) if o.format is not None))


def _check_operand(name: str, side: str, operand: Operand, dims: tuple[str, str]) -> None:
    foreign = [d for d in DIMENSIONS if d not in dims and (operand.rotation(d) or operand.scale == d)]
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
    if left.scale == contracted or (name == "output" and right.scale == contracted):
        raise ValueError(
            f"{name} contracts {contracted}: a scale along it can only be folded into an operand that is quantised "
            "later, and only E is. Put it on the other dimension, or use 'tensor'"
        )
    if (left.scale == "block") != (right.scale == "block"):
        raise ValueError(f"{name}: either both operands or none carry block scales")
    if name == "output" and right.rounding == "stochastic":
        raise ValueError("output: the codes of a weight are kept in step with it, so they are rounded to nearest")
