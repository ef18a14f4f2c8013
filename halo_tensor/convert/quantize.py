"""``quantize_`` and ``dequantize_``."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torchao.quantization
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from halo_tensor.activations.hooks import watch
from halo_tensor.analysis.ceilings import Ceilings
from halo_tensor.config import Balanced, LayerConfigs, LinearConfig
from halo_tensor.convert import ties
from halo_tensor.convert.conversion import Conversion, survey, warn_of_share, warn_of_unrotated
from halo_tensor.convert.filter import CHOICE, EMPTY, layer_filter
from halo_tensor.convert.prediction import TOKENS, Predictor, warn_of_slower
from halo_tensor.convert.slow_layers import SlowLayers, restore_layer
from halo_tensor.fences import fast_paths as fences
from halo_tensor.layers import kinds as layers
from halo_tensor.layers import linear_subclasses, model_parts
from halo_tensor.layers.linear import restore_weight
from halo_tensor.trainers import watch_deepspeed, watch_trainers
from halo_tensor.weight.tensor import HaloWeight

logger = logging.getLogger("halo_tensor")
Filter = Callable[[nn.Module, str], bool]


@torch.inference_mode(False)  # parameters made in inference mode could not be trained outside of it
def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.types.Device = None,
    *,
    min_gain: float | None = None,
    tokens: int = TOKENS,
    gpu: str | Ceilings | None = None,
) -> Conversion:
    """Make the linear layers and the experts of a model follow a config, in place: a low-precision training method.

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
        min_gain: leave layers in high precision whose predicted speed, × bf16, is lower: 1.0 for all that would be slower.
            None converts them too, with a warning, and 0 without one. What is converted then depends on the model alone, and
            not on the GPU.
        tokens: rows of a layer's input in a training step, for the prediction: output positions of a convolution. Of experts,
            the tokens before they are copied: each expert is taken to get tokens · top_k / experts rows, where top_k is what
            the module or its config says, or else 1. The speed of torchtitan's experts is not predicted, so that ``min_gain``
            never leaves them out.
        gpu: the GPU for which speed is predicted, "H200" or "RTX 4090" for example, or its rates as a
            :class:`~halo_tensor.analysis.ceilings.Ceilings`. The default is the GPU of the model or, for a model on a CPU, of
            this machine. Without one, or if its rates are not known, there is no prediction.

    Returns:
        which layers were converted, which were left alone and why, and with which share of the linear layers' parameters;
        and the predicted speed of each layer (``predicted.gains``). ``print`` shows it.

    Raises:
        ValueError: no layer was converted (the message says why each was left alone); a layer that ``filter_fn`` chose cannot
            follow the config; a ``LayerConfigs`` names no layer, or layers that the model lacks; ``gpu`` is not known; or
            ``min_gain`` is given and there is no prediction.
        TypeError: ``model`` is no module; or ``config`` is no config, or a ``Balanced`` one, whose balance needs a batch.
        RuntimeError: the device cannot multiply the config's number format. The message says which one to use.

    Warns:
        UserWarning: less than half of the linear layers' parameters were converted, not counting what the caller left out; no
            rotation block fits a layer's width, so that it is left un-rotated; layers are predicted to be slower than in bf16;
            or no layer reaches ``min_gain``, so that the model stays as it was.

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
    if min_gain is not None and not _has_our_config(config):
        raise ValueError(f"min_gain needs a config of this library, whose speed is modelled; got {config!r:.200}")
    predictor = Predictor(gpu, _device_of(model, device), tokens)
    slow = SlowLayers(predictor, min_gain)
    tied = ties.tied_parameters(model)
    before = _marks(model)
    chosen, for_torchao = filter_fn, _for_torchao(config, before.keys())
    if isinstance(for_torchao, FqnToConfig):
        for_torchao = slow.left_out_of(for_torchao, model)
    elif isinstance(config, LinearConfig):
        filter_fn = filter_fn or layer_filter(model, config)
        accepted = {name: m for name, m in model.named_modules() if model_parts.is_layer(m) and filter_fn(m, name)}
        slow.choose({name: (m, config) for name, m in accepted.items()})
        wanted = {m for name, m in accepted.items() if name not in slow.reasons}
        chosen = _once(wanted)
    torchao.quantization.quantize_(model, for_torchao, filter_fn=chosen, device=device)
    slow.restore(model)
    ties.tie_again(tied)

    converted, skipped, reasons = [], {}, getattr(filter_fn, "reasons", {})
    for name, mark in _marks(model).items():
        if mark is not None and mark is not before[name]:
            converted.append(name)
        else:
            skipped[name] = slow.reasons.get(name) or reasons.get(name) or _why_left(model.get_submodule(name), config)
    conversion = survey(model, config, converted, skipped)
    conversion.only_saving = [name for name in converted if layers.only_saves(model.get_submodule(name))]
    conversion.predicted = predictor.of(model, converted)
    if _has_our_config(config):
        _check_something_converted(model, conversion, slow)
        if converted:
            warn_of_share(model, conversion)
    warn_of_unrotated(model, conversion)
    if min_gain is None:
        warn_of_slower(conversion.predicted)
    _watch_activations(model)
    watch_trainers()
    watch_deepspeed()
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


def _device_of(model: nn.Module, device: torch.types.Device) -> torch.device:
    """Return the device that the layers are on, or will be moved to."""
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _check_something_converted(model: nn.Module, conversion: Conversion, slow: SlowLayers) -> None:
    if not conversion.converted and slow.reasons:
        slow.warn_if_all(model)
    elif not conversion.converted:
        raise ValueError(
            f"no layer of this {type(model).__name__} was converted:\n"
            f"{conversion.reasons or '  it has no nn.Linear, nn.Conv2d, Conv1D or experts'}\n"
            "Pass filter_fn, or a config with another skip or min_features"
        )


def _has_our_config(config: AOBaseConfig) -> bool:
    configs = config.fqn_to_config.values() if isinstance(config, FqnToConfig) else [config]
    return any(isinstance(c, LinearConfig | LayerConfigs) for c in configs)


def _why_left(module: nn.Module, config: object) -> str:
    """Why a layer was left alone about which the default filter was not asked."""
    obstacle = layers.misfit(module, config.recipe) if isinstance(config, LinearConfig) else None
    return obstacle or (EMPTY if layers.is_empty(module) else CHOICE)


def _once(wanted: set[nn.Module]) -> Filter:
    """Return a filter that accepts each of ``wanted`` once. torchao visits a layer that two modules hold twice."""

    def accept(module: nn.Module, name: str) -> bool:
        found = module in wanted
        wanted.discard(module)
        return found

    return accept


def _marks(model: nn.Module) -> dict[str, object]:
    """For every layer that could be converted, an object that a conversion replaces; None if it is not converted."""
    found = ((name, m) for name, m in model.named_modules() if model_parts.is_layer(m))
    return {name: None if layers.recipe_of(m) is None else _mark(m) for name, m in found}


def _mark(module: nn.Module) -> object:
    converted = (w for w in layers.weights(module).values() if isinstance(w, HaloWeight))
    return next(converted, layers.recipe_of(module))


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
        restore_layer(name, module)
    ties.tie_again(tied)
    for module in model.modules():  # those that were tied to a converted layer before a state dict was assigned
        restore_weight(module)
        linear_subclasses.own_class(module)
    _watch_activations(model)
