"""Training methods as recipes: HALO, HOT and the methods that they are compared with. Add a method here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from halo_tensor.recipe.formats import E8M0, FP4_E1M2, FP4_E2M1, FP4_E3M0, FP8_E4M3, INT4, INT8, Format
from halo_tensor.recipe.language import PRODUCTS, E, Operand, Product, Recipe, Rotation, W
from halo_tensor.recipe.scales import TENSOR, UNIT, Scales

HADAMARD_128 = Rotation()
HADAMARD_16 = Rotation(16)


def halo(level: int, format: Format, granularity: str = "row", rotation: Rotation = HADAMARD_128) -> Recipe:
    """HALO (arXiv 2501.02625).

    Args:
        level: 0 rotates nothing; 1 rotates in_features of X and W; 2 also rotates the tokens of E in grad_input.
        format: of all operands.
        granularity: "tensor", the paper's one scale for each operand; or "row", one scale for each token of X and E and for
            each output feature of W, so that X and W are quantised once (see the rule of scales in
            :mod:`~halo_tensor.recipe.language`).
        rotation: of the rotated dimensions.
    """
    features = rotation if level >= 1 else None
    # The number of tokens is only known at run time and is padded to whole blocks, so there is no full width.
    tokens = replace(rotation, block=rotation.block or 128) if level >= 2 else None
    per = _per_index if granularity == "row" else _per_tensor
    x = Operand(format, per("tokens"), in_features=features)
    w = Operand(format, per("out_features"), in_features=features)
    return Recipe(
        output=Product(x, w),
        grad_input=Product(Operand(format, per("tokens"), tokens=tokens), w),
        grad_weight=Product(Operand(format, per("out_features")), x),
    )


def switchback() -> Recipe:
    """SwitchBack (arXiv 2304.13013): int8 with one scale for each token of X and E and one for W; grad_weight in high
    precision."""
    by_token, w = Operand(INT8, Scales.per(tokens=1)), Operand(INT8)
    return Recipe(output=Product(by_token, w), grad_input=Product(by_token, w))


def jetfire() -> Recipe:
    """Jetfire (arXiv 2403.12422), its linear layer: int8 with one scale for each 32×32 block."""
    return _uniformly(Operand(INT8, Scales.per(rows=32, columns=32)))


def ideal(format: Format) -> Recipe:
    """Bare casts without scales. Their results are meaningless; their speed is an upper bound for all recipes."""
    return _uniformly(Operand(format, UNIT))


def hot(
    rank: int | None = 8,
    block: int = 16,
    *,
    grad_input: Format = INT4,
    grad_weight: Format = INT8,
    saved: Format | None = None,
    scale: str = "tensor",
    granularity: str = "tensor",
    rounding: str = "stochastic",
    seed: int | None = None,
    low_rank_input: str | None = None,
    quantized_convolutions: str = "none",
) -> Recipe:
    """HOT (arXiv 2503.21261): a plain forward; int4 grad_input with out_features rotated on both sides and E rounded
    stochastically; int8 grad_weight of the ``rank`` lowest sequencies in each ``block`` of tokens, which is also what is saved
    of X.

    Args:
        rank: how many sequencies of a block are kept; None for all, a rotation of the tokens.
        block: the edge of the rotations' blocks.
        grad_input, grad_weight: the formats of the two products.
        saved: the format of X in grad_weight, which is what forward saves, with a scale for each in_feature; None for
            that of ``grad_weight``.
        scale: the granularity of E in grad_input, "tensor" or "tokens": HOT chooses one for each layer.
        granularity: of the other operands: "tensor" as published, or "row", along the dimension that the product keeps.
        rounding: of E in grad_input.
        seed: of the signs of whole blocks.
        low_rank_input: use the rank in grad_input too, as in the paper's ablation: "internal" on the contracted out_features,
            "external" on the tokens, projected back.
        quantized_convolutions: "none", "pointwise" or, as published, "all"; see :class:`Recipe`.
    """
    whole = Rotation(block, seed)
    low = whole if rank is None else Rotation(block, None, rank)
    features = low if low_rank_input == "internal" else None if low_rank_input == "external" else whole
    tokens = low if low_rank_input == "external" else None
    per = _per_index if granularity == "row" else _per_tensor
    e = Operand(grad_input, Scales.of(scale), tokens, out_features=features, rounding=rounding)
    of_x = (grad_weight, per("in_features")) if saved is None else (saved, _per_index("in_features"))
    return Recipe(
        grad_input=Product(e, Operand(grad_input, per("in_features"), out_features=features)),
        grad_weight=Product(Operand(grad_weight, per("out_features"), tokens=low), Operand(*of_x, tokens=low)),
        quantized_convolutions=quantized_convolutions,
    )


def lbp_wht(rank: int = 8, block: int = 16) -> Recipe:
    """LBP-WHT (arXiv 2309.15275): tokens of low rank in both backward products, projected back in grad_input and contracted
    in grad_weight, in high precision. Its blocks are one-dimensional here, as HOT's are; the paper's are of images."""
    tokens = Operand(tokens=Rotation(block, None, rank))
    return Recipe(grad_input=Product(tokens), grad_weight=Product(tokens, tokens))


def luq() -> Recipe:
    """LUQ (arXiv 2112.10769), its backward: E in powers of two, rounded without bias down to zero, with X and W in int4. The
    forward stays plain, as in HOT's comparison; LUQ's own forward is int4 too."""
    e, int4 = Operand(FP4_E3M0, rounding="stochastic"), Operand(FP4_E1M2)
    return Recipe(grad_input=Product(e, int4), grad_weight=Product(e, int4))


def mxfp8(rotation: Rotation | None = None) -> Recipe:
    """MXFP8 as arXiv 2506.08027 and Transformer Engine train with it: E4M3 for all operands, each quantised along the
    contracted dimension of its product in blocks of 1×32, with E8M0 scales that are rounded up. X, W and E are quantised twice
    each. No kernel: for accuracy studies.

    Args:
        rotation: of in_features of X and W, as in HALO's level 1; None for none.
    """

    def operand(product: str, dims: tuple[str, str]) -> Operand:
        granularity = _along_contraction(product, dims, 32, E8M0)
        return Operand(FP8_E4M3, granularity, in_features=None if dims == E else rotation)

    return _each_operand(operand)


def nvfp4(plain: bool = False) -> Recipe:
    """NVFP4 as arXiv 2509.25149 and Transformer Engine train with it: E2M1 for all operands, with E4M3 scales and one float32
    for each tensor. X and E are quantised along the contracted dimension in blocks of 1×16, and W in blocks of 16×16, once for
    both of its products. E is rounded stochastically. Both operands of grad_weight carry a rotation of the tokens in blocks of
    16. The paper keeps some layers in high precision; pass ``filter_fn`` to ``quantize_`` for that. No kernel: for accuracy
    studies.

    Args:
        plain: use 1×16 blocks for W too, round all operands to nearest, and rotate nothing.
    """

    def operand(product: str, dims: tuple[str, str]) -> Operand:
        granularity = _along_contraction(product, dims, 16, FP8_E4M3, two_levels=True)
        if plain:
            return Operand(FP4_E2M1, granularity)
        if dims == W:
            return Operand(FP4_E2M1, Scales.per(FP8_E4M3, two_levels=True, rows=16, columns=16))
        tokens = HADAMARD_16 if product == "grad_weight" else None
        return Operand(FP4_E2M1, granularity, tokens, rounding="stochastic" if dims == E else "nearest")

    return _each_operand(operand)


def _per_index(dimension: str) -> Scales:
    return Scales.of(dimension)


def _per_tensor(dimension: str) -> Scales:
    return TENSOR


def _along_contraction(product: str, dims: tuple[str, str], length: int, dtype: Format, two_levels: bool = False) -> Scales:
    """Return the layout with blocks of 1×``length`` along the contracted dimension, of an operand over ``dims``."""
    block: dict[str, Any] = {dimension: length if dimension == PRODUCTS[product][2] else 1 for dimension in dims}
    return Scales.per(dtype, two_levels, **block)


def _uniformly(operand: Operand) -> Recipe:
    return _each_operand(lambda product, dims: operand)


def _each_operand(operand: Callable[[str, tuple[str, str]], Operand]) -> Recipe:
    """Return the recipe of which ``operand(product, dims)`` gives each operand."""
    products: dict[str, Any] = {
        name: Product(operand(name, left), operand(name, right)) for name, (left, right, _) in PRODUCTS.items()
    }
    return Recipe(**products)


#: The methods besides HALO, by name. ``recipe_config(name)`` finds those that you add here.
RECIPES: dict[str, Recipe] = {
    "switchback": switchback(),
    "jetfire": jetfire(),
    "ideal_int8": ideal(INT8),
    "ideal_fp8": ideal(FP8_E4M3),
    "hot": hot(),
    "hot_per_token": hot(scale="tokens"),
    # Usable for LLMs, whose tokens are not redundant: 8 bits, and the whole rank of signed blocks.
    "hot_llm": hot(None, 128, grad_input=INT8, scale="tokens", granularity="row", rounding="nearest", seed=0),
    # HOT's ablations: int4 in grad_weight, a whole Hadamard rotation in both products, grad_input of low rank.
    "hot_int4": hot(grad_weight=INT4),
    "hot_rotated": hot(None),
    "hot_rotated_int4": hot(None, grad_weight=INT4),
    "hot_internal": hot(low_rank_input="internal"),
    "hot_external": hot(low_rank_input="external"),
    "lbp_wht": lbp_wht(),
    "luq": luq(),
    # No kernel: these run on a CPU, for accuracy studies. On a CUDA device they raise an error.
    "mxfp8": mxfp8(),
    "mxfp8_halo1": mxfp8(HADAMARD_128),
    "nvfp4": nvfp4(),
    "nvfp4_plain": nvfp4(plain=True),
}
