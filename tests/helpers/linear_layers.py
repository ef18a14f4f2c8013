"""Converted linear layers, their outputs and gradients, and the same in float64."""

import copy

import torch
from torch import nn

from halo_tensor import quantize_
from halo_tensor.layers.linear import convert_weight
from halo_tensor.recipe import Recipe, Rotation
from halo_tensor.reference.hadamard import hadamard, signs


def everything(module, name):
    return isinstance(module, nn.Linear)


def converted(layer: nn.Linear, config) -> nn.Linear:
    """Return a converted copy of a layer. ``config`` is a config or a recipe."""
    layer = copy.deepcopy(layer)
    if isinstance(config, Recipe):
        convert_weight(layer, config)
    else:
        quantize_(layer, config, filter_fn=everything)
    return layer


def gradients(layer, x, e):
    """Return the output and the gradients of input, weight and bias. Without a bias there are three tensors."""
    x = x.detach().requires_grad_()
    y = layer(x)
    wanted = [x, layer.weight] + ([] if layer.bias is None else [layer.bias])
    return [y, *torch.autograd.grad(y, wanted, e)]


def exact(layer, x, e):
    """Return what :func:`gradients` returns, computed in float64."""
    x, e, w = x.double().reshape(-1, x.shape[-1]), e.double().reshape(-1, e.shape[-1]), layer.weight.double()
    y = x @ w.t() + (0 if layer.bias is None else layer.bias.double())
    return [y, e @ w, e.t() @ x] + ([] if layer.bias is None else [e.sum(0)])


def rotation_matrix(rotation: Rotation | None, n: int) -> torch.Tensor:
    if rotation is None:
        return torch.eye(n, dtype=torch.float64)
    block = torch.diag(signs(rotation.block, rotation.seed)).double() @ hadamard(rotation.block).double()
    return torch.block_diag(*[block / rotation.block**0.5] * (n // rotation.block))
