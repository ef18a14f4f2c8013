"""Modules that hold converted weights: how they come to, and that their state dicts stay plain ones."""

import warnings
from functools import cache
from typing import cast

import torch
from torch.compiler import is_compiling
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from halo_tensor.recipe import Recipe
from halo_tensor.weight import fsdp
from halo_tensor.weight.tensor import HaloWeight, dense_value, tags

_STANDS_IN = "_halo_stand_in"  # an attribute of parameters
#: Types of the weight of a converted layer; a DTensor is a sharded one.
_CONVERTED = (HaloWeight, DTensor)


def convert_weight(module: torch.nn.Linear, recipe: Recipe, frozen: bool = False, keep_codes: bool = True) -> None:
    """Make ``module``'s linear products follow ``recipe``, in place; its state dict stays a plain one. A weight that follows
    another stays balanced."""
    weight, gains = module.weight, None
    dense = dense_value(weight).detach()
    if isinstance(weight, HaloWeight) and recipe.output.right.format is not None:
        gains = weight.gains
    if gains is not None and not (frozen or keep_codes):
        raise ValueError(
            "this weight is balanced, which keep_codes=False cannot keep, since s is the codes': leave keep_codes at True, or "
            "call dequantize_(model) first"
        )
    set_weight(module, HaloWeight.from_hp(dense, recipe, frozen, gains, keep_codes), weight.requires_grad)


def set_weight(module: torch.nn.Linear, weight: HaloWeight, requires_grad: bool = False) -> None:
    """Make ``weight`` the parameter of ``module``, whose state dict stays a plain one."""
    _replace(module, "weight", torch.nn.Parameter(weight, requires_grad=requires_grad))
    keep_plain(module)
    _watch_replacements()


@cache
def _watch_replacements() -> None:
    """Once a layer has been converted, warn where any such layer is replaced by a plain one."""
    torch.nn.modules.module.register_module_module_registration_hook(_warn_of_replacement)


def _warn_of_replacement(parent: torch.nn.Module, name: str, new: torch.nn.Module | None) -> None:
    """A hook of every module that is assigned, while the one that it replaces is still there. Transformers'
    ``resize_token_embeddings``, for one, makes a new output layer."""
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


def _replace(module: torch.nn.Module, name: str, new: torch.nn.Parameter) -> None:
    """Put ``new`` in the place of a parameter, with all that hangs on it: attributes, a gradient, and hooks, whose handles
    still remove them."""
    old = cast(torch.Tensor, module._parameters[name])
    new.__dict__.update(tags(old))
    with torch._C.DisableTorchFunctionSubclass():
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(old, hooks):
                setattr(new, hooks, getattr(old, hooks))
        new.grad = old.grad
    setattr(module, name, new)


def keep_plain(module: torch.nn.Module) -> None:
    """Let the state dict of a module that holds converted weights, and no longer of one that holds none, stay a plain one; and
    let a linear layer tell when its weight has become plain."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_save_plain, _load_plain, _check_converted):
                del hooks[key]
    module.__dict__.pop("__prepare_scriptable__", None)
    if any(isinstance(parameter, HaloWeight) for parameter in module._parameters.values()):
        module.register_state_dict_post_hook(_save_plain)
        module.register_load_state_dict_pre_hook(_load_plain)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(_check_converted)
            module.__dict__["__prepare_scriptable__"] = _refuse_script  # which torch.jit.script calls


def restore_weight(module: torch.nn.Module) -> None:
    """The inverse of :func:`convert_weight`, for every converted weight that ``module`` itself holds."""
    for name, weight in module._parameters.items():
        if isinstance(weight, HaloWeight):
            _replace(module, name, torch.nn.Parameter(weight.dequantize(), requires_grad=weight.requires_grad))
    keep_plain(module)


def stand_in(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A dense parameter of the same memory, with which a converted layer may compute in high precision for a while, without a
    warning that it does."""
    made = torch.nn.Parameter(dense_value(parameter).detach(), parameter.requires_grad)
    made.__dict__[_STANDS_IN] = True
    return made


def _refuse_script():
    raise RuntimeError("torch.jit.script knows no converted layers: call dequantize_(model) first")


def _check_converted(module, args) -> None:
    """Before the forward of a converted layer: is its weight still a converted one?"""
    if is_compiling():
        return
    weight = module._parameters.get("weight")
    if isinstance(weight, _CONVERTED) or hasattr(weight, _STANDS_IN):
        return
    shape = [module.out_features, module.in_features]
    if weight is None:  # FSDP1 and parametrisations keep it elsewhere
        weight = module.__dict__.get("weight")
    if isinstance(getattr(weight, "_base", None), FlatParameter):
        fsdp.refuse_fsdp1(shape)
    warnings.warn(
        f"a converted layer {shape} runs in high precision, since its weight was replaced by a plain one or is parametrised. "
        "For functional_call, pass dict(model.named_parameters()), not a state dict; to load weights, use load_state_dict; "
        "after any other replacement call quantize_ again, or dequantize_ if high precision is meant",
        stacklevel=4,
    )


def _save_plain(module, state_dict, prefix, local_metadata):
    for name, _ in module.named_parameters(remove_duplicate=False):  # those of parametrisations too
        weight = state_dict.get(prefix + name)
        if isinstance(weight, torch.nn.Parameter):  # under keep_vars=True
            continue
        if isinstance(weight, HaloWeight):
            state_dict[prefix + name] = weight.lend()
        elif fsdp.is_sharded(weight):
            state_dict[prefix + name] = fsdp.lend(weight)


def _load_plain(module, state_dict, prefix, local_metadata, *_):
    """``load_state_dict(assign=True)`` puts a tensor of the state dict in the weight's place: make it one."""
    if not local_metadata.get("assign_to_params_buffers"):
        return
    for name, own in module.named_parameters(remove_duplicate=False):
        weight = state_dict.get(prefix + name)
        if weight is None or isinstance(weight, HaloWeight):
            continue
        if fsdp.is_sharded(own):
            state_dict[prefix + name] = fsdp.map_shard(weight.detach(), fsdp.local(own).renewed)
        elif isinstance(own, HaloWeight):
            state_dict[prefix + name] = own.renewed(weight.detach())
