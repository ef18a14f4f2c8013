"""The hook through which torchao's ``quantize_`` makes one layer follow a config of this library."""

from typing import Any

import torch
from torchao.quantization import register_quantize_module_handler

from halo_tensor.config.base import LinearConfig
from halo_tensor.config.methods import METHODS
from halo_tensor.kernels.device import check_device, check_scales
from halo_tensor.layers import kinds as layers
from halo_tensor.weight.tensor import HaloWeight


def convert_layer(module: torch.nn.Module, config: LinearConfig, *, parameter_name: str = "weight") -> torch.nn.Module:
    """Make a layer follow ``config``, in place.

    Args:
        module: a layer.
        config: of one of the ``METHODS``.
        parameter_name: must be "weight", or the name of a stack of experts, which converts them all. torchao passes another
            name if a config is given for another parameter.

    Returns:
        ``module``.

    Raises:
        ValueError: the layer cannot follow the config, or its weight is no plain floating-point one.
        RuntimeError: the device cannot multiply the recipe's formats, or no kernel computes with its scales.
    """
    recipe, known = config.recipe, layers.widths(module)
    obstacle = layers.misfit(module, recipe) if known else "no layer of a kind that it knows"
    held: dict[str, Any] = layers.weights(module) if known else {}
    if obstacle or parameter_name not in ("weight", *held):
        raise ValueError(
            f"{type(config).__name__} converts the weight of nn.Linear layers that are called through F.linear, of Conv1D, "
            f"with a plain forward of nn.Conv2d, and transformers' experts; got {parameter_name!r} of {type(module).__name__}"
            + (f": {obstacle}" if obstacle else "")
        )
    if layers.is_empty(module):
        return module
    for weight in held.values() or (None,):
        if not (type(weight) is torch.nn.Parameter or isinstance(weight, HaloWeight)) or not weight.is_floating_point():
            dtype = getattr(weight, "dtype", None)
            raise ValueError(
                f"the weight of this layer is a {type(weight).__name__} of {dtype}: only plain floating-point weights "
                "can be converted. Convert before any other quantisation or sharding"
            )
        check_scales(recipe.granularities, weight.device)
        check_device(recipe.formats, weight.device)
        if config.frozen:
            weight.requires_grad_(False)
    layers.convert(module, recipe, config.frozen, config.holds_codes)
    return module


for method in METHODS:
    register_quantize_module_handler(method)(convert_layer)
