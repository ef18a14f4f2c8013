"""``export_compressed_tensors``: a converted model as a checkpoint that vLLM reads."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from halo_tensor.transformers.export import balance
from halo_tensor.transformers.export.choice import Choice, check_any, choose, leave_partners, listed, stacks
from halo_tensor.transformers.export.quantization_config import matrices, precision, quantization_config
from halo_tensor.transformers.quantizer import HaloQuantizer
from halo_tensor.weight.tensor import dense_value


@dataclass(frozen=True)
class Exported:
    """What :func:`export_compressed_tensors` wrote.

    Args:
        layers: names of the linear layers that are codes in the checkpoint.
        ignored: name -> reason, of linear layers that are in high precision there.
    """

    layers: list[str]
    ignored: dict[str, str]


def export_compressed_tensors(model: PreTrainedModel, path: str | os.PathLike, tokenizer: Any = None) -> Exported:
    """Write a converted model as compressed-tensors W8A8, which vLLM serves.

    Each converted layer is written as the codes that its forward multiplies with, int8 or fp8 [out_features, in_features], and
    one float32 scale per output feature. A server quantises activations with one scale per token, as training does. The
    rotation of in_features is a ``transform_config`` of Hadamard matrices, which a server applies to activations. All other
    tensors are written as they are, under the names of a plain checkpoint. Nothing is quantised again, unless the model holds
    no codes (``keep_codes=False``), and the model does not change.

    A balance (:func:`~halo_tensor.balance_`) is folded into the weight of the norm before the layer, or into the scales of
    ``up_proj`` or ``v_proj``. This is exact, and is checked by running the model on a few tokens.

    One warning names the layers that were trained in low precision and are written in high precision, since no server could
    compute them otherwise: layers with tied weights, those whose balance cannot be folded (``o_proj`` with grouped queries),
    and those that vLLM merges with such a layer.

    Args:
        model: a model of transformers, whose linear layers :func:`~halo_tensor.quantize_` or ``HaloQuantConfig`` has
            converted to int8 or fp8. Not sharded, and without adapters: pass what ``merge_and_unload()`` returned.
        path: a folder, which is made if it does not exist.
        tokenizer: a tokenizer or processor to save in the same folder, or None.

    Returns:
        which layers are codes in the checkpoint, and why others are not.

    Raises:
        TypeError: ``model`` is no model of transformers.
        ValueError: no layer was converted; a layer has a format (fp6), scales or rotations that W8A8 does not have; the model
            is sharded, has adapters, is on the meta device, or is quantised by another library; or a weight is not finite.

    Example:
        >>> import tempfile, transformers
        >>> from halo_tensor import halo_config, quantize_
        >>> from halo_tensor.transformers import export_compressed_tensors
        >>> tiny = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers.LlamaForCausalLM(tiny)
        >>> conversion = quantize_(model, halo_config(level=1, dtype="int8"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export_compressed_tensors(model, folder)
        >>> len(exported.layers), exported.ignored
        (7, {'lm_head': 'it was not converted'})
    """
    _check(model, path)
    choice = choose(model)
    with torch.no_grad():
        factors = _fold(model, choice)
        state = tensors(model, choice)
        balance.apply(factors, state)
    _warn(model, choice)
    config = quantization_config(choice.codes, [*choice.ignored, *stacks(model)], model.dtype)
    _save(model, Path(path), state, config)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return Exported(list(choice.codes), choice.ignored)


def tensors(model: PreTrainedModel, choice: Choice) -> dict[str, torch.Tensor]:
    """Return the tensors of the checkpoint by name.

    Raises:
        ValueError: a scale is not finite.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # without keep_vars, weights come dequantised
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in choice.codes:
            operand = choice.codes[layer]
            assert operand.scale is not None
            if not operand.scale.isfinite().all():
                raise ValueError(f"{name} has a NaN or Inf")
            state[name] = operand.any_codes()
            state[f"{name}_scale"] = operand.scale.reshape(-1, 1).expand(len(tensor), 1).contiguous()
        else:
            state[name] = dense_value(tensor).detach()
    return state | matrices(choice.codes, precision(model.dtype))


def _fold(model: PreTrainedModel, choice: Choice) -> dict[str, torch.Tensor]:
    """Fold balances until no more layers are left in high precision because of that."""
    while True:
        factors, count = balance.fold(model, choice), len(choice.codes)
        leave_partners(choice)
        if len(choice.codes) == count:
            check_any(model, choice)
            return factors


def _check(model: Any, path: str | os.PathLike) -> None:
    if not isinstance(model, PreTrainedModel):
        wrapped = next((a for a in ("peft_config", "_orig_mod", "module") if hasattr(model, a)), None)
        advice = {
            "peft_config": "export what its merge_and_unload() returns",
            "_orig_mod": "torch.compile has wrapped it: pass the model that was compiled",
            "module": "pass its .module",
            None: "only such a model has the config.json that servers read",
        }
        raise TypeError(f"expected a model of transformers; got a {type(model).__name__}: {advice[wrapped]}")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, HaloQuantizer):
        raise ValueError(
            f"the model is quantised by transformers' {type(quantizer).__name__}: load it without, then convert it"
        )
    if Path(path).is_file():
        raise ValueError(f"{path} is a file; pass a folder")


def _warn(model: PreTrainedModel, choice: Choice) -> None:
    if choice.lost:
        reasons = listed(dict.fromkeys(choice.ignored[name] for name in choice.lost), most=3)
        warnings.warn(
            f"exported in high precision, although trained in low precision: {len(choice.lost)} of "
            f"{len(choice.codes) + len(choice.lost)} layers, "
            f"{listed(choice.lost)} ({reasons})",
            stacklevel=3,
        )
    biased = [n for n, operand in choice.codes.items() if operand.column_rotation and model.get_submodule(n).bias is not None]
    if biased:
        warnings.warn(
            f"vLLM refuses layers that have a transform and a bias, as {listed(biased, most=3)} do; compressed-tensors reads "
            "them. For vLLM, train them without a rotation (fp8 at level 0), or leave them out by skip=",
            stacklevel=3,
        )


def _save(model: PreTrainedModel, path: Path, state: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    """Write the files as ``save_pretrained`` does, shards and the names of the original checkpoint included."""
    quantizer = model.__dict__.pop("hf_quantizer", None)  # it would replace the state dict by its own
    try:
        model.save_pretrained(path, state_dict=state)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
    file = path / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": quantization}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
