"""``quantize_`` and ``dequantize_``."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torchao.quantization
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from halo_tensor.activations.hooks import watch
from halo_tensor.config import Balanced, LayerConfigs, LinearConfig
from halo_tensor.convert import ties
from halo_tensor.convert.conversion import Conversion, survey, warn_of_share, warn_of_unrotated
from halo_tensor.convert.filter import CHOICE, EMPTY, layer_filter
from halo_tensor.fences import fast_paths as fences
from halo_tensor.layers import kinds as layers
from halo_tensor.layers import linear_subclasses, model_parts
from halo_tensor.layers.linear import restore_weight
from halo_tensor.trainers import watch_trainers
from halo_tensor.weight.sharded_parameters import is_sharded

logger = logging.getLogger("halo_tensor")
Filter = Callable[[nn.Module, str], bool]


@torch.inference_mode(False)  # parameters made in inference mode could not be trained outside of it
def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.types.Device = None,
) -> Conversion:
    """Make the linear layers of a model follow a config, in place: a low-precision training method.

    Call this before making the optimiser, before ``torch.compile`` and before FSDP. Training then works as before: parameters
    keep their names, shapes and dtypes, and ``model.state_dict()`` is a plain one. A converted model can be converted again
    with another config; :func:`~halo_tensor.dequantize_` undoes it.

    It is torchao's ``quantize_`` with a default filter that knows the whole model (see :func:`~halo_tensor.layer_filter`), and
    with a report of what was converted.

    Args:
        model: any module. It is changed in place.
        config: of :func:`~halo_tensor.halo_config`, :func:`~halo_tensor.hot_config` or :func:`~halo_tensor.recipe_config`, for
            all layers; a :class:`~halo_tensor.LayerConfigs`, which :func:`~halo_tensor.calibrate` returns; or a torchao
            ``FqnToConfig``.
        filter_fn: ``(module, qualified name) -> bool``, in place of the default filter. It is asked about layers only, not
            about containers, norms and embeddings.
        device: where to move each layer before it is converted, as in torchao; None leaves layers where they are.

    Returns:
        which layers were converted, which were left alone and why, and with which share of the linear layers' parameters.
        ``print`` shows it.

    Raises:
        ValueError: no layer was converted (the message says why each was left alone); a layer that ``filter_fn`` chose cannot
            follow the config; or a ``LayerConfigs`` names no layer, or layers that the model lacks.
        TypeError: ``model`` is no module; or ``config`` is no config, or a ``Balanced`` one, whose balance needs a batch.
        RuntimeError: the device cannot multiply the config's number format. The message says which one to use.

    Warns:
        UserWarning: less than half of the linear layers' parameters were converted, not counting what the caller left out; or
            no rotation block fits a layer's width, so that it is left un-rotated.

    Example:
        >>> import torch
        >>> from halo_tensor import halo_config, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
        >>> quantize_(model, halo_config(level=1, dtype="int8")).converted
        ['0', '2']
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model(torch.randn(16, 128)).square().mean().backward()
        >>> optimizer.step()
    """
    fences.warn_of_untested_versions()
    _check_arguments(model, config)
    if isinstance(config, LinearConfig):
        filter_fn = filter_fn or layer_filter(model, config)
    tied = ties.tied_parameters(model)
    before = _marks(model)
    chosen = _of_layers(filter_fn) if filter_fn is not None and isinstance(config, LinearConfig) else filter_fn
    torchao.quantization.quantize_(model, _for_torchao(config, before.keys()), filter_fn=chosen, device=device)
    ties.tie_again(tied)

    converted, skipped, reasons = [], {}, getattr(filter_fn, "reasons", {})
    for name, mark in _marks(model).items():
        if mark is not None and mark is not before[name]:
            converted.append(name)
        else:
            skipped[name] = reasons.get(name) or _why_left(model.get_submodule(name), config)
    conversion = survey(model, config, converted, skipped)
    if _has_our_config(config):
        _check_something_converted(model, conversion)
    warn_of_unrotated(model, conversion)
    if _has_our_config(config):
        warn_of_share(model, conversion)
    _watch_activations(model)
    watch_trainers()
    logger.info("%s", conversion)
    return conversion


def _watch_activations(model: nn.Module) -> None:
    """Let the blocks of a model compress what they save in eager code, as the recipes of their layers say."""
    recipes = ((name, layers.recipe_of(m)) for name, m in model.named_modules() if model_parts.is_layer(m))
    watch(model, [(name, recipe.activations) for name, recipe in recipes if recipe is not None])


def _check_arguments(model: object, config: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_ converts an nn.Module, quantize_(model, config); got a {type(model).__name__}")
    if isinstance(config, Balanced):
        raise TypeError("a balance needs a batch: call quantize_(model, balanced.config), and then balance_(model, **batch)")
    if not isinstance(config, AOBaseConfig):
        raise TypeError(f"a config is what halo_config(level=1, dtype='int8') makes, for example; got {config!r}")


def _for_torchao(config: AOBaseConfig, names: Any) -> AOBaseConfig:
    """``config`` as torchao takes it. ``names``: those of the model's layers."""
    if not isinstance(config, LayerConfigs):
        return config
    if not config.layers:
        raise ValueError("these LayerConfigs name no layer, so nothing would be converted")
    if unknown := config.layers.keys() - names:
        raise ValueError(f"the configs name {len(unknown)} layers that this model lacks, {min(unknown)} among them")
    return FqnToConfig(OrderedDict(config.layers))


def _check_something_converted(model: nn.Module, conversion: Conversion) -> None:
    if not conversion.converted:
        raise ValueError(
            f"no layer of this {type(model).__name__} was converted:\n"
            f"{conversion.reasons or '  it has no nn.Linear, nn.Conv2d or Conv1D'}\n"
            "Pass filter_fn, or a config with another skip or min_features"
        )


def _has_our_config(config: AOBaseConfig) -> bool:
    configs = config.fqn_to_config.values() if isinstance(config, FqnToConfig) else [config]
    return any(isinstance(c, LinearConfig | LayerConfigs) for c in configs)


def _why_left(module: nn.Module, config: object) -> str:
    """Why a layer was left alone about which the default filter was not asked."""
    obstacle = layers.misfit(module, config.recipe) if isinstance(config, LinearConfig) else None
    return obstacle or (EMPTY if layers.is_empty(module) else CHOICE)


def _of_layers(filter_fn: Filter) -> Filter:
    """``filter_fn``, asked once about each layer of a kind that can be converted."""
    seen = set()

    def accept(module: nn.Module, name: str) -> bool:
        if not model_parts.is_layer(module) or module in seen:  # torchao visits a layer that two modules hold twice
            return False
        seen.add(module)
        return filter_fn(module, name)

    return accept


def _marks(model: nn.Module) -> dict[str, object]:
    """For every layer that could be converted, an object that a conversion replaces; None if it is not converted."""
    found = ((name, m) for name, m in model.named_modules() if model_parts.is_layer(m))
    return {
        name: None if (recipe := layers.recipe_of(m)) is None else m.weight if isinstance(m, nn.Linear) else recipe
        for name, m in found
    }


def dequantize_(model: nn.Module) -> None:
    """Make every converted layer a plain one again, with its high-precision weight, in place.

    A weight that is held as codes only gets the value of its codes, in its dtype.

    Args:
        model: a model with converted layers. One without stays as it is.

    Raises:
        ValueError: FSDP has sharded the model.

    Example:
        >>> import torch
        >>> from halo_tensor import dequantize_, halo_config, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128))
        >>> before = model[0].weight.detach().clone()
        >>> quantize_(model, halo_config()).converted
        ['0']
        >>> dequantize_(model)
        >>> type(model[0].weight).__name__, torch.equal(model[0].weight, before)
        ('Parameter', True)
    """
    tied = ties.tied_parameters(model)
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if is_sharded(weight) or (layers.recipe_of(module) and isinstance(weight, DTensor)):
            raise ValueError(
                f"{name} is sharded by FSDP, whose parameters cannot be replaced. torch's get_model_state_dict gives plain "
                "tensors, which load into a plain model"
            )
        if layers.recipe_of(module) is not None:
            layers.restore(module)
    ties.tie_again(tied)
    for module in model.modules():  # those that were tied to a converted layer before a state dict was assigned
        restore_weight(module)
        linear_subclasses.own_class(module)
    _watch_activations(model)
