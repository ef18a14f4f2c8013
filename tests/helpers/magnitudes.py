"""Operands of any magnitude, and the check of a layer that multiplies them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halo_tensor import halo_config, quantize_
from tests.helpers.errors import relative_error

#: level, dtype, relative error of each product of Gaussian matrices
RECIPES = [(0, "int8", 0.0102), (1, "int8", 0.0102), (2, "int8", 0.0102), (0, "fp8", 0.0375), (1, "fp8", 0.0372),
           (2, "fp8", 0.0372), (0, "fp6_e3m2", 0.0735), (1, "fp6_e2m3", 0.0387), (2, "fp6_e2m3", 0.0387)]  # fmt: skip
in_every_recipe = pytest.mark.parametrize(("level", "dtype", "usual"), RECIPES)
#: The supported range of the largest elements of operands and results.
SERVED = 1e-37, 9e36
#: Below this size, the terms that grad_input and grad_weight sum up have fewer bits.
SMALL_TERMS = 1e-36
PRODUCTS = ("output", "grad_input", "grad_weight")


def operands(exponents, tokens=64, width=128, dtype=torch.float32):
    """Return Gaussian X [tokens, width], W [width, width] and E [tokens, width], whose largest elements are 10 to the
    ``exponents``."""
    torch.manual_seed(1)
    made = [torch.randn(rows, width, dtype=torch.float64) for rows in (tokens, width, tokens)]
    return [(t / t.abs().max() * 10.0**exponent).to(dtype) for t, exponent in zip(made, exponents, strict=True)]


def results(x, w, e, f):
    """Return f(x, w) and the gradients of x and w."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = f(x, w)
    y.backward(e)
    return y.detach(), x.grad, w.grad


def converted(level, dtype, x, w, e):
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device=w.device)
    with torch.no_grad():
        layer.weight.copy_(w)
    quantize_(layer, halo_config(level, dtype))
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(e)
    return y.detach(), x.grad, layer.weight.grad


def check_layer(level, dtype, usual, exponents, tensors):
    """Check the products of one layer: those within the supported range are accurate, and all others are accurate, negligible or
    visibly not finite. Return the names of the former."""
    true = results(*(t.double() for t in tensors), F.linear)
    actual = converted(level, dtype, *tensors)
    x, w, e = exponents
    low, high = SERVED
    served = []
    for name, y, expected, factors in zip(PRODUCTS, actual, true, ((x, w), (e, w), (e, x)), strict=True):
        largest = expected.abs().max().item()
        terms = 10.0 ** sum(factors)
        bound = usual * (1.15 if terms > SMALL_TERMS or name == "output" else 2)
        if all(low <= number <= high for number in (10.0 ** factors[0], 10.0 ** factors[1], terms, largest)):
            served.append(name)
            assert relative_error(y, expected) < bound, (name, relative_error(y, expected))
        elif largest > 5e38:
            assert not y.isfinite().all(), f"{name} is beyond float32, and nothing shows it"
        elif largest < 1e-40 or not y.isfinite().all():
            continue
        elif y.isfinite().all() and largest >= low and min(terms, *(10.0**f for f in factors)) >= low:
            # Close to the largest float32: not served, perhaps, but not wrong either.
            assert relative_error(y, expected) < bound, (name, relative_error(y, expected))
        else:
            assert y.abs().max().item() < 2 * largest + 1e-38
    return served


EDGES = {
    "small X": ((-36.9, 36.5, 10), {"output", "grad_weight"}),
    "small W": ((36.5, -36.9, 10), {"output", "grad_input"}),
    "large X": ((36.9, -36.9, -30), {"output", "grad_weight"}),
    "large W": ((-36.9, 36.9, -30), {"output", "grad_input"}),
    "small E": ((0, 0, -36.9), set(PRODUCTS)),
    "large E": ((-1, -1, 36.5), set(PRODUCTS)),
    "small E beside small X": ((-29, 0, -7.9), set(PRODUCTS)),
    "small E beside small W": ((0, -29, -7.9), set(PRODUCTS)),
    "large E beside large X": ((18, 0, 17.5), set(PRODUCTS)),
    "large E beside large W": ((0, 18, 17.5), set(PRODUCTS)),
}
