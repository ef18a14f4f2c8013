"""ReLUs that save one bit an element, by launches in eager code."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from halo_tensor import dequantize_, hot_config, quantize_
from halo_tensor.activations import choice
from halo_tensor.activations.relu import HaloReLU
from tests.helpers import interpreter, launches
from tests.helpers.interpreter import DEVICE, runs_kernels
from tests.helpers.recording import OpLog

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=13)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(choice, "FEWEST_ELEMENTS", 2**9)


class Net(nn.Module):
    """A ReLU, in a model that contains a converted layer."""

    def __init__(self, inplace=False):
        super().__init__()
        self.layer, self.relu = nn.Linear(64, 64), nn.ReLU(inplace)

    def forward(self, x):
        return self.relu(x * 1)


def model_of(activations="all", **options):
    model = Net(**options).to(DEVICE)
    quantize_(model, hot_config(activations=activations))
    return model


def run(f, x, e):
    x = x.detach().requires_grad_()
    y = f(x)
    return [y.detach(), *torch.autograd.grad(y, x, e)]


@runs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_a_relu(layout, dtype, monkeypatch):
    """Result and gradient are those of F.relu to the bit, NaN included; nothing but a launch each, and a copy of an E that lies
    otherwise."""
    model, names = model_of(), launches.noted(monkeypatch)
    assert type(model.relu) is HaloReLU and isinstance(model.relu, nn.ReLU)
    for _ in range(3):
        x = LAYOUTS[layout](torch.randn(2, 5, 6, 16, device=DEVICE, dtype=dtype))
        x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, float("nan")])
        for e in (torch.randn_like(x), torch.randn(2, 16, 6, 5, device=DEVICE, dtype=dtype).transpose(1, 3),
                  torch.ones((), device=DEVICE, dtype=dtype).expand(x.shape)):  # fmt: skip
            names.clear()
            actual, expected = run(model, x, e), run(lambda x: F.relu(x * 1), x, e)
            assert names == ["relu_kernel", "masked_kernel"]
            for a, b in zip(actual, expected, strict=True):
                assert a.dtype == dtype and torch.equal(a.nan_to_num(9), b.nan_to_num(9))
            assert actual[0].stride() == expected[0].stride()
            assert actual[0].isnan().sum() == 1


@runs_kernels
def test_what_is_saved():
    x = torch.randn(8, 128, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        seen: list[torch.Tensor] = []
        y = model_of()(x)
    assert [(t.dtype, t.numel()) for t in seen] == [(torch.uint8, 128)]
    y.sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


@runs_kernels
@pytest.mark.parametrize("case", ["in place", "no gradient", "few elements", "plain activations", "a mode", "a checkpoint"])
def test_what_nn_relu_computes(case, monkeypatch):
    """Masks are packed by hooks there, or nothing is compressed."""
    model = model_of("plain" if case == "plain activations" else "all", inplace=case == "in place")
    names = launches.noted(monkeypatch)
    x = torch.randn(1 if case == "few elements" else 8, 128, device=DEVICE, requires_grad=case != "no gradient")
    if case == "a mode":
        with OpLog() as log:
            y = model(x)
        assert "pack_mask" in [name for name, _ in log.calls]
    elif case == "a checkpoint":
        y = checkpoint(model, x, use_reentrant=False)
    else:
        y = model(x)
    if x.requires_grad:
        y.sum().backward()
        assert torch.equal(x.grad, (x > 0).float())
    assert torch.equal(y, x.relu()) and not {"relu_kernel", "masked_kernel"} & {*names}


@runs_kernels
def test_derivatives_of_its_gradient():
    model, x = model_of(), torch.randn(8, 128, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 2 * (x > 0).float())


@runs_kernels
def test_what_reads_its_result_knows_its_zeros():
    """A tensor that a ReLU made is saved with a mask by another op, so that zeros come back as zeros."""
    model, x = model_of(), torch.randn(8, 128, device=DEVICE, requires_grad=True)
    y = model(x)
    assert choice.is_rectified(y) and choice.is_rectified(y.view(4, 256)) and not choice.is_rectified(y * 1)


def test_copies_and_restoring():
    model = model_of()
    assert all(type(m.relu) is HaloReLU for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))))
    quantize_(model, hot_config())
    assert type(model.relu) is nn.ReLU, "activations are saved as they are"
    quantize_(model, hot_config(activations="all"))
    assert type(model.relu) is HaloReLU
    dequantize_(model)
    assert type(model.relu) is nn.ReLU


def test_compiled():
    model = model_of()
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(8, 128, device=DEVICE)
    for actual, expected in zip(run(compiled, x, torch.ones_like(x)), run(torch.relu, x, torch.ones_like(x)), strict=True):
        assert torch.equal(actual, expected)
