"""Kernels that quantise, transpose and pack, against the reference.

Without a GPU, one test runs this module again in Triton's interpreter; see tests/helpers/interpreter.py.
"""

from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.kernels import rotate as rotating
from halo_tensor.kernels.launch import Launch
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.kernels.quantize import many, whole_rows
from halo_tensor.kernels.quantize import plan as quantizer
from halo_tensor.kernels.quantize.codes import code_matrix
from halo_tensor.recipe import FORMATS, FP6_E2M3, FP6_E3M2, FP8_E4M3, INT8, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference import packing
from halo_tensor.reference.codes import from_bits
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels
from tests.helpers.kernel_checks import (
    DTYPES,
    FORMAT,
    LAYOUTS,
    assert_layout,
    assert_same_bytes,
    assert_same_codes,
    assert_same_scales,
    check,
    codes_of,
    examples,
    gain_of,
    matrix,
    ordinals,
)

in_every_format = pytest.mark.parametrize("format", list(FORMATS.values()), ids=str)


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=93)


# Quantisation.

#: What may be asked of any matrix.
REQUESTS = {
    "format": FORMAT,
    "fold": st.booleans(),
    "gained": st.booleans(),
    "layouts": st.sampled_from([(True, False), (False, True), (True, True)]),
    "dtype": DTYPES,
    "layout": st.sampled_from(list(LAYOUTS)),
    "integers": st.booleans(),
}


@runs_kernels
@given(
    m=st.sampled_from([1, 3, 5, 18]),
    size=st.sampled_from(
        [(1, None), (37, None), (200, None), (64, 16), (48, 16), (192, 64), (384, 128), (256, 256), (768, 256), (576, 576)]
    ),
    seed=st.sampled_from([None, 0, 7]),
    **REQUESTS,
)
@examples
def test_whole_rows(m, size, seed, format, fold, gained, layouts, dtype, layout, integers):
    k, block = size
    right = Rotation(block, seed) if block else None
    x = matrix(m, k, dtype, layout, integers)
    fold_columns = torch.rand(k, device=DEVICE) + 0.5 if fold else None
    # A GPU keeps 16 bits of the sums over a full width.
    rtol = 1e-5 if GPU and block == 576 else 1e-6
    exact, gain = right is None or integers, gain_of(k, dtype) if gained else None
    check(x, None, right, format, "row", None, fold_columns, *layouts, exact=exact, rtol=rtol, gain=gain)


@runs_kernels
@given(
    m=st.sampled_from([1, 37, 130]),
    size=st.sampled_from([(1, None), (37, None), (200, None), (64, 16), (192, 64), (256, 128), (256, 256)]),
    left=st.sampled_from([None, Rotation(16, 3), Rotation(32), Rotation(128), Rotation(16, None, 8)]),
    scale=st.sampled_from(["row", "column", "tensor", "unit"]),
    **REQUESTS,
)
@examples
def test_tiles(m, size, left, scale, format, fold, gained, layouts, dtype, layout, integers):
    k, block = size
    right = Rotation(block, 5) if block else None
    rotations = (left is not None) + (right is not None)
    assume(rotations == 0 or (min(m, k) > 1 and layout != "expanded"))  # a sum that cancels, its own scale, is noise
    integers = integers and rotations < 2  # two rotations are scaled in different order, which ends ties differently
    x = matrix(m, k, dtype, layout, integers)
    fold_rows = fold_columns = None
    if fold and scale == "column":
        fold_rows = torch.rand(reference.rotated(m, left), device=DEVICE) + 0.5
    elif fold and (scale == "row" or layouts == (True, False)):
        fold_columns = torch.rand(k, device=DEVICE) + 0.5
    exact, gain = rotations == 0 or integers, gain_of(k, dtype) if gained else None
    check(x, left, right, format, scale, fold_rows, fold_columns, *layouts, exact=exact, gain=gain)


@runs_kernels
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("scale", ["row", "column", "tensor", "unit"])
@pytest.mark.parametrize("size", [(200, None), (192, 64), (768, 256), (576, 576)], ids=str)
def test_a_layout_by_itself_is_the_same(size, scale, gained):
    """Which compiled graphs rely on that make one in forward and one in backward."""
    k, block = size
    format = INT8 if gained == (scale in ("row", "column")) else FP8_E4M3  # each with every size, every scale and every gain
    x, right = matrix(5, k, torch.bfloat16), Rotation(block, 3) if block else None
    quantize = partial(
        quantizer.rotate_quantize, x, None, right, format, scale, None, None, gain=gain_of(k) if gained else None
    )
    codes, codes_t, scales = quantize(True, True)
    alone, _, scales_1 = quantize(True, False)
    _, alone_t, scales_2 = quantize(False, True)
    assert_same_bytes(alone, codes)
    assert_same_bytes(alone_t, codes_t)
    assert torch.equal(scales_1, scales) and torch.equal(scales_2, scales)


@runs_kernels
@pytest.mark.parametrize(
    ("scale", "folded", "layouts"),
    [
        ("row", "rows", (True, False)),
        ("column", "columns", (False, True)),
        ("tensor", "rows", (False, True)),
        ("tensor", "rows", (True, False)),
        ("tensor", "columns", (False, True)),
        ("unit", "rows", (True, False)),
        ("unit", "columns", (False, True)),
    ],
)
def test_every_fold_reaches_every_layout(scale, folded, layouts):
    x, fold = matrix(40, 40), torch.rand(40, device=DEVICE) + 2
    folds = (fold, None) if folded == "rows" else (None, fold)
    check(x, None, None, INT8, scale, *folds, *layouts, exact=True)


@runs_kernels
@given(
    m=st.sampled_from([1, 37, 150]),
    k=st.sampled_from([1, 48, 200]),
    left=st.sampled_from([None, Rotation(16, 3), Rotation(128), Rotation(256)]),
    format=FORMAT,
    folds=st.booleans(),
    dtype=DTYPES,
    layout=st.sampled_from(list(LAYOUTS)),
)
@examples
def test_pair(m, k, left, format, folds, dtype, layout):
    assume(left is None or (k > 1 and layout != "expanded"))  # as above
    x = matrix(m, k, dtype, layout)
    fold_columns, fold_rows = (torch.rand(n, device=DEVICE) + 0.5 if folds else None for n in (k, m))
    codes, codes_t, row_scales, column_scales = quantizer.quantize_pair(x, left, format, fold_columns, fold_rows)
    expected, expected_scales = reference.rotate_quantize(x, left, None, format, "row", None, fold_columns)
    assert_layout(codes)
    assert_same_codes(codes, expected, format, exact=left is None)
    assert_same_scales(row_scales, expected_scales, exact=left is None)
    expected, expected_scales = reference.rotate_quantize(x, None, None, format, "column", fold_rows, None)
    assert_layout(codes_t)
    assert_same_codes(codes_t.t(), expected, format, exact=True)
    assert_same_scales(column_scales, expected_scales, exact=True)


@runs_kernels
@pytest.mark.parametrize(
    ("left", "right", "scale"),
    [(None, Rotation(64), "row"), (None, Rotation(256), "row"), (Rotation(32), None, "row"), (None, Rotation(64), "tensor")],
    ids=str,
)
def test_into(left, right, scale):
    """A matrix like an earlier one is quantised to where that one's codes are."""
    earlier, later = matrix(37, 256), matrix(37, 256)
    codes, _, scales = quantizer.rotate_quantize(earlier, left, right, FP8_E4M3, scale, None, None, True, False)
    expected, _, expected_scales = quantizer.rotate_quantize(later, left, right, FP8_E4M3, scale, None, None, True, False)
    assert not torch.equal(codes.view(torch.int8), expected.view(torch.int8))
    quantizer.rotate_quantize(later, left, right, FP8_E4M3, scale, None, None, True, False, (codes, scales))
    assert_same_bytes(codes, expected)
    assert torch.equal(scales, expected_scales)


@runs_kernels
@pytest.mark.parametrize("scale", ["row", "tensor"])
@pytest.mark.parametrize(("width", "block"), [(256, None), (256, 64), (256, 256), (576, 576)])
def test_into_with_a_gain(width, block, scale):
    (earlier, later), gain, right = (matrix(37, width) for _ in range(2)), gain_of(width), block and Rotation(block, 3)
    rtol = 1e-5 if GPU and block == 576 else 1e-6
    codes, _, scales = ops.rotate_quantize(earlier, None, right, INT8, scale)
    ops.rotate_quantize_(later, None, right, INT8, scale, codes, scales, gain)
    expected, expected_scales = reference.rotate_quantize(later, None, right, INT8, scale, gain=gain)
    assert_same_codes(codes, expected, INT8, right is None, rtol)
    assert_same_scales(scales, expected_scales, rtol=rtol)


@runs_kernels
def test_into_codes_that_were_copied():
    """A copy has rows without padding between them, and what follows them is another's memory."""
    x = matrix(37, 100)
    codes, _, scales = quantizer.rotate_quantize(x, None, None, INT8, "row", None, None, True, False)
    memory = torch.full((37 * 100 + 1000,), 77, dtype=torch.int8, device=DEVICE)
    copied = memory[: 37 * 100].view(37, 100)
    quantizer.rotate_quantize(x, None, None, INT8, "row", None, None, True, False, (copied, scales))
    assert torch.equal(copied, codes) and (memory[37 * 100 :] == 77).all()


def requantized(xs, right, format, scale, gains):
    """Codes and scales of 7 everywhere, then of these matrices."""
    codes = [code_matrix(x, x.shape[0], reference.rotated(x.shape[1], right), format) for x in xs]
    scales = [x.new_full((x.shape[0],) if scale == "row" else (), 7, dtype=torch.float32) for x in xs]
    for code in codes:
        code.view(torch.int8).fill_(7)
    ops.requantize_(xs, None, right, format, scale, codes, scales, gains)
    return codes, scales


@runs_kernels
@examples
@given(
    shapes=st.lists(st.tuples(st.integers(0, 12), st.sampled_from([64, 100, 128, 576])), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]), min_size=1, max_size=2),
    layouts=st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=2),
    format=FORMAT, scale=st.sampled_from(["row", "row", "row", "tensor"]), block=st.sampled_from([None, 16, 64, 576]),
    gained=st.booleans(),
)  # fmt: skip
def test_many_are_requantised_as_each(shapes, dtypes, layouts, format, scale, block, gained):
    right = block and Rotation(block, 3)
    shapes = [(m, k) for m, k in shapes if block != 576 or k == 576]
    assume(shapes)
    xs = [
        matrix(m, k, dtypes[i % len(dtypes)], "contiguous" if m == 0 else layouts[i % len(layouts)])
        for i, (m, k) in enumerate(shapes)
    ]
    gains = [gain_of(x.shape[1]) for x in xs] if gained else []
    for codes, scales, x, gain in zip(
        *requantized(xs, right, format, scale, gains), xs, gains or [None] * len(xs), strict=True
    ):
        expected, _, expected_scales = ops.rotate_quantize(x, None, right, format, scale, gain=gain)
        assert_same_bytes(codes, expected)
        assert torch.equal(scales, expected_scales)


@runs_kernels
@settings(examples, max_examples=20)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 10), st.sampled_from([64, 128, 576])), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), format=st.sampled_from([FP6_E2M3, FP6_E3M2]),
    scale=st.sampled_from(["row", "row", "tensor"]), block=st.sampled_from([None, 16, 64, 576]), gained=st.booleans(),
    beyond=st.sampled_from([0, 16]), exponent=st.integers(-30, 30),
)  # fmt: skip
def test_many_are_packed_as_each(shapes, dtype, format, scale, block, gained, beyond, exponent):
    right = block and Rotation(block, 3)
    shapes = [(m, k) for m, k in shapes if block != 576 or k == 576]
    assume(shapes)
    xs = [matrix(m, k, dtype) * 2.0**exponent for m, k in shapes]
    gains = [gain_of(x.shape[1]) for x in xs] if gained else []
    memory = [torch.full((x.shape[0], x.shape[1] // 4 * 3 + beyond), 77, dtype=torch.uint8, device=DEVICE) for x in xs]
    packed = [m[:, : x.shape[1] // 4 * 3] for m, x in zip(memory, xs, strict=True)]
    scales = [x.new_full((x.shape[0],) if scale == "row" else (), 7, dtype=torch.float32) for x in xs]
    ops.requantize_(xs, None, right, format, scale, packed, scales, gains)
    for x, mine, whole, scale_of_x, gain in zip(xs, packed, memory, scales, gains or [None] * len(xs), strict=True):
        codes, _, expected_scales = ops.rotate_quantize(x, None, right, format, scale, gain=gain)
        expected = torch.empty(mine.shape, dtype=torch.uint8, device=DEVICE)
        ops.pack_rows_(codes, format, expected)
        assert torch.equal(mine, expected) and torch.equal(scale_of_x, expected_scales)
        assert (whole[:, mine.shape[1] :] == 77).all()


@runs_kernels
def test_many_alike_are_one_launch(monkeypatch):
    launched = []
    call = Launch.__call__

    def noted(self, sizes, *tensors):
        launched.append((self.kernel.fn.__name__, sizes.integers[0]))
        call(self, sizes, *tensors)

    def launches_of(xs, right, gains=()):
        launched.clear()
        requantized(xs, right, INT8, "row", [*gains])
        return launched

    monkeypatch.setattr(Launch, "__call__", noted)
    narrow, wide = [matrix(m, 128) for m in (3, 70, 5)], [matrix(m, 256) for m in (9, 2)]
    of_many = "whole_rows_of_many"
    for right in (None, Rotation(64)):
        assert launches_of([*narrow, *wide], right) == [(of_many, 3), (of_many, 2)]
        assert launches_of([*narrow, *wide], right, map(gain_of, (128, 128, 128, 256, 256))) == [(of_many, 3), (of_many, 2)]
    halves = [x.bfloat16() for x in narrow[:2]]
    assert launches_of([*halves, *narrow], None) == [(of_many, 2), (of_many, 3)]
    packed = [torch.empty(x.shape[0], 96, dtype=torch.uint8, device=DEVICE) for x in narrow]
    launched.clear()
    ops.requantize_(narrow, None, None, FP6_E2M3, "row", packed, [torch.empty(x.shape[0], device=DEVICE) for x in narrow], [])
    assert launched == [(of_many, 3)]
    # Those that the kernel cannot take have launches of their own.
    odd = [matrix(4, 128, layout="misaligned"), matrix(4, 128, torch.float64), matrix(4, 100)]
    assert launches_of([*odd[:1], *narrow, *odd[1:]], Rotation(64)) == [(of_many, 3), *[("whole_rows", 4)] * 3]


@runs_kernels
@pytest.mark.parametrize("width", [128, 1024])
def test_programs_of_many_rows(width, monkeypatch):
    """As weights with some ten thousand rows have them."""
    monkeypatch.setattr(whole_rows, "MANY", 0)
    monkeypatch.setattr(whole_rows, "_TILE", 2048)
    many._plans.clear()
    xs = [matrix(m, width, torch.bfloat16) for m in (70, 3, 33)]
    for codes, scales, x in zip(*requantized(xs, Rotation(64), INT8, "row", []), xs, strict=True):
        expected, _, expected_scales = ops.rotate_quantize(x, None, Rotation(64), INT8, "row")
        assert_same_bytes(codes, expected)
        assert torch.equal(scales, expected_scales)
    (plan,) = many._plans.values()
    constants = plan.groups[0].launch.constants
    assert constants["STEPS"] > 1 and constants["ROWS"] * constants["STEPS"] >= 64 and not plan.single
    many._plans.clear()


@runs_kernels
def test_one_matrix_of_many_rows(monkeypatch):
    x = matrix(70, 1024, torch.bfloat16)
    expected = ops.rotate_quantize(x, None, Rotation(64), INT8, "row")
    monkeypatch.setattr(whole_rows, "MANY", 70)
    monkeypatch.setattr(whole_rows, "_TILE", 2048)
    whole_rows.plan_whole_rows.cache_clear()
    found = ops.rotate_quantize(x, None, Rotation(64), INT8, "row")
    assert_same_bytes(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    monkeypatch.undo()
    whole_rows.plan_whole_rows.cache_clear()


@runs_kernels
def test_many_that_have_moved():
    """What is remembered holds pointers."""
    kept = []
    for m in (37, 37, 5, 37):
        xs = [matrix(m, 128), matrix(40 - m, 128)]
        kept.append(xs)
        for codes, scales, x in zip(*requantized(xs, None, INT8, "row", []), xs, strict=True):
            expected, _, expected_scales = ops.rotate_quantize(x, None, None, INT8, "row")
            assert_same_bytes(codes, expected)
            assert torch.equal(scales, expected_scales)


@runs_kernels
def test_vectors_of_any_stride():
    """An expanded or sliced bias, scale or fold is read as what it is."""
    x, fold = torch.randn(37, 64, device=DEVICE), torch.rand(2 * 64, device=DEVICE) + 0.5
    actual = quantizer.rotate_quantize(x, None, None, INT8, "row", None, fold[::2], True, False)
    expected = quantizer.rotate_quantize(x, None, None, INT8, "row", None, fold[::2].contiguous(), True, False)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])
    actual = quantizer.rotate_quantize(x, None, None, INT8, "row", None, None, True, False, gain=fold[::2])
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])
    a, ones = codes_of((37, 64), INT8), torch.ones(1, device=DEVICE)
    options, sliced = (None, None, (37, 37), torch.float32), fold[:74:2]
    y = product.scaled_mm(a, a, sliced, ones.expand(37), sliced, *options, sliced)
    sliced = sliced.contiguous()
    expected = product.scaled_mm(a, a, sliced, None, sliced, *options, sliced)
    assert torch.equal(y, expected)


@runs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@in_every_format
def test_nan_and_inf_show_in_the_result(format, bad):
    """Where codes · scale is not finite; what the codes are there is of no concern. Other rows are as if nothing happened."""

    def shown(codes, scales):
        return ~(codes.float() * scales).isfinite()

    x = matrix(5, 64)
    x[3, 7] = bad
    in_row, in_column = (torch.zeros(5, 64, dtype=torch.bool, device=DEVICE) for _ in range(2))
    in_row[3], in_column[:, 7] = True, True
    good = [0, 1, 2, 4]
    for right in (None, Rotation(16), Rotation(64)):
        codes, _, scales = quantizer.rotate_quantize(x, None, right, format, "row", None, None, True, False)
        assert torch.equal(shown(codes, scales[:, None]), in_row)
        expected, expected_scales = reference.rotate_quantize(x[good], None, right, format, "row")
        assert_same_codes(codes[good], expected, format, exact=right is None)
        assert_same_scales(scales[good], expected_scales)
        codes, _, scales = quantizer.rotate_quantize(x, None, right, format, "tensor", None, None, True, False)
        assert shown(codes, scales).all()
    codes, _, scales = quantizer.rotate_quantize(x, None, None, format, "column", None, None, True, False)
    assert torch.equal(shown(codes, scales), in_column)
    codes, codes_t, row_scales, column_scales = quantizer.quantize_pair(x, None, format, None, None)
    assert torch.equal(shown(codes, row_scales[:, None]), in_row)
    assert torch.equal(shown(codes_t.t(), column_scales), in_column)
    codes, _, scales = quantizer.rotate_quantize(x, Rotation(16), None, format, "row", None, None, True, False)
    assert shown(codes, scales[:, None]).all(), "every row of its block"
    if not format.uniform:  # a bare cast to integers hides it: they have neither NaN nor a scale
        check(x, None, None, format, "unit")


@runs_kernels
@pytest.mark.parametrize("right", [None, Rotation(32, 5)], ids=str)
@pytest.mark.parametrize("scale", ["row", "tensor"])
def test_a_gain_beyond_float16(scale, right):
    x, gain = matrix(37, 64, torch.float16), torch.ones(64, device=DEVICE)
    x[0, 3], gain[3] = 300.0, 256.0
    check(x, None, right, INT8, scale, rtol=1e-5, gain=gain)


@runs_kernels
@pytest.mark.parametrize("scale", ["row", "column", "tensor", "unit"])
def test_nothing_is_quantised(scale):
    for size in ((0, 64), (64, 0)):
        x = torch.empty(size, device=DEVICE)
        codes, codes_t, scales = quantizer.rotate_quantize(x, None, None, INT8, scale, None, None, True, True)
        expected, expected_scales = reference.rotate_quantize(x, None, None, INT8, scale)
        assert codes.shape == codes_t.t().shape == expected.shape and scales.shape == expected_scales.shape
        assert scales.isfinite().all() and (scales > 0).all()


# Transposition.


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1, 1), (37, 200), (130, 300), (0, 5)])
def test_transposed(shape, dtype):
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE).view(dtype)
    assert_layout(rotating.transposed(codes))
    assert_same_bytes(rotating.transposed(codes), codes.t())
    assert_same_bytes(rotating.transposed(codes[:, 1:]), codes[:, 1:].t())


@runs_kernels
@pytest.mark.parametrize("format", [FP6_E2M3, FP6_E3M2], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_packing(rows, format):
    codes = from_bits(torch.randint(64, (rows, 192), dtype=torch.uint8), format)
    codes[0, :64] = from_bits(torch.arange(64, dtype=torch.uint8), format)
    packed = torch.empty(rows, 144, dtype=torch.uint8, device=DEVICE)
    ops.pack_rows_(codes.to(DEVICE), format, packed)
    assert_same_bytes(packed, packing.pack_rows(codes, format).to(DEVICE))
    assert_same_bytes(ops.unpack_rows(packed, format), codes.to(DEVICE))
    padded = nn.functional.pad(packed, (7, 0))[:, 7:]
    assert_same_bytes(ops.unpack_rows(padded, format), codes.to(DEVICE))
    ops.pack_rows_(codes.to(DEVICE), format, padded.zero_())
    assert_same_bytes(padded, packed)


@runs_kernels
def test_widths_are_padded_to_whole_blocks():
    x, right, gain = matrix(37, 100), Rotation(16), gain_of(100)
    torch.testing.assert_close(rotating.rotate(x, None, right, torch.float32), reference.rotate(x, None, right))
    for scale in ("row", "tensor"):
        check(x, None, right, INT8, scale)
        check(x, None, right, INT8, scale, gain=gain)


# Sizes that only a GPU has the time for, through the public ops.


@pytest.mark.gpu
@runs_kernels
@in_every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block"), [((1000, 4096), 128), ((513, 14336), 128), ((513, 14336), 14336), ((200, 18944), 18944)]
)
def test_real_rows(shape, block, dtype, format):
    x = matrix(*shape, dtype)
    rtol = 1e-5 if block > 128 else 1e-6
    for gain in (None, gain_of(shape[1], dtype)):
        check(x, None, Rotation(block), format, "row", rtol=rtol, quantize=ops.rotate_quantize, gain=gain)


# That these tests can fail.


@runs_kernels
def test_the_kernels_are_what_is_tested(monkeypatch):
    launched, gained = set(), set()
    call = Launch.__call__

    def noted(self, sizes, *tensors):
        (gained if self.constants.get("GAIN") else launched).add(self.kernel.fn.__name__)
        call(self, sizes, *tensors)

    monkeypatch.setattr(Launch, "__call__", noted)
    check(matrix(3, 64), None, Rotation(64), INT8, "row")
    check(matrix(3, 64), None, None, INT8, "column")
    rotating.rotate(matrix(3, 64), None, Rotation(64), torch.float32)
    for m in (3, 65):
        a, b_t = codes_of((m, 64), INT8), codes_of((3, 64), INT8)
        product.scaled_mm(a, b_t, None, None, None, None, None, (m, 3), torch.float32)
    expected = "whole_rows amax_tiles cast_tiles transpose_codes rotate_tiles few_rows_kernel scaled_mm_kernel"
    assert launched == set(expected.split())
    gain, like = gain_of(64), codes_of((64, 64), INT8)
    for x, right in ((matrix(3, 64), Rotation(64)), (matrix(3, 64), None)):
        launched.clear(), gained.clear()
        quantizer.rotate_quantize(x, None, right, INT8, "row", None, None, True, False, gain=gain)
        assert gained == {"whole_rows"} and not launched
    product.scaled_mm(like, like, None, None, None, None, Rotation(64), (64, 64), torch.float32, gain)
    assert gained == {"whole_rows", "scaled_mm_kernel"} and not launched


@in_every_format
def test_one_wrong_code_is_seen(format):
    codes, scales = reference.rotate_quantize(torch.randn(10, 1000), None, None, format, "row")
    number = ordinals(codes, format)
    values, counts = number.unique(return_counts=True)
    follows = values.diff() == 1
    low = values[:-1][follows][counts[:-1][follows].argmax()]  # a common code, of which the next one up occurs as well

    def changed(at, to):
        """The codes with those numbered ``low`` at ``at`` replaced by a code of another number."""
        other = codes.view(torch.int8).clone()
        other.view(-1)[at] = other[number == to][0]
        return other.view(codes.dtype)

    at = (number.flatten() == low).nonzero().flatten()
    assert_same_codes(codes, codes, format, exact=True)
    assert_same_codes(changed(at[0], low + 1), codes, format, exact=False)
    with pytest.raises(AssertionError, match="1 of 10000 codes differ"):
        assert_same_codes(changed(at[0], low + 1), codes, format, exact=True)
    with pytest.raises(AssertionError):
        assert_same_codes(changed(at[0], values[0]), codes, format, exact=False)
    with pytest.raises(AssertionError):
        assert_same_codes(changed(at[:3], low + 1), codes, format, exact=False)
    with pytest.raises(AssertionError):
        assert_same_scales(scales * (1 + 3e-6), scales)
