"""Kernels that compress activations and decompress them, against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from halo_tensor.kernels.quantize import blocks
from halo_tensor.reference import blocks as reference
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels
from tests.helpers.kernel_checks import DTYPES, examples

BITS = st.sampled_from([8, 6, 4])


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=3)


def assert_same(codes, expected, bits):
    """Sums in another order may be rounded to the next code."""
    a, b = (reference._unpacked(c, bits).int() for c in (codes, expected))
    steps = (a - b).abs()
    assert steps.max() <= 1 and steps.count_nonzero() <= 1e-3 * steps.numel() + (1 if GPU else 0)


@runs_kernels
@given(bits=BITS, dtype=DTYPES, count=st.sampled_from([1, 100, 128, 8192, 64 * 128 * 3 + 37]), seed=st.integers(0, 99))
@examples
def test_the_reference(bits, dtype, count, seed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    codes, scales = blocks.compress(x, bits)
    expected, expected_scales = reference.compress(x, bits)
    torch.testing.assert_close(scales, expected_scales, rtol=2**-7, atol=0)
    if torch.equal(scales, expected_scales):
        assert_same(codes, expected, bits)
    y = blocks.decompress(expected, expected_scales, x.shape, dtype)
    # It is exact up to the last rounding, in which the interpreter truncates bfloat16.
    rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 and not GPU else 0
    torch.testing.assert_close(y, reference.decompress(expected, expected_scales, x.shape, dtype), rtol=rtol, atol=0)


@runs_kernels
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_every_code(bits):
    """Also of the smallest one, which no compression makes."""
    codes = torch.arange(-128, 128, device=DEVICE).to(torch.int8).repeat(bits * 2).view(-1, 16 * bits)
    scales = torch.linspace(0.1, 2, len(codes), device=DEVICE).bfloat16()
    shape = torch.Size([len(codes) * 128])
    y = blocks.decompress(codes, scales, shape, torch.float32)
    assert torch.equal(y, reference.decompress(codes, scales, shape, torch.float32))


@runs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(3 * 128).to(DEVICE)
    x[200] = bad
    x[256:] = 0
    y = blocks.decompress(*blocks.compress(x, 8), x.shape, x.dtype)
    assert not y[128:256].isfinite().any() and y[:128].isfinite().all() and not y[256:].any()
