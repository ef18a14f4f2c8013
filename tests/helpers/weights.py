"""Converted weights, and whether their codes are those of their masters."""

import torch
from torch import nn

from halo_tensor import HaloWeight, quantize_
from halo_tensor.products.operands import weight_operand


def in_step(weight: HaloWeight) -> bool:
    """Return whether the codes and scales are those of the master. ``weight.codes`` would bring them up to date."""
    fresh = weight_operand(weight.master, weight.recipe, weight.gains)
    return all(torch.equal(a, b) for a, b in zip(fresh.parts, weight.operand.parts, strict=True))


def converted(config, **kwargs) -> nn.Linear:
    layer = nn.Linear(128, 256, bias=False, **kwargs)
    quantize_(layer, config)
    return layer
