"""Weights of a checkpoint that another library released in 8 bits -> parameters, one at a time.

transformers runs :class:`Recode` for each weight that is a parameter of its own. Parameters that it makes of several weights
of the checkpoint, as the experts of a layer, go through :class:`Dequantize`, transformers' own operations and :class:`Hold`.
Only the weights of one parameter are in high precision at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from halo_tensor.transformers.layouts import OF_ACTIVATIONS, PARTS, WEIGHT, Layout
from halo_tensor.transformers.loading import Keep, Loading, codes_of, hold, placeholder
from halo_tensor.transformers.recoding import Recoding, cosine_of_codes

#: What transformers looks for beside a weight of a quantised checkpoint.
SERIALIZED = {"weight": [f"weight{part}" for part in PARTS] + list(OF_ACTIVATIONS)}


def patterns(leaf: str) -> list[str]:
    """What the checkpoint may hold of a layer whose name ends in ``leaf``, as patterns: ``PARTS``, then ``OF_ACTIVATIONS``."""
    return [f"{leaf}.weight{part}(?!\\w)" for part in PARTS] + [f"{leaf}.{name}(?!\\w)" for name in OF_ACTIVATIONS]


class _Op(ConversionOps):
    """What the operations share.

    Attributes:
        loading: the model's layers, and what was found in the checkpoint.
        hf_quantizer: by this attribute transformers knows that dtypes of what goes into the operation stay as they are.
        layout: of the checkpoint.
        recoding: where they note what became of weights.
    """

    def __init__(self, hf_quantizer: Any):
        self.hf_quantizer = hf_quantizer
        self.loading: Loading = hf_quantizer.loading
        self.layout: Layout = hf_quantizer.layout
        self.recoding: Recoding = hf_quantizer.recoding

    def __deepcopy__(self, memo: dict) -> "_Op":
        return self  # transformers copies it for each weight, and all copies write to the same Loading

    @property
    def reverse_op(self) -> ConversionOps:
        """What transformers runs when the model is saved."""
        return Keep()

    def _made(self, model: nn.Module, name: str, values: torch.Tensor, coded: bool) -> torch.Tensor:
        """Return the parameter of a weight. ``coded``: whether the checkpoint has it in 8 bits."""
        loading = self.loading
        (loading.coded if coded else loading.plain).add(name)
        if not coded or name not in loading.weights:
            (self.recoding.dequantised if coded else self.recoding.plain).append(name)
            loading.weights.discard(name)
            return values
        if values.shape != loading.shapes[name]:
            loading.weights.discard(name)  # transformers then looks at the shape, and refuses or initialises it
            return values
        if not loading.frozen:
            return values
        weight = codes_of(model, name, values, loading.recipe)
        self.recoding.cosines[name] = cosine_of_codes(weight, values)
        return hold(model, name, weight)


class Recode(_Op):
    """The parts of a weight -> its parameter."""

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
        """Make a parameter of the parts. ``source_patterns`` are :func:`patterns`."""
        name, like = full_layer_name, model.get_parameter(full_layer_name)  # on the meta device
        given = zip(PARTS, source_patterns[: len(PARTS)], strict=True)
        parts = {part: input_dict.pop(pattern)[0] for part, pattern in given if pattern in input_dict}
        try:
            values = self.layout.values(parts, like.dtype)
        except ValueError as error:  # transformers would log an error that is raised here, and raise one that names nothing
            self.loading.refused[name] = str(error)
            tensors = [*parts.values(), *(tensors[0] for tensors in input_dict.values())]
            return {name: placeholder(like, tensors[0].device)}
        coded = not self.layout.is_plain(parts)
        del parts
        return {name: self._made(model, name, values, coded)}


class Dequantize(_Op):
    """Weights from which transformers makes one parameter, and their scales -> their values."""

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        """Dequantise each weight, and drop what belongs to it."""
        dtype, plain = model.get_parameter(full_layer_name).dtype, True
        made: dict[str, list[torch.Tensor]] = {}
        for pattern in [p for p in input_dict if p.endswith(f"weight{WEIGHT}")]:
            found = {part: input_dict.pop(pattern + part) for part in PARTS if pattern + part in input_dict}
            count = len(found[WEIGHT])
            values = made[pattern] = []
            for i in range(count):
                parts = {part: tensors[i] for part, tensors in found.items() if i < len(tensors)}
                try:
                    if any(len(tensors) != count for tensors in found.values()):
                        raise ValueError(f"it is made of {count} weights, and some of their scales are missing")
                    values.append(self.layout.values(parts, dtype))
                except ValueError as error:
                    self.loading.refused[full_layer_name] = f"{pattern}: {error}"
                    values.append(parts[WEIGHT].new_zeros((), dtype=dtype).expand(parts[WEIGHT].shape))
                plain &= self.layout.is_plain(parts)
                found[WEIGHT][i] = None
        if plain:
            self.loading.plain.add(full_layer_name)
        return made


class Hold(_Op):
    """What transformers has made of dequantised weights -> parameters."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        target_patterns: Sequence[str],
        model: Any,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Quantise those that are weights of converted layers."""
        coded = full_layer_name not in self.loading.plain
        made = {}
        for target, values in input_dict.items():
            values = values[0] if isinstance(values, list) else values
            name = full_layer_name.replace(target_patterns[0], target)
            made[target] = self._made(model, name, values, coded)
        return made
