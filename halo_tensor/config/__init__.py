"""The configs that users pass to ``quantize_``: one dataclass for each method, checked when it is made."""

from halo_tensor.config import handler  # noqa: F401  torchao learns the configs
from halo_tensor.config.balanced import Balanced
from halo_tensor.config.base import LinearConfig
from halo_tensor.config.halo import HaloConfig, halo_config
from halo_tensor.config.hot import HotConfig, hot_config
from halo_tensor.config.layer_configs import LayerConfigs
from halo_tensor.config.named import RecipeConfig, recipe_config

__all__ = [
    "Balanced",
    "HaloConfig",
    "HotConfig",
    "LayerConfigs",
    "LinearConfig",
    "RecipeConfig",
    "halo_config",
    "hot_config",
    "recipe_config",
]
