"""The kernel that undoes the rotation of transposed codes, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from halo_tensor import HadamardQuantTensor, ops
from halo_tensor.kernels.quantize import dequantize
from halo_tensor.recipe import COLUMN, FP8_E4M3, INT8, TENSOR, UNIT, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers import interpreter, launches
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import DEVICE, runs_kernels
from tests.helpers.kernel_checks import examples

ROTATIONS = [None, Rotation(16, None, 8), Rotation(16, None, 1), Rotation(16, None, 5), Rotation(32, 3), Rotation(128, 0)]


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=5)


@runs_kernels
@given(
    rows=st.sampled_from([1, 37, 197, 256, 1500]),
    columns=st.sampled_from([1, 16, 100, 192]),
    rotation=st.sampled_from(ROTATIONS),
    granularity=st.sampled_from([TENSOR, COLUMN, UNIT]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    steps=st.sampled_from([1, dequantize.TILES.steps]),
)
@settings(examples, max_examples=25)
def test_it_is_what_the_reference_says(rows, columns, rotation, granularity, dtype, steps):
    x = torch.randn(rows, columns, device=DEVICE, dtype=dtype)
    codes, scale = reference.rotate_quantize(x, rotation, None, INT8, granularity)
    scale = None if granularity == UNIT else scale
    codes_t = codes.new_zeros(columns, codes.shape[0] + 5)[:, : codes.shape[0]].copy_(codes.t())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantize, "LARGE", 0 if steps > 1 else 2**62)
        dequantize.plan_dequantize.cache_clear()
        names = launches.noted(patch)
        made = ops.dequantize_t(codes_t, scale, rotation, x.shape, dtype)
        assert names == ["dequantize_kernel"]
    expected = reference.unrotate(reference.dequantize(codes, scale, granularity), rotation, None, x.shape)
    assert made.dtype == dtype and made.is_contiguous()
    torch.testing.assert_close(made, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=2e-6)
    if granularity != UNIT and (rotation is None or rotation.rank is None):
        # A row alone is exact with scales of columns.
        assert 1e-4 < relative_error(made, x) < 0.02 or rows == 1 or rows * columns < 50


@runs_kernels
def test_an_operand_takes_it(monkeypatch):
    x = torch.randn(320, 64, device=DEVICE).bfloat16()
    names = launches.noted(monkeypatch)
    for granularity in (TENSOR, COLUMN):
        operand = HadamardQuantTensor.from_hp(
            x, INT8, granularity, row_rotation=Rotation(16, None, 8), rows=False, columns=True
        )
        names.clear()
        y = operand.dequantize()
        assert names == ["dequantize_kernel"] and y.dtype == torch.bfloat16
        blocks = y.float().view(20, 16, 64)
        kept = torch.stack([block @ block.t() for block in blocks.double()])
        assert torch.linalg.matrix_rank(kept, hermitian=True, rtol=1e-3).max() == 8
        assert 0.5 < relative_error(y, x) < 0.9, "half of the sequencies of noise are lost"


@runs_kernels
def test_what_it_does_not_serve(monkeypatch):
    """Blocks wider than a tile and codes of floats are computed by PyTorch."""
    names = launches.noted(monkeypatch)
    for rotation, format in ((Rotation(256), INT8), (Rotation(16), FP8_E4M3)):
        x = torch.randn(300, 64, device=DEVICE)
        codes, scale = reference.rotate_quantize(x, rotation, None, format, TENSOR)
        y = ops.dequantize_t(codes.t().contiguous(), scale, rotation, x.shape, x.dtype)
        assert relative_error(y, x) < 0.05
    assert names == []


@runs_kernels
@pytest.mark.parametrize("shape", [(0, 64), (16, 0)])
def test_empty(shape):
    codes_t = torch.zeros(shape[1], shape[0] // 2, dtype=torch.int8, device=DEVICE)
    assert ops.dequantize_t(codes_t, None, Rotation(16, None, 8), shape, torch.bfloat16).shape == shape


@runs_kernels
def test_what_is_not_finite_stays():
    codes_t = torch.ones(64, 8, dtype=torch.int8, device=DEVICE)
    scale = torch.ones(64, device=DEVICE)
    scale[3] = float("nan")
    made = ops.dequantize_t(codes_t, scale, Rotation(16, None, 8), (16, 64), torch.float32)
    assert made[:, 3].isnan().all() and made.isfinite().sum() == 16 * 63
