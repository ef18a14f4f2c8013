"""The quantizer that transformers asks while it loads and saves a model that has a ``HaloQuantConfig``."""

import logging
import warnings
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer

from halo_tensor.convert import Conversion, dequantize_, layer_filter, quantize_, survey, warn_of_share, warn_of_unrotated
from halo_tensor.fences import fast_paths as fences
from halo_tensor.layers.experts import is_experts
from halo_tensor.layers.kinds import weights
from halo_tensor.operand import gains
from halo_tensor.recipe import Recipe
from halo_tensor.trainers import watch_trainers
from halo_tensor.transformers import released, saving, stored
from halo_tensor.transformers.config import METHOD, HaloQuantConfig
from halo_tensor.transformers.layouts import is_code, layout_of, refuse_codes
from halo_tensor.transformers.loading import Deserialize, Loading, Quantize
from halo_tensor.transformers.merging import read_other_checkpoints
from halo_tensor.transformers.recoding import Recoding, cosine_of_codes, listed
from halo_tensor.weight.tensor import HaloWeight, dense_value

logger = logging.getLogger("halo_tensor")
read_other_checkpoints()


def _holds_codes(module: nn.Module) -> bool:
    """Whether all weights of a linear layer or of experts are converted ones."""
    held = list(weights(module).values()) if isinstance(module, nn.Linear) or is_experts(module) else []
    return bool(held) and all(isinstance(weight, HaloWeight) for weight in held)


def _leaf_of_experts(model: nn.Module, name: str) -> str | None:
    """Return the end of the name of a weight of experts, from the module's own name on; None for any other weight."""
    path, _, leaf = name.rpartition(".")
    return f"{path.rpartition('.')[2]}.{leaf}" if is_experts(model.get_submodule(path)) else None


@register_quantizer(METHOD)
class HaloQuantizer(HfQuantizer):
    """Loads and saves models with a :class:`HaloQuantConfig`. transformers makes and calls it.

    Attributes:
        report: which layers are held as codes, and why others are not.
        layout: of a checkpoint that another library released in 8 bits; None for any other.
        recoding: what became of its weights.
    """

    quantization_config: HaloQuantConfig
    is_trainable = True  # through adapters; transformers refuses to train the weights themselves
    is_compileable = True

    def __init__(self, quantization_config: HaloQuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        source = vars(quantization_config).pop("source", None)
        self.layout = None if source is None else layout_of(source)
        if self.layout is not None:
            self.recoding = Recoding(str(self.layout))
            self.serialized_names = released.SERIALIZED

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` can write the model."""
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes per element of a quantised weight."""
        format = self.recipe.output.right.format
        assert format is not None
        return format.bits / 8

    @property
    def recipe(self) -> Recipe:
        """What the codes are made with."""
        return self.quantization_config.halo_config.recipe

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse device maps that offload weights.

        Raises:
            ValueError: ``device_map`` names the disk, or the CPU among other devices.
        """
        fences.warn_of_untested_versions()
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError("quantised weights cannot be offloaded to CPU or disk; pass a device_map that names devices only")

    # Before loading: choose layers.

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.halo_config
        readable, converted, skipped = self._choose_layers(model)
        self._experts = {leaf for name in readable if (leaf := _leaf_of_experts(model, name)) is not None}
        self.report = survey(model, config, converted, skipped)
        if not self.report.converted:
            why = self.report.reasons or "  it has no nn.Linear"
            raise ValueError(f"no layer of this {type(model).__name__} can be quantised:\n{why}")
        warn_of_share(model, self.report)
        self.loading = Loading(
            recipe=config.recipe,
            weights={f"{name}.{leaf}" for name in self.report.converted for leaf in weights(model.get_submodule(name))},
            readable=readable,
            shapes={name: parameter.shape for name, parameter in model.named_parameters()},
            frozen=config.frozen is True,
        )
        if self.layout is None and not self.pre_quantized:
            refuse_codes(kwargs.get("checkpoint_files"))
        logger.info("%s", self.report)

    def _choose_layers(self, model: Any) -> tuple[set[str], list[str], dict[str, str]]:
        """Names of weights that may be codes in a checkpoint, of layers to quantise, and of others with reasons."""
        accept = layer_filter(model, self.quantization_config.halo_config)
        tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
        precise = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
        readable, converted, skipped = set(), [], accept.reasons
        for name, module in model.named_modules():
            is_precise = bool(precise & set(name.split(".")))
            if (isinstance(module, nn.Linear) or is_experts(module)) and not is_precise:
                readable |= {f"{name}.{leaf}" for leaf in weights(module)}
            if not accept(module, name):
                continue
            if not (isinstance(module, nn.Linear) or is_experts(module)):
                skipped[name] = f"a {type(module).__name__} holds no codes: load without HaloQuantConfig, then call quantize_"
            elif any(f"{name}.{leaf}" in tied for leaf in weights(module)):
                skipped[name] = "its weight is tied to another layer's"
            elif is_precise:
                skipped[name] = "the model keeps it in float32"
            else:
                converted.append(name)
        return readable, converted, skipped

    # While loading.

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of a plain checkpoint is to be quantised."""
        if self.layout is not None:
            self.pre_quantized = True  # the first weight arrives: see update_weight_conversions
            return False
        return self.loading.frozen and param_name in self.loading.weights

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element that a parameter will have."""
        coded = self.loading.frozen and param_name in self.loading.weights
        return self.quantized_element_size if coded else param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to which transformers casts a tensor of a quantised checkpoint; None leaves it."""
        made = super().get_new_dtype(converter, param, dtype)
        if self.layout is not None and made is not None and is_code(param):
            name = converter.target_patterns[0]
            self.loading.refused[name] = "it is 8-bit, and no scale in a layout that is known belongs to it"
        return made

    def get_load_operations(self) -> dict[str, type]:
        """What runs before transformers makes one parameter of several weights."""
        return {} if self.layout is None else {"dequantize": released.Dequantize}

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """The operations for all weights of the checkpoint."""
        updated = super().update_weight_conversions(weight_conversions, *args)
        if self.layout is None:
            self._own_conversions = list(weight_conversions)
            return updated
        for conversion in updated:
            if isinstance(getattr(conversion, "operations", [None])[0], released.Dequantize):
                conversion.operations.append(released.Hold(self))
        self._conversions = list(zip(weight_conversions, updated, strict=False))
        # transformers loads in threads, as fast as it can, unless weights are quantised while loading, which is what it takes
        # this for. So it does not hold the whole checkpoint beside what is made of it.
        self.pre_quantized = False
        return updated

    def get_quantize_ops(self) -> ConversionOps:
        """The operation for weights of a plain checkpoint."""
        return Quantize(self.loading)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The operations for weights of a quantised checkpoint."""
        if not self.pre_quantized:
            return []
        # By the last part of a layer's name, so that transformers loads all other parameters as usual.
        if self.layout is not None:
            matrices = (name for name, shape in self.loading.shapes.items() if len(shape) > 1 and name.endswith(".weight"))
            leaves = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in matrices})
            return [WeightConverter(released.patterns(leaf), f"{leaf}.weight", [released.Recode(self)]) for leaf in leaves]
        linear = {".".join(name.split(".")[-2:]) for name in self.loading.readable if name.endswith(".weight")}
        return [
            WeightConverter([f"{leaf}{part}" for part in stored.PARTS], leaf, [Deserialize(self.loading, self)])
            for leaf in sorted(linear | self._experts)
        ]

    # After loading: check and report.

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._check_what_was_read(model)
        if self.layout is not None:
            self._finish_released(model)
        elif self.pre_quantized:
            coded = [name for name in self.loading.recorded if _leaf_of_experts(model, name) is not None]
            model._weight_conversions = saving.conversions_to_reverse(model, self._own_conversions, self._experts, coded)
        if not self.loading.frozen:
            return self._make_trainable(model)
        held = [name for name, module in model.named_modules() if _holds_codes(module)]
        self._report_what_is_held(model, held)
        watch_trainers()
        warn_of_unrotated(model, Conversion(self.report.config, held))
        # Layers that read the same X have equal gains. Make those one object, by which the layers find that they share X.
        seen: dict[tuple, gains.Gains] = {}
        for operand in (weight.operand for name in held for weight in weights(model.get_submodule(name)).values()):
            if operand.gain is not None:
                operand.gains = seen.setdefault((operand.gain.device, *operand.gain.tolist()), operand.gains)
        return model

    def _check_what_was_read(self, model: Any) -> None:
        """Raise an error that names the weights that cannot be used."""
        refused, recorded, shapes = self.loading.refused, self.loading.recorded, self.loading.shapes
        for name, parameter in model.named_parameters():
            if parameter.shape != shapes.get(name, parameter.shape):
                # transformers 5.6 checks no shape in a quantised model; later versions do.
                refused[name] = f"it is {list(parameter.shape)}, where the model has {list(shapes[name])}"
        for name, module in model.named_modules():
            held = weights(module) if is_experts(module) else {}
            if any(isinstance(w, HaloWeight) for w in held.values()) and not _holds_codes(module):
                plain = next(leaf for leaf, w in held.items() if not isinstance(w, HaloWeight))
                refused.setdefault(f"{name}.{plain}", "its codes are missing, and the experts' other weight has some")
        unrecorded = [name for name, has_record in recorded.items() if not has_record]
        if unrecorded and any(recorded.values()):
            refused |= dict.fromkeys(unrecorded, "the record of its recipe is missing, which other weights have")
        elif unrecorded:
            warnings.warn(
                f"the checkpoint does not say what its {len(unrecorded)} quantised weights were made with, as those that "
                "halo_tensor 0.1.0 wrote do not: its config.json cannot be checked. save_pretrained adds the records",
                stacklevel=2,
            )
        if refused:
            lines = [f"  {name}: {why}" for name, why in refused.items()]
            more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise ValueError(f"this checkpoint has weights that cannot be used:\n{chr(10).join(lines[:5])}{more}")

    def _finish_released(self, model: Any) -> None:
        """Check and report what became of the weights of a checkpoint of another library."""
        self.pre_quantized = True
        # What transformers runs when it saves: the model's own conversions, without those of the layout.
        model._weight_conversions = [own for own, made in self._conversions if made.was_used()]
        text_config = model.config.get_text_config(decoder=True)
        if text_config is not model.config and hasattr(text_config, "quantization_config"):
            del text_config.quantization_config  # that of the checkpoint
        dequantised = self.recoding.dequantised
        if not self.loading.coded:
            raise ValueError(f"config.json says that this checkpoint is quantised ({self.layout}), and none of its weights is")
        if dequantised:
            dtype = str(model.get_parameter(dequantised[0]).dtype).removeprefix("torch.")
            gib = sum(self.loading.shapes[name].numel() for name in dequantised) * model.dtype.itemsize / 2**30
            warnings.warn(
                f"8-bit in the checkpoint, and dequantised to {dtype} ({gib:.2g} GiB), since they belong to no layer that is "
                f"converted: {listed(dequantised)}. model.hf_quantizer.report and model.halo_recoding list them",
                stacklevel=2,
            )
        model.halo_recoding = self.recoding
        logger.info("%s", self.recoding)

    def _make_trainable(self, model: Any) -> Any:
        """Convert the layers of a model that was loaded in high precision, all of which is to be trained."""
        wanted = {name.rpartition(".")[0] for name in self.loading.weights}
        self.report = quantize_(model, self.quantization_config.halo_config, filter_fn=lambda module, name: name in wanted)
        if self.layout is not None:
            for name in self.report.converted:
                for leaf, weight in weights(model.get_submodule(name)).items():
                    self.recoding.cosines[f"{name}.{leaf}"] = cosine_of_codes(weight, dense_value(weight).detach())
            logger.info("%s", self.recoding)
        self.remove_quantization_config(model)
        return model

    def _report_what_is_held(self, model: Any, held: list[str]) -> None:
        """Bring ``report`` in line with the layers that are held as codes. Warn of newly initialised ones."""
        new = []
        for name in held:
            self.report.skipped.pop(name, None)
        for name in set(self.report.converted) - set(held):
            held_plain = weights(model.get_submodule(name))
            plain = any(f"{name}.{leaf}" in self.loading.plain for leaf in held_plain)
            # The model's own conversions make experts of plain weights; this flag of transformers says that they did.
            plain |= all(w.ndim == 3 and getattr(w, "_is_hf_initialized", False) for w in held_plain.values())
            saved = "it was plain when it was saved" if self.layout is None else "the checkpoint has it in high precision"
            self.report.skipped[name] = saved if plain else "its weight is not in the checkpoint"
            new += [] if plain else [name]
        self.report.converted = held
        if new:
            warnings.warn(
                f"left in high precision and newly initialised, since the checkpoint has no weights that fit: "
                f"{', '.join(sorted(new))}",
                stacklevel=2,
            )

    # Saving.

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict]:
        """The tensors of the checkpoint, and no metadata.

        Raises:
            ValueError: a weight follows another recipe than the ``quantization_config`` says.
        """
        state = saving.state_of(model, self.recipe)
        if not any(f"{name}_scale" in state for name in state):  # it was dequantised, so the checkpoint is a plain one
            self.remove_quantization_config(model)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dequantize_(model)
        saving.keep_codes(model, [])
        # After save_pretrained, transformers (5.23) passes the dtype's name, as it has written it to the config.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if dtype is None else model.to(dtype)
