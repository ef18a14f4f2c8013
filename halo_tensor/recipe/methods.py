"""Methods of training as recipes: HALO, HOT and those that they are compared with. Add a method here."""

from dataclasses import replace

from halo_tensor.recipe.formats import FP4_E1M2, FP4_E3M0, FP8_E4M3, INT4, INT8, Format
from halo_tensor.recipe.language import Operand, Product, Recipe, Rotation

HADAMARD_128 = Rotation()


def halo(level: int, format: Format, granularity: str = "row", rotation: Rotation = HADAMARD_128) -> Recipe:
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
