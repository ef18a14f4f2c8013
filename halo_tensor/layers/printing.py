"""Descriptions of converted layers, for ``print(model)``."""

import weakref
from dataclasses import replace
from typing import Any

from torch import nn

from halo_tensor.products.steps import holds_for_grad_input
from halo_tensor.recipe import PRODUCTS, RECIPES, Operand, Product, Recipe, Rotation, halo
from halo_tensor.weight.sharded_parameters import shard_of
from halo_tensor.weight.tensor import HaloWeight


class _ExtraRepr:
    """The ``extra_repr`` of one converted ``nn.Linear``, an attribute of the module.

    It refers to the module weakly. A bound method would make a cycle, and a model that is deleted would keep its memory until
    Python looks for cycles. Copies and pickles of a module get one that refers to the copy.
    """

    def __init__(self, module: nn.Linear | None) -> None:
        self._module = None if module is None else weakref.ref(module)

    def _owner(self) -> nn.Linear | None:
        return None if self._module is None else self._module()

    def __call__(self) -> str:
        module = self._owner()
        if module is None:  # in a replica, whose original is gone
            return ""
        plain, parameter = type(module).extra_repr(module), module._parameters.get("weight")
        weight = parameter if isinstance(parameter, HaloWeight) else shard_of(parameter)
        return plain if weight is None else f"{plain}, {describe_weight(weight)}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _ExtraRepr, (self._owner(),)


def show_weight(module: nn.Linear) -> None:
    """Let ``print`` tell how the weight of a layer is converted. An ``extra_repr`` that a user set on the module is kept."""
    module.__dict__.setdefault("extra_repr", _ExtraRepr(module))


def hide_weight(module: nn.Module) -> None:
    """Undo :func:`show_weight`."""
    if isinstance(module.__dict__.get("extra_repr"), _ExtraRepr):
        del module.__dict__["extra_repr"]


def describe_weight(weight: HaloWeight) -> str:
    """Describe a converted weight: its recipe, which codes it holds, and whether it is balanced."""
    words = [describe_recipe(weight.recipe)]
    if weight.gain is not None:
        words.append("balanced")
    if weight.master is None and not weight.is_gathered and not weight.recipe.is_identity:
        words.append("frozen, codes only")
    elif weight.holds_codes:
        words.append("codes kept")
    elif not weight.recipe.output.right.is_plain:
        words.append("quantised in every forward")
    elif holds_for_grad_input(weight.recipe):
        words.append("quantised in every backward")
    return ", ".join(words)


def describe_recipe(recipe: Recipe) -> str:
    """Name a recipe: HALO's with its level, format and rotation; another of ``RECIPES`` by its name there; any other by the
    formats of its products.
    """
    if recipe.is_identity:
        return "high precision"
    if (quantized := recipe.quantized_convolutions) != Recipe.quantized_convolutions:
        usual = replace(recipe, quantized_convolutions=Recipe.quantized_convolutions)
        return f"{describe_recipe(usual)}, quantized convolutions: {quantized}"
    if (name := next((name for name, known in RECIPES.items() if known == recipe), None)) is not None:
        return name
    return _describe_halo(recipe) or f"recipe({', '.join(_describe_products(recipe))})"


def _describe_halo(recipe: Recipe) -> str | None:
    w = recipe.output.right
    if w.format is None:
        return None
    for level in (1, 2) if w.in_features else (0,):
        for granularity in ("row", "tensor"):
            if halo(level, w.format, granularity, w.in_features or Rotation()) == recipe:
                return f"halo({', '.join(_describe_options(recipe, level, granularity))})"
    return None


def _describe_options(recipe: Recipe, level: int, granularity: str) -> list[str]:
    w = recipe.output.right
    words = [f"level={level}", str(w.format)]
    if w.in_features is not None:
        words.append("full width" if w.in_features.block is None else f"block {w.in_features.block}")
        if w.in_features.seed is None:
            words.append("no signs")
        elif w.in_features.seed:
            words.append(f"seed {w.in_features.seed}")
    return words if granularity == "row" else [*words, "per tensor"]


def _describe_products(recipe: Recipe) -> list[str]:
    products: dict[str, Product] = {name: getattr(recipe, name) for name in PRODUCTS}
    changed = {name: p for name, p in products.items() if not (p.left.is_plain and p.right.is_plain)}
    return [f"{name} {'·'.join(dict.fromkeys(_name(o) for o in (p.left, p.right)))}" for name, p in changed.items()]


def _name(operand: Operand) -> str:
    return str(operand.format or ("high precision" if operand.is_plain else "rotated"))
