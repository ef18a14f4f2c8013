"""The methods that have a config. Add a class here: ``quantize_`` then accepts it, and files with it can be read."""

from halo_tensor.config.base import LinearConfig
from halo_tensor.config.halo import HaloConfig
from halo_tensor.config.hot import HotConfig
from halo_tensor.config.named import RecipeConfig

METHODS: tuple[type[LinearConfig], ...] = (HaloConfig, HotConfig, RecipeConfig)
