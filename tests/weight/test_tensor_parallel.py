"""Parts of weights for tensor parallelism: rows keep their codes, columns their rotation, and together they are the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_tensor import HaloWeight
from halo_tensor.fences.collectives import Ranks
from halo_tensor.operand import gains
from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, INT8, RECIPES, Rotation, halo
from halo_tensor.weight.tensor_parallel import obstacle, part_of

FORMATS = st.sampled_from([INT8, FP8_E4M3, FP6_E2M3])


def parts(weight: HaloWeight, dim: int, count: int) -> list[HaloWeight]:
    dense = [None] * count if weight.master is None else weight.master.chunk(count, dim)
    return [part_of(weight, dim, Ranks("", count, rank), dense[rank]) for rank in range(count)]


@settings(max_examples=25, deadline=None)
@given(
    FORMATS, st.sampled_from([0, 1, 2]), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.sampled_from([16, 128])
)
def test_parts_are_the_whole(format, level, count, frozen, balanced, block):
    torch.manual_seed(count)
    master = torch.randn(64, 4 * 128)
    exponents = torch.randint(-2, 3, (4 * 128,))
    pair = gains.of_exponents(exponents) if balanced else None
    whole = HaloWeight.from_hp(master, halo(level, format, rotation=Rotation(block)), frozen=frozen, gains=pair)
    x = torch.randn(8, 4 * 128)
    y = torch.nn.functional.linear(x, whole)
    for dim in (0, 1):
        assert obstacle(whole, dim, count) is None
        cut = parts(whole, dim, count)
        assert all(part.recipe is whole.recipe and (part.master is None) == frozen for part in cut)
        torch.testing.assert_close(torch.cat([p.dequantize() for p in cut], dim), whole.dequantize(), rtol=0, atol=1e-6)
        if dim == 0:
            assert all(
                torch.equal(a.codes.view(torch.uint8), b.view(torch.uint8))
                for a, b in zip(cut, whole.codes.chunk(count), strict=True)
            )
            assert torch.equal(torch.cat([part.scale for part in cut]), whole.scale)
            assert torch.equal(torch.cat([torch.nn.functional.linear(x, part) for part in cut], 1), y)
        else:
            together = sum(torch.nn.functional.linear(a, p) for a, p in zip(x.chunk(count, 1), cut, strict=True))
            exact = x @ master.t()
            assert (together - exact).norm() < 1.15 * (y - exact).norm()
            assert count == 1 or not torch.equal(together, y)
        assert all(part.codes.untyped_storage().nbytes() <= whole.codes.nbytes // count + 16 for part in cut), "its own memory"


@pytest.mark.parametrize(
    ("shape", "recipe", "dim", "count", "reason"),
    [
        ((128, 128), halo(1, INT8), 0, 3, "3 ranks do not divide 128 out_features"),
        ((128, 384), halo(1, INT8), 1, 2, "192 of 384 in_features, which are not whole blocks of the rotation, 128"),
        ((128, 512), halo(1, INT8, rotation=Rotation(None)), 1, 2, "not whole blocks of the rotation, 512"),
        ((128, 80), halo(0, INT8), 1, 2, "40 of 80 in_features, no multiple of 16"),
        ((192, 128), RECIPES["hot_llm"], 0, 2, "96 of 192 out_features, which are not whole blocks"),
        ((128, 384), halo(0, INT8), 1, 2, None),
        ((128, 384), halo(1, INT8, rotation=Rotation(64)), 1, 2, None),
        ((256, 128), RECIPES["hot_llm"], 0, 2, None),
    ],
)
def test_what_cannot_be_cut(shape, recipe, dim, count, reason):
    found = obstacle(HaloWeight.from_hp(torch.zeros(shape), recipe), dim, count)
    assert found is None if reason is None else reason in found
