"""Kernels with operands as large and as small as float32 holds them, beside the reference.

They run in Triton's interpreter where there is no GPU, in a process of their own, as in test_kernels. It multiplies subnormal
numbers as a CPU does; that a GPU does too is for the tests marked gpu.
"""

from itertools import product

import pytest
import torch

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, INT8, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers import interpreter
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import DEVICE, runs_kernels
from tests.helpers.magnitudes import EDGES, check_layer, in_every_recipe, operands


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=20)


def whole_numbers(rows, columns, exponent, dtype=torch.float32):
    """Of which every sum is exact in any order, times a power of two; none subnormal, and the last row zero."""
    x = torch.randint(-8, 9, (rows, columns)).double()
    x[:, 0], x[-1] = 8, 0
    return (x * 2.0 ** (exponent - 3)).to(DEVICE, dtype)


#: binary exponents of the largest elements
EXTREMES = [-123, -118, 0, 119, 123]
FOLDED = [(-123, 0), (-60, -62), (-20, -103), (0, 0), (58, 58), (98, 18)]


def assert_matches(codes, scales, expected, expected_scales):
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scales, expected_scales)
    assert codes.float().abs().max() > 0 and scales.isfinite().all()


@runs_kernels
@pytest.mark.parametrize("exponent", EXTREMES)
def test_kernels_quantise(exponent):
    for format, right, scale in product((INT8, FP8_E4M3, FP6_E2M3), (None, Rotation(64)), ("row", "tensor")):
        for dtype in (torch.float32, torch.bfloat16):
            x = whole_numbers(20, 128, exponent, dtype)
            codes, _, scales = ops.rotate_quantize(x, None, right, format, scale)
            assert_matches(codes, scales, *reference.rotate_quantize(x, None, right, format, scale))
    x = whole_numbers(20, 128, exponent)
    codes, scales = torch.zeros(20, 128, dtype=torch.int8, device=DEVICE), torch.zeros(20, device=DEVICE)
    ops.requantize_([x, x], None, Rotation(64), INT8, "row", [codes, codes.clone()], [scales, scales.clone()], [])
    assert_matches(codes, scales, *reference.rotate_quantize(x, None, Rotation(64), INT8, "row"))
    y = ops.rotate(x, None, Rotation(64))
    assert torch.equal(y, reference.rotate(x, None, Rotation(64))) and y.isfinite().all()
    assert torch.equal(ops.unrotate(y, None, Rotation(64), x.shape), x)


@runs_kernels
@pytest.mark.parametrize("exponents", FOLDED)
def test_kernels_fold(exponents):
    """Both numbers in the range that is served, and their product times 128 as well, as it is where one is a scale."""
    size, fold = exponents
    x = whole_numbers(64, 128, size)
    by_row, by_column = (2.0**fold * torch.randint(1, 3, (n,), device=DEVICE) for n in x.shape)
    for format in (INT8, FP8_E4M3):
        for left in (None, Rotation(64)):
            codes, codes_t, row_scales, column_scales = ops.quantize_pair(x, left, format, by_column, by_row)
            assert_matches(codes, row_scales, *reference.rotate_quantize(x, left, None, format, "row", None, by_column))
            by_columns = reference.rotate_quantize(x, None, None, format, "column", by_row)
            assert_matches(codes_t.t(), column_scales, *by_columns)
        codes, _, scales = ops.rotate_quantize(x, None, None, format, "row", fold_columns=by_column)
        assert_matches(codes, scales, *reference.rotate_quantize(x, None, None, format, "row", None, by_column))


@runs_kernels
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
@pytest.mark.parametrize("exponents", [(-120, 113), (113, -120), (-60, -55), (0, 0)])
def test_kernels_multiply(exponents, format):
    """Scales of operands of such magnitudes."""
    torch.manual_seed(0)
    a, b = (reference.rotate_quantize(torch.randn(n, 64), None, None, format, "row")[0].to(DEVICE) for n in (20, 128))
    a_scale, b_scale = ((torch.rand(n) + 1).to(DEVICE) * 2.0**e for n, e in zip((20, 128), exponents, strict=True))
    for right in (None, Rotation(64)):
        y = ops.scaled_mm(a, b, a_scale, b_scale, None, None, right, (20, 128), torch.float32)
        columns = reference.unrotate(a.double() @ b.double().t() * b_scale * 2.0 ** -exponents[1], None, right, y.shape)
        true = columns.double() * a_scale.double()[:, None] * 2.0 ** exponents[1]
        # A fp8 unit of a GPU sums products to some 13 bits before it adds them to a float32.
        summed = 2e-4 if format is FP8_E4M3 and DEVICE.type == "cuda" else 1e-5
        assert relative_error(y, true) < (summed if right is None else 1e-2)


@runs_kernels
@pytest.mark.parametrize("edge", EDGES)
def test_a_layer(edge):
    exponents, served = EDGES[edge]
    tensors = [t.to(DEVICE) for t in operands(exponents)]
    assert served <= set(check_layer(1, "int8", 0.0105, exponents, tensors))


@pytest.mark.gpu
@in_every_recipe
@pytest.mark.parametrize("dtype_of_x", [torch.float32, torch.bfloat16])
def test_on_a_gpu(level, dtype, usual, dtype_of_x):
    """Which flushes no subnormal number, in none of the kernels."""
    rounding = 0.0015 if dtype_of_x == torch.float32 else 0.004
    for exponents, _ in EDGES.values():
        tensors = [t.cuda() for t in operands(exponents, 512, 512, dtype_of_x)]
        assert check_layer(level, dtype, usual + rounding, exponents, tensors)
