"""Runs that leave a model as it was, and gradients that are sampled."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from halo_tensor.analysis import trial_run


@pytest.mark.parametrize("evaluating", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_run_leaves_the_model_as_it_was(evaluating, fails):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model[2].eval()
    model(torch.randn(4, 8)).sum().backward()
    gradient, buffers = model[0].weight.grad, {name: (b, b.clone()) for name, b in model.named_buffers()}
    before, state = gradient.clone(), torch.get_rng_state()
    with pytest.raises(KeyError) if fails else nullcontext(), torch.no_grad(), trial_run.untouched(model, evaluating):
        assert torch.is_grad_enabled() and model[0].weight.grad is None
        assert [m.training for m in model] == ([False] * 3 if evaluating else [True, True, False])
        model(torch.randn(4, 8)).sum().backward()
        model[1].running_var = torch.ones(8)
        if fails:
            raise KeyError("stop")
    assert model[0].weight.grad is gradient and torch.equal(gradient, before)
    assert all(dict(model.named_buffers())[name] is b and torch.equal(b, value) for name, (b, value) in buffers.items())
    assert [m.training for m in model] == [True, True, False] and torch.equal(torch.get_rng_state(), state)


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
