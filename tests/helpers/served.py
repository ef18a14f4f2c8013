"""Reads an exported checkpoint with the compressed-tensors package, as a server does, and states what it should compute."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight

transformers = pytest.importorskip("transformers")
WHY = "compressed-tensors is not installed"


def sections(folder: Path) -> dict:
    """The quantization_config of config.json."""
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


def read(folder: Path, transformed: bool = True) -> nn.Module:
    """Build the model of a checkpoint with compressed-tensors alone, without this library, and load every tensor of it."""
    pytest.importorskip("compressed_tensors", reason=WHY)
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    quantisation = QuantizationConfig.model_validate(sections(folder))
    if transformed and sections(folder)["transform_config"]:
        apply_transform_config(model, TransformConfig.model_validate(sections(folder)["transform_config"]))
    apply_quantization_config(model, quantisation)
    compressor = ModelCompressor(quantization_config=quantisation)
    compressor.compress_model(model)
    state = load_file(Path(folder) / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    loaded = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    missing = {name for name in missing if id(model.get_parameter(name)) not in loaded} - set(model.all_tied_weights_keys)
    assert not missing and (not transformed or not unexpected), (missing, unexpected)
    model.tie_weights()
    compressor.decompress_model(model)
    return model.eval()


def exact_activations(model: nn.Module) -> nn.Module:
    """Make what :func:`read` returned leave activations as they are, rotated and not quantised."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """A plain copy of a converted model, with the values of the codes as weights."""
    values = {
        name: weight.operand.dequantize()
        for name, weight in model.named_parameters()
        if isinstance(weight, HaloWeight) and weight.operand is not None
    }
    plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict({name: values.get(name, tensor) for name, tensor in model.state_dict().items()})
    return plain.eval()


def served_output(state: dict[str, torch.Tensor], layer: str, x: torch.Tensor) -> torch.Tensor:
    """X W'ᵀ from the tensors of a checkpoint: rotate, quantise each token, multiply codes, scale. In float64."""
    codes, scale = state[f"{layer}.weight"], state[f"{layer}.weight_scale"].double()
    x = x.double()
    for matrix in (tensor.double() for name, tensor in state.items() if name.startswith(f"{layer}.H")):
        x = (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2) / len(matrix) ** 0.5
    whole = codes.dtype == torch.int8
    step = x.abs().amax(-1, keepdim=True) / (127 if whole else 448)
    q = (x / step).round() if whole else (x / step).float().to(codes.dtype).double()
    return q @ codes.double().t() * step * scale.t()


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def assert_servable(model: nn.Module, path: Path) -> None:
    """A model of two blocks that a host has trained is exported, with the codes that it was trained with."""
    from safetensors.torch import load_file

    from halo_tensor.transformers import export_compressed_tensors

    exported = export_compressed_tensors(model, path)
    assert len(exported.layers) == 14
    state = load_file(Path(path) / "model.safetensors")
    for name in exported.layers:
        assert torch.equal(state[f"{name}.weight"], model.get_submodule(name).weight.codes), name
