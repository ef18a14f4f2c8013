"""A model of the time that the products of a linear layer take on a GPU. It predicts; it measures nothing.

The time of a layer is the sum of its three products and of the passes that rotate and quantise. A product takes as long as its
matrix unit or the memory needs, whichever is longer. :class:`Ceilings` holds the rates: measured for an H100, published by
NVIDIA for other GPUs (:mod:`halo_tensor.analysis.gpus`). The model assumes that nothing overlaps and that launches are free,
as in CUDA graphs. Small layers are slower than it predicts.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from halo_tensor.config import LinearConfig
from halo_tensor.recipe import PRODUCTS, E, Operand, Product, Recipe, W, X

AnyConfig = TypeVar("AnyConfig", bound=LinearConfig)

HP_BYTES = 2  # a bf16 element
CODE_BYTES = 1  # a code as a matrix unit reads it, in every format
DENSE_BLOCK = 256  # a rotation with a larger block is computed in two passes
SQUARE = {"tokens": 8192, "in_features": 4096, "out_features": 4096}  # the layer whose time orders recipes


@dataclass(frozen=True)
class Ceilings:
    """The rates that one GPU reaches.

    Attributes:
        name: the GPU.
        products: matrix unit ("bf16", "int8" or "fp8") -> operations/s of a large product; a multiply-accumulate is two
            operations. Units that the GPU lacks are absent.
        undo: matrix unit -> the fraction of that rate that is left when the product also undoes one rotation of its result.
        copy: bytes/s of a copy, read and written bytes together.
        quantize: bytes/s of a pass that quantises.
        rotate: bytes/s of a pass that rotates in blocks of at most 256 and quantises.
        rotate_wide: bytes/s of a pass that rotates in larger blocks and quantises.
        source: where the numbers come from.
        notes: sentences that a reader of a prediction should know.
    """

    name: str
    products: dict[str, float]
    undo: dict[str, float]
    copy: float
    quantize: float
    rotate: float
    rotate_wide: float
    source: str
    notes: tuple[str, ...] = ()
    launch: float = 0.0
    multiprocessors: int = 1
    measured: bool = False

    @property
    def a_name(self) -> str:
        """The name with "a" or "an" before it."""
        return f"{'an' if self.name[:1] in tuple('AEFHILMNORSX8') else 'a'} {self.name}"


#: Medians over bench/results/gemm.json and rotation.json ("both layouts"). A test recomputes them.
H100 = Ceilings(
    name="H100 80GB HBM3",
    products={"bf16": 716e12, "int8": 1377e12, "fp8": 1315e12},
    undo={"bf16": 1.0, "int8": 0.98, "fp8": 0.97},
    copy=2.96e12,
    quantize=2.34e12,
    rotate=2.16e12,
    rotate_wide=0.75e12,
    source="medians of bench/gemm.py and bench/rotation.py, 2026-11-22 and 23, torch 2.11.0+cu130, Triton 3.6.0",
)


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
    time = sum(_product(recipe, name, sizes, ceilings) for name in products)
    for dims in (X, W, E):
        layouts: dict[Operand, set[str]] = {}
        for name in products:
            if dims in PRODUCTS[name][:2] and not (operand := recipe.operand(name, dims)).is_plain:
                layouts.setdefault(operand, set()).add(PRODUCTS[name][2])
        elements = sizes[dims[0]] * sizes[dims[1]]
        for operand, contracted in layouts.items():
            if dims == W and not trained:
                time += (len(contracted) - 1) * 2 * CODE_BYTES * elements / ceilings.copy
            else:
                once = elements * (HP_BYTES + len(contracted) * CODE_BYTES) / _quantizing_rate(operand, ceilings)
                time += once / sharing if dims == X else once
    return time


def seconds_of(recipe, shape, products=tuple(PRODUCTS), *, trained=True, ceilings=H100) -> float:
    sizes = {"tokens": shape.tokens, "in_features": shape.in_features, "out_features": shape.out_features}
    return shape.groups * seconds(recipe, sizes, products, trained=trained, ceilings=ceilings)


def lacking(recipe: Recipe, ceilings: Ceilings) -> set[str]:
    """Return the matrix units that a recipe needs and a GPU lacks."""
    return _units(recipe) - ceilings.products.keys()


def gains(recipe: Recipe, ceilings: Ceilings) -> bool:
    """Whether every quantised product of the recipe runs on a unit that is faster than bf16 on this GPU."""
    rates = ceilings.products
    return all(unit == "bf16" or rates.get(unit, 0) > rates["bf16"] for unit in _units(recipe))


def fastest_first(configs: Iterable[AnyConfig], ceilings: Ceilings) -> list[AnyConfig]:
    """Return the configs that :func:`gains` accepts, ordered by the predicted time of one square layer."""
    able = [config for config in configs if gains(config.recipe, ceilings)]
    return sorted(able, key=lambda config: seconds(config.recipe, SQUARE, ceilings=ceilings))


def _units(recipe: Recipe) -> set[str]:
    return {_unit(getattr(recipe, name)) for name in PRODUCTS}


def _unit(sides: Product) -> str:
    """Return the matrix unit of a product. Codes with block scales have no kernel and are multiplied in high precision."""
    format = sides.left.format
    return "bf16" if format is None or sides.left.granularity.is_blocked else "int8" if format.uniform else "fp8"


def _product(recipe: Recipe, name: str, sizes: dict[str, int], ceilings: Ceilings) -> float:
    sides, (left, right, contracted) = getattr(recipe, name), PRODUCTS[name]
    unit = _unit(sides)
    survivors = [dim for dims in (left, right) for dim in dims if dim != contracted]
    undone = sum(side.rotation(dim) is not None for side, dim in zip((sides.left, sides.right), survivors, strict=True))
    m, n = (sizes[dim] for dim in survivors)
    k = sizes[contracted]
    compute = 2 * m * n * k / (ceilings.products[unit] * ceilings.undo[unit] ** undone)
    read = (m + n) * k * (HP_BYTES if unit == "bf16" else CODE_BYTES)
    return max(compute, (read + m * n * HP_BYTES) / ceilings.copy)


def _quantizing_rate(operand: Operand, ceilings: Ceilings) -> float:
    rotations = [r for r in (operand.tokens, operand.in_features, operand.out_features) if r is not None]
    if any(r.block is None or r.block > DENSE_BLOCK for r in rotations):
        return ceilings.rotate_wide
    return ceilings.rotate if rotations else ceilings.quantize
