"""``quantize_`` and ``dequantize_``: which layers of a model are converted, and what became of each."""

import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchao.quantization
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from halo_tensor import fences, layers
from halo_tensor.config import Balanced, LayerConfigs, LinearConfig
from halo_tensor.fsdp import is_sharded
from halo_tensor.modules import keep_plain, restore_weight
from halo_tensor.ops.hadamard import fit
from halo_tensor.recipe import PRODUCTS, Product
from halo_tensor.weight import HaloWeight

logger = logging.getLogger("halo_tensor")
#: 8-bit matrix units read operands in pieces of 16 bytes.
ALIGNMENT = 16


@dataclass
class Conversion:
    """What :func:`quantize_` did: names of ``converted`` layers, and of ``skipped`` ones and stacks of matrices the reason."""

    config: object
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        layers = len(self.converted) + len(self.skipped)
        return f"{len(self.converted)} of {layers} layers follow {self.config}\n{self.reasons}".rstrip()

    @property
    def reasons(self) -> str:
        """Why layers were left alone, a line for each reason."""
        lines = []
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  left alone: {shown}: {reason}")
        return "\n".join(lines)


@torch.inference_mode(False)  # or the model could not be trained outside of it
def quantize_(
    model: nn.Module,
    config,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.types.Device = None,
) -> Conversion:
    """torchao's ``quantize_`` with a filter that knows the whole model, and a report of what was converted.

    Args:
        model: changed in place. Call this before making the optimiser, ``torch.compile`` and FSDP.
        config: of :func:`~halo_tensor.halo_config`, :func:`~halo_tensor.hot_config` or :func:`~halo_tensor.recipe_config`;
            what :func:`~halo_tensor.calibrate` chose; or a torchao ``FqnToConfig``. A converted model can be converted again,
            with another config.
        filter_fn: ``(module, qualified name) -> bool``, in place of the default :func:`layer_filter`.
        device: where to move the layers first, as in torchao.

    Raises:
        ValueError: no layer is eligible; the message says why each was left alone. Or calibrated configs name layers that the
            model lacks.
        TypeError: no config, or a ``Balanced`` one, whose balance needs a batch.
    """
    fences.warn_of_untested_versions()
    if isinstance(config, Balanced):
        raise TypeError("a balance needs a batch: call quantize_(model, balanced.config), and then balance_(model, **batch)")
    if not isinstance(config, AOBaseConfig):
        raise TypeError(f"a config is what halo_config(level=1, dtype='int8') makes, for example; got {config!r}")
    if isinstance(config, LinearConfig) and filter_fn is None:
        filter_fn = layer_filter(model, config)
    ties = _tied_parameters(model)
    before = _marks(model)
    torchao_config = config
    if isinstance(config, LayerConfigs):
        if unknown := config.layers.keys() - before.keys():
            raise ValueError(f"the configs name {len(unknown)} layers that this model lacks, {min(unknown)} among them")
        torchao_config = FqnToConfig(OrderedDict(config.layers))
    torchao.quantization.quantize_(model, torchao_config, filter_fn=filter_fn, device=device)
    _tie_again(model, ties)

    report, reasons = Conversion(config), getattr(filter_fn, "reasons", {})
    for name, mark in _marks(model).items():
        if mark is not None and mark is not before[name]:
            report.converted.append(name)
        elif name in reasons or isinstance(config, LayerConfigs) or isinstance(model.get_submodule(name), nn.Linear):
            report.skipped[name] = reasons.get(name, "filter_fn or the config says so")
    if isinstance(config, LinearConfig):
        report.skipped |= _stacks(model, config.min_features)
    if not report.converted and isinstance(config, LinearConfig):
        kinds = "nn.Linear, nn.Conv2d or Conv1D" if config.recipe.output == Product() else "nn.Linear"
        why = report.reasons or f"  it has no {kinds}"
        raise ValueError(
            f"no layer of this {type(model).__name__} was converted:\n{why}\n"
            "Pass filter_fn, or a config with another skip or min_features"
        )
    warn_of_unrotated(model, report)
    logger.info("%s", report)
    return report


def dequantize_(model: nn.Module) -> None:
    """Give back a plain layer with its high-precision weight for every converted one, in place.

    Raises:
        ValueError: FSDP has sharded the model.
    """
    ties = _tied_parameters(model)
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if is_sharded(weight) or (layers.recipe_of(module) and isinstance(weight, DTensor)):
            raise ValueError(
                f"{name} is sharded by FSDP, whose parameters cannot be replaced. torch's get_model_state_dict gives plain "
                "tensors, which load into a plain model"
            )
        if layers.recipe_of(module) is not None:
            layers.restore(module)
    _tie_again(model, ties)
    for module in model.modules():  # what was tied to a converted layer, before a state dict was assigned
        restore_weight(module)


def layer_filter(model: nn.Module, config: LinearConfig) -> Callable[[nn.Module, str], bool]:
    """The default filter: a ``filter_fn`` for :func:`quantize_`, this library's or torchao's.

    It takes every ``nn.Linear`` whose forward is that of ``nn.Linear``, and where the config's forward is plain every
    ``nn.Conv2d`` and ``Conv1D``, but output embeddings, layers with tied weights, PEFT's adapters, those that ``config.skip``
    names, those with fewer than ``config.min_features`` features on a side (channels of a group), and those whose features
    8-bit units cannot address.
    """
    shared = _tied_parameters(model)
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=None)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    adapters, plain = _adapters(model), config.recipe.output == Product()
    reasons: dict[str, str] = {}

    def reason(module: Any, name: str) -> str | None:
        sides = layers.features(module)
        if sides is None:
            return "of convolutions, only nn.Conv2d is converted"
        if "weight" not in module._parameters:
            return "its weight is another module's"
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            return f"it is a {type(module).__name__}, whose forward may be its own"
        if obstacle := layers.misfit(module, config.recipe):
            return obstacle
        if not isinstance(module.weight, HaloWeight) and type(module.weight) is not nn.Parameter:
            return f"its weight is a {type(module.weight).__name__}"
        is_adapter = module in adapters
        if is_adapter and not config.adapters:
            return "it belongs to an adapter"
        if id(module.weight) in shared:
            return "its weight is tied to another layer's"
        if module is output or (output is None and sides[0] < sides[1] == vocabulary):
            return "it is the output embedding"
        if config.skip and re.search(config.skip, name):
            return f"its name matches skip={config.skip!r}"
        if min(sides) < config.min_features and not is_adapter:
            return f"fewer than min_features={config.min_features} features on a side"
        if any(side % ALIGNMENT for side in sides):
            return f"a width that is no multiple of {ALIGNMENT}"
        return None

    def accept(module: nn.Module, name: str) -> bool:
        convolves = isinstance(module, nn.modules.conv._ConvNd) or layers.features(module) is not None
        if not (isinstance(module, nn.Linear) or (plain and convolves)):
            return False
        why = reason(module, name)
        if why is not None:
            reasons[name] = why
        return why is None

    accept.reasons = reasons  # type: ignore[attr-defined]
    return accept


def _stacks(model: nn.Module, min_features: int) -> dict[str, str]:
    """Parameters that are matrices one over the other, as a mixture's experts are, and why they are left alone."""
    reason = "a stack of matrices, as of experts, which is not called through F.linear"
    found = ((name, p) for name, p in model.named_parameters() if p.ndim > 2 and min(p.shape[-2:]) >= min_features)
    return {name: reason for name, _ in found}


def _adapters(model: nn.Module) -> set[nn.Module]:
    """What PEFT's layers hold besides the layer they wrap: matrices too small to gain, of any rank."""
    wrappers = [m for m in model.modules() if isinstance(getattr(m, "base_layer", None), nn.Module)]
    owned = [child for m in wrappers for name, child in m.named_children() if name != "base_layer"]
    return {module for child in owned for module in child.modules()}


def _marks(model: nn.Module) -> dict[str, object]:
    """For every layer that could be converted, an object that a conversion renews; None if it is not converted."""
    found = ((name, m) for name, m in model.named_modules() if layers.features(m) or isinstance(m, nn.modules.conv._ConvNd))
    return {
        name: None if (recipe := layers.recipe_of(m)) is None else m.weight if isinstance(m, nn.Linear) else recipe
        for name, m in found
    }


def _tied_parameters(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a parameter that several modules hold -> those modules and their names for it."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    return {key: held for key, held in holders.items() if len(held) > 1}


def _tie_again(model: nn.Module, ties: dict[int, list[tuple[nn.Module, str]]]) -> None:
    """Where one holder of a tied parameter has got a new one, give it to all of them."""
    for key, holders in ties.items():
        new = [getattr(m, name) for m, name in holders if id(getattr(m, name)) != key]
        for module, name in holders if new else ():
            setattr(module, name, new[-1])
            keep_plain(module)


def warn_of_unrotated(model: nn.Module, report: Conversion) -> None:
    """One warning for all layers with a feature dimension that the recipe rotates and no block fits."""
    unrotated = []
    for name in report.converted:
        module = model.get_submodule(name)
        sides, recipe = layers.features(module), layers.recipe_of(module)
        assert sides and recipe
        widths = {"out_features": sides[1], "in_features": sides[0]}
        operands = [o for p in PRODUCTS for o in (getattr(recipe, p).left, getattr(recipe, p).right)]
        for dimension, width in widths.items():
            wanted = {o.rotation(dimension) for o in operands} - {None}
            if any(fit(rotation, width) is None for rotation in wanted):
                unrotated.append(f"{name or 'the model'} ({dimension} {width})")
    if unrotated:
        warnings.warn(
            f"left un-rotated, since no block of at least 16 divides the width: {', '.join(unrotated)}", stacklevel=3
        )
