"""Bytes and operations, against sums done by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from halo_tensor import halo_config
from halo_tensor.analysis import cost, roofline
from halo_tensor.analysis.ceilings import H100
from halo_tensor.recipe import PRODUCTS, RECIPES, Recipe


def test_bit_operations_by_hand():
    """HALO-1 in int8: blocks of 128 take 7 additions an element, of 16 bits; a scaling takes 16·16."""
    recipe, groups = halo_config(1, "int8").recipe, 3
    tokens, n_in, n_out = 256, 128, 64
    shape = cost.Shape(tokens, n_in, n_out, groups, (tokens, n_in))
    counts = cost.bit_operations(recipe, shape)
    of_e = {recipe.operand(name, ("tokens", "out_features")) for name in ("grad_input", "grad_weight")}
    made = (tokens * n_in + n_in * n_out) * (7 * 16 + 16 * 16) + len(of_e) * tokens * n_out * 16 * 16  # X and W once each
    undone = 7 * 16 * (tokens * n_in + n_out * n_in)
    assert counts["transforms"] == groups * (made + undone)
    assert counts["output"] == counts["grad_input"] == groups * tokens * n_in * n_out * 64


def test_shapes_of_layers_at_work():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = (nn.Linear(64, 32) for _ in range(3))
            self.conv, self.pointwise = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(16, 32, 1, stride=2)

        def forward(self, x, image):
            return self.q(x), self.k(x), self.o(x + 1), self.conv(image), self.pointwise(image)

    found = cost.shapes(Layers(), torch.randn(2, 5, 64), torch.randn(2, 16, 8, 8))
    linear = cost.Shape(10, 64, 32, 1, (10, 64))
    assert (found["q"], found["k"], found["o"]) == (linear, replace(linear, first=False), linear), "k reads what q has saved"
    assert found["conv"] == cost.Shape(32, 144, 32, 1, (128, 16), is_convolution=True), "input positions, not windows"
    assert found["pointwise"] == cost.Shape(32, 16, 32, 1, (32, 16), is_convolution=True), "only the positions that it reads"


def test_a_larger_convolution_computes_in_high_precision():
    """Its X is projected and quantised, and back: log₂ 16 = 4 additions and a product for each element, twice."""
    wide, products = cost.Shape(32, 144, 32, 2, (128, 16), is_convolution=True), 2 * 32 * 144 * 32 * 256
    counts = cost.bit_operations(RECIPES["hot"], wide)
    assert counts == dict.fromkeys(PRODUCTS, products) | {"transforms": 2 * 2 * 128 * 16 * (4 + 16) * 16}
    assert cost.bit_operations(replace(RECIPES["hot"], quantized_convolutions="all"), wide)["grad_input"] == products // 16
    assert cost.saved_bytes(RECIPES["hot"], wide) == 2 * 64 * 16 + 4, "one scale for both groups"


def test_scales_of_blocks_count():
    """X of grad_weight lies in blocks along the tokens: of 32 with a byte each, or of 16 with a byte each and one float32."""
    shape = cost.Shape(70, 48, 128, 1, (70, 48))
    assert cost.saved_bytes(RECIPES["mxfp8"], shape) == 70 * 48 + 3 * 48
    assert cost.saved_bytes(RECIPES["nvfp4"], shape) == 80 * 48 + 5 * 48 + 4, "the rotation pads 70 tokens to 80"
    assert cost.bit_operations(RECIPES["nvfp4_plain"], shape)["output"] == 70 * 48 * 128 * 4 * 4


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_a_model_gives_no_time_of_units_that_no_kernel_uses(name):
    """Scales of blocks are dequantised and multiplied in high precision, so that nothing is gained."""
    sizes = {"tokens": 4096, "in_features": 4096, "out_features": 4096}
    plain, blocks = (roofline.seconds(recipe, sizes) for recipe in (Recipe(), RECIPES[name]))
    assert blocks > plain > roofline.seconds(halo_config(0, "fp8").recipe, sizes)
    assert not roofline.lacking(RECIPES[name], H100)
