"""Low-precision training of LLMs with Hadamard rotations: fast and accurate.

from halo_tensor import halo_config, quantize_
quantize_(model, halo_config(level=1, dtype="int8"))
model = torch.compile(model)
"""

from halo_tensor import compiler  # noqa: F401  torch.compile learns the ops
from halo_tensor.calibration.balance import balance_
from halo_tensor.calibration.layer_configs import calibrate
from halo_tensor.checkpointing import keep_products
from halo_tensor.config import (
    Balanced,
    HaloConfig,
    HotConfig,
    LayerConfigs,
    LinearConfig,
    RecipeConfig,
    halo_config,
    hot_config,
    recipe_config,
)
from halo_tensor.convert import Conversion, dequantize_, layer_filter, quantize_
from halo_tensor.diagnostics import NonFiniteError, Report, environment, find_nonfinite, report
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.version import __version__ as __version__
from halo_tensor.weight.tensor import HaloWeight

__all__ = [
    "Balanced",
    "Conversion",
    "HadamardQuantTensor",
    "HaloConfig",
    "HaloWeight",
    "HotConfig",
    "LayerConfigs",
    "LinearConfig",
    "NonFiniteError",
    "RecipeConfig",
    "Report",
    "balance_",
    "calibrate",
    "dequantize_",
    "environment",
    "find_nonfinite",
    "halo_config",
    "hot_config",
    "keep_products",
    "layer_filter",
    "quantize_",
    "recipe_config",
    "report",
]
