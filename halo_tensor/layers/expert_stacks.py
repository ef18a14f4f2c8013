"""The parameters of experts, [experts, out, in] or [experts, in, out], whichever library's module holds them."""

from typing import Any

from torch import nn

from halo_tensor.layers.printing import describe_weight
from halo_tensor.products.stacks import misfit as stack_misfit
from halo_tensor.recipe import Recipe
from halo_tensor.weight.tensor import HaloWeight, dense_value


def why_not(module: Any, name: str, recipe: Recipe, in_features_first: bool = False) -> str | None:
    """Return why the parameter ``name`` of experts cannot follow ``recipe``; None if it can."""
    weight = module._parameters.get(name)
    if weight is None or not (type(weight) is nn.Parameter or isinstance(weight, HaloWeight)):
        return f"its {name} is a {type(getattr(module, name, None)).__name__}, and no plain parameter"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its {name} is of {weight.dtype}"
    shape = tuple(weight.shape)
    reason = stack_misfit((shape[0], *shape[:0:-1]) if in_features_first else shape, recipe)
    return f"experts cannot follow this recipe: {reason}" if reason else None


def quantised(old: Any, recipe: Recipe, frozen: bool | None, keep_codes: bool, in_features_first: bool = False) -> HaloWeight:
    """Return what takes the place of a parameter of experts.

    Args:
        old: the parameter, dense or converted. A converted one stays balanced.
        recipe: of its products.
        frozen: hold codes only; None does so for parameters that are not trained.
        keep_codes: hold codes beside trained parameters. Experts [experts, in, out] hold them in any case.
        in_features_first: whether it is [experts, in, out].
    """
    if frozen:
        old.requires_grad_(False)
    is_frozen = not old.requires_grad if frozen is None else frozen
    gains = old.gains if isinstance(old, HaloWeight) else None
    dense = dense_value(old).detach()
    return HaloWeight.from_hp(dense, recipe, is_frozen, gains, keep_codes, in_features_first=in_features_first)


def describe(own: str, weight: Any, sides: list[tuple[int, int]]) -> str:
    """Describe converted experts for ``print``, after what their own class says."""
    words = [own] if own else []
    if isinstance(weight, HaloWeight):
        words += [f"{weight.shape[0]} experts", ", ".join(f"{i}→{o}" for i, o in sides), describe_weight(weight)]
    return ", ".join(words)
