"""How a config is selected for one layer from its X and E."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor.config import HotConfig, LinearConfig
from halo_tensor.layers import kinds as layers
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import E, Recipe, Scales
from halo_tensor.reference.hadamard import fit

#: Name of a quantity -> its value. :class:`~halo_tensor.LayerConfigs` saves these names in files, so they stay as they are.
Measurement = dict[str, float]


class Selection(Protocol):
    """Measures a layer in each batch, and selects its config from the means.

    Attributes:
        eligible: the config whose filter decides which layers are measured.
    """

    eligible: LinearConfig

    def why_not(self, module: nn.Module) -> str | None:
        """Return why the layer can follow none of the configs; None if it can."""

    def measure(self, module: nn.Module, x: torch.Tensor, e: torch.Tensor, *rest: torch.Tensor) -> Measurement:
        """Measure a layer with input ``x`` and output gradient ``e``. ``rest``: what experts are called with besides."""

    def choose(self, measured: Measurement) -> LinearConfig:
        """Select the config that the means of all measurements call for."""


class QuantizerSelection:
    """HOT's layer-wise quantiser selection, and its rank.

    A layer gets a scale for each token if that more than halves the INT4 error of E. Otherwise it gets one scale for the whole
    tensor, which is cheaper. If ``energy`` is given, the layer gets the smallest even rank that keeps this part of ‖G‖².
    """

    def __init__(self, config: HotConfig, energy: float | None):
        self.config = config
        self.eligible: LinearConfig = config
        self.energy = energy
        self.ranks = range(2, config.block_size, 2) if energy is not None else ()

    def why_not(self, module: nn.Module) -> str | None:
        """Return why the layer cannot follow HOT."""
        return layers.misfit(module, self.config.recipe)

    def measure(self, module: nn.Module, x: torch.Tensor, e: torch.Tensor, *rest: torch.Tensor) -> Measurement:
        """Return the relative error of E with each scale, and the part of ‖G‖² that each rank keeps."""
        operand = self.config.recipe.grad_input.left
        matrix = e.unflatten(-3, (module.groups, -1)).movedim(-3, -1) if isinstance(module, nn.Conv2d) else e
        matrix = matrix.reshape(-1, matrix.shape[-1])
        rotation = fit(operand.out_features, matrix.shape[1])
        measured = {}
        for name in ("tensor", "tokens"):
            rounded = HadamardQuantTensor.from_hp(
                matrix, operand.format, Scales.of(name).on(E), column_rotation=rotation, rounding=operand.rounding
            )
            measured[_error_with(name)] = _relative_error(rounded.dequantize(), matrix)
        if self.ranks:
            exact = gradients_under(module, None, x, e)[2]
            for rank in self.ranks:
                recipe = replace(self.config, rank=rank).recipe
                error = _relative_error(gradients_under(module, recipe, x, e)[2], exact)
                measured[_energy_of(rank)] = 1 - error**2
        return measured

    def choose(self, measured: Measurement) -> HotConfig:
        """Select the granularity of E and, if asked to, the rank."""
        halves = measured[_error_with("tokens")] < measured[_error_with("tensor")] / 2
        config = replace(self.config, grad_output_granularity="row" if halves else "tensor")
        if self.energy is not None:
            enough = (rank for rank in self.ranks if measured[_energy_of(rank)] >= self.energy)
            config = replace(config, rank=next(enough, None))
        return config


class CosineSelection:
    """Selects the first candidate whose results are close enough to those in high precision, or else the closest one."""

    def __init__(self, candidates: Sequence[LinearConfig], target: float):
        self.candidates, self.target = list(candidates), target
        self.eligible = candidates[0]

    def why_not(self, module: nn.Module) -> str | None:
        """Return why the layer cannot follow the last candidate, if it can follow none."""
        reasons = [layers.misfit(module, candidate.recipe) for candidate in self.candidates]
        return reasons[-1] if all(reasons) else None

    def measure(self, module: nn.Module, x: torch.Tensor, e: torch.Tensor, *rest: torch.Tensor) -> Measurement:
        """Return the lowest cosine of output, E_X and each G with the exact ones, under each candidate that fits the layer."""
        exact = gradients_under(module, None, x, e, *rest)
        measured = {}
        for i, candidate in enumerate(self.candidates):
            if layers.misfit(module, candidate.recipe):
                continue
            actual = gradients_under(module, candidate.recipe, x, e, *rest)
            measured[_cosine_of(i)] = min(_cosine(a, b) for a, b in zip(actual, exact, strict=True))
        return measured

    def choose(self, measured: Measurement) -> LinearConfig:
        """Select a candidate among those that fit the layer."""
        cosines = {i: measured[_cosine_of(i)] for i in range(len(self.candidates)) if _cosine_of(i) in measured}
        enough = (i for i, cosine in cosines.items() if cosine >= self.target)
        return self.candidates[next(enough, max(cosines, key=cosines.__getitem__))]


def gradients_under(
    module: nn.Module, recipe: Recipe | None, x: torch.Tensor, e: torch.Tensor, *rest: torch.Tensor
) -> list[torch.Tensor]:
    """Return [output, E_X, G] of a copy of a layer that follows ``recipe``, or of one in high precision (None).

    Experts have two G, and are called with ``rest`` too: top_k_index and top_k_weights.
    """
    twin: Any = copy.deepcopy(module).requires_grad_()
    for hooks in (twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks):
        hooks.clear()
    if recipe is not None:
        layers.convert(twin, recipe, frozen=False)
    weights = [*layers.weights(twin).values()]
    x = x.to(weights[0].dtype).requires_grad_()
    with torch.enable_grad():
        y = twin(x, *rest)
        return [y.detach(), *torch.autograd.grad(y, [x, *weights], e.to(y.dtype))]


def _error_with(scale: str) -> str:
    return f"error with scale={scale}"


def _energy_of(rank: int) -> str:
    return f"energy of rank {rank}"


def _cosine_of(candidate: int) -> str:
    return f"cosine of candidate {candidate}"


def _relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.float()
    return ((actual.float() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _cosine(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return F.cosine_similarity(actual.flatten().double(), exact.flatten().double(), 0).item()
