"""Optimisers of torchao that need less memory, with converted weights."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torchao import optim
from torchao.optim import adam, cpu_offload

from halo_tensor import HaloWeight, halo_config, quantize_
from halo_tensor.analysis.peak import OPTIMIZERS
from halo_tensor.products.operands import weight_operand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
in_every_mode = pytest.mark.parametrize("memory", ["speed", "low"])


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    """torchao compiles the update of a parameter. On a CPU it is traced, and its ops run one by one."""
    if DEVICE == "cpu":
        monkeypatch.setattr(adam.torch, "compile", partial(torch.compile, backend="aot_eager"))


def model_of(memory: str) -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.GELU(), nn.Linear(128, 128, bias=False)).bfloat16()
    quantize_(model, halo_config(memory=memory))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(64, 128, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    losses = []
    for _ in range(steps):
        loss = (model(x) - target / 8).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        check_codes(model)
    return losses


def check_codes(model: nn.Module) -> None:
    """Weights stay converted, and their codes are those of the updated master."""
    for weight in (model[0].weight, model[2].weight):
        assert isinstance(weight, HaloWeight)
        if weight.operand is not None:
            expected = weight_operand(weight.master, weight.recipe)
            assert torch.equal(weight.codes, expected.codes) and torch.equal(weight.scale, expected.scale)


def expected_losses(memory: str) -> list[float]:
    model = model_of(memory)
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


@in_every_mode
def test_8_bit_state(memory):
    model = model_of(memory)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-3)
    assert train(model, optimizer) == pytest.approx(expected_losses(memory), rel=0.02)
    for p in model.parameters():
        state = [optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq")]
        held = sum(getattr(s, name).nbytes for s in state for name in getattr(s, "tensor_attrs", ()) if name != "qmap")
        assert (held or sum(s.nbytes for s in state)) == OPTIMIZERS["adamw8bit"](p), "as the prediction of the peak counts it"


@in_every_mode
def test_stochastic_rounding(memory):
    """Updates far below the spacing of bfloat16 are lost by rounding to nearest, and their mean is kept by this."""
    kept = {}
    for rounds in (False, True):
        model = model_of(memory)
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        optimizer = optim._AdamW(model[0].parameters(), lr=1e-4, weight_decay=0.0, bf16_stochastic_round=rounds)
        for _ in range(10):
            for p in model[0].parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        check_codes(model)
        kept[rounds] = 1 - model[0].weight.dequantize().double().mean().item()
    assert kept[False] == 0.0 and kept[True] == pytest.approx(1e-3, rel=0.2)


class Stream:
    """Stands in for a CUDA stream on a machine without a GPU."""

    def wait_stream(self, other: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self) -> "Stream":
        return self


@in_every_mode
@pytest.mark.parametrize("free", [False, True], ids=["", "gradients too"])
def test_offloaded_state(memory, free, monkeypatch):
    if DEVICE == "cpu":
        empty_like = torch.empty_like
        monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch, "empty_like", lambda *a, pin_memory=False, **options: empty_like(*a, **options))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: None)
    model = model_of(memory)
    optimizer = optim.CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, offload_gradients=free, lr=1e-3)
    assert train(model, optimizer) == pytest.approx(expected_losses(memory), rel=1e-3)
    held = [t for o in optimizer.optim_dict.values() for s in o.state.values() for t in s.values()]
    assert held and all(t.device.type == "cpu" and not isinstance(t, HaloWeight) for t in held)
