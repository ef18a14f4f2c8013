import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor.recipe import Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.hadamard import factors, fit, hadamard, has_hadamard, signs

WIDE = [1536, 4864, 14336, 18944]


@pytest.mark.parametrize("n", [n for n in range(1, 257) if has_hadamard(n)] + [512, 576])
def test_hadamard_matrices(n):
    h = hadamard(n)
    assert set(h.unique().tolist()) <= {-1, 1}
    assert torch.equal(h @ h.t(), n * torch.eye(n, dtype=torch.int64))


def test_powers_of_two_are_sylvesters():
    h = hadamard(128)
    parity = torch.tensor([[bin(i & j).count("1") % 2 for j in range(128)] for i in range(128)])
    assert torch.equal(h, 1 - 2 * parity)


@pytest.mark.parametrize("n", [3, 5, 6, 92, 100])
def test_orders_that_do_not_exist_or_are_not_built(n):
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"order {n}"):
        hadamard(n)


def test_signs_are_the_same_everywhere():
    """Ranks, checkpoints and kernels rely on these very values."""
    assert "".join("+-"[s < 0] for s in signs(32, 0).tolist()) == "++----+-+-++--+++++--+-+----+-+-"
    assert "".join("+-"[s < 0] for s in signs(32, 1).tolist()) == "--++---+--+----++--++--+++++--+-"
    assert torch.equal(signs(8, None), torch.ones(8, dtype=torch.int64))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1])
def test_signs_look_random(seed):
    """A sum, a lagged product and a Hadamard transform of them are all of the order √n."""
    s, n = signs(4096, seed), 4096
    assert s.sum().abs() < 5 * n**0.5
    assert (s[1:] * s[:-1]).sum().abs() < 5 * n**0.5
    assert (hadamard(n) @ s).abs().max() < 6 * n**0.5


@given(
    width=st.sampled_from([16, 48, 64, 576, *WIDE]),
    rows=st.integers(1, 5),
    block=st.sampled_from([16, 32, 64, 128, 256, None]),
    seed=st.sampled_from([None, 0, 7]),
)
def test_rotation_is_orthogonal_and_inverts(width, rows, block, seed):
    rotation = fit(Rotation(block, seed), width)
    x = torch.randn(rows, width)
    y = reference.rotate_last(x, rotation)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
    assert (y - x).norm() > 0.5 * x.norm(), "nothing was rotated"
    torch.testing.assert_close(reference.rotate_last(y, rotation, inverse=True), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [16, 64, 576, 1536])
def test_rotation_is_signs_then_hadamard(block):
    """Against the dense matrix D·H/√block, in float64; 576 and 1536 run as two factors."""
    x = torch.randn(3, 2 * block)
    matrix = torch.diag(signs(block, 3)).double() @ hadamard(block).double() / block**0.5
    expected = torch.cat([x[:, :block].double() @ matrix, x[:, block:].double() @ matrix], dim=1)
    torch.testing.assert_close(reference.rotate_last(x, Rotation(block, 3)).double(), expected, rtol=0, atol=2e-6)


def test_rotation_spreads_an_outlier():
    x = torch.zeros(1, 128)
    x[0, 5] = 1.0
    assert torch.allclose(reference.rotate_last(x, Rotation(128)).abs(), torch.full((1, 128), 128**-0.5))


@pytest.mark.parametrize(
    ("block", "width", "fitted"),
    [
        (128, 4096, 128),
        (128, 576, 64),
        (128, 48, 16),
        (128, 100, None),
        (16, 4096, 16),
        (None, 576, 576),
        (None, 14336, 14336),
        (None, 18944, 18944),
        (None, 11008, 256),
        (None, 100, None),
    ],
)
def test_fit(block, width, fitted):
    rotation = fit(Rotation(block, 5), width)
    assert rotation == (None if fitted is None else Rotation(fitted, 5))
    assert rotation is None or factors(rotation.block) is not None
