"""Llama with LoRA adapters on a frozen base, for several ways of storing the base."""

import importlib.util
import re
import time

import torch
from contenders import torchao_float8, torchao_int8
from llama import Llama
from peft import LoraConfig, get_peft_model
from steps import CUDA, DEVICE
from torch import nn

from halo_tensor import halo_config, quantize_
from halo_tensor.layers.kinds import is_experts


def is_base(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.endswith("base_layer")


def convert(llama: nn.Module, name: str) -> None:
    """Convert the base of ``llama`` as ``name`` says. It has its adapters already, except for bitsandbytes."""
    if name == "bf16":
        return
    if name == "torchao-int8":
        torchao_int8(llama, is_base)
        for module in [module for key, module in llama.named_modules() if is_base(module, key)]:
            module.requires_grad_(False)  # the conversion makes new, trainable parameters
        return
    if name.startswith("torchao-"):
        return torchao_float8(name.removeprefix("torchao-"), llama, is_base)
    halo = re.fullmatch(r"halo(\d)-(\w+?)(-A)?", name)
    if halo is None:
        raise ValueError(f"there is no base {name!r}; there are bf16, torchao-RECIPE, bitsandbytes-nf4, haloLEVEL-DTYPE[-A]")

    def chosen(module: nn.Module, name: str) -> bool:
        adapter = halo[3] and isinstance(module, nn.Linear) and ".lora_A." in name
        return is_base(module, name) or is_experts(module) or bool(adapter)

    quantize_(llama, halo_config(int(halo[1]), halo[2]), filter_fn=chosen)


def to_bitsandbytes(llama: nn.Module) -> None:
    """Store the linear layers in NF4, as QLoRA does, before adapters are added."""
    import bitsandbytes as bnb

    for module in list(llama.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, new.to(DEVICE))
    llama.is_loaded_in_4bit = True  # PEFT reads this attribute


def make(name: str, shape: dict, recompute: str = "no") -> tuple[Llama, float]:
    """Return the model with its adapters, and the seconds that converting its base took."""
    if name.startswith("bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError("bitsandbytes is not installed")
    # Of a mixture, PEFT adapts experts and routers in eager code only.
    adapted = ["q_proj", "k_proj", "v_proj", "o_proj"] if "num_experts" in shape else "all-linear"
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=adapted)
    with torch.device(DEVICE):
        model = Llama(shape, recompute)
        seconds = _timed(to_bitsandbytes, model.llama) if name.startswith("bitsandbytes") else 0.0
        get_peft_model(model.llama, lora, autocast_adapter_dtype=False)  # changes model.llama in place
        if not name.startswith("bitsandbytes"):
            seconds = _timed(convert, model.llama, name)
    adapters = {parameter.dtype for key, parameter in model.named_parameters() if "lora_" in key}
    assert adapters == {torch.bfloat16}, f"the adapters are in {adapters}"
    return model, seconds


def _timed(function, *args) -> float:
    synchronize = torch.cuda.synchronize if CUDA else lambda: None
    synchronize()
    start = time.perf_counter()
    function(*args)
    synchronize()
    return time.perf_counter() - start
