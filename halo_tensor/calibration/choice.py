"""Choosing a config for each layer from what its gradients look like in training.

HOT's layer-wise quantiser selection (LQS): a gradient with outlier tokens gets a scale per token where that more than halves
its INT4 error, any other the one scale that is cheaper. The same run can choose HOT's rank, or HALO's level and dtype.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor.analysis import gpus, roofline
from halo_tensor.config import Balanced, HotConfig, LayerConfigs, LinearConfig, halo_config, hot_config
from halo_tensor.convert import layer_filter
from halo_tensor.kernels.device import runs
from halo_tensor.layers import kinds as layers
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import E, Recipe, Scales
from halo_tensor.reference.hadamard import fit

#: What ``level="auto"`` chooses from, by default; the GPU says which is the fastest, and which are slower than bf16.
CANDIDATES = (halo_config(1, "int8"), halo_config(0, "fp8"), halo_config(2, "int8"))
Measurement = dict[str, float]


def calibrate(
    model: nn.Module,
    batches: Iterable,
    config: HotConfig | None = None,
    *,
    level: str | None = None,
    target: float = 0.999,
    candidates: Sequence[LinearConfig] | None = None,
    gpu: str | None = None,
    energy: float | None = None,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> LayerConfigs:
    """Run forward and backward on training batches and choose a config for each layer. The model is left as it was: weights,
    gradients, buffers and random state.

    Args:
        model: in high precision, not converted yet. In training mode, if that is how it will be trained.
        batches: a few training batches.
        config: HOT's, whose ``scale`` is to be chosen for each layer (default: ``hot_config()``).
        level: "auto" chooses from ``candidates`` instead: the first whose worst of output, E_X and G has a cosine of at least
            ``target`` with that in high precision; where none has, the one with the best. It is the cosine of one layer
            alone: errors of layers add up in a model, so the whole gradient's is lower.
        candidates: in the order in which they are tried. By default HALO-1 and HALO-2 in int8 and HALO-0 in fp8, those that
            ``gpu`` runs faster than bf16, the fastest first by the model of time that ``report`` uses.
        gpu: the GPU to order them for, "RTX 4090" for example; by default the model's, as for :func:`~halo_tensor.report`.
        energy: chooses HOT's rank too: the smallest even one that keeps this part of ‖G‖², the whole block if none does.
        loss: ``(model, batch)`` → a scalar. Default: ``model(**batch).loss``, or the cross entropy of
            ``model(batch[0])`` with the labels ``batch[1]``.
        filter_fn: which layers, as for :func:`~halo_tensor.quantize_`.

    Returns:
        configs for ``quantize_``, with what was measured; they can be saved as JSON.

    Raises:
        ValueError: no layer that the config could convert got a gradient, a layer is converted already, arguments are of
            different choices, or ``gpu`` is not known.
        TypeError: the config is not HOT's, or a candidate is ``Balanced``; what is chosen can be balanced after ``quantize_``.
    """
    if level not in (None, "auto"):
        raise ValueError(f"level must be 'auto', or None for HOT; got {level!r}")
    if gpu is not None and (level is None or candidates is not None):
        raise ValueError("gpu orders the default candidates of level='auto': pass it without candidates, and with that level")
    if level == "auto" and candidates is None:
        device = next(model.parameters()).device
        able = (candidate for candidate in CANDIDATES if runs(candidate.recipe.formats, device))
        candidates = roofline.fastest_first(able, gpus.modelled(gpu, device))
    if level == "auto" and not candidates:
        raise ValueError("level='auto' needs at least one candidate")
    if any(isinstance(candidate, Balanced) for candidate in candidates or ()):
        raise TypeError("a balance is of layers together, which calibrate measures one by one: call balance_ after quantize_")
    if config is not None and not isinstance(config, HotConfig):
        raise TypeError(f"config is HOT's, of hot_config(); level='auto' chooses HALO's level and dtype. Got {config!r:.100}")
    if level == "auto" and (config is not None or energy is not None):
        raise ValueError("level='auto' chooses among candidates: config and energy are of HOT's choice, with level=None")
    if energy is not None and config is not None and config.seed is not None:
        raise ValueError("energy chooses a low rank, which takes no signs: pass a config with seed=None")
    if level == "auto":
        choice: _Choice = _Cosines(candidates or (), target)
    else:
        choice = _Quantisers(config or hot_config(), energy)
    accept = filter_fn or layer_filter(model, choice.eligible)
    chosen = {name: m for name, m in model.named_modules() if layers.features(m) and accept(m, name)}
    if converted := [name for name, m in chosen.items() if layers.recipe_of(m) is not None]:
        raise ValueError(f"calibrate measures gradients of high precision, and {converted[0]} is converted: dequantize_ first")
    sums: dict[str, Measurement] = {}
    counts: dict[str, int] = {}

    def observe(name: str, module: nn.Module, x: torch.Tensor, e: torch.Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            measured = choice.measure(module, x.detach(), e)
        before = sums.get(name, {})
        sums[name] = {key: before.get(key, 0.0) + value for key, value in measured.items()}
        counts[name] = counts.get(name, 0) + 1

    def watch(name: str):
        def hook(module, inputs, named, output):
            if output.requires_grad:
                output.register_hook(lambda e: observe(name, module, layers.input_of(inputs, named), e))

        return hook

    hooks = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in chosen.items()]
    gradients = {p: p.grad for p in model.parameters()}
    for parameter in gradients:
        parameter.grad = None  # autograd would add to the user's tensors, in place
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        with torch.random.fork_rng(sorted({p.device.index for p in gradients if p.is_cuda})):
            for batch in batches:
                (loss or _default_loss)(model, batch).backward()
    finally:
        for h in hooks:
            h.remove()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer  # a forward may have put another in its place
    if not sums:
        raise ValueError("no layer that this config converts got a gradient from these batches")
    if idle := [name for name in chosen if name not in sums]:
        warnings.warn(
            f"{len(idle)} layers got no gradient from these batches and will be left in high precision: {', '.join(idle)}",
            stacklevel=2,
        )
    measured = {name: {k: v / counts[name] for k, v in sums[name].items()} for name in chosen if name in sums}
    return LayerConfigs({name: choice.choose(m) for name, m in measured.items()}, measured)


def _default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    if isinstance(batch, dict):
        return model(**batch).loss
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def gradients_under(module: nn.Module, recipe: Recipe | None, x: torch.Tensor, e: torch.Tensor) -> list[torch.Tensor]:
    """[Y, E_X, G] of a copy of a layer that follows ``recipe``, or in high precision (None)."""
    twin: Any = copy.deepcopy(module).requires_grad_()
    for hooks in (twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks):
        hooks.clear()
    if recipe is not None:
        layers.convert(twin, recipe, frozen=False)
    x = x.to(twin.weight.dtype).requires_grad_()
    with torch.enable_grad():
        y = twin(x)
        return [y.detach(), *torch.autograd.grad(y, [x, twin.weight], e.to(y.dtype))]


class _Choice:
    """What is measured of a layer's X and E, and what follows from it."""

    eligible: LinearConfig  # whose filter says which layers are measured

    def measure(self, module: nn.Module, x: torch.Tensor, e: torch.Tensor) -> Measurement:
        raise NotImplementedError

    def choose(self, measured: Measurement) -> LinearConfig:
        raise NotImplementedError


class _Quantisers(_Choice):
    """LQS, and the rank."""

    def __init__(self, config: HotConfig, energy: float | None):
        self.eligible = self.config = config
        self.energy = energy
        self.ranks = range(2, config.block_size, 2) if energy is not None else ()

    def measure(self, module, x, e):
        operand = self.config.recipe.grad_input.left
        matrix = e.unflatten(-3, (module.groups, -1)).movedim(-3, -1) if isinstance(module, nn.Conv2d) else e
        matrix = matrix.reshape(-1, matrix.shape[-1])
        right = fit(operand.out_features, matrix.shape[1])
        measured = {}
        for name in ("tensor", "tokens"):
            rounded = HadamardQuantTensor.from_hp(
                matrix, operand.format, Scales.of(name).on(E), column_rotation=right, rounding=operand.rounding
            )
            measured[f"error with scale={name}"] = _relative_error(rounded.dequantize(), matrix)
        if self.ranks:
            exact = gradients_under(module, None, x, e)[2]
            for rank in self.ranks:
                recipe = replace(self.config, rank=rank).recipe
                error = _relative_error(gradients_under(module, recipe, x, e)[2], exact)
                measured[f"energy of rank {rank}"] = 1 - error**2
        return measured

    def choose(self, measured):
        halves = measured["error with scale=tokens"] < measured["error with scale=tensor"] / 2
        config = replace(self.config, scale="tokens" if halves else "tensor")
        if self.energy is not None:
            enough = (rank for rank in self.ranks if measured[f"energy of rank {rank}"] >= self.energy)
            config = replace(config, rank=next(enough, None))
        return config


class _Cosines(_Choice):
    def __init__(self, candidates: Sequence[LinearConfig], target: float):
        self.candidates, self.target, self.eligible = list(candidates), target, candidates[0]

    def measure(self, module, x, e):
        exact = gradients_under(module, None, x, e)
        measured = {}
        for i, candidate in enumerate(self.candidates):
            if layers.misfit(module, candidate.recipe):
                continue
            actual = gradients_under(module, candidate.recipe, x, e)
            cosines = [_cosine(a, b) for a, b in zip(actual, exact, strict=True)]
            measured[f"cosine of candidate {i}"] = min(cosines)
        return measured

    def choose(self, measured):
        cosines = {int(key.split()[-1]): cosine for key, cosine in measured.items()}
        enough = (i for i, cosine in cosines.items() if cosine >= self.target)
        return self.candidates[next(enough, max(cosines, key=cosines.__getitem__))]


def _relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.float()
    return ((actual.float() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _cosine(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return F.cosine_similarity(actual.flatten().double(), exact.flatten().double(), 0).item()
