"""Products in the order of stores are products."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from halo_tensor.kernels.quantize.order import column_order, in_parts, load_shuffled, row_order
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, runs_kernels


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=16)


@triton.jit
def multiply(x, matrix, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    i, k = tl.arange(0, ROWS), tl.arange(0, 16)
    y = tl.dot(tl.load(x + i[:, None] * 16 + k[None, :]), load_shuffled(matrix, 16, COLUMNS))
    target = out + row_order(True, ROWS, WARPS)[:, None, None] * COLUMNS + column_order(COLUMNS)
    tl.store(target, in_parts(y, True, ROWS, COLUMNS, WARPS))


@runs_kernels
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("columns", [16, 32, 64, 128])
@pytest.mark.parametrize("warps", [4, 8])
def test_each_element_is_in_its_place(rows, columns, warps):
    x, matrix = (torch.randint(-8, 9, shape, device=DEVICE).float() for shape in ((rows, 16), (16, columns)))
    out = torch.full((rows, columns), float("nan"), device=DEVICE)
    multiply[(1,)](x, matrix, out, rows, columns, warps, num_warps=warps)
    assert torch.equal(out, x @ matrix)
