"""Bytes and operations, against sums done by hand."""

from dataclasses import replace

import torch
from torch import nn

from halo_tensor import halo_config
from halo_tensor.analysis import cost


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
    assert found["conv"] == cost.Shape(32, 144, 32, 1, (128, 16)), "input positions, not windows"
    assert found["pointwise"] == cost.Shape(32, 16, 32, 1, (32, 16)), "only the positions that it reads"
