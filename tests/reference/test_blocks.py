"""Activations in rotated blocks of integers: the error of the round trip, from both sides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_tensor.reference import blocks

#: bits -> the relative error of Gaussian numbers: step / √12, where the step is the largest of 128 over the largest code.
EXPECTED = {8: 0.0064, 6: 0.026, 4: 0.116}


def relative_error(y, x):
    return float((y - x).norm() / x.norm())


def round_trip(x, bits):
    return blocks.decompress(*blocks.compress(x, bits), x.shape, x.dtype)


@given(bits=st.sampled_from([8, 6, 4]), seed=st.integers(0, 999), log=st.integers(-30, 30))
@settings(max_examples=30, deadline=None)
def test_gaussian_numbers(bits, seed, log):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**log
    assert 0.9 * EXPECTED[bits] < relative_error(round_trip(x, bits), x) < 1.1 * EXPECTED[bits]


@given(seed=st.integers(0, 999), height=st.sampled_from([30.0, 100.0, 1000.0]))
@settings(max_examples=20, deadline=None)
def test_an_outlier_channel(seed, height):
    """Rotated, it loses no more than Gaussian numbers do; without a rotation the others would be rounded to the outlier's grid."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    x[:, 7] *= height
    y = round_trip(x, 8)
    assert 0.1 * EXPECTED[8] < relative_error(y, x) < 1.2 * EXPECTED[8]


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (128,), (2, 3, 100)])
def test_shapes_and_bytes(bits, shape):
    x = torch.randn(shape, dtype=torch.bfloat16)
    codes, scales = blocks.compress(x, bits)
    count = -(-x.numel() // 128)
    assert codes.shape == (count, 16 * bits) and scales.shape == (count,) and blocks.bits_of(codes) == bits
    y = blocks.decompress(codes, scales, x.shape, x.dtype)
    assert y.shape == x.shape and y.dtype == x.dtype


def test_zeros_and_the_smallest_numbers():
    tiny = torch.full((2, 128), torch.finfo(torch.float32).tiny)
    assert not round_trip(torch.zeros(2, 128), 8).any() and round_trip(tiny, 8).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(3, 128)
    x[1, 5] = bad
    y = round_trip(x, 8)
    assert not y[1].isfinite().any() and y[::2].isfinite().all()


def test_packed_codes_are_what_they_were():
    for bits in (8, 6, 4):
        most = blocks.largest(bits)
        codes = torch.randint(-most, most + 1, (40, 128), dtype=torch.int8)
        assert torch.equal(blocks._unpacked(blocks._packed(codes, bits), bits), codes)


@given(st.integers(0, 40), st.integers(0, 99))
def test_masks(count, seed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)).relu()
    bits = blocks.pack_mask(x)
    assert bits.numel() == (count + 7) // 8 and bits.dtype == torch.uint8
    assert sum(int(b).bit_count() for b in bits) == (x > 0).sum()
    assert torch.equal(blocks.unpack_mask(bits, x.shape, torch.float32), (x > 0).float())
    assert torch.equal(blocks.pack_mask(x > 0), bits)


def test_nan_is_in_the_mask():
    """As in the backward of ReLU, which lets the gradient of NaN through."""
    assert blocks.pack_mask(torch.tensor([float("nan"), -1.0, 0.0, 2.0])).tolist() == [0b1001]
