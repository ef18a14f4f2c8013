"""The random numbers of stochastic rounding."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor.reference.noise import uniform

SEEDS = st.integers(-(2**63), 2**63 - 1).map(lambda n: torch.tensor([n]))


@given(seed=SEEDS, rows=st.integers(0, 40), columns=st.integers(0, 40))
def test_a_number_depends_on_its_position_only(seed, rows, columns):
    whole = uniform(seed, 40, 40)
    assert whole.dtype == torch.float32 and torch.equal(uniform(seed, rows, columns), whole[:rows, :columns])
    assert whole.min() >= 0 and whole.max() < 1 and not (whole * 2**23).frac().any()


@given(seed=SEEDS)
def test_they_are_uniform_and_independent(seed):
    """Of 2¹⁸ numbers: the mean, the variance, 256 classes, and the correlation with neighbours and with other seeds."""
    u = uniform(seed, 512, 512)
    assert abs(u.mean() - 0.5) < 6 * (1 / 12 / u.numel()) ** 0.5 and abs(12 * u.var() - 1) < 0.02
    counts = torch.histc(u, 256, 0, 1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 255 + 7 * 510**0.5
    others = [u.roll(1, 0), u.roll(1, 1), u.t(), uniform(seed + 1, 512, 512), uniform(seed + 2**32, 512, 512)]
    correlation = torch.corrcoef(torch.stack([x.flatten() for x in (u, *others)]))[0, 1:]
    assert correlation.abs().max() < 6 / 512


def by_hand(seed, i, j):
    def mix(x):
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    return mix(mix(i ^ seed % 2**32) ^ mix(mix(j ^ seed >> 32) ^ 0x9E3779B9)) >> 9


@given(seed=SEEDS)
def test_the_definition_with_pythons_integers(seed):
    """So that a run with a seed can be repeated with a later version."""
    bits = (uniform(seed, 2, 3) * 2**23).int()
    assert bits.tolist() == [[by_hand(int(seed) % 2**64, i, j) for j in range(3)] for i in range(2)]
