"""Converted weights, and whether their codes follow their masters."""

import torch
from torch import nn

from halo_tensor import HaloWeight, quantize_
from halo_tensor.products.operands import weight_operand


def in_step(weight: HaloWeight) -> bool:
    fresh = weight_operand(weight.master, weight.recipe)
    return torch.equal(fresh.codes, weight.operand.codes) and torch.equal(fresh.scale, weight.operand.scale)


def converted(config, **kwargs) -> nn.Linear:
    layer = nn.Linear(128, 256, bias=False, **kwargs)
    quantize_(layer, config)
    return layer
