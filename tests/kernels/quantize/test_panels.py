"""Columns quantised in one launch, against the reference and against two launches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.fences.fast_paths import PANELS
from halo_tensor.kernels.quantize import panels, plan, two_operands
from halo_tensor.kernels.quantize.panels import Panels, column_quantizer
from halo_tensor.recipe import COLUMN, FP8_E4M3, INT4, INT8, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, runs_kernels
from tests.helpers.kernel_checks import LAYOUTS, assert_layout, assert_same_codes, assert_same_scales, examples, matrix

#: Small tiles, since Triton's interpreter is slow. The numbers of bytes make panels of one tile, of some, and of all.
WAYS = [
    Panels(32, 16, 2, 2**20, 2, 2, 4, 2), Panels(32, 16, 1, 1, 1, 1, 4, 1), Panels(32, 16, 4, 3000, 3, 1, 4, 1),
    Panels(64, 32, 1, 5000, 2, 1, 4, 3),
]  # fmt: skip


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=7)


@runs_kernels
@given(
    rows=st.sampled_from([1, 32, 37, 150]),
    columns=st.sampled_from([16, 33, 100]),
    rotation=st.sampled_from([Rotation(16, None), Rotation(16, None, 8), Rotation(32, 3)]),
    format=st.sampled_from([INT8, INT4, FP8_E4M3]),
    how=st.sampled_from(WAYS),
    layout=st.sampled_from([name for name in LAYOUTS if name != "expanded"]),
)
@settings(examples, max_examples=8)
def test_it_is_what_the_reference_says(rows, columns, rotation, format, how, layout):
    x = matrix(rows, columns, torch.bfloat16, layout)
    codes_t, scales = column_quantizer(x.dtype, x.device, rotation, format, how)(x)
    assert_layout(codes_t)
    expected = reference.rotate_quantize(x, rotation, None, format, "column")
    assert_same_codes(codes_t.t(), expected[0], format, exact=False, rtol=2e-6)
    assert_same_scales(scales, expected[1], rtol=2e-6)


@runs_kernels
def test_it_is_what_two_launches_give():
    """Bit for bit, also in place of earlier codes."""
    x, rotation = torch.randn(70, 40, device=DEVICE).bfloat16(), Rotation(16, None)
    made = two_operands.operands_quantizer(x.dtype, x.device, None, two_operands.Side(rotation, INT8, True))(x)
    for how in WAYS:
        quantize = column_quantizer(x.dtype, x.device, rotation, INT8, how)
        into = quantize(-2 * x)
        assert quantize(x, into) is into
        assert torch.equal(into[0], made[1]) and torch.equal(into[1], made[3])


@runs_kernels
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scales(special):
    x = torch.randn(70, 40, device=DEVICE).bfloat16()
    x[50, 5] = special
    _, scales = column_quantizer(x.dtype, x.device, Rotation(16, None), INT8, WAYS[0])(x)
    assert scales.isfinite().sum() == 39 and not scales[5].isfinite()


@runs_kernels
@pytest.mark.parametrize("shape", [(0, 32), (32, 0)])
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE).bfloat16()
    codes_t, scales = column_quantizer(x.dtype, x.device, Rotation(16, None), INT8, WAYS[0])(x)
    assert codes_t.shape == (shape[1], shape[0]) and torch.equal(scales, torch.ones_like(scales))


@runs_kernels
@pytest.mark.parametrize("on", [True, False])
def test_the_op_takes_it_where_it_is_on(monkeypatch, on):
    asked = []

    def of_columns(*args):
        asked.append(args)
        return column_quantizer(*args, WAYS[0])

    monkeypatch.setattr(plan, "column_quantizer", of_columns)
    monkeypatch.setattr(PANELS, "enabled", on)
    monkeypatch.setattr(panels, "has_wgmma", lambda device: True)
    x, rotation = torch.randn(64, 32, device=DEVICE).bfloat16(), Rotation(16, None)
    _, codes_t, scales = ops.rotate_quantize(x, rotation, None, INT8, COLUMN, rows=False, columns=True)
    assert len(asked) == on
    ops.rotate_quantize_(-x, rotation, None, INT8, COLUMN, codes_t, scales, transposed=True)
    assert len(asked) == 2 * on
    expected = reference.rotate_quantize(-x, rotation, None, INT8, "column")
    assert_same_codes(codes_t.t(), expected[0], INT8, exact=False, rtol=2e-6)
