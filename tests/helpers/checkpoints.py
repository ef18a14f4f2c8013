"""Small quantised checkpoints, and what is in them."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from halo_tensor import HaloWeight
from halo_tensor.transformers import HaloQuantConfig

IDS = torch.arange(64).view(2, 32)
CONFIGS = {"int8": HaloQuantConfig(1, "int8"), "fp8": HaloQuantConfig(1, "fp8"), "fp6": HaloQuantConfig(0, "fp6")}
WEIGHT = "model.layers.0.mlp.down_proj.weight"


def weights(model) -> dict[str, HaloWeight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, HaloWeight)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def copied(folder, to, change=None, **quantization):
    """A copy of a checkpoint, whose tensors ``change`` has changed, and whose config.json says ``quantization`` besides."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    if change is not None:
        tensors = load_file(to / "model.safetensors")
        change(tensors)
        save_file(tensors, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] |= quantization
    (to / "config.json").write_text(json.dumps(config))
    return to


def replacing(name, function):
    """A change of tensors for ``copied``: ``function`` of the tensor of that name takes its place."""
    return lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})
