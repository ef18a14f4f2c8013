"""Measurements of one linear layer: its outliers, its three products, and their predicted time."""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor.analysis import roofline
from halo_tensor.analysis.capture import Operands
from halo_tensor.analysis.ceilings import Ceilings
from halo_tensor.analysis.fidelity import Fidelity, Outliers
from halo_tensor.diagnostics.reports.data import HIGH_PRECISION, LayerReport
from halo_tensor.layers.kinds import features
from halo_tensor.recipe import PRODUCTS, Recipe, Rotation


def layer_report(
    name: str, module: nn.Module, operands: Mapping[str, Operands], weight: nn.Parameter, rotation: Rotation
) -> LayerReport:
    """Describe the layer ``name`` by its operands. ``operands`` holds those of all layers, and ``weight`` is [out, in]."""
    own, sides = operands[name], features(module)
    assert sides is not None
    sharing = sum(other.x_group == own.x_group for other in operands.values())
    computed = products_of(own, weight.requires_grad)
    return LayerReport(name, *sides, own.tokens, computed, sharing, outliers_of(own, weight, rotation))


def products_of(own: Operands, trained: bool) -> tuple[str, ...]:
    """Return the products that a training step computes of a layer."""
    arrived = own.e is not None
    computed = {"output": True, "grad_input": arrived and own.needs_grad_input, "grad_weight": arrived and trained}
    return tuple(product for product in PRODUCTS if computed[product])


def outliers_of(operands: Operands, weight: torch.Tensor, rotation: Rotation) -> dict[str, tuple[Outliers, Outliers]]:
    """Measure X, W and E as they are, and with X and W rotated along in_features and E along tokens."""
    rotation = replace(rotation, block=rotation.block or 128)
    matrices = {"X": (operands.x, 1), "W": (weight.detach(), 1), "E": (operands.e, 0)}
    with torch.autocast(weight.device.type, enabled=False):
        return {
            name: (Outliers.of(matrix), Outliers.rotated(matrix, dim, rotation))
            for name, (matrix, dim) in matrices.items()
            if matrix is not None
        }


def exact_products(layer: LayerReport, own: Operands, weight: nn.Parameter) -> dict[str, torch.Tensor]:
    """Compute the layer's products in float32, except grad_weight, which of all layers would take the memory of the model."""
    assert own.x is not None
    wanted = tuple(product for product in layer.products if product != "grad_weight")
    return _products(own.x, nn.Parameter(weight.detach().float(), weight.requires_grad), own.e, wanted)


def fidelity(layer: LayerReport, own: Operands, weight: nn.Parameter, exact: dict[str, torch.Tensor]) -> dict[str, Fidelity]:
    """Compare the products of a converted ``weight`` with the ``exact`` ones. Returns product -> fidelity."""
    assert own.x is not None
    quantized = _products(own.x, weight, own.e, layer.products)
    if "grad_weight" in layer.products:
        assert own.e is not None
        with torch.autocast(own.x.device.type, enabled=False):
            exact = exact | {"grad_weight": own.e.float().t() @ own.x.float()}
    return {product: Fidelity.of(quantized[product], exact[product]) for product in layer.products}


def _products(
    x: torch.Tensor, weight: nn.Parameter, e: torch.Tensor | None, wanted: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Compute products of a layer with F.linear and its backward, in the dtype of the weight.

    Args:
        x: [t, in].
        weight: [out, in].
        e: [t, out], or None if only the output is wanted.
        wanted: names of products; the output is computed in any case.
    """
    inputs = {"grad_input": x.to(weight.dtype).detach().requires_grad_("grad_input" in wanted), "grad_weight": weight}
    backward = [name for name in wanted if name != "output"]
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(inputs["grad_input"], weight)
        results = {"output": y.detach()}
        if backward:
            assert e is not None
            found = torch.autograd.grad(y, [inputs[name] for name in backward], e.to(y.dtype))
            results |= dict(zip(backward, found, strict=True))
    return results


def predict_time(layer: LayerReport, recipes: dict[str, Recipe], tokens: int, trained: bool, ceilings: Ceilings) -> None:
    """Set ``layer.seconds`` for high precision and for each candidate's recipe, with ``tokens`` rows of X in a step."""
    sizes = {"tokens": tokens, "in_features": layer.in_features, "out_features": layer.out_features}
    for name, recipe in ({HIGH_PRECISION: Recipe()} | recipes).items():
        layer.seconds[name] = roofline.seconds(
            recipe, sizes, layer.products, trained=trained, sharing=layer.sharing, ceilings=ceilings
        )
