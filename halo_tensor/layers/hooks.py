"""Hooks of modules that hold converted weights.

Their state dicts stay plain, a linear layer warns if its weight has become plain, and ``print`` shows how it is converted.
"""

import warnings
from functools import cache
from typing import Any, NoReturn

import torch
from torch.compiler import is_compiling
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from halo_tensor.fences.pytorch import local_tensor
from halo_tensor.layers.printing import hide_weight, show_weight
from halo_tensor.weight.copies import renewed
from halo_tensor.weight.refusals import refuse_dtensor, refuse_fsdp1
from halo_tensor.weight.sharded_parameters import is_sharded, lend, shard_of, with_shard
from halo_tensor.weight.tensor import HaloWeight

#: An attribute of dense parameters that may stand in for a converted weight without a warning.
STANDS_IN = "_halo_stand_in"
#: An attribute of converted layers whose forward multiplies with this rank's part of a weight that is a DTensor.
SPLIT = "_split"


def update_hooks(module: torch.nn.Module) -> None:
    """Install the hooks of a module that holds converted weights, and remove those of a module that holds none."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_save_plain, _load_plain, _check_converted):
                del hooks[key]
    module.__dict__.pop("__prepare_scriptable__", None)
    hide_weight(module)
    if any(isinstance(parameter, HaloWeight) for parameter in module._parameters.values()):
        module.register_state_dict_post_hook(_save_plain)
        module.register_load_state_dict_pre_hook(_load_plain)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(_check_converted)
            module.__dict__["__prepare_scriptable__"] = _refuse_script  # torch.jit.script calls it
            show_weight(module)


def _save_plain(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Put dense values in the place of converted weights in a state dict."""
    for name, _ in module.named_parameters(remove_duplicate=False):  # includes those of parametrisations
        weight = state_dict.get(prefix + name)
        if isinstance(weight, torch.nn.Parameter):  # under keep_vars=True
            continue
        if isinstance(weight, HaloWeight):
            state_dict[prefix + name] = weight.lend()
        elif is_sharded(weight):
            assert weight is not None
            state_dict[prefix + name] = lend(weight)


def _load_plain(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Convert the tensors that ``load_state_dict(assign=True)`` puts in the place of converted weights."""
    if not local_metadata.get("assign_to_params_buffers"):
        return
    for name, own in module.named_parameters(remove_duplicate=False):
        weight = state_dict.get(prefix + name)
        if weight is None or isinstance(weight, HaloWeight):
            continue
        weight, shard = weight.detach(), shard_of(own)
        if shard is not None:
            state_dict[prefix + name] = with_shard(weight, renewed(shard, local_tensor(weight)))
        elif isinstance(own, HaloWeight):
            state_dict[prefix + name] = renewed(own, weight)


def _refuse_script() -> NoReturn:
    raise RuntimeError("torch.jit.script knows no converted layers: call dequantize_(model) first")


def _check_converted(module: torch.nn.Linear, args: tuple) -> None:
    """Warn before the forward of a converted layer if its weight is no longer a converted one.

    Raises:
        ValueError: it is a DTensor, whose product would be in high precision.
    """
    if is_compiling():
        return
    weight = module._parameters.get("weight")
    if isinstance(weight, HaloWeight) or hasattr(weight, STANDS_IN):
        return
    shape = [module.out_features, module.in_features]
    if isinstance(weight, DTensor):
        if SPLIT not in module.__dict__:
            refuse_dtensor(shape, shard_of(weight))
        return
    if weight is None:  # FSDP1 and parametrisations keep it elsewhere
        weight = module.__dict__.get("weight")
    if isinstance(getattr(weight, "_base", None), FlatParameter):
        refuse_fsdp1(shape)
    warnings.warn(
        f"a converted layer {shape} runs in high precision, since its weight was replaced by a plain one or is parametrised. "
        "For functional_call, pass dict(model.named_parameters()), not a state dict; to load weights, use load_state_dict; "
        "after any other replacement call quantize_ again, or dequantize_ if high precision is meant",
        stacklevel=4,
    )


@cache
def watch_replacements() -> None:
    """From the first conversion on, warn where a converted layer is replaced by a plain one."""
    torch.nn.modules.module.register_module_module_registration_hook(_warn_of_replacement)


def _warn_of_replacement(parent: torch.nn.Module, name: str, new: torch.nn.Module | None) -> None:
    """Look at a module that is assigned, while its parent still has the one that it replaces.

    Transformers' ``resize_token_embeddings``, for example, makes a new output layer.
    """
    old = parent._modules.get(name)
    if not (isinstance(old, torch.nn.Linear) and isinstance(new, torch.nn.Linear)):
        return
    weight = old._parameters.get("weight")
    if isinstance(weight, HaloWeight) and not isinstance(new._parameters.get("weight"), HaloWeight):
        warnings.warn(
            f"{name} {list(weight.shape)} of a {type(parent).__name__}, which is converted, is replaced by a plain nn.Linear, "
            "which computes in high precision: call quantize_ again if it is to be converted",
            stacklevel=3,
        )
