"""Layers with scales of blocks: MXFP8 and NVFP4, which have no kernel and run on a CPU."""

import copy
import functools
from math import sqrt

import pytest
import torch
from torch import nn

from halo_tensor import HadamardQuantTensor, quantize_, recipe_config, report
from halo_tensor.config import handler
from halo_tensor.kernels.device import check_scales
from halo_tensor.products.operands import quantize_operands
from halo_tensor.recipe import FP4_E2M1, FP8_E4M3, PRODUCTS, RECIPES, E, Scales, W, X
from tests.helpers.errors import relative_error
from tests.helpers.linear_layers import converted, exact, gradients
from tests.helpers.recording import OpLog

#: recipe -> the format and the layouts of X, W and E in each product, in rows and columns; None: along the contracted dimension
BLOCKS = {
    "mxfp8": (FP8_E4M3, "/e8m0", 32),
    "mxfp8_halo1": (FP8_E4M3, "/e8m0", 32),
    "nvfp4_plain": (FP4_E2M1, "/fp8_e4m3/float32", 16),
}
NAMES = [*BLOCKS, "nvfp4"]


@pytest.mark.parametrize("name", BLOCKS)
def test_operands_are_quantised_along_the_contracted_dimension(name):
    format, dtype, length = BLOCKS[name]
    for product, (left, right, contracted) in PRODUCTS.items():
        for dims in (left, right):
            operand = RECIPES[name].operand(product, dims)
            block = f"1x{length}" if dims[1] == contracted else f"{length}x1"
            assert operand.format is format and str(operand.granularity.on(dims)) == block + dtype
            assert (operand.in_features is not None) == (name == "mxfp8_halo1" and dims != E)


def test_nvfp4_is_the_paper_s():
    """arXiv 2509.25149: blocks of 16×16 for W, made once; E rounded stochastically; tokens rotated in grad_weight only."""
    recipe = RECIPES["nvfp4"]
    w = recipe.operand("output", W)
    assert w == recipe.operand("grad_input", W) and w.granularity == Scales.of("16x16/fp8_e4m3/float32")
    for product, dims in (("output", X), ("grad_input", E), ("grad_weight", E), ("grad_weight", X)):
        operand = recipe.operand(product, dims)
        assert operand.format is FP4_E2M1
        assert operand.rounding == ("stochastic" if dims == E else "nearest")
        assert (operand.tokens is not None) == (product == "grad_weight")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_errors_of_a_layer_are_those_of_its_operands(name, bias):
    """Errors of two operands are independent, so that a product's relative error is the root of their squares' sum."""
    torch.manual_seed(0)
    plain, x, e = nn.Linear(256, 192, bias=bias), torch.randn(2, 80, 256), torch.randn(2, 80, 192)
    layer = converted(plain, recipe_config(name))
    with OpLog() as log:
        results = gradients(layer, x, e)
    assert log.products() == [torch.float8_e4m3fn] * 3, "codes of FP4 are held in E4M3"
    recipe, matrices = RECIPES[name], {X: x.flatten(0, 1), W: plain.weight.detach(), E: e.flatten(0, 1)}
    for product, actual, expected in zip(PRODUCTS, results, exact(plain, x, e), strict=False):
        squares = 0.0
        for dims in PRODUCTS[product][:2]:
            (operand,) = quantize_operands(matrices[dims], dims, recipe, [product])
            squares += relative_error(operand.dequantize(), matrices[dims]) ** 2
        error = relative_error(actual.reshape(expected.shape), expected)
        assert 0.9 * sqrt(squares) < error < 1.1 * sqrt(squares), (product, error, sqrt(squares))
        assert error > (0.03 if name.startswith("mx") else 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_layer_and_a_step(name):
    """A frozen weight is held as codes if these serve both of its products; a trained one is brought up to date by its
    optimizer."""
    torch.manual_seed(0)
    plain, x = nn.Linear(128, 128), torch.randn(40, 128)
    frozen = converted(copy.deepcopy(plain).requires_grad_(False), recipe_config(name))
    assert (frozen.weight.master is None) == (name == "nvfp4")
    assert torch.equal(frozen(x), converted(plain, recipe_config(name))(x))
    layer = converted(plain, recipe_config(name))
    layer(x).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    fresh = HadamardQuantTensor.from_hp(
        layer.weight.master.detach(), layer.weight.operand.format, layer.weight.operand.granularity,
        column_rotation=layer.weight.operand.column_rotation,
    )  # fmt: skip
    assert torch.equal(layer.weight.operand.codes.float(), fresh.codes.float())
    assert torch.equal(layer.weight.operand.scale, fresh.scale)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4_plain"])
def test_compiled_is_eager(name):
    torch.manual_seed(0)
    layer, x, e = converted(nn.Linear(128, 64), recipe_config(name)), torch.randn(40, 128), torch.randn(40, 64)
    for actual, expected in zip(gradients(torch.compile(layer), x, e), gradients(layer, x, e), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_refused_with_one_clear_error(name, monkeypatch):
    """When a layer on a GPU is converted, and when a converted one is moved there."""
    on_a_gpu = functools.partial(check_scales, device=torch.device("cuda"))
    monkeypatch.setattr(handler, "check_scales", lambda granularities, device: on_a_gpu(granularities))
    with pytest.raises(RuntimeError, match="no kernel computes with scales per .*CPU only, for accuracy studies.*'int8'"):
        quantize_(nn.Linear(128, 128), recipe_config(name))
    monkeypatch.undo()
    frozen = converted(nn.Linear(128, 128).requires_grad_(False), recipe_config("nvfp4"))
    with pytest.raises(RuntimeError, match="no kernel computes with scales per 16x16"):
        torch.ops.aten._to_copy(frozen.weight, device=torch.device("cuda"))


def test_a_report_measures_them():
    """The gradient's cosine is below 1 and near it, and MXFP8's is the larger one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    found = report(
        model, torch.randn(64, 128), loss_fn=lambda model, x: model(x).square().mean(),
        candidates=[recipe_config(name) for name in ("mxfp8", "nvfp4_plain")],
    )  # fmt: skip
    cosine = {candidate.name: candidate.cosine for candidate in found.candidates}
    mxfp8, nvfp4 = (next(c for name, c in cosine.items() if part in name) for part in ("mxfp8", "nvfp4"))
    assert 0.97 < nvfp4 < 0.99 < mxfp8 < 0.9999


def test_a_shard_of_rows_has_the_scales_of_its_blocks():
    weight = converted(nn.Linear(128, 128), recipe_config("jetfire")).weight.detach()
    for shard, rows in zip(weight.split(64), weight.master.split(64), strict=True):
        fresh = HadamardQuantTensor.from_hp(rows, shard.operand.format, "32x32")
        assert shard.operand.scale.shape == (2, 4) and torch.equal(shard.operand.scale, fresh.scale)
        assert torch.equal(shard.operand.codes, fresh.codes)
    assert weight.new_zeros((64, 128)).operand.scale.shape == (2, 4)
    with pytest.raises(ValueError, match="48 rows per rank are not whole blocks of 32, each of which has one scale"):
        weight.new_zeros((48, 128))


@pytest.mark.parametrize(
    ("name", "message"),
    [("nvfp4", "share one float32, on which all ranks would have to agree"), ("mxfp8", "recipe quantises it otherwise")],
)
def test_fsdp_refuses_what_no_shard_has(name, message):
    weight = converted(nn.Linear(128, 128), recipe_config(name)).weight.detach()
    with pytest.raises(ValueError, match=message):
        weight.new_zeros((64, 128))
