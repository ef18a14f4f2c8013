"""Which tensors are saved in how many bits, on convolutions, ReLUs and poolings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor import hot_config, quantize_
from halo_tensor.activations import choice, hooks
from halo_tensor.analysis.saved_memory import measure_saved
from tests.helpers.small_models import transformers

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(choice, "FEWEST_ELEMENTS", 2**9)


class Net(nn.Module):
    """A stem, which is not converted, and convolutions behind ReLUs and norms."""

    def __init__(self, functional=False):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.a, self.b, self.norms = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 10)
        self.act = F.relu if functional else self.relu

    def forward(self, x):
        x = self.pool(self.act(self.norm(self.stem(x))))
        x = self.act(x + self.norms(self.a(x)))
        return self.head(self.act(self.b(x)).mean((2, 3)))


def make(activations, functional=False, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    model = Net(functional).to(memory_format=memory_format)
    options = {"grad_input_bits": 8, "granularity": "row", "grad_output_granularity": "row", "rounding": "nearest"}
    quantize_(model, hot_config(None, **options, activations=activations))
    return model


def run(model, memory_format=torch.contiguous_format):
    """(gradients of all parameters, bytes saved)"""
    x = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory_format)
    with measure_saved(model) as saved:
        y = model(x)
    model.zero_grad()
    model(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), saved.total, y


def distance(a, b):
    return 1 - float(F.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("functional", [False, True])
def test_a_net_of_relus(memory_format, functional):
    """Its zeros stay zeros, whatever saves them, and the layout of images does not matter."""
    exact, plain, same = run(make("plain", functional, memory_format), memory_format)
    for activations, most, share in (("all", 2e-4, 0.45), ("all-int4", 3e-2, 0.35)):
        gradient, saved, y = run(make(activations, functional, memory_format), memory_format)
        assert torch.equal(y, same), "forward computes with exact values"
        assert 0 < distance(gradient, exact) < most
        assert saved < (share + 0.1 * functional) * plain


def test_what_comes_back_of_a_relu():
    """A tensor that a ReLU made and another op reads: zeros where it was zero, positive numbers elsewhere."""
    activations = make("all").a.recipe.activations
    x = torch.randn(64, 128, requires_grad=True).mul(1).relu()
    saved = hooks._Hooks(activations, None).pack(x)
    y = saved.unpack()
    assert torch.equal(y > 0, x > 0) and 0 < (y - x).abs().max() < 0.05


def test_positions_of_a_pooling():
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.MaxPool2d(2))
    quantize_(model, hot_config(activations="all", rounding="nearest"))
    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kinds.append(t.dtype) or t, lambda t: t):
        kinds = []
        model(x)
    assert torch.int16 in kinds and torch.int64 not in kinds
    plain = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.MaxPool2d(2))
    plain.load_state_dict(model.state_dict())
    quantize_(plain, hot_config(rounding="nearest"))
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, plain)]
    assert torch.equal(*grads), "signs and positions are exact"


def test_probabilities_stay():
    """Also those of attention with a mask, whose softmax has another name."""
    x = torch.randn(2, 2, 64, 64, requires_grad=True)
    for function in (torch.softmax, torch._safe_softmax):
        y = function(x * 1, -1)
        assert choice.bits_of(y, make("all").a.recipe.activations, False) is None
    assert choice.bits_of(x * 1, make("all").a.recipe.activations, False) == 8


def test_vit_saves_less_than_half():
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512, image_size=32, patch_size=4
    )
    saved = {}
    for activations in (None, "all", "all-int4"):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).bfloat16()
        if activations:
            quantize_(model, hot_config(activations=activations))
        with measure_saved(model) as found:
            model(pixel_values=torch.randn(4, 3, 32, 32).bfloat16())
        saved[activations] = found.total
    assert 0.3 < saved["all"] / saved[None] < 0.5 and 0.2 < saved["all-int4"] / saved[None] < 0.35
