"""Measures of the error of a matrix, and of how heavy its tails are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log10, sqrt

import torch

from halo_tensor.recipe import Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.hadamard import fit

LOSSLESS = 150.0  # dB: smaller differences are below the rounding of float32


@dataclass(frozen=True)
class Fidelity:
    """The error of a matrix, compared with the exact one.

    Attributes:
        cosine: the cosine of both matrices as vectors.
        sqnr: the signal-to-quantisation-noise ratio 10 log₁₀(|exact|² / |difference|²) in dB, clamped to ±150.
    """

    cosine: float
    sqnr: float

    @classmethod
    def of(cls, actual: torch.Tensor, exact: torch.Tensor) -> "Fidelity":
        """Compare two matrices of one shape."""
        a, e = actual.flatten().float(), exact.flatten().float()
        signal, power, dot = (float(u @ v) for u, v in ((e, e), (a, a), (e, a)))
        difference = a - e
        noise = float(difference @ difference)
        if noise == 0:
            return cls(1.0, LOSSLESS)
        if not 0 < signal * power < float("inf") or not noise < float("inf"):
            return cls(0.0, -LOSSLESS)
        return cls(dot / sqrt(signal * power), max(min(10 * log10(signal / noise), LOSSLESS), -LOSSLESS))


@dataclass(frozen=True)
class Outliers:
    """How heavy the tails of a matrix are.

    Attributes:
        kurtosis: E[x⁴] / E[x²]², which is 3 for a Gaussian.
        peak: max|x| / rms(x).
    """

    kurtosis: float
    peak: float

    @classmethod
    def of(cls, x: torch.Tensor) -> "Outliers":
        """Measure all elements of ``x``."""
        flat = x.float().flatten()
        rms = (flat @ flat / len(flat)).sqrt().clamp_min(reference.SMALLEST_SCALE)
        squares = (flat / rms).square_()
        return cls(float(squares @ squares) / len(flat), squares.amax().sqrt().item())

    @classmethod
    def rotated(cls, x: torch.Tensor, dim: int, rotation: Rotation) -> "Outliers":
        """Measure a matrix after a rotation along ``dim``.

        Args:
            x: a matrix.
            dim: 1 rotates along the columns, in the largest blocks that fit. 0 rotates along the rows, as tokens are; rows
                beyond the last whole block are left out.
            rotation: with a number as its ``block``.
        """
        if dim == 1:
            return cls.of(reference.rotate(x, None, fit(rotation, x.shape[1])))
        edge = min(rotation.edge, 1 << (len(x).bit_length() - 1))
        return cls.of(reference.rotate(x[: len(x) // edge * edge], replace(rotation, block=edge) if edge > 1 else None, None))


def cosine(actual: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    """The cosine of two vectors whose parts are given by name; 0 if one is zero or not finite."""
    dot = actual_square = exact_square = 0.0
    for name, e in exact.items():
        a = actual[name]
        dot += float(a @ e)
        actual_square += float(a @ a)
        exact_square += float(e @ e)
    product = actual_square * exact_square
    return dot / sqrt(product) if 0 < product < float("inf") else 0.0
