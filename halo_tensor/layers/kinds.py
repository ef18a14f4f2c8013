"""The kinds of layers that can follow a recipe, and how each is converted and restored.

``nn.Linear`` follows any recipe: its weight becomes a :class:`~halo_tensor.weight.tensor.HaloWeight`. transformers' ``Conv1D``
also follows any, and ``nn.Conv2d`` follows recipes with a plain forward. Their weights stay as they are, and the class of the
module becomes a subclass. A Conv1D under a recipe with a quantised forward quantises its weight in every forward, as an
nn.Linear with ``keep_codes=False`` does. Experts of mixtures (:mod:`halo_tensor.layers.experts` has transformers',
:mod:`halo_tensor.layers.grouped_experts` torchtitan's) follow recipes whose products can be grouped by expert. They are layers
of several products, so :func:`features` is not asked about them.
"""

import sys
from dataclasses import replace
from typing import Any

from torch import nn

from halo_tensor.layers import experts, grouped_experts, linear_subclasses
from halo_tensor.layers.conv2d import HaloConv2d, is_pointwise
from halo_tensor.layers.linear import convert_weight, restore_weight
from halo_tensor.recipe import Product, Recipe
from halo_tensor.weight.tensor import HaloWeight


def _conv1d() -> Any:
    """Return transformers' Conv1D. If it has not been imported, return a class of which no layer is an instance."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", type(None))


def _experts(module: Any) -> Any:
    """Return the module of :mod:`halo_tensor.layers` that knows experts of this class; None for any other module."""
    return next((kind for kind in (experts, grouped_experts) if kind.is_experts(module)), None)


def is_experts(module: Any) -> bool:
    """Whether a module is experts of a mixture, which hold parameters of three dimensions."""
    return _experts(module) is not None


def is_grouped_experts(module: Any) -> bool:
    """Whether a module is torchtitan's experts, which are called with sorted rows and whose speed is not predicted."""
    return grouped_experts.is_experts(module)


def features(module: Any) -> tuple[int, int] | None:
    """Return the (in, out) features of a layer that some recipe can govern: of one group if it is a convolution. None for
    any other module.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels // module.groups, module.out_channels // module.groups
    if isinstance(module, _conv1d()):
        return module.nx, module.nf
    return None


def is_empty(module: Any) -> bool:
    """Whether a layer has no in or out features, as ``Linear(0, n)``: there is nothing to multiply."""
    return 0 in (features(module) or ()) and not nn.parameter.is_lazy(module._parameters.get("weight"))


def input_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the input of a layer that was called with these arguments."""
    return args[0] if args else next(iter(kwargs.values()))


def inputs_of(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a layer was called with: its input, and for experts also top_k_index and top_k_weights."""
    return (*args, *kwargs.values())[: 3 if experts.is_experts(module) else 1]


def widths(module: nn.Module) -> list[tuple[int, int]]:
    """Return the (in, out) features of each product of a layer: several of experts, one of other layers."""
    kind = _experts(module)
    return kind.sides(module) if kind else [sides] if (sides := features(module)) else []


def weights(module: Any) -> dict[str, Any]:
    """Return the parameters that multiply activations in a layer, by name."""
    if kind := _experts(module):
        return {name: w for name, w in zip(kind.stack_names(module), kind.stacks(module), strict=True) if w is not None}
    return {"weight": w} if (w := getattr(module, "weight", None)) is not None else {}


def misfit(module: nn.Module, recipe: Recipe) -> str | None:
    """Return why a layer cannot follow ``recipe``; None if it can."""
    if kind := _experts(module):
        return kind.misfit(module, recipe)
    if features(module) is None:
        return "of convolutions, only nn.Conv2d is converted"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its owner does not call it through F.linear"
    if isinstance(module, nn.Linear):
        return None
    if type(module) not in (nn.Conv2d, _conv1d()) and recipe_of(module) is None:
        return f"it is a {type(module).__name__}, whose forward may be its own"
    if isinstance(module, nn.Conv2d) and recipe.output != Product():
        return f"a {type(module).__name__} follows recipes with a plain forward only, as hot_config()'s"
    return None


def recipe_of(module: nn.Module) -> Recipe | None:
    """Return the recipe that a converted layer follows; None for any other module."""
    if kind := _experts(module):
        return kind.recipe_of(module)
    if isinstance(module, nn.Linear):
        weight = module._parameters.get("weight")  # not module.weight: a subclass may return another module's
        return weight.recipe if isinstance(weight, HaloWeight) else None
    return module.__dict__.get("recipe") if features(module) else None


def only_saves(module: nn.Module) -> bool:
    """Whether a converted layer computes in high precision, and its recipe only says how its input is saved: a convolution
    that the recipe does not quantise."""
    recipe = recipe_of(module)
    if not isinstance(module, nn.Conv2d) or recipe is None:
        return False
    return not recipe.quantizes_convolution(is_pointwise(module))


def convert(module: Any, recipe: Recipe, frozen: bool | None, keep_codes: bool = True) -> None:
    """Make a layer follow ``recipe``, in place.

    Args:
        module: a layer that :func:`misfit` accepts.
        recipe: of its three products.
        frozen: of an nn.Linear and of experts; see :class:`~halo_tensor.config.LinearConfig`.
        keep_codes: of these too; see there.
    """
    if kind := _experts(module):
        kind.convert(module, recipe, frozen, keep_codes)
        return
    if frozen is None:
        frozen = not module.weight.requires_grad
    if isinstance(module, nn.Linear):
        convert_weight(module, recipe, frozen, keep_codes)
        linear_subclasses.follow_linear(module)
        return
    if isinstance(module, nn.Conv2d):
        module.__class__ = HaloConv2d
    else:
        from halo_tensor.layers.conv1d import HaloConv1D

        module.__class__ = HaloConv1D
    module.recipe = replace(recipe)  # a new object each time, which shows that the layer was converted


def restore(module: Any) -> None:
    """Undo :func:`convert`, in place."""
    if kind := _experts(module):
        kind.restore(module)
    elif isinstance(module, nn.Linear):
        restore_weight(module)
        linear_subclasses.own_class(module)
    else:
        del module.recipe
        module.__class__ = nn.Conv2d if isinstance(module, nn.Conv2d) else _conv1d()
