"""Products of codes, by whichever backend is planned, against float64."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.kernels.launch import Launch
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.kernels.matmul import tma
from halo_tensor.recipe import FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2, INT8, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers import interpreter
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels
from tests.helpers.kernel_checks import (
    DTYPES,
    ROUNDING,
    codes_of,
    exact_product,
    examples,
    gain_of,
    matrix,
    scales_of,
)


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=40)


@runs_kernels
@pytest.mark.parametrize("gained", [False, True])
def test_float16_keeps_its_range_between_two_unrotations(monkeypatch, gained):
    """Where a pass of its own undoes the left one: columns of nearly one value, rotated along tokens, are √128 times as large."""
    monkeypatch.setattr(product, "_undoes_rows_in_epilogue", lambda *_: False)
    left, right, (m, n, k) = Rotation(128, None), Rotation(128, 1), (128, 128, 256)
    x, w = 1 + 0.05 * matrix(m, k), 0.1 * matrix(n, k) + 0.05
    x = x * (2e4 / (x @ w.t()).abs().max())
    a, a_scale = reference.rotate_quantize(x, left, None, INT8, "row")
    b, b_scale = reference.rotate_quantize(w.t().contiguous(), None, right, INT8, "column")
    args = (a, b.t().contiguous(), a_scale, b_scale, None, left, right, (m, n))
    y = product.scaled_mm(*args, torch.float16, torch.ones(n, device=DEVICE) if gained else None)
    assert y.dtype == torch.float16 and y.isfinite().all()
    assert relative_error(y.float(), exact_product(*args)) < 2e-3


@runs_kernels
@given(
    size=st.sampled_from([(1, 16, 1), (37, 48, 100), (70, 192, 200), (200, 576, 144), (300, 512, 64)]),
    formats=st.sampled_from(
        [(INT8, INT8), (FP8_E4M3, FP8_E4M3), (FP8_E5M2, FP8_E4M3), (FP6_E2M3, FP6_E2M3), (FP6_E3M2, FP6_E3M2)]
    ),
    left=st.sampled_from([None, None, Rotation(32, 5), Rotation(256)]),
    right=st.sampled_from([None, 16, 64, 128, 256]),
    scales=st.tuples(*[st.sampled_from([None, "one", "vector"])] * 2),
    biased=st.booleans(),
    gained=st.booleans(),
    dtype=DTYPES,
    layouts=st.tuples(*[st.sampled_from(["contiguous", "misaligned", "transposed"])] * 2),
)
@examples
def test_scaled_mm(size, formats, left, right, scales, biased, gained, dtype, layouts):
    m, n, k = size
    right = Rotation(right, 7) if right else None
    rows, columns = reference.padded(m, left), reference.padded(n, right)
    assume(dtype != torch.float16 or None not in scales)  # sums of codes are too large for it
    assume(k > 1 or left is None)  # one product for a row may cancel
    a, b_t = (codes_of((r, k), f, layout) for r, f, layout in zip((rows, columns), formats, layouts, strict=True))
    a_scale, b_scale = scales_of(scales, (rows, columns), [format.max for format in formats])
    bias = torch.randn(n, device=DEVICE, dtype=dtype) if biased else None
    gain = gain_of(n) if gained else None
    y = product.scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, (m, n), dtype, gain)
    assert y.dtype == dtype and y.shape == (m, n) and y.is_contiguous()
    error = relative_error(y, exact_product(a, b_t, a_scale, b_scale, bias, left, right, (m, n), gain))
    # Up to three roundings to the result's dtype. Triton's interpreter truncates to bf16, which errs twice as much; a GPU
    # rounds to bf16 before it undoes a rotation in the epilogue, and keeps about 14 bits of fp8 sums.
    least, most = ROUNDING[dtype], 3 * ROUNDING[dtype] ** 2
    if GPU:
        most += 1.66e-3**2 * ((left is not None) + (right is not None)) + (2e-3**2 if a.dtype != torch.int8 else 0)
    elif dtype == torch.bfloat16:
        most *= 4
    few = y.numel() < 1000  # a matter of chance
    assert error < (3 if few else 1.2) * most**0.5 + 1e-6
    assert error >= 0.8 * least or few


@runs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "transposed"])
@pytest.mark.parametrize("size", [(1, 1, 1), (37, 48, 100), (130, 300, 261), (300, 520, 256)])
def test_integer_products_are_exact(size, layout):
    m, n, k = size
    a, b_t = codes_of((m, k), INT8, layout), codes_of((n, k), INT8, layout)
    y = product.scaled_mm(a, b_t, None, None, None, None, None, (m, n), torch.float32)
    assert torch.equal(y.double(), exact_product(a, b_t))
    scale, bias = torch.tensor(0.5, device=DEVICE), torch.arange(n, device=DEVICE, dtype=torch.float32)
    y = product.scaled_mm(a, b_t, scale, scale, bias, None, None, (m, n), torch.float32)
    assert torch.equal(y.double(), exact_product(a, b_t) / 4 + bias)
    gain = gain_of(n)
    y = product.scaled_mm(a, b_t, scale, scale, bias, None, None, (m, n), torch.float32, gain)
    assert torch.equal(y.double(), exact_product(a, b_t) / 4 * gain + bias)


@runs_kernels
@pytest.mark.parametrize("rotations", [(None, None), (Rotation(16), Rotation(32, 5))], ids=str)
def test_sums_that_an_integer_does_not_hold(monkeypatch, rotations):
    """Are cut. In the interpreter shorter ones, of which each part is exact."""
    assert reference.LONGEST_SUM * INT8.max**2 < 2**31
    monkeypatch.setattr(product, "LONGEST_SUM", 256)
    launches = []
    call = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: (launches.append(self.kernel.fn), call(self, *tensors))[1])
    m, n, k = 96, 96, 700
    a, b_t = codes_of((m, k), INT8, "misaligned"), codes_of((n, k), INT8)
    scale, bias, gain = torch.rand(m, device=DEVICE) + 0.5, torch.randn(n, device=DEVICE), gain_of(n)
    y = product.scaled_mm(a, b_t, scale, None, bias, *rotations, (m, n), torch.float32, gain)
    assert launches.count(tma.scaled_mm_kernel.fn) == 3
    error = relative_error(y, exact_product(a, b_t, scale, None, bias, *rotations, (m, n), gain))
    assert error < (5e-3 if GPU and rotations[0] else 1e-6)


@runs_kernels
@pytest.mark.parametrize("left", [None, Rotation(32, 5), Rotation(256)], ids=str)
@pytest.mark.parametrize("block", [16, 128, 256])
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
def test_a_gain_comes_between_the_unrotation_and_the_bias(format, block, left):
    """In the epilogue, and where all of a rotation or one of two is undone in a pass of its own."""
    m, n, k, right = 256, 512, 64, Rotation(block, 7)
    a, b_t = codes_of((m, k), format), codes_of((n, k), format)
    a_scale = (torch.rand(m, device=DEVICE) + 0.5) / format.max
    # Columns and a bias so unlike each other that no other order comes near.
    gain, bias = 2.0 ** torch.randint(-6, 7, (n,), device=DEVICE), torch.randn(n, device=DEVICE) * 100
    options = (left, right, (m, n), torch.float32)
    y = product.scaled_mm(a, b_t, a_scale, None, bias, *options, gain) - bias
    expected = exact_product(a, b_t, a_scale, None, None, left, right, (m, n))
    assert relative_error(y / gain, expected) < (6e-3 if GPU else 1e-3)


@runs_kernels
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [(0, 16, 64), (5, 0, 64), (5, 16, 0)])
def test_nothing_is_multiplied(size, biased):
    m, n, k = size
    a, b_t = codes_of((m, k), INT8), codes_of((n, k), INT8)
    bias = torch.randn(n, device=DEVICE) if biased else None
    y = product.scaled_mm(a, b_t, None, None, bias, None, None, (m, n), torch.float32)
    assert torch.equal(y, bias.expand(m, n) if biased else torch.zeros(m, n, device=DEVICE))


@pytest.mark.gpu
@runs_kernels
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
@pytest.mark.parametrize("size", [(1000, 1024, 4096), (4096, 4096, 1024), (16, 4096, 4096), (8192, 4096, 1000)])
def test_real_products(size, format):
    m, n, k = size
    a, b_t = codes_of((m, k), format), codes_of((n, k), format)
    a_scale, b_scale = (torch.rand(length, device=DEVICE) + 0.5 for length in (m, n))
    exact, gain = exact_product(a, b_t, a_scale, b_scale), gain_of(n)
    for left, right in ((None, None), (None, Rotation(128)), (Rotation(128), Rotation(64)), (Rotation(16), None)):
        if left is not None and m % left.edge:
            continue
        expected = reference.unrotate(exact, left, right, (m, n))
        for dtype in (torch.float32, torch.bfloat16):
            y = ops.scaled_mm(a, b_t, a_scale, b_scale, None, left, right, (m, n), dtype)
            error = relative_error(y, expected)
            assert error < 5e-3
            if format is INT8 and dtype == torch.float32 and left is right is None:
                assert error < 1e-6
            gained = ops.scaled_mm(a, b_t, a_scale, b_scale, None, left, right, (m, n), dtype, gain)
            torch.testing.assert_close(gained, (y * gain).to(dtype), rtol=0 if error < 1e-6 else 1e-2, atol=1e-4)
