"""Layouts of scales: names, shapes, cuts and bytes, against loops over elements."""

import pickle
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor.recipe import (
    COLUMN,
    E8M0,
    FP8_E4M3,
    INT8,
    ROW,
    TENSOR,
    UNIT,
    E,
    Operand,
    Product,
    Recipe,
    Scales,
    W,
    X,
)

TILES = Scales.per(rows=32, columns=32)
MX = Scales.per(E8M0, rows=1, columns=32)
NV = Scales.per(FP8_E4M3, two_levels=True, rows=1, columns=16)
#: layout -> its name, the name of its transpose, and the edges of a block in a matrix of 70×100
LAYOUTS = {
    TENSOR: ("tensor", "tensor", (70, 100)),
    ROW: ("row", "column", (1, 100)),
    COLUMN: ("column", "row", (70, 1)),
    TILES: ("32x32", "32x32", (32, 32)),
    MX: ("1x32/e8m0", "32x1/e8m0", (1, 32)),
    NV: ("1x16/fp8_e4m3/float32", "16x1/fp8_e4m3/float32", (1, 16)),
    Scales.per(FP8_E4M3, rows=4, columns=8): ("4x8/fp8_e4m3", "8x4/fp8_e4m3", (4, 8)),
    Scales.per(two_levels=True, rows=1, columns=16): ("1x16/float32", "16x1/float32", (1, 16)),
}
layouts = st.sampled_from(list(LAYOUTS))


@pytest.mark.parametrize("layout", [*LAYOUTS, UNIT], ids=str)
def test_a_name_gives_the_layout(layout):
    name, transposed, _ = LAYOUTS.get(layout, ("unit", "unit", None))
    assert str(layout) == name and Scales.of(name) == layout and Scales.of(layout) is layout
    assert str(layout.transposed) == transposed and layout.transposed.transposed == layout
    assert pickle.loads(pickle.dumps(layout)) == layout


@given(layout=layouts, rows=st.integers(1, 70), columns=st.integers(1, 100))
def test_elements_of_a_block_share_a_scale(layout, rows, columns):
    """Each element's scale is the one of its block, in a matrix that blocks need not divide."""
    height, width = LAYOUTS[layout][2]
    shape = layout.shape(rows, columns)
    scale = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    spread = layout.spread(scale, rows, columns).expand(rows, columns)
    across = ceil(columns / width)
    for i in range(0, rows, 7):
        for j in range(0, columns, 5):
            assert spread[i, j] == 1 + (i // height) * across + j // width
    turned = layout.transposed.spread(scale.t() if scale.ndim == 2 else scale, columns, rows)
    assert torch.equal(turned.expand(columns, rows).t(), spread)


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (UNIT, 0),
        (TENSOR, 4),
        (ROW, 4 * 70),
        (COLUMN, 4 * 100),
        (TILES, 4 * 3 * 4),
        (MX, 70 * 4),
        (NV, 70 * 7 + 4),
    ],
    ids=str,
)
def test_bytes(layout, size):
    assert layout.bytes(70, 100) == size


@given(layout=layouts, axis=st.sampled_from(["rows", "columns"]), start=st.integers(0, 99), stop=st.integers(0, 100))
def test_a_cut_has_the_scales_of_its_part(layout, axis, start, stop):
    """A part that begins with a block has its rows' (columns') scales. Another has none of its own, and is refused."""
    rows, columns = 70, 100
    start, stop = min(start, rows - 1), min(max(start, stop), rows)
    scale = torch.randn(layout.shape(rows, columns))
    length = layout.length(axis)
    if length is not None and start % length:
        with pytest.raises(ValueError, match=rf"{axis} from {start} on begin inside of a block of {length}"):
            layout.cut(scale, axis, start, stop)
        return
    part = (stop - start, columns) if axis == "rows" else (rows, stop - start)
    whole = layout.spread(scale, rows, columns).expand(rows, columns)
    cut = layout.cut(scale, axis, start, stop)
    assert cut.shape == layout.shape(*part)
    expected = whole[start:stop] if axis == "rows" else whole[:, start:stop]
    assert torch.equal(layout.spread(cut, *part).expand(part), expected)


def test_a_recipe_s_dimensions_become_rows_and_columns():
    tokens = Scales.per(tokens=1)
    assert tokens.on(X) is tokens.on(E) is ROW and Scales.per(in_features=1).on(X) is COLUMN
    along = Scales.per(E8M0, in_features=32, out_features=1)
    assert along.on(W) == MX and str(along) == "in_features=32,out_features=1/e8m0"
    assert TILES.on(W) is TILES and UNIT.on(X) is UNIT
    with pytest.raises(ValueError, match="over tokens and in_features has no scales along out_features"):
        along.on(X)
    assert tokens.is_per("tokens") and not tokens.is_per("in_features") and not along.is_per("out_features")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scales.of("block"), "one of tensor, row, column, unit, tokens, .*or a block such as 32x32.*got 'block'"),
        (lambda: Scales.of("1x32/int8"), "got '1x32/int8'"),
        (lambda: Scales.per(batch=1), "along at most two of rows, columns, or of tokens.*got batch"),
        (lambda: Scales.per(rows=1, tokens=1), "got rows, tokens"),
        (lambda: Scales.per(tokens=1, in_features=1, out_features=1), "at most two"),
        (lambda: Scales.per(rows=0), "integers of at least 1; got {'rows': 0}"),
        (lambda: Scales.per(rows=1.5), "integers of at least 1"),
        (lambda: Scales.per(INT8, rows=1), "kept in float32, e8m0, fp8_e4m3; got int8"),
        (lambda: Scales.per(two_levels=True), "two levels of scales need blocks"),
        (lambda: Operand(INT8, "row"), "must be a layout of scales, such as .*got 'row'"),
        (lambda: Operand(INT8, ROW), r"not along rows or columns; got Scales\(row\)"),
        (lambda: Operand(INT8, MX), "not along rows or columns"),
        (
            lambda: Recipe(
                output=Product(
                    Operand(INT8, Scales.per(tokens=1, in_features=32)), Operand(INT8, Scales.per(rows=16, columns=16))
                )
            ),
            "output contracts in_features, where the blocks of both operands must be equally long; got 32 on the left and 16",
        ),
        (
            lambda: Recipe(grad_input=Product(Operand(INT8, Scales.per(tokens=1, out_features=32)), Operand(INT8))),
            "grad_input: either both operands or none carry scales of blocks",
        ),
        (
            lambda: Recipe(grad_weight=Product(Operand(INT8, Scales.per(tokens=1, in_features=32)), Operand(INT8))),
            "grad_weight: its left operand .* cannot carry a rotation or a scale on in_features",
        ),
    ],
)
def test_layouts_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
