"""The config of HALO."""

from dataclasses import dataclass
from functools import lru_cache

from halo_tensor import recipe as recipes
from halo_tensor.config.base import RotatedConfig, one_of
from halo_tensor.recipe import Format, Recipe, Rotation

LEVELS = (0, 1, 2)
#: dtype -> format. Plain "fp6" depends on the level: rotated operands suit a nearly uniform grid, others a wide range.
DTYPES: dict[str, Format | None] = {
    "int8": recipes.INT8,
    "fp8": recipes.FP8_E4M3,
    "fp6": None,
    "fp6_e2m3": recipes.FP6_E2M3,
    "fp6_e3m2": recipes.FP6_E3M2,
    "bf16": None,
}


@dataclass(frozen=True, repr=False)
class HaloConfig(RotatedConfig):
    """HALO (arXiv 2501.02625): all three products of a linear layer in one number format, with Hadamard rotations.

    ``halo_config`` is another name of this class. It has the fields of
    :class:`LinearConfig` too: ``skip``, ``min_features``, ``frozen``, ``memory``, ``keep_codes``,
    ``activations`` and ``adapters``.

    Args:
        level: which rotations. 0: none. 1: in_features of X and W. 2: also the tokens of E. Uniform grids (int8, fp6_e2m3)
            want level 1 or 2, floating-point ones (fp8, fp6_e3m2) want level 0.
        dtype: "int8", "fp8" (e4m3), "fp6_e2m3", "fp6_e3m2", "fp6" (e3m2 at level 0, else e2m3), or "bf16": no quantisation
            at all, for comparison.
        granularity: "row": one scale per token of X and E and one per output feature of W, and each operand is quantised
            once. "tensor": one scale per operand, as in the paper.
        block_size: edge of the rotation's blocks, a power of two of at least 16. Where it does not divide a layer's width,
            the largest power of two that does is used. None rotates the full width.
        seed: seed of the rotation's random signs, from 0 to 2³¹ − 1; None for no signs.

    Raises:
        ValueError: a field or a value is not valid. The message lists the valid ones.

    Example:
        >>> from halo_tensor import halo_config
        >>> halo_config()
        HaloConfig(level=1, dtype='int8', granularity='row', block_size=128, seed=0)
        >>> halo_config(0, "fp8", skip="lm_head|router").recipe.formats[0].bits
        8
    """

    level: int = 1
    dtype: str = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("level", self.level, LEVELS)
        one_of("dtype", self.dtype, tuple(DTYPES))
        block = self.block_size
        if block is not None and (type(block) is not int or block < 16 or block & (block - 1)):
            raise ValueError(f"block_size must be a power of two of at least 16, or None for the full width; got {block!r}")

    @property
    def recipe(self) -> Recipe:
        """The method as data. Configs that differ only in which layers they convert share one object."""
        return self.saving(_recipe(self.level, self.dtype, self.granularity, self.block_size, self.seed))


@lru_cache
def _recipe(level: int, dtype: str, granularity: str, block_size: int | None, seed: int | None) -> Recipe:
    """Cached, so that all layers of a model hold one recipe object, and comparing recipes is free."""
    if dtype == "bf16":
        return Recipe()
    format = DTYPES[dtype] or (recipes.FP6_E2M3 if level else recipes.FP6_E3M2)
    return recipes.halo(level, format, granularity, Rotation(block_size, seed))


halo_config = HaloConfig
"""HALO as a config for `quantize_`. Another name of `HaloConfig`, which explains the fields."""
