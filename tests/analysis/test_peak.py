"""The predicted peak of a step, on tensors without values."""

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, halo_config, quantize_
from halo_tensor.activations import choice
from halo_tensor.analysis import measure_saved, predict_peak
from halo_tensor.analysis.peak import LiveBytes, on_meta
from halo_tensor.fences.pytorch import partition_only
from tests.helpers.small_models import llama

IDS = torch.arange(128).view(2, 64)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(choice, "FEWEST_ELEMENTS", 2**9)


def make(**options) -> nn.Module:
    torch.manual_seed(0)
    model = llama(use_cache=False).bfloat16()
    quantize_(model, halo_config(**options))
    return model


@pytest.mark.parametrize("memory", ["speed", "balanced", "low"])
def test_what_a_model_saves_is_predicted_exactly(memory):
    model = make(memory=memory)
    peak = predict_peak(model, IDS, labels=IDS)
    with measure_saved(model) as saved, LiveBytes(model) as live:
        loss = model(IDS, labels=IDS).loss
    assert peak.saved == saved.total > 0
    assert all(not p.is_meta and p.grad is None for p in model.parameters()), "the model is as it was"
    with live:
        loss.backward()
    weights = [p for p in model.parameters() if isinstance(p, HaloWeight)]
    elements = sum(p.numel() for p in model.parameters())
    assert peak.weights - 2 * elements < 1000, "and the buffers of rotary embeddings"
    assert peak.codes == sum(part.nbytes for w in weights if w.operand is not None for part in w.operand.parts)
    assert (peak.codes > 0) == (memory == "speed")
    assert peak.gradients == 2 * elements and peak.optimizer == 4 * elements
    assert peak.total == peak.weights + peak.codes + peak.optimizer + peak.step
    assert peak.step == pytest.approx(live.peak, rel=0.02)


def test_of_compiled_blocks():
    """What the partitioner saves on a CPU is what it saves on the meta device."""
    torch._dynamo.reset()
    model = make(memory="low")
    peak = predict_peak(model, IDS, labels=IDS, compiled="blocks")
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=partition_only())
    with measure_saved(model) as saved:
        model(IDS, labels=IDS)
    assert peak.saved == saved.total and peak.step >= peak.saved + IDS.numel() * 128 * 2


def test_live_bytes():
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b.view(10, 100) + 1
        del b, c
        torch.ones(100)
    assert live.peak == 8000


def test_arguments():
    model = nn.Linear(128, 128)
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adamw8bit"):
        predict_peak(model, torch.ones(1, 128), optimizer="lion")
    with pytest.raises(ValueError, match='compiled must be None, "model" or "blocks"'):
        predict_peak(model, torch.ones(1, 128), compiled=True)


def test_on_meta():
    model = make()
    twin = on_meta(model)
    assert all(p.is_meta for p in twin.parameters()) and not any(p.is_meta for p in model.parameters())
    assert twin.lm_head.weight.shape == model.lm_head.weight.shape
    assert isinstance(twin.model.layers[0].mlp.up_proj.weight, HaloWeight)


def test_optimizers():
    model = nn.Linear(128, 128, bias=False)
    sizes = {name: predict_peak(model, torch.ones(1, 128), optimizer=name).optimizer for name in ("adamw", "sgd", "adamw8bit")}
    assert sizes == {"adamw": 8 * 128**2, "sgd": 0, "adamw8bit": 2 * (128**2 + 128**2 // 64)}


def test_it_prints():
    text = str(predict_peak(nn.Linear(128, 128), torch.ones(1, 128)))
    assert text.splitlines()[-1].split() == ["peak", "0.00", "GiB"]
