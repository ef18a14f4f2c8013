"""Kernels that rotate matrices, against the reference."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("triton")
from halo_tensor.kernels import rotate as rotating
from halo_tensor.recipe import Rotation
from halo_tensor.reference import ops as reference
from tests.helpers import interpreter
from tests.helpers.interpreter import runs_kernels
from tests.helpers.kernel_checks import (
    DTYPES,
    LAYOUTS,
    examples,
    matrix,
)


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=2)


@runs_kernels
@given(
    m=st.sampled_from([0, 1, 37, 150]),
    size=st.sampled_from([(37, None), (48, 16), (192, 64), (256, 128), (512, 256), (576, 576)]),
    left=st.sampled_from([None, Rotation(16, 3), Rotation(128), Rotation(256), Rotation(16, None, 8)]),
    dtype=DTYPES,
    out=DTYPES,
    layout=st.sampled_from(list(LAYOUTS)),
)
@examples
def test_rotate_and_unrotate(m, size, left, dtype, out, layout):
    k, block = size
    right = Rotation(block, 5) if block else None
    assume(m > 0 or layout == "contiguous")
    assume(block != 576 or layout != "transposed")  # see test_full_width_of_a_transposed_matrix
    tolerance = {"rtol": torch.finfo(out).eps + 4e-6, "atol": 4e-6}
    x = matrix(m, k, dtype, layout)
    y = rotating.rotate(x, left, right, out)
    torch.testing.assert_close(y, reference.rotate(x, left, right).to(out), **tolerance)
    back = rotating.unrotate(y, left, right, (m, k), out)
    torch.testing.assert_close(back, reference.unrotate(y, left, right, (m, k)).to(out), **tolerance)
    assert y.is_contiguous() and back.is_contiguous()


@runs_kernels
def test_full_width_of_a_transposed_matrix():
    x, rotation = matrix(37, 576, layout="transposed"), Rotation(576)
    expected = reference.rotate(x.contiguous(), None, rotation)
    torch.testing.assert_close(rotating.rotate(x, None, rotation, torch.float32), expected)
