"""``quantize_`` and ``dequantize_``: which layers of a model are converted, and what became of each."""

import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchao.quantization
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from halo_tensor.config import Balanced, LayerConfigs, LinearConfig
from halo_tensor.fences import fast_paths as fences
from halo_tensor.layers import kinds as layers
from halo_tensor.layers import parts, subclasses
from halo_tensor.layers.linear import keep_plain, restore_weight
from halo_tensor.recipe import PRODUCTS
from halo_tensor.reference.hadamard import fit
from halo_tensor.trainers import watch_trainers
from halo_tensor.weight.fsdp import is_sharded
from halo_tensor.weight.tensor import HaloWeight

logger = logging.getLogger("halo_tensor")
#: 8-bit matrix units read operands in pieces of 16 bytes.
ALIGNMENT = 16
#: A conversion that leaves more than this part of the linear layers' parameters in high precision is warned of.
LEAST_SHARE = 0.5
#: Why a layer was left alone that the caller left out.
CHOICE = "filter_fn or the config says so"
SKIPPED = "its name matches skip="
EMPTY = "it has no features on a side, so there is nothing to multiply"


@dataclass
class Conversion:
    """The result of :func:`quantize_`.

    Attributes:
        config: what the converted layers follow.
        converted: names of layers. skipped: names of layers, and of parameters that are matrices but not of a layer, with the
            reason.
        sizes: of all of these, how many parameters multiply activations, 3-D stacks of experts included. Embeddings, input and
            output, and adapters are not counted.
    """

    config: object
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        layers = len(self.converted) + len(self.skipped)
        share = f", with {percent(self.share)} of the linear layers' parameters" if self.sizes else ""
        return f"{len(self.converted)} of {layers} layers follow {self.config}{share}\n{self.reasons}".rstrip()

    @property
    def share(self) -> float:
        """The part of the parameters counted in ``sizes`` that is converted; 1 if there are none."""
        return self._elements(self.converted) / (sum(self.sizes.values()) or 1) if self.sizes else 1.0

    @property
    def reasons(self) -> str:
        """Why layers were left alone, a line for each reason."""
        lines = []
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(name or "the model" for name in names[:3]) + (
                f" and {len(names) - 3} more" if len(names) > 3 else ""
            )
            elements = self._elements(names)
            share = f" ({percent(elements / sum(self.sizes.values()))} of the parameters)" if elements else ""
            lines.append(f"  left alone: {shown}: {reason}{share}")
        return "\n".join(lines)

    def _elements(self, names: Iterable[str]) -> int:
        return sum(self.sizes.get(name, 0) for name in names)

    @property
    def is_partial(self) -> bool:
        """Whether less than half is converted of what the caller did not leave out by ``filter_fn``, ``skip`` or name."""
        left_out = [n for n, reason in self.skipped.items() if reason == CHOICE or reason.startswith(SKIPPED)]
        candidates = sum(self.sizes.values()) - self._elements(left_out)
        return self._elements(self.converted) < LEAST_SHARE * candidates


def percent(share: float) -> str:
    """A part of a whole, of a whole number of percent where that says enough."""
    return f"{100 * share:.0f} %" if share in (0, 1) or 0.01 <= share < 0.995 else f"{100 * share:.2f} %"


def survey(
    model: nn.Module,
    config: object,
    converted: list[str],
    skipped: dict[str, str],
    filtered: Iterable[object] | None = None,
) -> Conversion:
    """A Conversion of ``model`` with the sizes, and with the matrices that are no layer's among the skipped.

    Args:
        filtered: the configs whose ``min_features`` and ``adapters`` say what is counted; by default ``config``.
    """
    configs = [c for c in filtered or [config] if isinstance(c, LinearConfig)]
    least = min((c.min_features for c in configs), default=LinearConfig.min_features)
    sizes, others = parts.matrices(model, least, any(c.adapters for c in configs))
    return Conversion(config, converted, skipped | others, sizes)


def warn_of_share(model: nn.Module, report: Conversion, stacklevel: int = 4) -> None:
    """One warning that says what is left alone and why, if it is more than half of the linear layers' parameters."""
    if report.is_partial:
        warnings.warn(
            f"only {percent(report.share)} of the parameters in the linear layers of this {type(model).__name__} follow the "
            f"config, and the rest stays in high precision:\n{report.reasons}",
            stacklevel=stacklevel,
        )


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
        filter_fn: ``(module, qualified name) -> bool``, in place of the default :func:`layer_filter`. It is asked of layers
            only, not of containers, norms and embeddings.
        device: where to move the layers first, as in torchao.

    Returns:
        which layers were converted, which were left alone and why, and with which share of the parameters. A conversion of
        less than half of the linear layers' parameters is also a warning, where the caller did not leave the rest out.

    Raises:
        ValueError: no layer is eligible; the message says why each was left alone. Or calibrated configs name no layer, or
            layers that the model lacks.
        TypeError: no config, or a ``Balanced`` one, whose balance needs a batch.
    """
    fences.warn_of_untested_versions()
    if isinstance(config, Balanced):
        raise TypeError("a balance needs a batch: call quantize_(model, balanced.config), and then balance_(model, **batch)")
    if not isinstance(config, AOBaseConfig):
        raise TypeError(f"a config is what halo_config(level=1, dtype='int8') makes, for example; got {config!r}")
    if isinstance(config, LinearConfig):
        filter_fn = filter_fn or layer_filter(model, config)
    ties = _tied_parameters(model)
    before = _marks(model)
    torchao_config = config
    if isinstance(config, LayerConfigs):
        if not config.layers:
            raise ValueError("these LayerConfigs name no layer, so nothing would be converted")
        if unknown := config.layers.keys() - before.keys():
            raise ValueError(f"the configs name {len(unknown)} layers that this model lacks, {min(unknown)} among them")
        torchao_config = FqnToConfig(OrderedDict(config.layers))
    ours = filter_fn if filter_fn is None or not isinstance(config, LinearConfig) else _of_layers(filter_fn)
    torchao.quantization.quantize_(model, torchao_config, filter_fn=ours, device=device)
    _tie_again(model, ties)

    converted, skipped, reasons = [], {}, getattr(filter_fn, "reasons", {})
    for name, mark in _marks(model).items():
        if mark is not None and mark is not before[name]:
            converted.append(name)
        else:
            skipped[name] = reasons.get(name) or _why_left(model.get_submodule(name), config)
    report = survey(model, config, converted, skipped)
    if not report.converted and _is_ours(config):
        raise ValueError(
            f"no layer of this {type(model).__name__} was converted:\n"
            f"{report.reasons or '  it has no nn.Linear, nn.Conv2d or Conv1D'}\n"
            "Pass filter_fn, or a config with another skip or min_features"
        )
    warn_of_unrotated(model, report)
    if _is_ours(config):
        warn_of_share(model, report)
    watch_trainers()
    logger.info("%s", report)
    return report


def _is_ours(config: AOBaseConfig) -> bool:
    configs = config.fqn_to_config.values() if isinstance(config, FqnToConfig) else [config]
    return any(isinstance(c, LinearConfig | LayerConfigs) for c in configs)


def _why_left(module: nn.Module, config: object) -> str:
    """Why a layer was left alone that the default filter was not asked about."""
    obstacle = layers.misfit(module, config.recipe) if isinstance(config, LinearConfig) else None
    return obstacle or (EMPTY if layers.is_empty(module) else CHOICE)


def _of_layers(filter_fn: Callable[[nn.Module, str], bool]) -> Callable[[nn.Module, str], bool]:
    """``filter_fn``, asked once about each layer of a kind that can be converted."""
    seen = set()

    def accept(module: nn.Module, name: str) -> bool:
        if not parts.is_layer(module) or module in seen:  # torchao comes to a layer that two modules hold twice
            return False
        seen.add(module)
        return filter_fn(module, name)

    return accept


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
        subclasses.own_class(module)


def layer_filter(model: nn.Module, config: LinearConfig) -> Callable[[nn.Module, str], bool]:
    """The default filter: a ``filter_fn`` for :func:`quantize_`, this library's or torchao's.

    It takes every ``nn.Linear``, also of a subclass whose forward adds nothing, every ``Conv1D`` of transformers, and where
    the config's forward is plain every ``nn.Conv2d``; but no output embeddings, layers with tied weights, PEFT's adapters,
    those that ``config.skip`` names, those with fewer than ``config.min_features`` features on a side (channels of a group),
    and those whose features 8-bit units cannot address.

    An output embedding is what the model's ``get_output_embeddings`` returns. Of a model without that method it is the last
    linear layer, or one named like a head, with as many outputs as the largest ``nn.Embedding`` has entries.
    """
    shared = _tied_parameters(model)
    heads, adapters = parts.output_embeddings(model), parts.adapters(model)
    reasons: dict[str, str] = {}

    def reason(module: Any, name: str) -> str | None:
        sides = layers.features(module)
        if sides is None:
            return layers.misfit(module, config.recipe)
        if layers.is_empty(module):
            return EMPTY
        if "weight" not in module._parameters:
            computed = hasattr(module, "weight_v") or hasattr(module, "weight_orig") or hasattr(module, "parametrizations")
            return "its weight is computed from others in every forward" if computed else "its weight is another module's"
        if nn.parameter.is_lazy(module.weight):
            return "its weight has no shape before the first batch"
        if not isinstance(module.weight, HaloWeight) and type(module.weight) is not nn.Parameter:
            return f"its weight is a {type(module.weight).__name__}"
        if isinstance(module, nn.Linear) and not subclasses.adds_nothing(module):
            return f"it is a {type(module).__name__}, whose forward may be its own"
        if obstacle := layers.misfit(module, config.recipe):
            return obstacle
        is_adapter = module in adapters
        if is_adapter and not config.adapters:
            return "it belongs to an adapter"
        if id(module.weight) in shared:
            return "its weight is tied to another layer's"
        if module in heads:
            return "it is the output embedding"
        if config.skip and re.search(config.skip, name):
            return f"{SKIPPED}{config.skip!r}"
        if min(sides) < config.min_features and not is_adapter:
            return f"fewer than min_features={config.min_features} features on a side"
        if any(side % ALIGNMENT for side in sides):
            return f"a width that is no multiple of {ALIGNMENT}"
        return None

    def accept(module: nn.Module, name: str) -> bool:
        if not parts.is_layer(module):
            return False
        why = reason(module, name)
        if why is not None:
            reasons[name] = why
        return why is None

    accept.reasons = reasons  # type: ignore[attr-defined]
    return accept


def _marks(model: nn.Module) -> dict[str, object]:
    """For every layer that could be converted, an object that a conversion renews; None if it is not converted."""
    found = ((name, m) for name, m in model.named_modules() if parts.is_layer(m))
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
