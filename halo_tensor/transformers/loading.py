"""Weights of a checkpoint -> parameters of codes: the operations that transformers runs for each weight as it loads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer

from halo_tensor.kernels.device import check_device
from halo_tensor.layers import experts
from halo_tensor.layers.linear import set_weight
from halo_tensor.layers.linear_subclasses import follow_linear
from halo_tensor.recipe import Recipe
from halo_tensor.transformers import stored
from halo_tensor.weight.tensor import HaloWeight


@dataclass
class Loading:
    """What the operations know of the model, and what they found in the checkpoint.

    Attributes:
        recipe: what codes are made with.
        weights: names of the weights that are to be held as codes.
        readable: names of weights that may be codes in the checkpoint. The file says which of them are, since another
            class of model, or another version of this library, may choose other layers.
        shapes: name -> shape of every parameter of the model.
        frozen: whether weights are held as codes only, and not quantised after loading.
        refused: name -> reason, of weights that cannot be read.
        recorded: name -> whether the checkpoint had a record of its recipe, of weights that were read as codes.
        coded: names of parameters that are 8-bit in a checkpoint of another library.
        plain: names of weights that are in high precision in a quantised checkpoint.
    """

    recipe: Recipe
    weights: set[str]
    readable: set[str]
    shapes: dict[str, torch.Size]
    frozen: bool = True
    refused: dict[str, str] = field(default_factory=dict)
    recorded: dict[str, bool] = field(default_factory=dict)
    coded: set[str] = field(default_factory=set)
    plain: set[str] = field(default_factory=set)


class Quantize(ConversionOps):
    """A weight of a plain checkpoint -> a parameter of codes."""

    def __init__(self, loading: Loading):
        self.loading = loading

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        *,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Quantise those of the tensors that are to be codes."""
        made = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if name in self.loading.weights:
                value = self._quantize(model, name, value)
            made[name] = value
        return made

    def _quantize(self, model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
        like = model.get_parameter(name)
        if value.ndim != like.ndim:
            self.loading.refused[name] = (
                f"it is {stored.described(value)}, where the model has a matrix {list(like.shape)}. If these are codes, "
                "config.json has lost the quantization_config that it was saved with"
            )
            return placeholder(like, value.device)
        if value.shape != like.shape:
            self.loading.weights.discard(name)  # transformers then looks at the shape, and refuses or initialises it
            return value
        return hold(model, name, codes_of(model, name, value, self.loading.recipe))


class Deserialize(ConversionOps):
    """The parts of a weight of a quantised checkpoint -> a parameter."""

    def __init__(self, loading: Loading, hf_quantizer: HfQuantizer):
        self.loading = loading
        # transformers 5.21 and newer convert no dtypes before an operation that has this attribute.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> "Deserialize":
        return self  # transformers copies it for each weight, and all copies write to the same Loading

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Any = None,
        *,
        model: Any,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Make a parameter of the parts. ``source_patterns`` follow ``stored.PARTS``."""
        name, loading = full_layer_name, self.loading
        codes, *_ = parts = [input_dict.get(pattern, [None])[0] for pattern in source_patterns]
        like = model.get_parameter(name)  # on the meta device
        alone = all(part is None for part in parts[1:])
        if codes is not None and alone and codes.ndim == like.ndim and codes.is_floating_point():
            loading.plain.add(name)
            loading.weights.discard(name)  # transformers then looks at the shape
            return {name: codes.to(like.dtype)}
        device = next(part.device for part in parts if part is not None)
        try:
            if name not in loading.readable:
                raise ValueError("it is quantised, and this model has no linear layer or experts there that may be")
            operand = stored.operand_of(parts, like, loading.recipe, _in_features_first(model, name))
        except ValueError as error:  # transformers would log an error that is raised here, and raise one that names nothing
            loading.refused[name] = str(error)
            return {name: placeholder(like, device)}
        loading.recorded[name] = parts[-1] is not None
        check_device(loading.recipe.formats, device)
        return {name: hold(model, name, HaloWeight(None, operand, loading.recipe))}

    @property
    def reverse_op(self) -> ConversionOps:
        """What transformers runs when the model is saved."""
        return Keep()


class Keep(ConversionOps):
    """Leaves tensors as they are: ``HaloQuantizer.get_state_dict_and_metadata`` has made them what the checkpoint holds."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return ``input_dict``."""
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        """The same."""
        return self


def _in_features_first(model: nn.Module, name: str) -> bool:
    """Whether a weight is that of experts [experts, in, out]."""
    module: Any = model.get_submodule(name.rpartition(".")[0])
    return experts.is_experts(module) and module.is_transposed


def codes_of(model: nn.Module, name: str, values: torch.Tensor, recipe: Recipe) -> HaloWeight:
    """Return the weight of a layer as codes of ``values``."""
    check_device(recipe.formats, values.device)
    return HaloWeight.from_hp(values, recipe, frozen=True, in_features_first=_in_features_first(model, name))


def hold(model: nn.Module, name: str, weight: HaloWeight) -> nn.Parameter:
    """Give a layer its weight."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if experts.is_experts(module):
        experts.hold(module, leaf, weight)
        return module.get_parameter(leaf)
    assert isinstance(module, nn.Linear)
    set_weight(module, weight)
    follow_linear(module)
    return module.get_parameter("weight")


def placeholder(like: torch.Tensor, device: torch.device) -> nn.Parameter:
    """A parameter without memory in place of a weight that is refused, until the error is raised."""
    return nn.Parameter(torch.zeros((), dtype=like.dtype, device=device).expand(like.shape), requires_grad=False)
