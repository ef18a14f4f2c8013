"""A model's balance as a dict of tensors, which state dicts do not contain: to save it, and to give it to another model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from halo_tensor.calibration.balance import LARGEST_EXPONENT, set_gains
from halo_tensor.operand import gains
from halo_tensor.weight.tensor import HaloWeight


def balance_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return log₂ s of each balanced layer: qualified name -> int8 [in_features] on the CPU. Not for sharded models."""
    weights: dict[str, Any] = {
        name: m._parameters.get("weight") for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    return {
        name: weight.gain.log2().round().to("cpu", torch.int8)
        for name, weight in weights.items()
        if isinstance(weight, HaloWeight) and weight.gain is not None
    }


def set_balance(model: nn.Module, balance: Mapping[str, torch.Tensor]) -> int:
    """Balance a converted model as another one is.

    Args:
        model: converted, and not sharded yet.
        balance: what :func:`balance_of` returned.

    Returns:
        the number of layers that were balanced.

    Raises:
        ValueError: a layer that ``balance`` names is missing, not converted, or of another width.
    """
    layers = dict(model.named_modules())
    for name, exponents in balance.items():
        weight = getattr(layers.get(name), "weight", None)
        if not isinstance(weight, HaloWeight) or weight.operand is None:
            raise ValueError(
                f"the balance names {name}, which is no converted layer with codes of this {type(model).__name__}"
            )
        if list(exponents.shape) != [weight.shape[1]] or exponents.abs().max() > LARGEST_EXPONENT:
            raise ValueError(
                f"the balance of {name} has shape {list(exponents.shape)} and exponents up to {exponents.abs().max()}; "
                f"expected {[weight.shape[1]]} and at most {LARGEST_EXPONENT}"
            )
    pairs: dict[tuple, gains.Gains] = {}  # layers with equal gains share them, so that X is quantised once for all of them
    for name, exponents in balance.items():
        weight = layers[name].weight
        key = (weight.device, *exponents.tolist())
        if key not in pairs:
            pairs[key] = gains.of_exponents(exponents.to(weight.device))
        set_gains(weight, pairs[key])
    return len(balance)
