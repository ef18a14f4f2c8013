"""Both operands of one matrix by two launches, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.kernels.device import has_wgmma
from halo_tensor.kernels.quantize import plan, two_operands
from halo_tensor.recipe import COLUMN, FP8_E4M3, INT4, INT8, ROW, TENSOR, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.noise import uniform
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, runs_kernels
from tests.helpers.kernel_checks import DTYPES, LAYOUTS, assert_layout, assert_same_codes, assert_same_scales, examples, matrix

COLUMNS = [None, Rotation(16, None), Rotation(16, None, 4), Rotation(64, 3), Rotation(128)]
ROWS = [None, Rotation(16, None, 8), Rotation(16, None, 3), Rotation(32), Rotation(128, 0)]


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=8)


def compare(codes, scales, expected, format):
    """Sums are in another order, so that a number between two codes may become the other one."""
    assert_same_codes(codes, expected[0], format, exact=False, rtol=2e-6)
    assert_same_scales(scales, expected[1], rtol=2e-6)


@runs_kernels
@given(
    rows=st.sampled_from([1, 37, 197]),
    columns=st.sampled_from([128, 256]),
    right=st.sampled_from(COLUMNS),
    left=st.sampled_from(ROWS),
    formats=st.sampled_from([(INT4, INT8), (INT8, INT8), (INT8, INT4), (FP8_E4M3, INT8)]),
    granularities=st.sampled_from([(TENSOR, TENSOR), (ROW, TENSOR), (TENSOR, COLUMN), (ROW, COLUMN)]),
    noisy=st.booleans(),
    dtype=DTYPES,
    layout=st.sampled_from([name for name in LAYOUTS if name != "expanded"]),
)
@settings(examples, max_examples=20)
def test_both_are_what_the_reference_says(rows, columns, right, left, formats, granularities, noisy, dtype, layout):
    x = matrix(rows, columns, dtype, layout)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE) if noisy else None
    codes, codes_t, scales, scales_t = ops.quantize_both(
        x, right, formats[0], granularities[0], left, formats[1], granularities[1], seed
    )
    assert_layout(codes)
    assert_layout(codes_t)
    noise = None if seed is None else uniform(seed, *codes.shape)
    expected = reference.rotate_quantize(x, None, right, formats[0], granularities[0], noise=noise)
    compare(codes, scales, expected, formats[0])
    compare(codes_t.t(), scales_t, reference.rotate_quantize(x, left, None, formats[1], granularities[1]), formats[1])


@runs_kernels
def test_hot_is_bit_for_bit():
    """Sums of 16 numbers of bfloat16 with few bits are exact in any order."""
    x = torch.randint(-64, 65, (197, 384), device=DEVICE).bfloat16()
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE)
    right, left = Rotation(16, None), Rotation(16, None, 8)
    codes, codes_t, scales, scales_t = ops.quantize_both(x, right, INT4, TENSOR, left, INT8, TENSOR, seed)
    noise = uniform(seed, 197, 384)
    expected, expected_scales = reference.rotate_quantize(x, None, right, INT4, TENSOR, noise=noise)
    assert torch.equal(codes, expected) and torch.equal(scales, expected_scales)
    expected, expected_scales = reference.rotate_quantize(x, left, None, INT8, TENSOR)
    assert torch.equal(codes_t.t(), expected) and torch.equal(scales_t, expected_scales)


@runs_kernels
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scales(special):
    x = torch.randn(197, 128, device=DEVICE).bfloat16()
    x[100, 5] = special
    right, left = Rotation(16, None), Rotation(16, None, 8)
    *_, scales, scales_t = ops.quantize_both(x, right, INT4, ROW, left, INT8, COLUMN, None)
    assert scales.isfinite().sum() == 196 and not scales[100].isfinite()
    assert scales_t.isfinite().sum() == 127 and not scales_t[5].isfinite()


@runs_kernels
@pytest.mark.parametrize("shape", [(0, 128), (16, 0)])
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE)
    codes, codes_t, *scales = ops.quantize_both(x, Rotation(16, None), INT4, TENSOR, Rotation(16, None, 8), INT8, TENSOR, None)
    assert codes.shape == shape and codes_t.shape == (shape[1], shape[0] // 2)
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)


@runs_kernels
@pytest.mark.parametrize("operand", ["first", "second"])
def test_one_operand_alone(operand):
    """It is what the two launches give beside the other one."""
    x, device = torch.randn(300, 256, device=DEVICE).bfloat16(), torch.device(DEVICE)
    first = two_operands.Side(Rotation(16, None), INT4, True)
    second = two_operands.Side(Rotation(16, None, 8), INT8, False)
    together = two_operands.operands_quantizer(x.dtype, device, first, second)(x)
    sides = (first, None) if operand == "first" else (None, second)
    alone = two_operands.operands_quantizer(x.dtype, device, *sides)(x)
    for i in (0, 2) if operand == "first" else (1, 3):
        assert torch.equal(alone[i], together[i])
    assert alone[1 if operand == "first" else 0] is None


@runs_kernels
def test_blocks_wider_than_a_tile_take_launches_of_their_own(monkeypatch):
    """There both operands are still right; and no other matrix takes that way where tensor cores read shared memory."""
    x = torch.randn(300, 256, device=DEVICE).bfloat16()
    wide, left = Rotation(256), Rotation(16, None, 8)
    assert not two_operands.fits(x, two_operands.Side(wide, INT8, False), two_operands.Side(left, INT8, False))
    codes, codes_t, scales, scales_t = ops.quantize_both(x, wide, INT8, TENSOR, left, INT8, TENSOR, None)
    compare(codes, scales, reference.rotate_quantize(x, None, wide, INT8, TENSOR), INT8)
    compare(codes_t.t(), scales_t, reference.rotate_quantize(x, left, None, INT8, TENSOR), INT8)

    def refuse(*args, **kwargs):
        raise AssertionError("quantised alone")

    monkeypatch.setattr(plan, "rotate_quantize", refuse)
    right = Rotation(16, None)
    ops.quantize_both(x, right, INT8, TENSOR, left, INT8, TENSOR, None)
    if has_wgmma(torch.device(DEVICE)):
        ops.quantize_both(x, Rotation(128), INT8, ROW, Rotation(128), INT8, COLUMN, None)
        ops.quantize_both(x.float(), right, INT8, ROW, left, INT8, COLUMN, None)


@pytest.mark.parametrize("shape", [(50432, 3072), (50432, 768), (12608, 768), (197, 768), (64, 64), (1, 130)])
def test_programs_share_a_row_of_tiles_evenly(shape):
    """Programs with tiles beyond the last column took a third of the time of 768 columns."""
    first, second = two_operands.Side(Rotation(16, None), INT4, False), two_operands.Side(Rotation(16, None, 8), INT8, False)
    for planned in two_operands.plan_operands(torch.bfloat16, torch.device("cpu"), first, second):
        numbers = *shape, shape[1], 1
        (programs,), (_, _, tiles, *_) = planned.variant(numbers).sizes(*numbers)
        down, needed = (-(-n // 64) for n in shape)
        across = -(-needed // tiles)
        assert programs == down * across and tiles * across - needed < across
        assert tiles == 1 or programs >= two_operands._PROGRAMS
