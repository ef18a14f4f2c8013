"""Which layers ``quantize_`` converts, and the reasons why others are left alone."""

import re
from typing import Any

from torch import nn

from halo_tensor.config import LinearConfig
from halo_tensor.convert import ties
from halo_tensor.layers import kinds as layers
from halo_tensor.layers import linear_subclasses, model_parts
from halo_tensor.weight.tensor import HaloWeight

#: 8-bit matrix units read operands in pieces of 16 bytes.
ALIGNMENT = 16
#: Reasons of layers that the caller left out.
CHOICE = "filter_fn or the config says so"
SKIPPED = "its name matches skip="
SLOW = "predicted at "
EMPTY = "it has no features on a side, so there is nothing to multiply"


def layer_filter(model: nn.Module, config: LinearConfig) -> "LayerFilter":
    """Return the default filter: a ``filter_fn`` for ``quantize_``, this library's or torchao's.

    It accepts every ``nn.Linear`` (also of a subclass whose forward adds nothing), every ``Conv1D`` and all experts of
    transformers, and every ``nn.Conv2d`` if the config's forward is plain. It refuses

    - output embeddings, layers with tied weights, and PEFT's adapters unless ``config.adapters``,
    - layers whose name ``config.skip`` matches,
    - layers with fewer than ``config.min_features`` features on a side (channels of a group),
    - layers whose features are no multiple of 16, which 8-bit matrix units cannot address.

    The output embedding is what the model's ``get_output_embeddings`` returns. In a model without that method it is the last
    linear layer, or one named like a head, with as many outputs as the largest ``nn.Embedding`` has entries.

    Args:
        model: the model whose layers the filter is asked about.
        config: of :func:`~halo_tensor.halo_config`, :func:`~halo_tensor.hot_config` or :func:`~halo_tensor.recipe_config`.

    Returns:
        a function ``(module, qualified name) -> bool``. Its attribute ``reasons`` maps the names that it refused to reasons.

    Example:
        >>> import torch
        >>> from halo_tensor import halo_config, layer_filter, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 8))
        >>> config = halo_config()
        >>> default = layer_filter(model, config)
        >>> quantize_(model, config, filter_fn=lambda module, name: default(module, name) and name != "0").converted
        ['1']
        >>> default.reasons
        {'2': 'fewer than min_features=128 features on a side'}
    """
    return LayerFilter(model, config)


class LayerFilter:
    """The filter that :func:`layer_filter` returns."""

    def __init__(self, model: nn.Module, config: LinearConfig):
        self.config = config
        self.reasons: dict[str, str] = {}
        self._tied = ties.tied_parameters(model)
        self._heads, self._adapters = model_parts.output_embeddings(model), model_parts.adapters(model)

    def __call__(self, module: nn.Module, name: str) -> bool:
        """Return whether the layer is to be converted; if not, note the reason."""
        if not model_parts.is_layer(module):
            return False
        reason = self._obstacle(module) or self._choice(module, name)
        if reason is not None:
            self.reasons[name] = reason
        return reason is None

    def _obstacle(self, module: Any) -> str | None:
        """Why the layer cannot be converted, or not safely."""
        if layers.is_experts(module):
            return layers.misfit(module, self.config.recipe)
        if layers.features(module) is None:
            return layers.misfit(module, self.config.recipe)
        if layers.is_empty(module):
            return EMPTY
        if "weight" not in module._parameters:
            computed = hasattr(module, "weight_v") or hasattr(module, "weight_orig") or hasattr(module, "parametrizations")
            return "its weight is computed from others in every forward" if computed else "its weight is another module's"
        if nn.parameter.is_lazy(module.weight):
            return "its weight has no shape before the first batch"
        if not isinstance(module.weight, HaloWeight) and type(module.weight) is not nn.Parameter:
            return f"its weight is a {type(module.weight).__name__}"
        if isinstance(module, nn.Linear) and not linear_subclasses.adds_nothing(module):
            return f"it is a {type(module).__name__}, whose forward may be its own"
        return layers.misfit(module, self.config.recipe)

    def _choice(self, module: Any, name: str) -> str | None:
        """Why the layer is not to be converted, although it can be."""
        config, sides = self.config, [side for widths in layers.widths(module) for side in widths]
        is_adapter = module in self._adapters
        if is_adapter and not config.adapters:
            return "it belongs to an adapter"
        if any(id(weight) in self._tied for weight in layers.weights(module).values()):
            return "its weight is tied to another layer's"
        if module in self._heads:
            return "it is the output embedding"
        if config.skip and re.search(config.skip, name):
            return f"{SKIPPED}{config.skip!r}"
        if min(sides) < config.min_features and not is_adapter:
            return f"fewer than min_features={config.min_features} features on a side"
        if any(side % ALIGNMENT for side in sides):
            return f"a width that is no multiple of {ALIGNMENT}"
        return None
