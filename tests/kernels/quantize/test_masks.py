"""Kernels that pack masks and unpack them, against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from halo_tensor.kernels.quantize import masks
from halo_tensor.reference import blocks as reference
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, runs_kernels
from tests.helpers.kernel_checks import examples

DTYPES = st.sampled_from([torch.bool, torch.bfloat16, torch.float16, torch.float32])


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=1)


@runs_kernels
@given(dtype=DTYPES, count=st.sampled_from([1, 7, 8, 8192, 3 * 8192 + 13]), seed=st.integers(0, 99))
@examples
def test_the_reference(dtype, count, seed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)).relu()
    x[::3] = float("nan")
    x = (x > 0 if dtype == torch.bool else x).to(DEVICE, dtype)
    bits = masks.pack_mask(x)
    assert torch.equal(bits, reference.pack_mask(x))
    y = masks.unpack_mask(bits, x.shape, dtype)
    assert y.dtype == dtype and torch.equal(y, reference.unpack_mask(bits, x.shape, dtype))
