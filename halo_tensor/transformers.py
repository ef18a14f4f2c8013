"""Quantised checkpoints through transformers: quantise a model as it is loaded, save it quantised, load it again.

from halo_tensor.transformers import HaloQuantConfig  # importing this module teaches transformers to read "halo" checkpoints
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=HaloQuantConfig(level=1, dtype="int8"))

Every weight of an ``nn.Linear`` that :func:`~halo_tensor.quantize_` would convert is quantised as it arrives on its device and
held as codes only, so no more than one of them is there in high precision at a time. Such a model trains with adapters (PEFT).
``model.save_pretrained`` writes codes and scales, and ``from_pretrained`` reads them back, bit for bit, with no config but the
checkpoint's; ``model.dequantize()`` makes it a plain model again.

In the checkpoint a quantised ``x.weight`` is its codes in one row (int8, fp8 e4m3, or four fp6 codes in three bytes), so that
a reader without this module stops at their shape and does not take them for weights; ``x.weight_scale`` is float32, and
``x.weight_balance``, of a balanced layer, the exponents of its gain, int8 [in_features].
"""

import logging
from dataclasses import dataclass, field, fields

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from transformers.utils.versions import require_version

from halo_tensor import gains
from halo_tensor.config import HaloConfig, halo_config
from halo_tensor.convert import Conversion, dequantize_, layer_filter, survey, warn_of_share, warn_of_unrotated
from halo_tensor.modules import set_weight
from halo_tensor.ops import formats
from halo_tensor.ops.device import check_device
from halo_tensor.ops.hadamard import fit
from halo_tensor.recipe import Recipe
from halo_tensor.subclasses import follow_linear
from halo_tensor.tensor import HadamardQuantTensor
from halo_tensor.weight import HaloWeight, dense_value

require_version("transformers>=5.6", "Earlier ones cannot read quantised checkpoints: upgrade transformers.")
logger = logging.getLogger("halo_tensor")
METHOD = "halo"
#: What a checkpoint holds of a weight: codes, scale, and if it is balanced its gain. Before transformers 5.21 a name goes to
#: the first of these patterns that it begins with.
_PARTS = (r"(?!\w)", r"_scale(?!\w)", r"_balance(?!\w)")


@register_quantization_config(METHOD)
@dataclass
class HaloQuantConfig(QuantizationConfigMixin):
    """:func:`~halo_tensor.halo_config`, which explains the fields, as a ``quantization_config`` of ``from_pretrained``.

    Raises:
        ValueError: what halo_config raises; or dtype "bf16", which has no codes.
    """

    level: int = 1
    dtype: str = "int8"
    granularity: str = "row"
    block_size: int | None = 128
    seed: int | None = 0
    skip: str = "lm_head"
    min_features: int = 128
    quant_method: str = field(default=METHOD, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self):
        if self.halo_config.recipe.is_identity:
            raise ValueError(
                f"HaloQuantConfig quantises weights, and dtype {self.dtype!r} does not; load the model without it"
            )

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """What transformers makes of a checkpoint's ``quantization_config``.

        Raises:
            ValueError: it has a field that is not known, or a value that is not valid.
        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(config_dict.keys() - set(known)):
            raise ValueError(
                f"the quantization_config of this checkpoint has a field {unknown[0]!r} that this halo_tensor does not know "
                f"(it knows {', '.join(known)}). Load it with the version that wrote it, or upgrade"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    @property
    def halo_config(self) -> HaloConfig:
        """The same as a config for ``quantize_``."""
        return halo_config(
            self.level,
            self.dtype,
            granularity=self.granularity,
            block_size=self.block_size,
            seed=self.seed,
            skip=self.skip,
            min_features=self.min_features,
            frozen=True,
        )


@register_quantizer(METHOD)
class HaloQuantizer(HfQuantizer):
    """What transformers asks while it loads and saves a model that has a :class:`HaloQuantConfig`."""

    quantization_config: HaloQuantConfig
    is_trainable = True  # through adapters; transformers refuses to train the weights themselves
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float:
        return self.recipe.output.right.format.bits / 8  # type: ignore[union-attr]

    @property
    def recipe(self) -> Recipe:
        return self.quantization_config.halo_config.recipe

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError("quantised weights cannot be offloaded to CPU or disk; pass a device_map that names devices only")

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        config = self.quantization_config.halo_config
        accept = layer_filter(model, config)
        tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
        precise = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
        converted = []
        skipped: dict[str, str] = accept.reasons  # type: ignore[attr-defined]
        for name, module in model.named_modules():
            if not accept(module, name):
                continue
            if not isinstance(module, nn.Linear):
                skipped[name] = f"a {type(module).__name__} holds no codes: load without HaloQuantConfig, then call quantize_"
            elif f"{name}.weight" in tied:
                skipped[name] = "its weight is tied to another layer's"
            elif precise & set(name.split(".")):
                skipped[name] = "the model keeps it in float32"
            else:
                converted.append(name)
        self.report = survey(model, config, converted, skipped)
        if not self.report.converted:
            why = self.report.reasons or "  it has no nn.Linear"
            raise ValueError(f"no layer of this {type(model).__name__} can be quantised:\n{why}")
        warn_of_share(model, self.report)
        self.weights = {f"{name}.weight" for name in self.report.converted}
        logger.info("%s", self.report)

    def _process_model_after_weight_loading(self, model, **kwargs):
        held = [name for name in self.report.converted if isinstance(model.get_submodule(name).weight, HaloWeight)]
        warn_of_unrotated(model, Conversion(self.report.config, held))
        # Layers that read one X have equal gains: make them the very same again, by which X is known to be shared.
        seen: dict[tuple, gains.Gains] = {}
        for operand in (model.get_submodule(name).weight.operand for name in held):
            if operand.gain is not None:
                operand.gains = seen.setdefault((operand.gain.device, *operand.gain.tolist()), operand.gains)
        return model

    # From a plain checkpoint.
    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return param_name in self.weights

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    # From and to a quantised one.
    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        # By the last part of a layer's name, so that other parameters are loaded as ever.
        leaves = sorted({name.rpartition(".")[2] for name in self.report.converted})
        return [
            WeightConverter([f"{leaf}.weight{part}" for part in _PARTS], f"{leaf}.weight", [_Deserialize(self)])
            for leaf in leaves
        ]

    def get_state_dict_and_metadata(self, model) -> tuple[dict[str, torch.Tensor], dict]:
        state: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():  # without it, weights come dequantised
            if isinstance(tensor, HaloWeight) and tensor.master is None:
                assert tensor.operand is not None and tensor.operand.scale is not None
                state |= {name: _to_stored(tensor.operand), f"{name}_scale": tensor.operand.scale}
                if tensor.gain is not None:
                    state[f"{name}_balance"] = tensor.gain.log2().round().to(torch.int8)
            else:
                state[name] = dense_value(tensor).detach()
        if not any(f"{name}_scale" in state for name in state):  # dequantised since, so a plain checkpoint
            self.remove_quantization_config(model)
        return state, {}

    def _dequantize(self, model, dtype=None):
        dequantize_(model)
        return model if dtype is None else model.to(dtype)


class _Quantize(ConversionOps):
    """A weight off a plain checkpoint -> the same as a parameter of codes."""

    def __init__(self, quantizer: HaloQuantizer):
        self.hf_quantizer = quantizer

    def convert(self, input_dict, source_patterns=None, target_patterns=None, *, model, **kwargs):
        made = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if name in self.hf_quantizer.weights:
                recipe = self.hf_quantizer.recipe
                check_device(recipe.formats, value.device)
                value = _hold(model, name, HaloWeight.from_hp(value, recipe, frozen=True))
            made[name] = value
        return made


class _Deserialize(ConversionOps):
    """Codes and scale off a quantised checkpoint -> a parameter."""

    def __init__(self, quantizer: HaloQuantizer):
        self.hf_quantizer = quantizer

    def convert(self, input_dict, source_patterns, target_patterns=None, *, model, full_layer_name, **kwargs):
        codes, scale, exponents = (input_dict.get(pattern, [None])[0] for pattern in source_patterns)
        like = model.get_parameter(full_layer_name)  # on the meta device
        if scale is None:  # a weight that was plain when it was saved
            return {full_layer_name: codes.to(like.dtype)}
        recipe = self.hf_quantizer.recipe
        check_device(recipe.formats, codes.device)
        operand = _from_stored(codes, scale, like, recipe)
        if exponents is not None:
            operand.gains = gains.of_exponents(exponents)
        return {full_layer_name: _hold(model, full_layer_name, HaloWeight(None, operand, recipe))}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Keep()


class _Keep(ConversionOps):
    """On saving, ``get_state_dict_and_metadata`` has done everything."""

    def convert(self, input_dict, *args, **kwargs):
        return input_dict


def _hold(model: nn.Module, name: str, weight: HaloWeight) -> nn.Parameter:
    module = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(module, nn.Linear)
    set_weight(module, weight)
    follow_linear(module)
    return module.get_parameter("weight")


def _to_stored(operand: HadamardQuantTensor) -> torch.Tensor:
    """The codes of a weight as the checkpoint holds them."""
    assert operand.codes is not None
    return operand.codes.contiguous().flatten()


def _from_stored(stored: torch.Tensor, scale: torch.Tensor, like: torch.Tensor, recipe: Recipe) -> HadamardQuantTensor:
    """What a weight like ``like`` [out, in] brings to its products, from the codes and the scale of a checkpoint.

    Raises:
        ValueError: their sizes or dtypes are not those of such a weight under this recipe.
    """
    spec = recipe.output.right
    assert spec.format is not None
    dtype = formats.code_dtype(spec.format) if spec.format.bits == 8 else torch.uint8
    if dtype.is_floating_point and stored.is_floating_point() and stored.ndim == 1:
        stored = stored.to(dtype)  # exact: transformers before 5.21 has made them of the model's dtype
    size = like.numel() * spec.format.bits // 8
    scale_shape = [like.shape[0]] if spec.scale == "out_features" else []
    if (stored.dtype, stored.numel(), list(scale.shape)) != (dtype, size, scale_shape):
        raise ValueError(
            f"the checkpoint holds {stored.numel()} codes of {stored.dtype} with scales of shape {list(scale.shape)}, where a "
            f"weight of shape {list(like.shape)} in {spec.format} has {size} of {dtype} with scales of shape {scale_shape}"
        )
    return HadamardQuantTensor(
        like.shape,
        like.dtype,
        {"codes": stored.view(like.shape[0], -1), "codes_t": None, "scale": scale.float()},
        {
            "scale_along": "row" if scale_shape else "tensor",
            "left": None,
            "right": fit(spec.in_features, like.shape[1]),
            "format": spec.format,
        },
    )
