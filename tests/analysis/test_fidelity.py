"""Errors and outliers of known matrices."""

import pytest
import torch

from halo_tensor import halo_config
from halo_tensor.analysis.fidelity import Fidelity, Outliers


def test_fidelity_of_known_differences():
    exact = torch.tensor([[3.0, 4.0]])
    assert Fidelity.of(exact * 1.1, exact).sqnr == pytest.approx(20.0, abs=1e-4)
    assert Fidelity.of(exact * 1.1, exact).cosine == pytest.approx(1.0)
    assert Fidelity.of(torch.tensor([[-4.0, 3.0]]), exact).cosine == pytest.approx(0.0)
    assert Fidelity.of(exact, exact) == Fidelity.of(exact * 0, exact * 0) == Fidelity(1.0, 150.0)
    assert Fidelity.of(exact * torch.nan, exact) == Fidelity(0.0, -150.0)
    assert Fidelity.of(exact.double() * 1e18, exact.double() * 1e-3).sqnr == -150.0


def test_noise_beyond_float32_is_no_error():
    """A candidate may overflow; the report is then of the others."""
    fidelity = Fidelity.of(torch.tensor([1e30, 0.0]), torch.tensor([1.0, 2.0]))
    assert fidelity == Fidelity(0.0, -150.0)


def test_outliers_before_and_after_rotation():
    x = torch.randn(200, 256)
    assert Outliers.of(x).kurtosis == pytest.approx(3.0, abs=0.15)
    assert 4 < Outliers.of(x).peak < 6.5
    x[:, 7] *= 50
    rotation = halo_config(1).recipe.output.left.in_features
    before, after = Outliers.of(x), Outliers.rotated(x, 1, rotation)
    assert before.kurtosis > 100 and 3 < after.kurtosis < 12
    assert before.peak > 30 and after.peak < 10
    rows = Outliers.rotated(x.T[:200], 0, rotation)  # whole blocks of them
    assert Outliers.of(x.T[:200]).kurtosis > 100 and 2 < rows.kurtosis < 12
    assert Outliers.rotated(x[:1], 0, rotation) == Outliers.of(x[:1])
    assert Outliers.of(torch.zeros(2, 2)) == Outliers(0.0, 0.0)
