"""The config of a method that is chosen by its name."""

from dataclasses import dataclass

from halo_tensor.config.base import LinearConfig, one_of
from halo_tensor.recipe import RECIPES, Recipe


@dataclass(frozen=True, repr=False)
class RecipeConfig(LinearConfig):
    """A recipe of ``halo_tensor.recipe.RECIPES``, by its name there: SwitchBack, Jetfire, HOT's variants and others.

    "mxfp8", "mxfp8_halo1", "nvfp4" and "nvfp4_plain" have no kernel: they are for accuracy studies on a CPU, and on a CUDA
    device they raise an error.

    ``recipe_config`` is another name of this class. A recipe that you add to ``RECIPES`` is found, too. It has the fields of
    :class:`LinearConfig` as well: ``skip``, ``min_features``, ``frozen``, ``memory``, ``keep_codes``,
    ``activations`` and ``adapters``.

    Args:
        name: the recipe's name in ``RECIPES``.

    Raises:
        ValueError: there is no recipe of that name (the message lists all), or another field is not valid.

    Example:
        >>> from halo_tensor import recipe_config
        >>> recipe_config("switchback").recipe.grad_weight.left.format is None  # SwitchBack's grad_weight is plain
        True
    """

    name: str

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("name", self.name, tuple(RECIPES))

    @property
    def recipe(self) -> Recipe:
        """The method as data: the entry of ``RECIPES``."""
        return self.saving(RECIPES[self.name])


recipe_config = RecipeConfig
"""A named recipe as a config for `quantize_`. Another name of `RecipeConfig`, which explains the fields."""
