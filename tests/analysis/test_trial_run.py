"""Gradients that are sampled."""

import pytest
import torch
from torch import nn

from halo_tensor.analysis import trial_run


def test_sampled_gradients_estimate_the_whole(monkeypatch):
    weight = nn.Parameter(torch.randn(300, 400))
    x = torch.randn(400)
    whole = trial_run.gradients((weight @ x).square().sum(), {"w": weight})["w"]
    monkeypatch.setattr(trial_run, "GRADIENT_SAMPLE", 20000)
    sample = trial_run.gradients((weight @ x).square().sum(), {"w": weight})["w"]
    assert len(whole) == 65536 and len(sample) == 20000
    exact = torch.autograd.grad((weight @ x).square().sum(), weight)[0].norm()
    assert sample.norm() == pytest.approx(exact.item(), rel=0.05)


def test_sampled_gradients_have_the_norm_of_the_whole(monkeypatch):
    monkeypatch.setattr(trial_run, "GRADIENT_SAMPLE", 64)
    weight, small = nn.Parameter(torch.ones(16, 64)), nn.Parameter(torch.ones(64))
    found = trial_run.gradients((weight * 3).sum() + (small * torch.arange(64.0)).sum(), {"w": weight, "s": small})
    assert len(found["w"]) == 64 and found["w"].square().sum().item() == pytest.approx(9 * 16 * 64)
    assert found["s"].tolist() == list(range(64)), "as many as are sampled: all, in order"
