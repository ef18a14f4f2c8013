"""Convolutions that save their input compressed, by launches in eager code."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")
from halo_tensor import hot_config, quantize_
from halo_tensor.kernels.repeating import Program
from halo_tensor.products import compressed_conv2d
from halo_tensor.recipe import RECIPES, Rotation
from tests.helpers import interpreter, launches
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import DEVICE, runs_kernels

#: Calls with one shape: the first runs the functions of the path, the second records them, the third repeats the recording.
CALLS = 3
CONFIGS = {
    "rank 8": hot_config(quantized_convolutions="none"),
    "a scale per channel": hot_config(granularity="row"),
    "whole rank": hot_config(rank=None, block_size=128, seed=0),
    "int4": hot_config(grad_weight_bits=4),
    "X in int4": hot_config(rank=None, saved_bits=4),
}
GEOMETRIES = {
    "1×1": {"kernel_size": 1},
    "strided 1×1": {"kernel_size": 1, "stride": 2},
    "strided groups": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2},
}


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=12)


def layer_of(config, **options):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(64, 128, **options)).to(DEVICE)
    assert quantize_(layer, replace(config, min_features=32)).converted == ["0"]
    return layer


def results(layer: nn.Module, x: torch.Tensor, e: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], e)]


@runs_kernels
@pytest.mark.parametrize(
    ("config", "geometry", "format"),
    [
        *((config, "3×3", torch.channels_last) for config in CONFIGS),
        *(("rank 8", geometry, torch.channels_last) for geometry in GEOMETRIES),
        ("rank 8", "strided groups", torch.contiguous_format),
    ],
)
def test_launches_give_what_ops_give(config, geometry, format, monkeypatch):
    layer = layer_of(CONFIGS[config], **GEOMETRIES.get(geometry, {"kernel_size": 3, "padding": 1, "bias": False})).to(
        torch.bfloat16
    )
    x = torch.randn(2, 64, 6, 7, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=format)
    x[:, 3] *= 30
    e = torch.randn_like(layer(x))
    repeated, repeat = [], Program._repeat_and_write
    monkeypatch.setattr(
        Program, "_repeat_and_write", lambda self, *tensors: (repeated.append(self), repeat(self, *tensors))[1]
    )
    for clear in (compressed_conv2d._found.clear, compressed_conv2d._launches.cache_clear):
        clear()
    inputs = [x * scale for scale in (1, 2, -3)[:CALLS]]
    eagerly = [results(layer, x, e) for x in inputs]
    assert len({*repeated}) == 2, "both directions were recorded"
    monkeypatch.setattr(compressed_conv2d, "_launches_of", lambda *args: None)
    for made, x in zip(eagerly, inputs, strict=True):
        for actual, expected in zip(made, results(layer, x, e), strict=True):
            assert torch.equal(actual, expected) and actual.stride() == expected.stride()
            assert actual.abs().max() > 0
        assert made[1].is_contiguous(memory_format=format)


@runs_kernels
@pytest.mark.parametrize("rank", [8, None])
def test_errors_are_those_of_the_compressed_input(rank):
    """The output and grad_input are those of nn.Conv2d. grad_weight is that of the X that was saved."""
    config = hot_config(rank=rank, grad_output_granularity="row")
    layer = layer_of(config, kernel_size=3, padding=1).to(torch.bfloat16)
    x = torch.randn(4, 64, 8, 8, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    e = torch.randn(4, 128, 8, 8, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(layer)
    plain[0].__class__ = nn.Conv2d
    for actual, exact in zip(results(layer, x, e), results(plain.double(), x.double(), e.double()), strict=True):
        if actual.shape != layer[0].weight.shape:
            assert relative_error(actual, exact) < 0.01
        elif rank is None:
            assert 2e-3 < relative_error(actual, exact) < 0.02
        else:
            assert 0.5 < relative_error(actual, exact) < 0.9, "noise has half of its energy in the sequencies that are dropped"


@runs_kernels
def test_what_is_launched(monkeypatch):
    layer = layer_of(hot_config(), kernel_size=3).to(torch.bfloat16)
    names = launches.noted(monkeypatch)
    x = torch.randn(2, 64, 8, 8, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert names == ["amax_of_operands", "cast_for_operands"]
    names.clear()
    y.sum().backward()
    assert names == ["dequantize_kernel"]
    names.clear()
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert names == []


@runs_kernels
def test_modes_and_autocast():
    layer = layer_of(hot_config(), kernel_size=3)
    x = torch.randn(2, 64, 8, 8, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert x.grad.dtype == layer[0].weight.grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(F.relu(layer(x)).sum(), x, create_graph=True)
    y = layer(x)
    with torch.no_grad():
        layer[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@runs_kernels
def test_which_operands_take_launches():
    x = torch.empty(1, device=DEVICE, dtype=torch.bfloat16)
    plain = {name: r.grad_weight.right for name, r in RECIPES.items() if r.output == RECIPES["hot"].output}
    taken = {name for name, operand in plain.items() if compressed_conv2d.has_launches(operand, x)}
    assert taken == {name for name in plain if name.startswith("hot")} and {*plain} - taken == {"lbp_wht", "luq"}
    wide = replace(plain["hot"], tokens=Rotation(256))
    assert not compressed_conv2d.has_launches(wide, x) and not compressed_conv2d.has_launches(plain["hot"], x.double())
