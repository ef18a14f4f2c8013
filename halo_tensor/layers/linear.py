"""``nn.Linear`` with a converted weight: how its parameter is converted and restored."""

from typing import cast

import torch

from halo_tensor.layers.hooks import STANDS_IN, update_hooks, watch_replacements
from halo_tensor.recipe import Recipe
from halo_tensor.weight.attachments import check_attributes, user_attributes
from halo_tensor.weight.tensor import HaloWeight, dense_value


def convert_weight(module: torch.nn.Linear, recipe: Recipe, frozen: bool = False, keep_codes: bool = True) -> None:
    """Make a layer follow ``recipe``, in place. A weight that follows another recipe stays balanced.

    Args:
        module: with a dense or converted weight.
        recipe: of its three products.
        frozen: see :meth:`HaloWeight.from_hp`.
        keep_codes: see there.

    Raises:
        ValueError: the weight is balanced, and would hold no codes.
    """
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
    replace_parameter(module, "weight", torch.nn.Parameter(weight, requires_grad=requires_grad))
    update_hooks(module)
    watch_replacements()


def restore_weight(module: torch.nn.Module) -> None:
    """Make every converted weight that ``module`` itself holds a plain parameter."""
    for name, weight in module._parameters.items():
        if isinstance(weight, HaloWeight):
            replace_parameter(module, name, torch.nn.Parameter(weight.dequantize(), requires_grad=weight.requires_grad))
    update_hooks(module)


def stand_in(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a dense parameter of the same memory. A converted layer may compute with it for a while, in high precision, and
    does not warn.
    """
    made = torch.nn.Parameter(dense_value(parameter).detach(), parameter.requires_grad)
    made.__dict__[STANDS_IN] = True
    return made


def replace_parameter(module: torch.nn.Module, name: str, new: torch.nn.Parameter) -> None:
    """Put ``new`` in the place of a parameter, with its attributes, its gradient and its hooks, whose handles still remove
    them.
    """
    old = cast(torch.Tensor, module._parameters[name])
    if not isinstance(old, HaloWeight):
        check_attributes(old)
    new.__dict__.update(user_attributes(old))
    with torch._C.DisableTorchFunctionSubclass():
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(old, hooks):
                setattr(new, hooks, getattr(old, hooks))
        new.grad = old.grad
    setattr(module, name, new)
