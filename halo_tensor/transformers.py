"""Quantised checkpoints through transformers: quantise a model as it is loaded, save it quantised, load it again.

from halo_tensor.transformers import HaloQuantConfig  # importing this module teaches transformers to read "halo" checkpoints
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=HaloQuantConfig(level=1, dtype="int8"))

Every weight of an ``nn.Linear`` that :func:`~halo_tensor.quantize_` would convert is quantised as it arrives on its device and
held as codes only, so no more than one of them is there in high precision at a time. Such a model trains with adapters (PEFT).
``model.save_pretrained`` writes codes and scales, and ``from_pretrained`` reads them back, bit for bit, with no config but the
checkpoint's; ``model.dequantize()`` makes it a plain model again.

In the checkpoint a quantised ``x.weight`` is its codes in one row (int8, fp8 e4m3, or four fp6 codes in three bytes), so that
a reader without this module stops at their shape and does not take them for weights; ``x.weight_scale`` is float32, and
``x.weight_balance``, of a balanced layer, the exponents of its gain, int8 [in_features]. ``x.weight_recipe`` is a text, UTF-8
in uint8, that says what the codes were made with: a checkpoint whose ``config.json`` says something else is refused, as are
parts that are missing or damaged.
"""

import logging
import warnings
from dataclasses import dataclass, field, fields

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from transformers.utils.versions import require_version

from halo_tensor.calibration.balance import LARGEST_EXPONENT
from halo_tensor.config import HaloConfig, halo_config
from halo_tensor.convert import Conversion, dequantize_, layer_filter, survey, warn_of_share, warn_of_unrotated
from halo_tensor.fences import fast_paths as fences
from halo_tensor.kernels.device import check_device
from halo_tensor.layers.linear import set_weight
from halo_tensor.layers.subclasses import follow_linear
from halo_tensor.operand import gains
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import TENSOR, Format, Recipe, Rotation, Scales, W
from halo_tensor.reference import codes as formats
from halo_tensor.reference.hadamard import fit
from halo_tensor.trainers import watch_trainers
from halo_tensor.weight.tensor import HaloWeight, dense_value

require_version("transformers>=5.6", "Earlier ones cannot read quantised checkpoints: upgrade transformers.")
logger = logging.getLogger("halo_tensor")
METHOD = "halo"
#: What a checkpoint holds of a weight: codes, scale, if it is balanced its gain, and the record of its recipe. Before
#: transformers 5.21 a name goes to the first of these patterns that it begins with.
_PARTS = (r"(?!\w)", r"_scale(?!\w)", r"_balance(?!\w)", r"_recipe(?!\w)")


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
        fences.warn_of_untested_versions()
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
        self.refused: dict[str, str] = {}  # weights of the checkpoint that cannot be read, and why
        self.recorded: dict[str, bool] = {}  # weights that were read as codes, and whether there was a record of their recipe
        self.plain: set[str] = set()  # weights that were plain when the quantised model was saved
        # Layers whose weights may be codes. The file says which of them are, since another class of model, or another version
        # of this library, may choose otherwise.
        self.readable: list[str] = []
        for name, module in model.named_modules():
            is_precise = bool(precise & set(name.split(".")))
            if isinstance(module, nn.Linear) and not is_precise:
                self.readable.append(name)
            if not accept(module, name):
                continue
            if not isinstance(module, nn.Linear):
                skipped[name] = f"a {type(module).__name__} holds no codes: load without HaloQuantConfig, then call quantize_"
            elif f"{name}.weight" in tied:
                skipped[name] = "its weight is tied to another layer's"
            elif is_precise:
                skipped[name] = "the model keeps it in float32"
            else:
                converted.append(name)
        self.report = survey(model, config, converted, skipped)
        if not self.report.converted:
            why = self.report.reasons or "  it has no nn.Linear"
            raise ValueError(f"no layer of this {type(model).__name__} can be quantised:\n{why}")
        warn_of_share(model, self.report)
        self.weights = {f"{name}.weight" for name in self.report.converted}
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        logger.info("%s", self.report)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self._check_what_was_read(model)
        linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
        held = [name for name, module in linears if isinstance(module._parameters.get("weight"), HaloWeight)]
        self._report_what_is_held(held)
        watch_trainers()
        warn_of_unrotated(model, Conversion(self.report.config, held))
        # Layers that read one X have equal gains: make them the very same again, by which X is known to be shared.
        seen: dict[tuple, gains.Gains] = {}
        for operand in (model.get_submodule(name).weight.operand for name in held):
            if operand.gain is not None:
                operand.gains = seen.setdefault((operand.gain.device, *operand.gain.tolist()), operand.gains)
        return model

    def _check_what_was_read(self, model) -> None:
        for name, parameter in model.named_parameters():
            if parameter.shape != self.shapes.get(name, parameter.shape):
                # Transformers 5.6 looks at no shape of a quantised model, later ones do.
                self.refused[name] = f"it is {list(parameter.shape)}, where the model has {list(self.shapes[name])}"
        unrecorded = [name for name, recorded in self.recorded.items() if not recorded]
        if unrecorded and any(self.recorded.values()):
            self.refused |= dict.fromkeys(unrecorded, "the record of its recipe is missing, which other weights have")
        elif unrecorded:
            warnings.warn(
                f"the checkpoint does not say what its {len(unrecorded)} quantised weights were made with, as those that "
                "halo_tensor 0.1.0 wrote do not: its config.json cannot be checked. save_pretrained adds the records",
                stacklevel=2,
            )
        if self.refused:
            lines = [f"  {name}: {why}" for name, why in self.refused.items()]
            more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise ValueError(f"this checkpoint has weights that cannot be used:\n{chr(10).join(lines[:5])}{more}")

    def _report_what_is_held(self, held: list[str]) -> None:
        new = []
        for name in held:
            self.report.skipped.pop(name, None)
        for name in set(self.report.converted) - set(held):
            plain = f"{name}.weight" in self.plain
            self.report.skipped[name] = "it was plain when it was saved" if plain else "its weight is not in the checkpoint"
            new += [] if plain else [name]
        self.report.converted = held
        if new:
            warnings.warn(
                f"left in high precision and newly initialised, since the checkpoint has no weights that fit: "
                f"{', '.join(sorted(new))}",
                stacklevel=2,
            )

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
        leaves = sorted({name.rpartition(".")[2] for name in self.readable})
        return [
            WeightConverter([f"{leaf}.weight{part}" for part in _PARTS], f"{leaf}.weight", [_Deserialize(self)])
            for leaf in leaves
        ]

    def get_state_dict_and_metadata(self, model) -> tuple[dict[str, torch.Tensor], dict]:
        state: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():  # without it, weights come dequantised
            if isinstance(tensor, HaloWeight) and tensor.master is None:
                if tensor.recipe != self.recipe:
                    raise ValueError(
                        f"{name} was converted again, with another recipe than this model's quantization_config says, so that "
                        "the checkpoint could not be read: convert it as the config says, or call dequantize_(model) first"
                    )
                assert tensor.operand is not None and tensor.operand.scale is not None
                state |= {name: _to_stored(tensor.operand), f"{name}_scale": tensor.operand.scale}
                if tensor.gain is not None:
                    state[f"{name}_balance"] = tensor.gain.log2().round().to(torch.int8)
                state[f"{name}_recipe"] = _to_bytes(_record_of(tensor.operand))
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
                value = self._quantize(model, name, value)
            made[name] = value
        return made

    def _quantize(self, model, name: str, value: torch.Tensor) -> torch.Tensor:
        quantizer, like = self.hf_quantizer, model.get_parameter(name)
        if value.ndim != like.ndim:
            quantizer.refused[name] = (
                f"it is {_said(value)}, where the model has a matrix {list(like.shape)}. If these are codes, config.json has "
                "lost the quantization_config that it was saved with"
            )
            return _placeholder(like, value.device)
        if value.shape != like.shape:
            quantizer.weights.discard(name)  # transformers then looks at the shape, and refuses or initialises it
            return value
        recipe = quantizer.recipe
        check_device(recipe.formats, value.device)
        return _hold(model, name, HaloWeight.from_hp(value, recipe, frozen=True))


class _Deserialize(ConversionOps):
    """The parts of a weight off a quantised checkpoint -> a parameter."""

    def __init__(self, quantizer: HaloQuantizer):
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo):
        return self  # transformers copies it for every weight; what it notes is to reach the quantizer

    def convert(self, input_dict, source_patterns, target_patterns=None, *, model, full_layer_name, **kwargs):
        name, quantizer = full_layer_name, self.hf_quantizer
        codes, *_ = parts = [input_dict.get(pattern, [None])[0] for pattern in source_patterns]
        like = model.get_parameter(name)  # on the meta device
        alone = all(part is None for part in parts[1:])
        if codes is not None and alone and codes.ndim == like.ndim and codes.is_floating_point():
            quantizer.plain.add(name)
            quantizer.weights.discard(name)  # transformers then looks at the shape
            return {name: codes.to(like.dtype)}
        device = next(part.device for part in parts if part is not None)
        try:
            if name.removesuffix(".weight") not in quantizer.readable:
                raise ValueError("it is quantised, and this model has no linear layer there that may be")
            operand = _from_stored(parts, like, quantizer.recipe)
        except ValueError as error:  # if it were raised, transformers would log it and raise one that names nothing
            quantizer.refused[name] = str(error)
            return {name: _placeholder(like, device)}
        quantizer.recorded[name] = parts[-1] is not None
        check_device(quantizer.recipe.formats, device)
        return {name: _hold(model, name, HaloWeight(None, operand, quantizer.recipe))}

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


def _placeholder(like: torch.Tensor, device: torch.device) -> nn.Parameter:
    """Stands where a weight that is refused would be, without memory, until the error is raised."""
    return nn.Parameter(torch.zeros((), dtype=like.dtype, device=device).expand(like.shape), requires_grad=False)


def _said(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _record(
    format: Format | None, granularity: Scales, rotation: Rotation | None, shape: tuple[int, ...], balanced: bool
) -> str:
    """What the codes of a weight [out, in] stand for, as text. Equal texts mean that codes can be read: the levels 1 and 2,
    which differ in E only, have the same."""
    scale = "one scale" if granularity == TENSOR else f"a scale per {granularity}"
    rotated = f"rotated by {rotation}" if rotation else "not rotated"
    return f"{format} {list(shape)}, {scale}, {rotated}, {'balanced' if balanced else 'not balanced'}"


def _record_of(operand: HadamardQuantTensor) -> str:
    return _record(operand.format, operand.granularity, operand.column_rotation, operand.shape, operand.gain is not None)


def _to_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _to_stored(operand: HadamardQuantTensor) -> torch.Tensor:
    """The codes of a weight as the checkpoint holds them."""
    assert operand.codes is not None
    return operand.codes.contiguous().flatten()


def _from_stored(parts: list[torch.Tensor | None], like: torch.Tensor, recipe: Recipe) -> HadamardQuantTensor:
    """What a weight like ``like`` [out, in] brings to its products, from the ``_PARTS`` that a checkpoint has of it.

    Raises:
        ValueError: a part is missing, or is not what such a weight has under this recipe.
    """
    stored, scale, exponents, record = parts
    if stored is None or scale is None:
        raise ValueError(f"its {'codes are' if stored is None else 'scale is'} missing")
    spec = recipe.output.right
    assert spec.format is not None
    granularity, rotation = spec.granularity.on(W), fit(spec.in_features, like.shape[1])
    if record is not None:
        written = bytes(record.to(torch.uint8).flatten().tolist()).decode(errors="replace")
        expected = _record(spec.format, granularity, rotation, like.shape, exponents is not None)
        if written != expected:
            raise ValueError(
                f"its codes were written as ({written}), and by config.json and what else the file has of it they are "
                f"({expected}). Use the config.json that it was saved with"
            )
    operand = HadamardQuantTensor(
        like.shape,
        like.dtype,
        {
            "codes": _checked_codes(stored, like, spec.format).view(like.shape[0], -1),
            "codes_t": None,
            "scale": _checked_scale(scale, list(granularity.shape(*like.shape))),
        },
        {"granularity": granularity, "row_rotation": None, "column_rotation": rotation, "format": spec.format},
    )
    if exponents is not None:
        operand.gains = gains.of_exponents(_checked_exponents(exponents, like.shape[1]))
    return operand


def _checked_codes(stored: torch.Tensor, like: torch.Tensor, format: Format) -> torch.Tensor:
    dtype = formats.code_dtype(format) if format.bits == 8 else torch.uint8
    size = like.numel() * format.bits // 8
    # Transformers before 5.21 has made fp8 codes of the model's dtype.
    castable = dtype.is_floating_point and stored.dtype == like.dtype
    if list(stored.shape) != [size] or not (stored.dtype == dtype or castable):
        raise ValueError(f"its codes are {_said(stored)}, where a weight {list(like.shape)} in {format} has {size} of {dtype}")
    codes = stored.to(dtype)
    if castable and not torch.equal(codes.to(stored.dtype), stored):
        raise ValueError(f"some of its codes are not finite, or no {format} numbers")
    if dtype == torch.int8 and codes.numel() and codes.min() < -format.max:
        raise ValueError(f"some of its codes are {codes.min().item()}, beyond ±{format.max:.0f}")
    if dtype == torch.float8_e4m3fn and ((codes.view(torch.uint8) & 0x7F) == 0x7F).any():
        raise ValueError("some of its codes are NaN")
    return codes


def _checked_scale(scale: torch.Tensor, shape: list[int]) -> torch.Tensor:
    if (scale.dtype, list(scale.shape)) != (torch.float32, shape):
        raise ValueError(f"its scale is {_said(scale)}, where it has to be float32 {shape}")
    if not ((scale > 0) & scale.isfinite()).all():
        raise ValueError("some of its scales are not finite and positive: the file is damaged, or the weight was not finite")
    return scale


def _checked_exponents(exponents: torch.Tensor, in_features: int) -> torch.Tensor:
    if (exponents.dtype, list(exponents.shape)) != (torch.int8, [in_features]):
        raise ValueError(f"its balance is {_said(exponents)}, where it has to be int8 {[in_features]}")
    if (exponents.int().abs() > LARGEST_EXPONENT).any():
        raise ValueError(f"some exponents of its balance are beyond ±{LARGEST_EXPONENT}")
    return exponents
