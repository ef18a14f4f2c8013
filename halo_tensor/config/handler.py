"""The hook through which torchao's ``quantize_`` makes one layer follow a config of this library."""

from typing import Any, cast

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
        parameter_name: must be "weight". torchao passes another name if a config is given for another parameter.

    Returns:
        ``module``.

    Raises:
        ValueError: the layer cannot follow the config, or its weight is no plain floating-point one.
        RuntimeError: the device cannot multiply the recipe's formats, or no kernel computes with its scales.
    """
    recipe, weight = config.recipe, cast(Any, getattr(module, "weight", None))
    obstacle = layers.misfit(module, recipe) if layers.features(module) else "no layer of a kind that it knows"
    if obstacle or parameter_name != "weight":
        raise ValueError(
            f"{type(config).__name__} converts the weight of nn.Linear layers that are called through F.linear, of Conv1D, "
            f"and with a plain forward of nn.Conv2d; got {parameter_name!r} of {type(module).__name__}"
            + (f": {obstacle}" if obstacle else "")
        )
    if layers.is_empty(module):
        return module
    if (type(weight) is not torch.nn.Parameter and not isinstance(weight, HaloWeight)) or not weight.is_floating_point():
        raise ValueError(
            f"the weight of this layer is a {type(weight).__name__} of {weight.dtype}: only plain floating-point weights "
            "can be converted. Convert before any other quantisation or sharding"
        )
    check_scales(recipe.granularities, weight.device)
    check_device(recipe.formats, weight.device)
    frozen = not weight.requires_grad if config.frozen is None else config.frozen
    if frozen and weight.requires_grad:
        weight.requires_grad_(False)
    layers.convert(module, recipe, frozen, config.holds_codes)
    return module


for method in METHODS:
    register_quantize_module_handler(method)(convert_layer)
