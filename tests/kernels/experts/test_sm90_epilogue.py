"""The matrices of an un-rotation by halves. The kernel is compiled in tests/integration/test_aot.py, and runs in test_products."""

import pytest
import torch

pytest.importorskip("triton")
from halo_tensor.kernels.experts.sm90_epilogue import HALF, halves
from halo_tensor.kernels.matmul.sm90 import _order
from halo_tensor.recipe import Rotation
from halo_tensor.reference.hadamard import block_diagonal

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 3, None])
@pytest.mark.parametrize("block", [128, 64, 32, 16])
def test_sums_and_differences_of_halves_undo_a_rotation(block, seed):
    rotation = Rotation(block, seed)
    y = torch.randint(-9, 10, (7, 128)).double()
    y0, y1 = (y[:, :HALF] + y[:, HALF:], y[:, :HALF] - y[:, HALF:]) if block == 128 else (y[:, :HALF], y[:, HALF:])
    undone = torch.empty(7, 128, dtype=torch.float64)
    for i, half in enumerate((y0, y1)):
        undone[:, i * HALF + _order()[:HALF]] = half @ halves(rotation, CPU).double().view(2, HALF, HALF)[i]
    expected = y @ block_diagonal(rotation, 128, torch.float64, CPU, transposed=True)
    assert torch.equal(undone, expected) and expected.abs().max() > 9
