"""Make the tensors that ``save_pretrained`` writes for a model whose frozen weights are held as codes."""

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.utils.versions import require_version

from halo_tensor.recipe import Recipe
from halo_tensor.transformers import stored
from halo_tensor.transformers.loading import Deserialize, Keep
from halo_tensor.weight.tensor import HaloWeight, dense_value


def state_of(model: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return the tensors of the checkpoint of a model whose config says ``recipe``.

    Raises:
        ValueError: a weight follows another recipe.
        ImportError: experts are codes, and transformers is older than 5.21.
    """
    state: dict[str, torch.Tensor] = {}
    experts = []
    for name, tensor in model.state_dict(keep_vars=True).items():  # without keep_vars, weights come dequantised
        if isinstance(tensor, HaloWeight) and tensor.master is None:
            if tensor.recipe != recipe:
                raise ValueError(
                    f"{name} was converted again, with another recipe than this model's quantization_config says, so that "
                    "the checkpoint could not be read: convert it as the config says, or call dequantize_(model) first"
                )
            state |= stored.parts_of(name, tensor)
            experts += [name] if tensor.ndim == 3 else []
        else:
            state[name] = dense_value(tensor).detach()
    keep_codes(model, experts)
    return state


def keep_codes(model: Any, experts: list[str]) -> None:
    """Let transformers leave the codes of ``experts`` as they are, and no others. The model's own conversions would cut the
    parameters of experts into those of each expert.
    """
    if experts:
        require_version("transformers>=5.21", "Earlier ones take scales of experts for weights: upgrade it.")
    conversions = getattr(model, "_weight_conversions", None) or []
    own = [conversion for conversion in conversions if not _has(conversion, Keep)]
    # transformers reverses the list, and takes the first conversion that matches a name.
    model._weight_conversions = own + [WeightConverter(name, name, [Keep()]) for name in experts]


def conversions_to_reverse(model: Any, own: Iterable[Any], leaves: Collection[str], experts: Collection[str]) -> list[Any]:
    """Return the conversions that transformers reverses when it saves a model that it loaded from a quantised checkpoint.

    Args:
        model: with the conversions that were used while loading.
        own: the conversions of the model's class. One that makes ``experts`` of plain weights belongs to these, though the
            checkpoint had codes: ``dequantize`` may come before the model is saved again.
        leaves: what follows the module's name in the names of experts, as patterns.
        experts: names of weights of experts that were read as codes.
    """
    ours = [c for c in model._weight_conversions if _has(c, Deserialize) and c.target_patterns[0] not in leaves]
    return [c for c in own if c.was_used() or (isinstance(c, WeightConverter) and _makes(c, experts))] + ours


def _makes(conversion: Any, names: Iterable[str]) -> bool:
    return any(re.search(target, name) for target in conversion.target_patterns for name in names)


def _has(conversion: Any, operation: type) -> bool:
    return any(isinstance(op, operation) for op in getattr(conversion, "operations", ()))
