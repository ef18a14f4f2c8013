"""The random numbers of stochastic rounding."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor.recipe import INT4
from halo_tensor.reference.codes import round_to
from halo_tensor.reference.noise import uniform

SEEDS = st.integers(-(2**63), 2**63 - 1).map(lambda n: torch.tensor([n]))


@given(seed=SEEDS, rows=st.integers(0, 40), columns=st.integers(0, 40))
def test_a_number_depends_on_its_position_only(seed, rows, columns):
    whole = uniform(seed, 40, 40)
    assert whole.dtype == torch.float32 and torch.equal(uniform(seed, rows, columns), whole[:rows, :columns])
    assert whole.min() >= 0 and whole.max() < 1 and not (whole * 2**8).frac().any()


@given(seed=SEEDS)
def test_they_are_uniform_and_independent(seed):
    """Of 2¹⁸ numbers: the mean, the variance, their 256 values, and the correlation with neighbours, with those that share a
    hash, and with other seeds."""
    u = uniform(seed, 512, 512)
    assert abs(u.mean() - 255 / 512) < 6 * (1 / 12 / u.numel()) ** 0.5 and abs(12 * u.var() - 1) < 0.02
    counts = torch.histc(u, 256, 0, 1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 255 + 7 * 510**0.5
    shifted = [u.roll(1, 0), u.roll(1, 1), u.roll(2, 1), u.roll(3, 1), u.roll(4, 1), u.t()]
    others = [*shifted, uniform(seed + 1, 512, 512), uniform(seed + 2**32, 512, 512)]
    correlation = torch.corrcoef(torch.stack([x.flatten() for x in (u, *others)]))[0, 1:]
    assert correlation.abs().max() < 6 / 512


@given(seed=SEEDS, fraction=st.floats(-7, 7))
def test_rounding_by_them_keeps_the_mean(seed, fraction):
    x = torch.full((256, 256), fraction)
    codes = round_to(x, INT4, uniform(seed, 256, 256)).float()
    assert codes.min() >= math.floor(fraction) and codes.max() <= math.ceil(fraction)
    assert abs(codes.mean() - fraction) < 6 * 0.5 / 256 + 1 / 512


def by_hand(seed, i, j):
    def mix(x):
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    row = mix(mix(i ^ mix(seed % 2**32 ^ 0x9E3779B9)) ^ seed >> 32)
    four = mix((row + j // 4 * 4 * 0x9E3779B9) % 2**32)
    return four.to_bytes(4, "little")[j % 4]


@given(seed=SEEDS)
def test_the_definition_with_pythons_integers(seed):
    """So that a run with a seed can be repeated with a later version."""
    bits = (uniform(seed, 2, 9) * 2**8).int()
    assert bits.tolist() == [[by_hand(int(seed) % 2**64, i, j) for j in range(9)] for i in range(2)]
