"""Convolutions and Conv1D by HOT's recipes."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from halo_tensor import dequantize_, halo_config, hot_config, quantize_, recipe_config
from halo_tensor.layers.conv2d import HaloConv2d
from halo_tensor.recipe import CONVOLUTIONS, Product
from tests.helpers.errors import relative_error
from tests.helpers.projections import project, rounded, walsh
from tests.helpers.recording import OpLog, saved_bytes

GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 1, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "groups": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
]


def converted(layer: nn.Module, name: str, quantized: str = "none") -> nn.Module:
    layer = copy.deepcopy(layer)
    quantize_(layer, recipe_config(name), filter_fn=lambda module, name: isinstance(module, nn.Conv2d | Conv1D))
    if isinstance(layer, nn.Conv2d):
        layer.recipe = replace(layer.recipe, quantized_convolutions=quantized)
    return layer


def gradients(layer: nn.Module, x: torch.Tensor, e: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], e)]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("hp", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", CONVOLUTIONS)
def test_any_geometry(options, hp, which):
    """In int8 of the whole rank, what is left of the errors is int8's; the forward is nn.Conv2d's to the bit."""
    plain = nn.Conv2d(32, 64, dtype=hp, **options)
    layer = converted(plain, "hot_llm", which)
    assert type(layer) is HaloConv2d and (layer.bias is None) == (plain.bias is None)
    x = torch.randn(3, 32, 9, 10, dtype=hp)
    e = torch.randn_like(plain(x))
    with OpLog() as log:
        actual = gradients(layer, x, e)
    quantised = which == "all" or (which == "pointwise" and plain.kernel_size == (1, 1))
    assert log.products() == [torch.int8] * (2 * plain.groups * quantised)
    exact = 1e-6 if hp == torch.float32 else 0.01
    for i, (a, b) in enumerate(zip(actual, gradients(plain.double(), x.double(), e.double()), strict=True)):
        assert a.dtype == hp and a.shape == b.shape
        assert relative_error(a, b) < (0.02 if i == 2 or (i == 1 and quantised) else exact)
        assert i != 2 or relative_error(a, b) > 2e-3, "X was compressed"
    unbatched = gradients(layer, x[0], e[0])
    assert unbatched[0].shape == e[0].shape and relative_error(unbatched[1], actual[1][0]) < 0.03


@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 3}], ids=str)
@pytest.mark.parametrize("windows", [False, True])
def test_an_empty_batch(options, windows):
    layer = nn.Sequential(nn.Conv2d(64, 64, **options))
    quantize_(layer, hot_config(quantized_convolutions="all" if windows else "none"))
    x = torch.randn(0, 64, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer[0].weight.grad.abs().max() == 0


def test_a_pointwise_convolution_is_a_linear_layer():
    """hot.md's two paths, in float64, on positions as tokens. Rounding to nearest, to be comparable."""
    plain = nn.Conv2d(32, 64, 1)
    layer = copy.deepcopy(plain)
    quantize_(layer, hot_config(rounding="nearest", min_features=32, quantized_convolutions="pointwise"))
    x, e = torch.randn(2, 32, 7, 7), torch.randn(2, 64, 7, 7)
    _, grad_x, grad_w, _ = gradients(layer, x, e)
    x, e = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, e))
    expected = rounded(project(e.t(), 16).t(), 7) @ rounded(project(plain.weight[..., 0, 0].detach(), 16), 7)
    assert relative_error(grad_x, expected.view(2, 7, 7, 32).permute(0, 3, 1, 2)) < 2e-3
    expected = rounded(project(e, 16, 8), 127).t() @ rounded(project(x, 16, 8), 127)
    assert relative_error(grad_w[..., 0, 0], expected) < 2e-3


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_wider_convolution_is_that_of_what_was_saved(windows, format):
    """grad_weight is the exact one of X projected and rounded, but for int8's error in the product of quantised windows."""
    plain = nn.Conv2d(32, 64, 3, padding=1)
    layer = converted(plain, "hot", "all" if windows else "none")
    x, e = torch.randn(2, 32, 8, 8), torch.randn(2, 64, 8, 8)
    grad_x, grad_w = gradients(layer, x.contiguous(memory_format=format), e)[1:3]
    tokens = x.permute(0, 2, 3, 1).flatten(0, 2)
    low = rounded(project(tokens, 16, 8), 127).view(-1, 8, 32)
    saved = (walsh(16, 8) @ low).view(2, 8, 8, 32).permute(0, 3, 1, 2)
    expected = torch.nn.grad.conv2d_weight(saved, plain.weight.shape, e.double(), padding=1)
    least, most = (1e-3, 0.03) if windows else (0, 1e-6)
    assert least < relative_error(grad_w, expected) < most
    expected = torch.nn.grad.conv2d_input(x.shape, plain.weight.double(), e.double(), padding=1)
    least, most = (0.05, 0.5) if windows else (0, 1e-6)
    assert least < relative_error(grad_x, expected) < most
    assert windows or grad_x.is_contiguous(memory_format=format)


def test_windows_are_an_option_of_the_config():
    assert hot_config().recipe == recipe_config("hot").recipe and hot_config().recipe.quantized_convolutions == "none"
    layer = nn.Sequential(nn.Conv2d(64, 64, 3))
    quantize_(layer, hot_config(quantized_convolutions="all"))
    assert layer[0].recipe.quantized_convolutions == "all"
    with OpLog() as log:
        layer(torch.randn(2, 64, 8, 8, requires_grad=True)).sum().backward()
    assert log.products() == [torch.int8] * 2


def test_the_report_names_what_computes_in_high_precision():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1), nn.Linear(64, 64))
    report = quantize_(model, hot_config())
    assert report.only_saving == ["0", "1"]
    assert "  in high precision: the products of 0, 1, which save their input in few bits (quantized_conv" in str(report)
    assert quantize_(model, hot_config(quantized_convolutions="pointwise")).only_saving == ["0"]
    report = quantize_(model, hot_config(quantized_convolutions="all"))
    assert report.only_saving == [] and "in high precision:" not in str(report)


def test_a_strided_pointwise_convolution_saves_what_it_reads():
    plain = nn.Conv2d(64, 64, 1, stride=2, bias=False)
    layer, x, e = converted(plain, "hot_llm", "none"), torch.randn(2, 64, 16, 16), torch.randn(2, 64, 8, 8)
    for format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=format)
        with saved_bytes() as saved:
            layer(x.requires_grad_())
        assert saved(layer) == 2 * 64 * 8 * 8 + 64 * 4, "codes, with a scale per channel"
        for actual, exact in zip(gradients(layer, x, e), gradients(plain, x, e), strict=True):
            error, of_weight = relative_error(actual, exact), actual.shape == plain.weight.shape
            assert (2e-3 < error < 0.02) if of_weight else error < 1e-6
            assert of_weight or actual.stride() == exact.stride()  # a 1×1 weight lies in both formats


def test_recipes_that_save_x_as_it_is_or_rotated_only():
    """LBP-WHT saves half of the sequencies in high precision; a recipe with a plain grad_weight saves X."""
    plain = nn.Conv2d(32, 64, 3, padding=1, bias=False)
    x, e = torch.randn(2, 32, 8, 8), torch.randn(2, 64, 8, 8)
    exact = gradients(plain, x, e)
    layer = converted(plain, "lbp_wht")
    assert 0.3 < relative_error(gradients(layer, x, e)[2], exact[2]) < 0.9
    layer.recipe = replace(layer.recipe, grad_weight=Product())
    assert all(map(torch.equal, gradients(layer, x, e), exact))


@pytest.mark.parametrize("which", ["none", "pointwise"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_only_compressed_codes_are_saved(kernel, which):
    plain = nn.Conv2d(64, 64, kernel, padding=kernel // 2, dtype=torch.bfloat16)
    x = torch.randn(4, 64, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    bytes = {}
    for layer in (plain, converted(plain, "hot", which)):
        with saved_bytes() as saved:
            out = layer(x)
        bytes[type(layer)] = saved(layer)
        del out
    assert bytes[nn.Conv2d] == 4 * 64 * 64 * 2 and bytes[HaloConv2d] == 4 * 64 * 64 // 2 + 4
    layer = converted(plain, "hot", which)
    layer.weight.requires_grad_(False)
    with saved_bytes() as saved:
        layer(x).sum().backward()
    assert saved(layer) == 0 and x.grad is not None


def test_what_is_left_alone_says_why():
    class Standardised(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(3, 64, 7), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64), Standardised(64, 64, 1),
        nn.ConvTranspose2d(64, 64, 2), nn.Conv2d(64, 72, 1), nn.Conv2d(72, 64, 1), nn.Linear(64, 64),
    )  # fmt: skip
    report = quantize_(model, hot_config())
    assert report.converted == ["1", "7"]
    assert {name: reason.split(" (")[0] for name, reason in report.skipped.items()} == {
        "0": "fewer than min_features=64 features on a side",
        "2": "fewer than min_features=64 features on a side",
        "3": "it is a Standardised, whose forward may be its own",
        "4": "of convolutions, only nn.Conv2d is converted",
        "5": "a width that is no multiple of 16",
        "6": "a width that is no multiple of 16",
    }
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(128, 128))
    with pytest.warns(UserWarning, match=r"0: a Conv2d follows .*hot_config\(\)'s \(69 % of the parameters\)"):
        assert quantize_(model, halo_config()).converted == ["1"]
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="a Conv2d follows recipes with a plain forward only"):
        quantize_(model, halo_config(), filter_fn=lambda module, name: isinstance(module, nn.Conv2d))


def test_there_and_back():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), Conv1D(64, 64))
    names = list(model.state_dict())
    assert quantize_(model, hot_config()).converted == quantize_(model, hot_config(4)).converted == ["0", "1"]
    assert model[0].recipe == hot_config(4).recipe
    assert quantize_(model, hot_config(4)).converted == ["0", "1"], "the same config again"
    again = pickle.loads(pickle.dumps(model))
    assert again[0].recipe == model[0].recipe and list(model.state_dict()) == names
    dequantize_(model)
    assert [type(m) for m in model] == [nn.Conv2d, Conv1D] and not hasattr(model[0], "recipe")


def test_conv1d_is_the_linear_layer_of_its_transpose():
    plain = Conv1D(128, 64)
    linear = nn.Linear(64, 128)
    linear.load_state_dict({"weight": plain.weight.t(), "bias": plain.bias})
    config = hot_config(rounding="nearest")
    layer = copy.deepcopy(plain)
    quantize_(layer, config)
    quantize_(linear, config)
    x, e = torch.randn(2, 13, 64), torch.randn(2, 13, 128)
    for a, b in zip(gradients(layer, x, e), gradients(linear, x, e), strict=True):
        torch.testing.assert_close(a if a.shape == b.shape else a.t(), b)


def test_compiled_and_under_autocast():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1, stride=2), nn.Flatten(2), Conv1D(64, 16))
    quantize_(model[:2], hot_config())
    quantize_(model[3], hot_config(min_features=16))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, 8, 8, requires_grad=True)

    def grads(f):
        torch.manual_seed(1)
        return torch.autograd.grad(f(x).square().sum(), [x, *model.parameters()])

    for a, b in zip(grads(compiled), grads(model), strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), [x, model[0].weight])] == [torch.float32] * 2
    with pytest.raises(ValueError, match="conv2d: input torch.bfloat16, weight torch.float32"):
        model[0](x.bfloat16())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(F.relu(model[0](x)).sum(), x, create_graph=True)
