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

This module is pure data: it knows nothing of tensors or kernels.
"""

from dataclasses import dataclass, fields, replace

DIMENSIONS = ("tokens", "in_features", "out_features")
X, W, E = ("tokens", "in_features"), ("out_features", "in_features"), ("tokens", "out_features")
#: product name -> (dimensions of its left operand, of its right operand, the contracted dimension)
PRODUCTS = {
    "output": (X, W, "in_features"),
    "grad_input": (E, W, "out_features"),
    "grad_weight": (E, X, "tokens"),
}


class _Constant:
    """Not to be copied: compiled code looks at every call whether a weight's recipe is the one it was compiled for, and sees
    at once that an object is itself."""

    def __deepcopy__(self, memo):
        return self


@dataclass(frozen=True)
class Format(_Constant):
    """A number format: ``bits`` per element, its largest finite value ``max``, and whether its grid is ``uniform``.

    Uniform grids run on integer units, the others on fp8 units. ``mantissa_bits`` and ``min_exponent`` (of the smallest
    normal number) define a floating grid; they are 0 for a uniform one.
    """

    name: str
    bits: int
    max: float
    uniform: bool = False
    mantissa_bits: int = 0
    min_exponent: int = 0

    def __str__(self) -> str:
        return self.name


INT8 = Format("int8", 8, 127.0, uniform=True)
INT4 = Format("int4", 4, 7.0, uniform=True)
FP8_E4M3 = Format("fp8_e4m3", 8, 448.0, mantissa_bits=3, min_exponent=-6)
FP8_E5M2 = Format("fp8_e5m2", 8, 57344.0, mantissa_bits=2, min_exponent=-14)
FP6_E2M3 = Format("fp6_e2m3", 6, 7.5, mantissa_bits=3, min_exponent=0)
FP6_E3M2 = Format("fp6_e3m2", 6, 28.0, mantissa_bits=2, min_exponent=-2)
#: Powers of two, 1 to 64, and zero: LUQ's logarithmic gradients.
FP4_E3M0 = Format("fp4_e3m0", 4, 64.0, mantissa_bits=0, min_exponent=0)
#: The integers −7…7, int4's, for products with a floating format.
FP4_E1M2 = Format("fp4_e1m2", 4, 7.0, mantissa_bits=2, min_exponent=2)
FORMATS = {f.name: f for f in (INT8, INT4, FP8_E4M3, FP8_E5M2, FP6_E2M3, FP6_E3M2, FP4_E3M0, FP4_E1M2)}


@dataclass(frozen=True)
class Rotation(_Constant):
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
class Recipe(_Constant):
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


def halo(level: int, format: Format, granularity: str = "row", rotation: Rotation = Rotation()) -> Recipe:
    """HALO (arXiv 2501.02625): level 0 rotates nothing; level 1 rotates in_features of X and W; level 2 also the tokens of E
    in grad_input. ``granularity`` "tensor" is the paper's, one scale per operand; "row" gives X and E one scale per token and
    W one per output feature, each operand quantised once (see the rule of scales above)."""
    features = rotation if level >= 1 else None
    # A token count is only known at run time and is padded to whole blocks, so "full width" has no meaning there.
    tokens = replace(rotation, block=rotation.block or 128) if level >= 2 else None
    by = (lambda dimension: dimension) if granularity == "row" else (lambda dimension: "tensor")
    x = Operand(format, by("tokens"), in_features=features)
    w = Operand(format, by("out_features"), in_features=features)
    return Recipe(
        output=Product(x, w),
        grad_input=Product(Operand(format, by("tokens"), tokens=tokens), w),
        grad_weight=Product(Operand(format, by("out_features")), x),
    )


def switchback() -> Recipe:
    """SwitchBack (arXiv 2304.13013): int8 with per-token scales for X and E and one for W; grad_weight in high precision."""
    by_token, w = Operand(INT8, "tokens"), Operand(INT8, "tensor")
    return Recipe(output=Product(by_token, w), grad_input=Product(by_token, w))


def _uniformly(operand: Operand) -> Recipe:
    product = Product(operand, operand)
    return Recipe(output=product, grad_input=product, grad_weight=product)


def jetfire() -> Recipe:
    """Jetfire (arXiv 2403.12422), the part that lies in the linear layer: int8 with one scale per 32×32 block."""
    return _uniformly(Operand(INT8, "block"))


def ideal(format: Format) -> Recipe:
    """Bare casts with unit scales: numerically meaningless, the upper bound of any recipe's speed."""
    return _uniformly(Operand(format, "unit"))


def hot(
    rank: int | None = 8,
    block: int = 16,
    *,
    grad_input: Format = INT4,
    grad_weight: Format = INT8,
    scale: str = "tensor",
    granularity: str = "tensor",
    rounding: str = "stochastic",
    seed: int | None = None,
    low_rank_input: str | None = None,
) -> Recipe:
    """HOT (arXiv 2503.21261): a plain forward; int4 grad_input with out_features rotated on both sides, E rounded
    stochastically; int8 grad_weight of the ``rank`` lowest sequencies in each ``block`` of tokens, as which X is saved.

    Args:
        rank: None keeps the whole block, a rotation of the tokens.
        grad_input, grad_weight: the formats of the two products.
        scale: of E in grad_input, "tensor" or "tokens": what HOT chooses layer by layer.
        granularity: of the other operands, "tensor" as published, or "row": along the dimension that survives the product.
        rounding: of E in grad_input.
        seed: of the signs of whole blocks.
        low_rank_input: a low rank of grad_input too, as in the paper's ablation: "internal" on the contracted out_features,
            "external" on the tokens, projected back.
    """
    whole = Rotation(block, seed)
    low = whole if rank is None else Rotation(block, None, rank)
    features = low if low_rank_input == "internal" else None if low_rank_input == "external" else whole
    along = (lambda dimension: dimension) if granularity == "row" else (lambda dimension: "tensor")
    e = Operand(grad_input, scale, low if low_rank_input == "external" else None, out_features=features, rounding=rounding)
    return Recipe(
        grad_input=Product(e, Operand(grad_input, along("in_features"), out_features=features)),
        grad_weight=Product(
            Operand(grad_weight, along("out_features"), tokens=low), Operand(grad_weight, along("in_features"), tokens=low)
        ),
    )


def lbp_wht(rank: int = 8, block: int = 16) -> Recipe:
    """LBP-WHT (arXiv 2309.15275): low-rank tokens in both backward products, projected back in grad_input and contracted in
    grad_weight, in high precision. Its blocks are one-dimensional here, as HOT's; the paper's are of images."""
    tokens = Operand(tokens=Rotation(block, None, rank))
    return Recipe(grad_input=Product(tokens), grad_weight=Product(tokens, tokens))


def luq() -> Recipe:
    """LUQ (arXiv 2112.10769), its backward: E in powers of two, unbiased down to zero, with X and W in int4. The forward stays
    plain, as in HOT's comparison, where LUQ's own is int4 too."""
    e, int4 = Operand(FP4_E3M0, rounding="stochastic"), Operand(FP4_E1M2)
    return Recipe(grad_input=Product(e, int4), grad_weight=Product(e, int4))


#: The methods that are not HALO's, by name; add yours here and ``recipe_config`` finds it.
RECIPES: dict[str, Recipe] = {
    "switchback": switchback(),
    "jetfire": jetfire(),
    "ideal_int8": ideal(INT8),
    "ideal_fp8": ideal(FP8_E4M3),
    "hot": hot(),
    "hot_per_token": hot(scale="tokens"),
    # Usable for LLMs, whose tokens are not redundant: 8 bits, and the whole rank of signed blocks.
    "hot_llm": hot(None, 128, grad_input=INT8, scale="tokens", granularity="row", rounding="nearest", seed=0),
    # HOT's ablations: int4 on grad_weight, a whole Hadamard rotation on both products, grad_input of low rank.
    "hot_int4": hot(grad_weight=INT4),
    "hot_rotated": hot(None),
    "hot_rotated_int4": hot(None, grad_weight=INT4),
    "hot_internal": hot(low_rank_input="internal"),
    "hot_external": hot(low_rank_input="external"),
    "lbp_wht": lbp_wht(),
    "luq": luq(),
}
