"""How long the products of a linear layer would take on a GPU: a model, not a measurement.

It adds up the three products, each at the rate of its matrix unit or of memory, whichever takes longer, and the passes that
rotate and quantise, at the rates of :class:`Ceilings`: measured for an H100, published for others (``diagnostics/gpus.py``).
Nothing overlaps and launches are free, as in CUDA graphs, so small layers are slower than this says.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from halo_tensor.config import LinearConfig
from halo_tensor.recipe import PRODUCTS, E, Operand, Product, Recipe, W, X

AnyConfig = TypeVar("AnyConfig", bound=LinearConfig)

HP_BYTES, CODE_BYTES = 2, 1  # of an element in bf16, and of a code that a matrix unit reads, whatever its format
DENSE_BLOCK = 256  # a wider rotation takes two passes of factors
SQUARE = {"tokens": 8192, "in_features": 4096, "out_features": 4096}  # the layer that recipes are ordered by


@dataclass(frozen=True)
class Ceilings:
    """What one GPU gives.

    Attributes:
        products: "bf16", "int8", "fp8" -> operations/s of a large product, two per multiply-accumulate. A unit that the GPU
            lacks is not there.
        undo: the same -> the part of that rate which is left where one rotation of the result is undone.
        copy: bytes/s, those read and those written together.
        quantize, rotate, rotate_wide: bytes/s of a pass that quantises; that rotates too; and with a block above 256.
        source: where the numbers come from.
        notes: sentences, what a reader of the result should know of them besides.
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

    @property
    def a_name(self) -> str:
        """The name with its article."""
        return f"{'an' if self.name[:1] in tuple('AEFHILMNORSX8') else 'a'} {self.name}"


#: Medians over bench/results/gemm.json and rotation.json ("both layouts"), from which a test recomputes them.
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
    """The modelled time of one linear layer in one step.

    Args:
        sizes: of "tokens", "in_features" and "out_features".
        products: those that are computed.
        trained: the weight changes in every step, and is quantised anew; codes that never change exist in one layout.
        sharing: how many layers read the same X, which is quantised once for all of them.
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


def lacking(recipe: Recipe, ceilings: Ceilings) -> set[str]:
    """The units that a recipe multiplies with and a GPU has not."""
    return _units(recipe) - ceilings.products.keys()


def gains(recipe: Recipe, ceilings: Ceilings) -> bool:
    """Whether a GPU multiplies faster as the recipe says than in bf16."""
    rates = ceilings.products
    return all(unit == "bf16" or rates.get(unit, 0) > rates["bf16"] for unit in _units(recipe))


def fastest_first(configs: Iterable[AnyConfig], ceilings: Ceilings) -> list[AnyConfig]:
    """Those of the configs that gain from low precision on a GPU, in the order of their time for one square layer."""
    able = [config for config in configs if gains(config.recipe, ceilings)]
    return sorted(able, key=lambda config: seconds(config.recipe, SQUARE, ceilings=ceilings))


def _units(recipe: Recipe) -> set[str]:
    return {_unit(getattr(recipe, name)) for name in PRODUCTS}


def _unit(sides: Product) -> str:
    """The matrix unit of a product. Block scales have no kernel: they are dequantised and multiplied in high precision."""
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
