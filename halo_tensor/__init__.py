"""Low-precision training of LLMs in PyTorch with Hadamard rotations.

``quantize_`` makes the linear layers of a model compute all three products, forward and backward, in int8, fp8 or fp6.
Rotations keep outliers from spoiling the precision (HALO, arXiv 2501.02625). Everything else stays as it is: the training
loop, optimisers, ``torch.compile``, FSDP2, PEFT and state dicts.

Example:
    >>> import torch
    >>> from halo_tensor import halo_config, quantize_
    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
    >>> quantize_(model, halo_config(level=1, dtype="int8")).converted  # before the optimiser, compile and FSDP
    ['0', '2']
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> model(torch.randn(16, 128)).square().mean().backward()
    >>> optimizer.step()

Convert a model:
    ``quantize_``, and ``dequantize_``, which undoes it. ``Conversion`` is the result: which layers were converted, and why
    others were not. ``layer_filter`` is the default choice of layers.

Configs:
    ``halo_config`` (``HaloConfig``) is for training LLMs. ``hot_config`` (``HotConfig``) is a low-precision backward for
    vision models. ``recipe_config`` (``RecipeConfig``) finds other published methods by name. Their common fields are those
    of ``LinearConfig``. ``LayerConfigs`` is a config for each layer.

Choose a config by measurement:
    ``report`` measures candidates on one batch and returns a ``Report``; ``Balanced`` is a candidate with a balance.
    ``calibrate`` chooses a config for each layer.

Improve accuracy, save memory:
    ``balance_`` scales columns so that int8 loses less. ``memory="low"`` in a config trades speed for memory, and
    ``predict_peak`` predicts the peak of a step (``PeakMemory``). ``keep_products`` is a policy of activation checkpointing.
    ``linear_cross_entropy`` computes the head and its loss without making logits.

Find errors:
    ``environment`` lists versions, devices and fast paths. ``find_nonfinite`` finds the first operand that is not finite
    (``NonFiniteError``).

Tensors:
    ``HaloWeight`` is the parameter of a converted layer, ``HadamardQuantTensor`` a rotated and quantised matrix.

``halo_tensor.transformers`` loads and saves quantised checkpoints, and fuses the heads of language models;
``halo_tensor.fsdp`` has what users of FSDP2 call.
``python -m halo_tensor`` prints the environment for a bug report, and ``python -m halo_tensor bench`` measures this GPU.
"""

from halo_tensor import compiler  # noqa: F401  torch.compile learns the ops
from halo_tensor.analysis.peak import PeakMemory, predict_peak
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
from halo_tensor.products.loss import linear_cross_entropy
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
    "PeakMemory",
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
    "linear_cross_entropy",
    "predict_peak",
    "quantize_",
    "recipe_config",
    "report",
]
