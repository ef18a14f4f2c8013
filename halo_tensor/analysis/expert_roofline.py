"""A model of the time that the experts of a mixture take on a GPU. It predicts; it measures nothing.

As in :mod:`halo_tensor.analysis.roofline`, the time is that of the kernels, one after another. The experts share the rows
evenly, since nothing is known of the router: tokens · top_k / experts rows each. The constants are adjusted to the kernels and
the layers of docs/notes/experts.md, measured on one H200, and taken for other GPUs in the same relation to their rates.
"""

from collections.abc import Collection, Iterator
from math import exp
from typing import Any, NamedTuple

from halo_tensor.analysis.ceilings import H100, Ceilings, Pass, time_of
from halo_tensor.analysis.roofline import CODE_BYTES, EPILOGUE_BLOCKS, HP_BYTES, unit_of
from halo_tensor.layers import experts
from halo_tensor.layers.expert_gates import gate_of
from halo_tensor.recipe import PRODUCTS, Recipe
from halo_tensor.reference.experts import TILE
from halo_tensor.reference.hadamard import carried

#: Experts to which a token is routed, if neither the module nor its config says how many. One is the fewest, so that the
#: prediction is the lowest of all possible ones.
TOP_K = 1
#: Matrix unit -> the rate of a grouped product, as a part of a dense one's.
GROUPED = {"bf16": 0.9, "int8": 0.93, "fp8": 1.0}
#: Matrix unit -> by how much waiting for the first operands of a tile prolongs the contraction.
WAITING = {"bf16": 64, "fp8": 128, "int8": 128}
#: Quantisers of halo_tensor/kernels/experts -> their rate, as a part of a copy's.
QUANTIZERS = {
    "gated_rows": 0.55, "gated_grad_rows": 0.5, "group_rows": 0.85, "group_columns": 0.85, "weights": 0.75,
    "turn_stack": 0.9,
}  # fmt: skip
#: Sorting the tokens by expert, in seconds. Both precisions do it.
SORTING = 1e-4
#: Passes over rows [tokens · top_k, d] in bf16 that transformers' ``grouped_mm`` makes in forward and in backward: rows are
#: gathered, weighted, put back in order and added, each of them read and written.
ROUTED = {"forward": 7, "backward": 9}


class ExpertShape(NamedTuple):
    """The sizes of one call of the experts of a layer.

    Attributes:
        tokens: before they are copied to experts.
        top_k: experts of a token.
        experts: their number.
        in_features: of the first product, and out_features of the second.
        up: out_features of the first product.
        down: in_features of the second product: half of ``up`` behind a gate.
        fused: whether the quantisers compute the gate.
        in_features_first: whether the parameters are [experts, in, out], so that they and their gradients are transposed.
    """

    tokens: int
    top_k: int
    experts: int
    in_features: int
    up: int
    down: int
    fused: bool = True
    in_features_first: bool = False

    @property
    def rows(self) -> int:
        """The copies of tokens."""
        return self.tokens * self.top_k

    @property
    def elements(self) -> int:
        """The number of elements of both weights."""
        return self.experts * self.in_features * (self.up + self.down)


def shape_of(module: Any, tokens: int, top_k: int | None = None) -> ExpertShape:
    """Return the shape of one call of a module of experts.

    Args:
        module: see :func:`halo_tensor.layers.experts.is_experts`.
        tokens: of the call.
        top_k: experts of a token; None takes what the module or its config says, or else TOP_K.
    """
    (in_features, up), (down, _) = experts.sides(module)
    top_k = top_k or experts.top_k_of(module) or TOP_K
    gate = module.__dict__.get("_halo_gate") or gate_of(module)
    fused = gate is not None and not getattr(module, "has_post_expert_norm", False)
    return ExpertShape(tokens, top_k, module.num_experts, in_features, up, down, fused, module.is_transposed)


def seconds(
    recipe: Recipe,
    shape: ExpertShape,
    products: Collection[str] = tuple(PRODUCTS),
    *,
    trained: bool = True,
    ceilings: Ceilings = H100,
) -> float:
    """Predict the time of the experts of one layer in one training step, with the sort and the sum over experts.

    Args:
        recipe: of both products of each expert; an empty one stands for transformers' ``grouped_mm`` in bf16.
        shape: the sizes. Experts share the rows evenly.
        products: which of "output", "grad_input" and "grad_weight" are computed.
        trained: True if the weights change in every step, so that they are quantised again.
        ceilings: the rates of the GPU.

    Returns:
        seconds.

    Example:
        >>> from halo_tensor import halo_config
        >>> from halo_tensor.analysis.ceilings import H200
        >>> from halo_tensor.analysis.expert_roofline import ExpertShape, seconds
        >>> from halo_tensor.recipe import Recipe
        >>> qwen3_30b_a3b = ExpertShape(8192, 8, 128, 2048, 1536, 768)
        >>> high, low = (seconds(r, qwen3_30b_a3b, ceilings=H200) for r in (Recipe(), halo_config(1, "int8").recipe))
        >>> 1.1 < high / low < 1.3
        True
    """
    products = tuple(name for name in PRODUCTS if name in products)
    passes = _passes_of_bf16(shape, products) if recipe.is_identity else _passes(recipe, shape, products, trained, ceilings)
    return SORTING + sum(_products(recipe, shape, products, ceilings)) + time_of(passes, ceilings)


def _products(recipe: Recipe, shape: ExpertShape, products: tuple[str, ...], ceilings: Ceilings) -> Iterator[float]:
    """Yield the seconds of each grouped product."""
    unit = unit_of(recipe.output)
    for out_features, in_features, is_first in ((shape.up, shape.in_features, True), (shape.in_features, shape.down, False)):
        undone = _is_undone(recipe, in_features)
        for name in products:
            if name == "output":
                yield _of_rows(shape, out_features, in_features, unit, False, ceilings)
            elif name == "grad_weight":
                yield _along_tokens(shape, out_features, in_features, unit, undone, ceilings)
        # The gradient between the products is computed for anything that comes before.
        if set(products) & ({"grad_input"} if is_first else {"grad_input", "grad_weight"}):
            yield _of_rows(shape, in_features, out_features, unit, undone, ceilings)


def _is_undone(recipe: Recipe, width: int) -> bool:
    rotation = carried(recipe.output.right, "in_features", width)
    return rotation is not None and rotation.edge in EPILOGUE_BLOCKS


def _padded(rows: float) -> float:
    """Return the rows of the tiles of an expert with about so many ``rows``, on average."""
    return rows + TILE / 2 if rows >= TILE / 2 else TILE * (1 - exp(-rows))


def _of_rows(shape: ExpertShape, n: int, k: int, unit: str, undone: bool, ceilings: Ceilings) -> float:
    """Return the time of a product [rows, k] · [experts, k, n]."""
    rows, size = shape.rows / shape.experts, HP_BYTES if unit == "bf16" else CODE_BYTES
    rate = _rate(unit, undone, ceilings)
    compute = 2 * shape.experts * _padded(rows) * n * (k + WAITING[unit]) / rate
    read = (shape.rows * k + shape.experts * min(rows, 1) * n * k) * size / ceilings.copy
    return ceilings.launch + max(compute, read) + HP_BYTES * shape.rows * n / ceilings.copy


def _along_tokens(shape: ExpertShape, m: int, n: int, unit: str, undone: bool, ceilings: Ceilings) -> float:
    """Return the time of a product [m, rows] · [rows, n] for each expert. Groups of codes begin at a tile."""
    rows = shape.rows / shape.experts
    k = rows if unit == "bf16" else _padded(rows)
    compute = 2 * shape.experts * m * n * (k + WAITING[unit]) / _rate(unit, undone, ceilings)
    return ceilings.launch + compute + HP_BYTES * shape.experts * m * n / ceilings.copy


def _rate(unit: str, undone: bool, ceilings: Ceilings) -> float:
    return ceilings.products[unit] * GROUPED[unit] * (ceilings.undo[unit] if undone else 1)


def _passes_of_bf16(shape: ExpertShape, products: tuple[str, ...]) -> Iterator[Pass]:
    backward = len(products) > 1
    routed = ROUTED["forward"] + backward * ROUTED["backward"]
    yield from [Pass(HP_BYTES * shape.rows * shape.in_features, "copy")] * routed
    yield from _gate(shape, backward)


def _gate(shape: ExpertShape, backward: bool) -> Iterator[Pass]:
    """Return the passes of a gate that is computed by itself, in high precision."""
    yield Pass(HP_BYTES * shape.rows * (shape.up + shape.down), "copy")
    if backward:
        yield Pass(HP_BYTES * shape.rows * (2 * shape.up + shape.down), "copy")


def _passes(
    recipe: Recipe, shape: ExpertShape, products: tuple[str, ...], trained: bool, ceilings: Ceilings
) -> Iterator[Pass]:
    """Return the kernels of halo_tensor/products/experts.py beside its products."""
    rows, d, up, down = shape.rows, shape.in_features, shape.up, shape.down
    of_tokens = recipe.grad_input.left.tokens is not None
    fused, backward = shape.fused and not of_tokens, len(products) > 1
    rate = "quantize" if recipe.output.left.in_features is None else "rotate"

    yield Pass((HP_BYTES + CODE_BYTES) * shape.tokens * d, rate)  # X, once per token
    yield Pass(2 * CODE_BYTES * rows * d, "copy")  # rows of codes, for their experts
    if fused:
        yield quantizer("gated_rows", HP_BYTES * rows * up + CODE_BYTES * rows * down)
    else:
        yield from _gate(shape, backward)
        yield Pass((HP_BYTES + CODE_BYTES) * rows * down, rate)
        yield from [Pass(HP_BYTES * rows * d, "copy")] * (2 + 3 * backward)  # the routing weights
    yield Pass(HP_BYTES * (rows + shape.tokens) * d, "copy")  # the sum over experts
    if backward:
        yield quantizer("group_rows", (HP_BYTES + CODE_BYTES) * rows * d)
        kept = HP_BYTES * rows * up if fused and "grad_weight" in products else 0  # the gradient, for its columns
        read = HP_BYTES * rows * (up + down) if fused else HP_BYTES * rows * up
        yield quantizer("gated_grad_rows" if fused else "group_rows", read + CODE_BYTES * rows * up + kept)
        if "grad_input" in products:
            yield Pass(HP_BYTES * (rows + shape.tokens) * d, "copy")
        if of_tokens:  # rows of float32 are gathered, multiplied and rotated, and the result is un-rotated and put back
            yield from [Pass(24 * rows * (d + up) + 6 * HP_BYTES * rows * (d + down), "copy")]
    if "grad_weight" in products:
        yield from [quantizer("group_columns", (2 * HP_BYTES + CODE_BYTES) * rows * width) for width in (d, up)]
        yield Pass(2 * CODE_BYTES * rows * (d + down), "copy")  # codes of both inputs, transposed
        if shape.in_features_first:
            yield quantizer("turn_stack", 2 * HP_BYTES * shape.elements)
    yield from _passes_of_weights(recipe, shape, backward, trained, rate)


def quantizer(name: str, moved: float) -> Pass:
    """Return a kernel of QUANTIZERS that reads and writes so many bytes."""
    return Pass(moved / QUANTIZERS[name], "copy")


def _passes_of_weights(recipe: Recipe, shape: ExpertShape, backward: bool, trained: bool, rate: str) -> Iterator[Pass]:
    """Return the kernels that make codes: of weights that train in both orders, of frozen ones in that of backward."""
    format = recipe.output.right.format
    assert format is not None
    if trained:
        if shape.in_features_first:
            yield quantizer("turn_stack", 2 * HP_BYTES * shape.elements)
        moved = (HP_BYTES + CODE_BYTES) * shape.elements
        yield quantizer("weights", moved) if rate == "rotate" else Pass(moved, rate)
    elif format.bits < 8:
        yield from [Pass((format.bits / 8 + CODE_BYTES) * shape.elements, "copy")] * (1 + backward)
    if backward:
        yield Pass(2 * CODE_BYTES * shape.elements, "copy")
