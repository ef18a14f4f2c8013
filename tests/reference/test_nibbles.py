"""INT4 codes in half a byte each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor import ops
from halo_tensor.reference.nibbles import pack_nibbles, unpack_nibbles

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
LAYOUTS = {
    "contiguous": lambda codes: codes,
    "transposed": lambda codes: codes.t().contiguous().t(),
    "with gaps": lambda codes: torch.nn.functional.pad(codes, (0, 5))[:, : codes.shape[1]],
}


def codes_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(0, 9), columns=st.integers(0, 70), seed=st.integers(0, 99), layout=st.sampled_from(sorted(LAYOUTS)))
def test_every_code_survives(rows, columns, seed, layout):
    codes = LAYOUTS[layout](codes_of(rows, columns, seed))
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (columns + 1) // 2) and packed.is_contiguous()
    unpacked = unpack_nibbles(packed, columns)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)
    assert unpacked.stride() == ((columns + 15) // 16 * 16, 1)


def test_the_layout():
    codes = torch.tensor([[1, 2, -1], [-8, 7, 0]], dtype=torch.int8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F], [0x78, 0x00]]
    every_byte = torch.arange(256, dtype=torch.uint8)[None]
    low, high = unpack_nibbles(every_byte, 512).view(-1, 2).t()
    signed = [*range(8), *range(-8, 0)]
    assert low.tolist() == signed * 16 and high.view(16, 16).tolist() == [[n] * 16 for n in signed]
    assert torch.equal(pack_nibbles(unpack_nibbles(every_byte, 512)), every_byte)


@pytest.mark.parametrize(("rows", "columns"), [(5, 16), (3, 21), (1, 7), (4, 1)])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_ops_are_traced_with_the_strides_that_they_return(rows, columns, layout):
    codes = LAYOUTS[layout](codes_of(rows, columns))
    packed = ops.pack_nibbles(codes)
    assert torch.equal(packed, pack_nibbles(codes))
    torch.library.opcheck(torch.ops.halo.pack_nibbles.default, (codes,), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.halo.unpack_nibbles.default, (packed, columns), test_utils=CHECKS)
    with torch._subclasses.FakeTensorMode() as mode:
        traced = ops.pack_nibbles(mode.from_tensor(codes))
        traced_back = ops.unpack_nibbles(traced, columns)
    assert (traced.shape, traced.stride()) == (packed.shape, packed.stride())
    assert traced_back.stride() == ops.unpack_nibbles(packed, columns).stride()
