"""Attributes and hooks that users attach to a parameter.

Both outlive ``module.to(...)``. ``Module._apply`` keeps a plain parameter and replaces its data. It replaces a parameter that
is a tensor subclass by ``nn.Parameter(converted)``, which is ``converted.detach().requires_grad_()``, so what is attached has
to be carried from the old parameter to the new one.
"""

from collections.abc import Callable
from typing import Any

import torch

#: Attributes that belong to :class:`~halo_tensor.weight.tensor.HaloWeight`. All others were set by users.
OWN = {"master", "operand", "grad_input_operand", "recipe", "base", "shard_role", "codes_state", "unpadded", "_is_param"}
#: The functions with which ``Module._apply`` converts a parameter.
_CONVERSIONS = {"to", "type", "cpu", "cuda", "xpu", "float", "double", "half", "bfloat16", "empty_like", "share_memory"}


def user_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the attributes that users have set on a parameter, as for optimisers."""
    return {name: value for name, value in tensor.__dict__.items() if name not in OWN}


def check_attributes(parameter: torch.Tensor) -> None:
    """Raise ValueError if users have set an attribute on a plain parameter that converted weights need."""
    if taken := OWN & parameter.__dict__.keys():
        raise ValueError(
            f"a parameter to convert has an attribute {min(taken)!r}, a name that converted weights need: rename it"
        )


def keep_hooks(func: Callable, weight: object, out: torch.Tensor) -> None:
    """Carry the hooks on ``weight`` to ``out``.

    Args:
        func: a function of torch. Nothing happens unless ``Module._apply`` converts parameters with it.
        weight: its first argument.
        out: its result, a converted weight.
    """
    name = getattr(func, "__name__", "").rstrip("_")
    if name in _CONVERSIONS and not torch.is_grad_enabled() and isinstance(weight, torch.nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            hooks = weight._backward_hooks, weight._post_accumulate_grad_hooks
        if any(hooks):
            out.__dict__["_hooks"] = hooks
    elif name == "requires_grad" and "_hooks" in out.__dict__:
        with torch._C.DisableTorchFunctionSubclass():
            out._backward_hooks, out._post_accumulate_grad_hooks = out.__dict__.pop("_hooks")
