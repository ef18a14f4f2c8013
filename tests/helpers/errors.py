"""Errors of quantised values, and the bounds that they keep."""

from math import sqrt

import torch

from halo_tensor.recipe import Format


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ in float64."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def rounding_bound(x: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the largest possible |x − codes·scale| for each element of a matrix that is at most format.max·scale everywhere.

    ``scale`` broadcasts against ``x``.
    """
    if format.uniform:
        return (scale / 2).expand_as(x)
    smallest_step = scale * 2.0 ** (format.min_exponent - format.mantissa_bits)
    return torch.maximum(x.abs() * 2.0 ** -(format.mantissa_bits + 1), smallest_step / 2)


def typical_error(format: Format) -> float:
    """Return the relative error (Frobenius norm) of a product of two Gaussian matrices that have row scales."""
    one = {"int8": 0.0076, "int4": 0.14, "fp4_e1m2": 0.14, "fp4_e3m0": 0.2}.get(format.name) or 2.0 ** -(
        format.mantissa_bits + 1
    ) * 0.42
    return sqrt(2) * one
