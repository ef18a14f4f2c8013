"""Experts of mixtures that transformers holds in parameters of three dimensions: which modules, how they are converted.

transformers (tested with 5.23) decorates such classes with ``use_experts_implementation``, and sends their forward to a
function that ``ALL_EXPERTS_FUNCTIONS`` has under the name in the config. A converted module calls this library's function
whatever the config says. That function is also registered as ``"halo"``.
"""

import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from halo_tensor.layers import expert_stacks
from halo_tensor.layers.expert_gates import gate_of
from halo_tensor.layers.expert_stacks import quantised
from halo_tensor.layers.hooks import STANDS_IN, update_hooks
from halo_tensor.layers.linear import replace_parameter, restore_weight
from halo_tensor.layers.linear_subclasses import with_forward
from halo_tensor.products.expert_parts import LowRank, Part, experts_in_parts
from halo_tensor.products.experts import experts
from halo_tensor.recipe import Recipe
from halo_tensor.weight.low_rank import LowRankSum
from halo_tensor.weight.tensor import HaloWeight

#: The name of this library's function in ``ALL_EXPERTS_FUNCTIONS``.
NAME = "halo"
#: What the decorator sets on a module, in every version that has it.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
#: Names under which modules and configs say how many experts a token has.
_TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "experts_per_token")


def _moe() -> Any:
    """Return the module of transformers that has the decorator, if it was imported."""
    return sys.modules.get("transformers.integrations.moe")


def is_experts(module: Any) -> bool:
    """Whether a module is of a class that transformers' decorator was applied to. A converted one is."""
    return _moe() is not None and all(name in module.__dict__ for name in _FLAGS) and hasattr(type(module), "_apply_gate")


def _own_class(module: Any) -> Any:
    """Return the class that a module had before it was converted."""
    kind: Any = type(module)
    return getattr(kind, "_own_class", kind)


def stack_names(module: Any) -> tuple[str, str]:
    """Return the names of the parameters [experts, …] of the products up and down."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def stacks(module: Any) -> list[Any]:
    """Return the parameters that a module holds under those names; None for one that is parametrised."""
    return [module._parameters.get(name) for name in stack_names(module)]


def sides(module: Any) -> list[tuple[int, int]]:
    """Return (in, out) features of an expert's products."""
    shapes = [tuple(w.shape[1:]) for w in stacks(module) if w is not None and w.ndim == 3]
    return [shape if module.is_transposed else shape[::-1] for shape in shapes]  # type: ignore[misc]


def top_k_of(module: Any) -> int | None:
    """Return how many experts each token is routed to, as far as the module or its config says. None if they do not.

    ``top_k`` of a config may be that of generation, so it is read from the module only.
    """
    found = [getattr(module, name, None) for name in _TOP_K] + [getattr(module.config, name, None) for name in _TOP_K[1:]]
    return next((number for number in found if type(number) is int and number > 0), None)


def misfit(module: Any, recipe: Recipe) -> str | None:
    """Return why experts cannot follow ``recipe``; None if they can."""
    own = _own_class(module)
    if "forward" in module.__dict__ or own.forward.__code__.co_filename != _moe().__file__:
        return f"it is a {own.__name__}, whose forward may be its own"
    for name in stack_names(module):
        if reason := expert_stacks.why_not(module, name, recipe, module.is_transposed):
            return reason
    up, down = stacks(module)
    if up.shape[0] != module.num_experts or down.shape[0] != module.num_experts:
        return f"it says that it has {module.num_experts} experts, and its parameters have {up.shape[0]}, {down.shape[0]}"
    return None


def recipe_of(module: Any) -> Recipe | None:
    """Return the recipe that converted experts follow; None for others."""
    weight = stacks(module)[0]
    return weight.recipe if isinstance(weight, HaloWeight) else None


def convert(module: Any, recipe: Recipe, frozen: bool | None, keep_codes: bool = True) -> None:
    """Make experts follow ``recipe``, in place.

    Args:
        module: that :func:`misfit` accepts.
        recipe: of both products of each expert.
        frozen: hold codes only; None does so for parameters that are not trained.
        keep_codes: hold codes beside trained parameters. Experts [experts, in, out] hold them in any case.
    """
    for name, old in zip(stack_names(module), stacks(module), strict=True):
        hold(module, name, quantised(old, recipe, frozen, keep_codes, module.is_transposed), old.requires_grad)


def hold(module: Any, name: str, weight: HaloWeight, requires_grad: bool = False) -> None:
    """Make ``weight`` the parameter ``name`` of experts, which then call this library's function."""
    replace_parameter(module, name, nn.Parameter(weight, requires_grad=requires_grad))
    update_hooks(module)
    if "_halo_gate" not in module.__dict__:
        module._halo_gate = gate_of(module)
        module.__class__ = _converted_class(_own_class(module))
        register()


def restore(module: Any) -> None:
    """Undo :func:`convert`, in place."""
    restore_weight(module)
    module.__dict__.pop("_halo_gate", None)
    module.__class__ = _own_class(module)


def register() -> None:
    """Register the function with transformers, as ``experts_implementation="halo"``."""
    from transformers.integrations import moe

    if NAME not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_implementation)


def experts_implementation(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run experts, of a module that transformers sends here because of its config, or that is converted.

    Args:
        module: the experts.
        *args: hidden_states [tokens, d], top_k_index [tokens, top_k], top_k_weights [tokens, top_k].
        **kwargs: the same by the names that the module's class gives them, in that order.

    Returns:
        [tokens, d], of the dtype of hidden_states.
    """
    given = (*args, *kwargs.values())
    weights = tuple(getattr(module, name) for name in stack_names(module))
    if all(isinstance(w, HaloWeight | LowRankSum) for w in weights):
        return _quantised(module, weights, *given)
    if not is_compiling() and not all(hasattr(w, STANDS_IN) for w in weights):
        _warn_of_plain(module)
    return _plain(module)(module, *given)


def _quantised(
    module: Any, weights: tuple[Any, ...], x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in stack_names(module)]
    if not is_compiling():
        for w in weights:
            w.follow()
    gate = module.__dict__.get("_halo_gate") or (module._apply_gate if module.has_gate else module.act_fn)
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    if norm is None and not any(isinstance(w, LowRankSum) for w in weights):
        y = experts(x, index, weight, weights[0], weights[1], gate, gate_up_bias=biases[0], down_bias=biases[1])
    else:
        first, second = (_part(w, bias) for w, bias in zip(weights, biases, strict=True))
        y = experts_in_parts(x, index, weight, first, second, gate, norm)
    return y.to(x.dtype)


def _part(weight: Any, bias: torch.Tensor | None) -> Part:
    if not isinstance(weight, LowRankSum):
        return Part(weight, bias)
    left, right = weight.left, weight.right
    factors = (left, right) if weight.weight.in_features_first else (right.transpose(1, 2), left.transpose(1, 2))
    return Part(weight.weight, bias, LowRank(*factors, weight.scale))


def _plain(module: Any) -> Callable:
    """Return the forward that the module has without this library."""
    if module.config._experts_implementation == NAME:
        return _moe().grouped_mm_experts_forward
    return _own_class(module).forward


def _warn_of_plain(module: Any) -> None:
    if hasattr(type(module), "_own_class"):
        why = (
            "since a weight was replaced by a plain one or is parametrised. One active adapter of PEFT's target_parameters is "
            "served; merge others. After another replacement call quantize_ again"
        )
    else:
        why = f"although its experts_implementation is {NAME!r}: it is not converted. Call quantize_(model, config)"
    warnings.warn(f"{type(module).__name__} runs in high precision, {why}", stacklevel=4)


def _extra_repr(module: Any) -> str:
    return expert_stacks.describe(module._own_class.extra_repr(module), stacks(module)[0], sides(module))


@cache
def _converted_class(own: Any) -> Any:
    made = with_forward(own, experts_implementation, _rebuild)
    made.extra_repr = _extra_repr
    return made


def _rebuild(own: type) -> nn.Module:
    return nn.Module.__new__(_converted_class(own))
