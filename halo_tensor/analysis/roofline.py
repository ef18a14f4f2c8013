"""A model of the time that the products of a linear layer take on a GPU. It predicts; it measures nothing.

The time of a layer is that of its kernels, one after another: three products, and the passes that rotate and quantise. A pass
takes the time of its memory traffic. A product takes the time of its matrix unit on the multiprocessors that have a tile, and
that of writing its result. Each kernel takes :attr:`Ceilings.launch` besides. Launches cost the CPU nothing, as in CUDA
graphs, and nothing overlaps. :mod:`halo_tensor.analysis.ceilings` has the rates.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from math import ceil, prod
from typing import TypeVar

from halo_tensor.analysis.ceilings import H100, Ceilings, Pass, time_of
from halo_tensor.analysis.cost import Shape, saved_bytes
from halo_tensor.config import LinearConfig
from halo_tensor.products.steps import Both, Dims, Step, as_both, as_pair, folded_products, holds_for_grad_input, steps_for
from halo_tensor.recipe import PRODUCTS, TENSOR, E, Operand, Product, Recipe, Rotation, W, X
from halo_tensor.reference.hadamard import carried
from halo_tensor.reference.ops import rotated

AnyConfig = TypeVar("AnyConfig", bound=LinearConfig)

HP_BYTES = 2  # a bf16 element
CODE_BYTES = 1  # a code as a matrix unit reads it, in every format
TILE = 128  # the edge of the tiles of kernels over tiles; wider blocks than half of it take whole ones
DENSE_BLOCK = 256  # a rotation with a larger block is computed in two passes
EPILOGUE_BLOCKS = (16, 32, 64, 128)  # rotations that a product undoes itself
TYPICAL = {"tokens": 8192, "in_features": 4096, "out_features": 14336}  # the layer whose time orders recipes
#: Passes over the quantised windows of a convolution larger than 1×1, each of a bf16 element read or written: they are
#: unfolded, transposed and quantised, and a gradient of them is written, transposed and folded
#: (halo_tensor/products/conv2d.py).
WINDOW_PASSES = {"grad_weight": 3, "grad_input": 4}
#: Matrix unit -> the part of writing a result that does not overlap with multiplying.
EXPOSED = {"bf16": 0.0, "fp8": 0.3, "int8": 1.0}
#: Matrix unit -> by how much waiting for the first operands of a tile prolongs the contraction.
WAITING = {"bf16": 0, "fp8": 0, "int8": 128}
LEAST_BUSY = 1 / 3  # of the multiprocessors, by a product in bf16 that is cut along its contraction


def seconds(
    recipe: Recipe,
    sizes: dict[str, int],
    products: Collection[str] = tuple(PRODUCTS),
    *,
    trained: bool = True,
    sharing: int = 1,
    ceilings: Ceilings = H100,
) -> float:
    """Predict the time of one linear layer in one training step.

    Args:
        recipe: the recipe of the layer.
        sizes: "tokens", "in_features" and "out_features" -> size.
        products: the products that are computed.
        trained: True if the weight changes in every step, so that it is quantised again. Codes of a frozen weight exist in one
            layout, and are copied to another one if a product needs it.
        sharing: how many layers read the same X. It is quantised once for all of them.
        ceilings: the rates of the GPU.

    Returns:
        seconds.
    """
    products = tuple(name for name in PRODUCTS if name in products)
    time = sum(_product(recipe, name, sizes, ceilings) for name in products)
    for dims in (X, W, E):
        once = time_of(_passes(recipe, dims, sizes, products, trained), ceilings)
        time += once / sharing if dims == X else once
    return time


def seconds_of(
    recipe: Recipe,
    shape: Shape,
    products: Collection[str] = tuple(PRODUCTS),
    *,
    trained: bool = True,
    sharing: int = 1,
    ceilings: Ceilings = H100,
) -> float:
    """Predict the time of a linear layer or a convolution in one training step.

    Args:
        recipe: the recipe of the layer.
        shape: the sizes of its products.
        products, trained, sharing, ceilings: as for :func:`seconds`.

    Returns:
        seconds.
    """
    sizes = shape.sizes
    quantized = recipe.quantizes_convolution(pointwise=not shape.is_windowed) or not shape.is_convolution
    if recipe.is_identity or (quantized and not shape.is_windowed):
        return shape.groups * seconds(recipe, sizes, products, trained=trained, sharing=sharing, ceilings=ceilings)
    followed = _whole_rank(recipe.of_convolution(pointwise=not shape.is_windowed))
    time = seconds(followed, sizes, products, trained=trained, ceilings=ceilings)
    passes = []
    if quantized:
        count = sum(WINDOW_PASSES.get(name, 0) for name in products)
        passes += [Pass(HP_BYTES * shape.tokens * shape.in_features, "copy")] * count
    if "grad_weight" in products:  # X is compressed in the forward, and decompressed in the backward
        kept = sizes | {"tokens": shape.saved[0], "in_features": shape.saved[1]}
        passes += _passes(recipe, X, kept, ("grad_weight",), trained)
        read = saved_bytes(recipe, replace(shape, groups=1), 8 * HP_BYTES)
        passes += [Pass(read + HP_BYTES * shape.saved[0] * shape.saved[1], "rotate")]
    return shape.groups * (time + time_of(passes, ceilings))


def lacking(recipe: Recipe, ceilings: Ceilings) -> set[str]:
    """Return the matrix units that a recipe needs and a GPU lacks."""
    return _units(recipe) - ceilings.products.keys()


def gains(recipe: Recipe, ceilings: Ceilings) -> bool:
    """Whether every quantised product of the recipe runs on a unit that is faster than bf16 on this GPU."""
    rates = ceilings.products
    return all(unit == "bf16" or rates.get(unit, 0) > rates["bf16"] for unit in _units(recipe))


def fastest_first(configs: Iterable[AnyConfig], ceilings: Ceilings) -> list[AnyConfig]:
    """Return the configs that :func:`gains` accepts, ordered by the predicted time of one layer of a large model."""
    able = [config for config in configs if gains(config.recipe, ceilings)]
    return sorted(able, key=lambda config: seconds(config.recipe, TYPICAL, ceilings=ceilings))


def _units(recipe: Recipe) -> set[str]:
    return {unit_of(getattr(recipe, name)) for name in PRODUCTS}


def unit_of(sides: Product) -> str:
    """Return the matrix unit of a product. Codes with block scales have no kernel and are multiplied in high precision."""
    format = sides.left.format
    return "bf16" if format is None or sides.left.granularity.is_blocked else "int8" if format.uniform else "fp8"


FILL = Pass(0, "copy")  # zeros, which the largest magnitudes are compared with
ONE_NUMBER = 3  # times FILL: programs that raise the same number wait for each other


def _passes(recipe: Recipe, dims: Dims, sizes: dict[str, int], products: tuple[str, ...], trained: bool) -> Iterator[Pass]:
    """Return the kernels that rotate and quantise X, W or E, as halo_tensor/kernels/quantize/plan.py launches them."""
    wanted = tuple(name for name in products if dims in PRODUCTS[name][:2])
    steps = steps_for(recipe, dims, wanted, folded_products(recipe, wanted) if dims == E else ())
    elements = sizes[dims[0]] * sizes[dims[1]]
    if pair := as_pair(dims, steps):
        rate = "tiles" if pair.tokens is None else "rotate_pair"
        yield from (FILL, Pass(HP_BYTES * elements, rate), Pass((HP_BYTES + 2 * CODE_BYTES) * elements, rate))
        return
    if both := as_both(dims, steps):
        yield from _passes_of_both(both, dims, sizes)
        return
    for step in steps:
        if dims == W and not trained and "output" in step.products:  # its codes exist, in the layout of output
            if len(step.contracted) > 1:
                yield Pass(2 * CODE_BYTES * elements, "copy")
        elif dims == W and not trained and holds_for_grad_input(recipe):
            continue  # its codes exist, in the layout of grad_input
        elif not step.operand.is_plain:
            yield from _passes_of(step, dims, sizes)


def _passes_of_both(both: Both, dims: Dims, sizes: dict[str, int]) -> Iterator[Pass]:
    """Return the kernels of halo_tensor/kernels/quantize/two_operands.py, which quantise E for both products."""
    elements, codes = sizes[dims[0]] * sizes[dims[1]], 0
    for operand in both:
        codes += prod(rotated(sizes[dimension], carried(operand, dimension, sizes[dimension])) for dimension in dims)
    yield from (FILL,) * (ONE_NUMBER if any(not operand.granularity.block for operand in both) else 1)
    rotations = [carried(operand, dimension, sizes[dimension]) for operand in both for dimension in dims]
    rate = _wide(rotations, "rotate_both")
    yield Pass(HP_BYTES * elements, rate)
    yield Pass(HP_BYTES * elements + CODE_BYTES * codes, rate if both.grad_input.rounding == "nearest" else "noisy")


def _passes_of(step: Step, dims: Dims, sizes: dict[str, int]) -> Iterator[Pass]:
    """Return the kernels of one quantisation."""
    operand, elements = step.operand, sizes[dims[0]] * sizes[dims[1]]
    rotations = [carried(operand, dimension, sizes[dimension]) for dimension in dims]
    kept = 1
    for dimension, rotation in zip(dims, rotations, strict=True):
        kept *= rotated(sizes[dimension], rotation)
    codes = CODE_BYTES * kept
    if operand.format is None:
        yield Pass(HP_BYTES * (elements + kept), _rate(rotations, "rotate"))
        return
    low = any(rotation is not None and rotation.rank is not None for rotation in rotations)
    if operand.granularity.is_per(dims[0]) and rotations[0] is None and not low and operand.rounding == "nearest":
        usual = "tiles" if step.folded else "quantize"
        yield Pass(HP_BYTES * elements + codes, _rate(rotations, "rotate") if any(rotations) else usual)
    else:
        rate = _rate(rotations, "tiles")
        if _rotates_rows(step, dims, rotations):
            rate = _wide(rotations, "rotate_rows")
        if operand.granularity.dtype is not None:
            yield from (FILL,) * (1 if operand.granularity.block else ONE_NUMBER)
            yield Pass(HP_BYTES * elements, rate)
        yield Pass(HP_BYTES * elements + codes, rate if operand.rounding == "nearest" else "noisy")
        if len(step.contracted) < 2:
            return  # tiles are stored in the layout that is wanted
    if dims[0] in step.contracted:
        yield Pass(2 * codes, "copy")  # the transpose


def _rotates_rows(step: Step, dims: Dims, rotations: list[Rotation | None]) -> bool:
    """Whether a quantisation takes the kernels of two_operands.py with one operand."""
    rows, columns = rotations
    known = step.operand.granularity == TENSOR or step.operand.granularity.is_per(dims[1])
    fits = rows is not None and columns is None and TILE % rows.edge == 0
    return fits and known and step.contracted == {dims[0]} and not step.folded and step.operand.rounding == "nearest"


def _wide(rotations: Iterable[Rotation | None], usual: str) -> str:
    return f"{usual}_wide" if any(r is not None and r.edge > TILE // 2 for r in rotations) else usual


def _rate(rotations: Iterable[Rotation | None], usual: str) -> str:
    return "rotate_wide" if any(r is not None and r.edge > DENSE_BLOCK for r in rotations) else usual


def _product(recipe: Recipe, name: str, sizes: dict[str, int], ceilings: Ceilings) -> float:
    """Return the time of a product, and of the passes that undo what its epilogue does not."""
    sides, (left, right, contracted) = getattr(recipe, name), PRODUCTS[name]
    unit = unit_of(sides)
    carries = [
        (sizes[d], carried(side, d, sizes[d]))
        for side, dims in ((sides.left, left), (sides.right, right))
        for d in dims
        if d != contracted
    ]
    m, n = (rotated(*width) for width in carries)
    k = rotated(sizes[contracted], carried(sides.left, contracted, sizes[contracted]))
    undone, passes = 0, []
    for axis, (_, rotation) in enumerate(carries):
        if rotation is not None and axis == 1 and rotation.rank is None and rotation.edge in EPILOGUE_BLOCKS:
            undone += 1
        elif rotation is not None:
            passes.append(Pass(HP_BYTES * (m * n + carries[0][0] * carries[1][0]), _rate([rotation], "rotate")))
    busy = _busy(unit, m, n, ceilings.multiprocessors)
    compute = 2 * m * n * (k + WAITING[unit]) / (ceilings.products[unit] * ceilings.undo[unit] ** undone * busy)
    read = (m + n) * k * (HP_BYTES if unit == "bf16" else CODE_BYTES)
    write = EXPOSED[unit] * m * n * HP_BYTES / ceilings.copy
    return ceilings.launch + max(compute, read / ceilings.copy) + write + time_of(passes, ceilings)


def _busy(unit: str, m: int, n: int, multiprocessors: int) -> float:
    """Return the part of the multiprocessors that work on a result [m, n], on the mean over the time of the product.

    The tiles are those of halo_tensor/kernels/matmul/tma.py. In bf16 the vendor's library chooses among many tiles, and cuts a
    long contraction into parts.
    """
    if unit == "bf16":
        return max(min(1.0, ceil(m / 64) * ceil(n / 96) / multiprocessors), LEAST_BUSY)
    wide, square, small = (ceil(m / rows) * ceil(n / columns) for rows, columns in ((128, 256), (128, 128), (64, 128)))
    tiles, slots = small, 2 * multiprocessors  # of which two share a multiprocessor
    if wide >= 0.7 * multiprocessors:
        tiles, slots = wide, multiprocessors
    elif square >= multiprocessors:
        tiles = square
    return tiles / (ceil(tiles / slots) * slots)


def _whole_rank(recipe: Recipe) -> Recipe:
    """Return the recipe with all sequencies of tokens in grad_weight, as a convolution larger than 1×1 multiplies them."""

    def whole(operand: Operand) -> Operand:
        return operand if operand.tokens is None else replace(operand, tokens=replace(operand.tokens, rank=None))

    return replace(recipe, grad_weight=Product(whole(recipe.grad_weight.left), whole(recipe.grad_weight.right)))
