"""Measurements of the experts of one layer: their outliers, their products, and their predicted time."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from halo_tensor.analysis import expert_roofline, trial_run
from halo_tensor.analysis.capture import Operands
from halo_tensor.analysis.ceilings import Ceilings
from halo_tensor.analysis.fidelity import Fidelity
from halo_tensor.diagnostics.reports.data import HIGH_PRECISION, LayerReport
from halo_tensor.diagnostics.reports.layers import outliers_of, products_of
from halo_tensor.layers.kinds import weights
from halo_tensor.layers.linear import stand_in
from halo_tensor.recipe import Recipe, Rotation


def layer_report(name: str, module: Any, own: Operands, rotation: Rotation) -> LayerReport:
    """Describe the experts ``name`` by their operands."""
    first, _ = stacks = [*weights(module).values()]
    matrix = first.detach().transpose(1, 2) if module.is_transposed else first.detach()
    width, trained = matrix.shape[2], any(weight.requires_grad for weight in stacks)
    outliers = outliers_of(own, matrix.reshape(-1, width), rotation)
    return LayerReport(name, width, width, own.tokens, products_of(own, trained), 1, outliers, experts=module.num_experts)


def predict_time(
    layer: LayerReport, module: Any, own: Operands, recipes: Mapping[str, Recipe], tokens: int, ceilings: Ceilings
) -> None:
    """Set ``layer.seconds`` for high precision and for each candidate's recipe, with ``tokens`` in a step."""
    shape, trained = expert_roofline.shape_of(module, tokens, own.rest[0].shape[1]), "grad_weight" in layer.products
    for name, recipe in {HIGH_PRECISION: Recipe(), **recipes}.items():
        layer.seconds[name] = expert_roofline.seconds(recipe, shape, layer.products, trained=trained, ceilings=ceilings)


def fidelity(layer: LayerReport, module: Any, own: Operands, recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Fidelity]]:
    """Compare the products of experts under each recipe with those in float32.

    Returns:
        candidate -> product -> fidelity. A candidate in high precision is compared too.
    """
    held = {name: p for name, p in module._parameters.items() if p is not None}
    dense = {name: stand_in(nn.Parameter(p.detach().float(), p.requires_grad)) for name, p in held.items()}
    with trial_run.swapped(module, dense):
        exact = _products(module, own, layer.products)
    found = {}
    for name, recipe in recipes.items():
        following = {} if recipe.is_identity else {module: recipe}
        with trial_run.following_experts(following):
            actual = _products(module, own, layer.products)
        found[name] = {product: _worst(actual[product], exact[product]) for product in layer.products}
    return found


def _worst(actual: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> Fidelity:
    return min((Fidelity.of(a, e) for a, e in zip(actual, exact, strict=True)), key=lambda fidelity: fidelity.sqnr)


def _products(module: Any, own: Operands, wanted: tuple[str, ...]) -> dict[str, list[torch.Tensor]]:
    """Run experts forward and backward on the sampled rows, in the dtype of their weights.

    Returns:
        product -> its results: the gradients of both weights, as far as they are trained.
    """
    assert own.x is not None
    stacks = [weight for weight in weights(module).values() if weight.requires_grad]
    x = own.x.detach().to(next(iter(weights(module).values())).dtype).requires_grad_("grad_input" in wanted)
    with torch.autocast(x.device.type, enabled=False):
        y = module(x, *own.rest)
        results = {"output": [y.detach()]}
        inputs = {"grad_input": [x], "grad_weight": stacks}
        backward = [product for product in wanted if product != "output"]
        if backward:
            assert own.e is not None
            read = [t for product in backward for t in inputs[product]]
            gradients = iter(torch.autograd.grad(y, read, own.e.to(y.dtype)))
            results |= {product: [next(gradients) for _ in inputs[product]] for product in backward}
    return results
