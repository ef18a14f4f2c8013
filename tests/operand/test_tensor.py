import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import assume, given
from hypothesis import strategies as st

from halo_tensor import HadamardQuantTensor, halo_config, ops, quantize_
from halo_tensor.recipe import FORMATS, FP4_E2M1, FP8_E4M3, INT8, ROW, Rotation, Scales
from halo_tensor.reference.hadamard import fit
from tests.helpers.errors import relative_error, rounding_bound, typical_error
from tests.helpers.recording import OpLog

WIDTHS = [1, 2, 7, 16, 48, 64, 100, 128, 200, 256, 576]
from_hp = HadamardQuantTensor.from_hp
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=2)[:, :, 0],
    "expanded": lambda x: x[:1].expand_as(x),
}
formats = st.sampled_from(list(FORMATS.values()))


def broadcast(q: HadamardQuantTensor) -> torch.Tensor:
    """Its scale, shaped to broadcast over its codes."""
    return q.scale.unsqueeze(1) if q.granularity == ROW else q.scale


@given(
    m=st.integers(1, 70),
    k=st.sampled_from(WIDTHS),
    n=st.integers(1, 70),
    format=formats,
    scale=st.sampled_from(["row", "tensor", "32x32"]),
    block=st.sampled_from([None, 16, 64]),
    tokens=st.sampled_from([None, Rotation(16), Rotation(32, 5)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_products_with_matching_rotations(m, k, n, format, scale, block, tokens, dtype, layout):
    """X Wᵀ is the plain product within the formats' bound, and is not the plain product: the quantised path ran."""
    middle = fit(Rotation(block), k) if block else None
    x, w = LAYOUTS[layout](torch.randn(m, k).to(dtype)), torch.randn(n, k).to(dtype)
    a = from_hp(x, format, scale, row_rotation=tokens, column_rotation=middle)
    b = from_hp(w, format, scale, column_rotation=middle).t()
    with OpLog() as log:
        y = torch.mm(a, b, out_dtype=torch.float32)
    assert log.products() == [a.codes.dtype]
    assert y.shape == (m, n)

    # |XWᵀ − Y| ≤ ‖δX‖‖W‖ + ‖X‖‖δW‖ + ‖δX‖‖δW‖, in the rotated coordinates, where norms are the same
    norms = []
    for q in (a, b.t()):
        step = q.scale.max() if scale == "32x32" else broadcast(q)
        rounded = q.codes.float() * step
        bound = rounding_bound(rounded.abs() * 1.07, step, format).norm()  # codes are within 1/16 of what they round
        norms.append((q.dequantize().norm(), bound))
    (norm_x, error_x), (norm_w, error_w) = norms
    expected = x.double() @ w.double().t()
    error = (y - expected).norm()
    assert error <= 1.1 * (error_x * norm_w + norm_x * error_w + 2 * error_x * error_w) + 1e-5
    if min(m, n) >= 16 and k >= 64 and layout != "expanded" and scale != "32x32":
        typical = typical_error(format) * (2.0 if scale == "tensor" and format.uniform else 1.0)
        assert typical / 3 < error / expected.norm() < 2 * typical


BLOCKS = ["32x32", "1x32/e8m0", "32x1/e8m0", "1x16/fp8_e4m3/float32", "16x16/fp8_e4m3/float32", "4x8"]


@given(
    m=st.integers(1, 40),
    k=st.sampled_from(WIDTHS),
    n=st.integers(1, 40),
    formats=st.sampled_from([(INT8, INT8), (FP8_E4M3, FP8_E4M3), (FP8_E4M3, FP4_E2M1), (FP4_E2M1, FP4_E2M1)]),
    layouts=st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS)),
    rotated=st.booleans(),
    transposed=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
)
def test_products_of_blocks_are_those_of_what_the_codes_stand_for(m, k, n, formats, layouts, rotated, transposed, bias):
    """torch.mm and addmm of any two block layouts, made in rows or in columns, are the products of the dequantised matrices."""
    rotation = fit(Rotation(16), k) if rotated else None

    def operand(x, format, layout, turned):
        if turned:
            return from_hp(x.t(), format, layout, row_rotation=rotation, rows=False, columns=True).t()
        return from_hp(x, format, layout, column_rotation=rotation)

    a, b = (operand(torch.randn(rows, k), *others) for rows, *others in zip((m, n), formats, layouts, transposed, strict=True))
    expected = a.dequantize().double() @ b.dequantize().double().t()
    with OpLog() as log:
        y = torch.addmm(torch.ones(n), a, b.t()) - 1 if bias else torch.mm(a, b.t())
    assert log.products() == [a.any_codes().dtype]
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * k**0.5)


@given(
    m=st.integers(1, 40),
    k=st.sampled_from(WIDTHS),
    format=formats,
    scale=st.sampled_from(["row", "column", "tensor", *BLOCKS]),
)
def test_transposition_commutes(m, k, format, scale):
    x = torch.randn(m, k)
    rotation = fit(Rotation(64), k)
    a = from_hp(x, format, scale, row_rotation=Rotation(16), column_rotation=rotation, rows=True, columns=True)
    b = from_hp(
        x.t(),
        format,
        Scales.of(scale).transposed,
        row_rotation=rotation,
        column_rotation=Rotation(16),
        rows=True,
        columns=True,
    )
    assert torch.equal(a.codes.t().float(), a.codes_t.float()), "both layouts hold the same codes"
    t = a.t()
    assert (t.shape, t.row_rotation, t.column_rotation, t.granularity) == (
        b.shape,
        b.row_rotation,
        b.column_rotation,
        b.granularity,
    )
    torch.testing.assert_close(t.dequantize(), a.dequantize().t(), rtol=1e-5, atol=1e-6)
    # Rotating rows before columns or after rounds differently: a few codes may fall on the other side.
    torch.testing.assert_close(t.scale, b.scale, rtol=1e-5, atol=0)
    assert (t.codes.float() != b.codes.float()).float().mean() < 0.02 + 2 / x.numel()
    assert torch.equal(t.t().codes.float(), a.codes.float())


@given(
    m=st.integers(1, 40),
    k=st.sampled_from(WIDTHS),
    format=formats,
    layout=st.sampled_from(list(LAYOUTS)),
    rows=st.booleans(),
)
def test_dequantize(m, k, format, layout, rows):
    x = LAYOUTS[layout](torch.randn(m, k))
    q = from_hp(x, format, "row", column_rotation=fit(Rotation(64), k), rows=rows, columns=not rows)
    error = (q.dequantize() - x).norm()
    codes = q.codes if rows else q.codes_t.t()
    bound = rounding_bound(codes.float() * broadcast(q) * 1.07, broadcast(q), format).norm()
    assert error <= 1.1 * bound + 1e-5 * x.norm()
    assume(x.numel() > 256)
    assert error > 0.1 * bound


@pytest.mark.parametrize("format", list(FORMATS.values()), ids=str)
@pytest.mark.parametrize("scale", ["row", "column", "tensor", "32x32"])
def test_zero_rows_and_columns_give_zeros(format, scale):
    x = torch.randn(40, 64)
    x[3], x[:, 5] = 0, 0
    q = from_hp(x, format, scale)
    assert q.codes[3].float().abs().max() == 0 and q.codes[:, 5].float().abs().max() == 0
    y = torch.mm(q, from_hp(torch.randn(64, 8), format, "tensor" if scale != "32x32" else "32x32")) if scale != "column" else q
    assert not y.dequantize().isnan().any() if scale == "column" else (y[3] == 0).all() and y.isfinite().all()
    nothing = from_hp(torch.zeros(40, 64), format, scale)
    assert nothing.scale.isfinite().all() and (nothing.dequantize() == 0).all()


@pytest.mark.parametrize("format", list(FORMATS.values()), ids=str)
@pytest.mark.parametrize("scale", ["row", "tensor", "32x32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rotation", [None, Rotation(16)])
def test_nan_and_inf_reach_the_result(format, scale, bad, rotation):
    x, w = torch.randn(40, 64), torch.randn(48, 64)
    x[3, 7] = bad
    y = torch.mm(from_hp(x, format, scale, column_rotation=rotation), from_hp(w, format, scale, column_rotation=rotation).t())
    assert not y[3].isfinite().any(), "the token with the bad value is hidden"
    if scale == "row":
        assert y[:3].isfinite().all() and y[4:].isfinite().all(), "other tokens keep their own scales"
    y = torch.mm(from_hp(w, format, scale, column_rotation=rotation), from_hp(x, format, scale, column_rotation=rotation).t())
    assert not y[:, 3].isfinite().any()


def test_level_1_tames_outlier_columns_in_int8_per_tensor():
    """HALO's premise: a rotation over in_features spreads a column of outliers; error at least 3 times lower."""
    x, w = torch.randn(256, 512), torch.randn(128, 512)
    x[:, [3, 77, 400]] *= 60
    w[:, [3, 77, 400]] /= 60
    expected = x.double() @ w.double().t()
    errors = {}
    for rotation in (None, Rotation(128)):
        a, b = (from_hp(t, INT8, "tensor", column_rotation=rotation) for t in (x, w))
        errors[rotation] = relative_error(torch.mm(a, b.t()), expected)
    assert errors[None] > 3 * errors[Rotation(128)], errors
    assert errors[Rotation(128)] > 0.003


def test_level_2_tames_outlier_tokens_of_e():
    e, w = torch.randn(256, 512), torch.randn(512, 128)
    e[[5, 99]] *= 100
    expected = e.double() @ w.double()
    ordinary = torch.ones(256, dtype=torch.bool)
    ordinary[[5, 99]] = False
    errors = {}
    for rotation in (None, Rotation(128)):
        y = torch.mm(from_hp(e, INT8, "tensor", row_rotation=rotation), from_hp(w, INT8, "tensor"))
        errors[rotation] = relative_error(y[ordinary], expected[ordinary])
    assert errors[None] > 3 * errors[Rotation(128)], errors


@pytest.mark.parametrize("dim", [0, 1])
def test_folding_equals_scaling_before(dim):
    """A folded scale multiplies the matrix before it is quantised; the other operand then goes in without it."""
    e, x = torch.randn(100, 64), torch.randn(100, 48) * torch.logspace(-2, 2, 100)[:, None]
    q = from_hp(x, INT8, "row", columns=True)
    folded = from_hp(e, INT8, "column", fold_rows=q.scale, columns=True)
    scaled = from_hp(e * q.scale[:, None], INT8, "column", columns=True)
    assert torch.equal(folded.codes, scaled.codes) and torch.equal(folded.scale, scaled.scale)
    y = torch.mm(folded.t(), q.without_scale())
    assert 1e-3 < relative_error(y, e.double().t() @ x.double()) < 0.02
    with pytest.raises(ValueError, match="folded into the other operand"):
        torch.mm(folded.t(), q)


def test_bias_and_addmm():
    x, w, bias, full = torch.randn(20, 64), torch.randn(32, 64), torch.randn(32), torch.randn(20, 32)
    a, b = from_hp(x, INT8), from_hp(w, INT8).t()
    torch.testing.assert_close(torch.addmm(bias, a, b), torch.mm(a, b) + bias)
    torch.testing.assert_close(torch.addmm(full, a, b), torch.mm(a, b) + full)
    with pytest.raises(ValueError, match="alpha = beta = 1"):
        torch.addmm(bias, a, b, beta=2)


def test_high_precision_operands_rotate_and_multiply():
    """Recipes may rotate without quantising (LBP-WHT): the same algebra, no codes."""
    x, w = torch.randn(40, 64), torch.randn(48, 64)
    a, b = (
        from_hp(x, None, row_rotation=Rotation(16), column_rotation=Rotation(32)),
        from_hp(w, None, column_rotation=Rotation(32)),
    )
    torch.testing.assert_close(torch.mm(a, b.t()), x @ w.t(), rtol=1e-4, atol=1e-4)
    assert a.scale is None and a.codes.dtype == torch.float32


def test_casts_copies_and_moves_keep_the_codes():
    q = from_hp(torch.randn(20, 64), FP8_E4M3, columns=True)
    for other in (q.detach(), q.clone(), q.to(torch.bfloat16), q.cpu(), q.transpose(0, 1).transpose(-2, -1)):
        assert isinstance(other, HadamardQuantTensor)
        assert torch.equal(other.codes.float(), q.codes.float()) and torch.equal(other.scale, q.scale)
    assert q.to(torch.bfloat16).dtype == torch.bfloat16 and q.to(torch.bfloat16).dequantize().dtype == torch.bfloat16
    assert torch.mm(q.bfloat16(), q.bfloat16().t()).dtype == torch.bfloat16
    assert q.to("meta").device.type == "meta"
    with pytest.raises(TypeError, match="cannot stand for torch.int32"):
        q.to(torch.int32)


def test_save_and_load(tmp_path):
    q = from_hp(torch.randn(20, 64), INT8, column_rotation=Rotation(32, 4), columns=True)
    torch.save(q, tmp_path / "q.pt")
    loaded = torch.load(tmp_path / "q.pt", weights_only=True)
    assert repr(loaded) == repr(q)
    assert torch.equal(loaded.dequantize(), q.dequantize())


def test_no_kernel_for_scales_other_than_float32():
    """On a GPU from_hp and to() refuse them; nothing else runs in their place. Fake tensors are on a GPU without one."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(32, 64, device="cuda")
        for layout in ("1x32/e8m0", "1x16/fp8_e4m3/float32"):
            with pytest.raises(RuntimeError, match=f"no kernel computes with scales per {layout}.*on a CPU only"):
                from_hp(x, FP8_E4M3, layout)
        assert from_hp(x, FP8_E4M3, "32x32").codes.device.type == "cuda"
    with pytest.raises(RuntimeError, match="no kernel computes with scales per 1x32/e8m0"):
        torch.ops.aten._to_copy(from_hp(torch.randn(32, 64), FP8_E4M3, "1x32/e8m0"), device=torch.device("cuda"))


def test_save_and_load_of_blocks(tmp_path):
    q = from_hp(torch.randn(20, 64), FP4_E2M1, "1x16/fp8_e4m3/float32")
    torch.save(q, tmp_path / "q.pt")
    loaded = torch.load(tmp_path / "q.pt", weights_only=True)
    assert loaded.granularity == q.granularity and torch.equal(loaded.dequantize(), q.dequantize())


def test_repr():
    q = from_hp(
        torch.randn(20, 64).bfloat16(), INT8, column_rotation=Rotation(32, 4), row_rotation=Rotation(16, None), columns=True
    )
    assert_expected_inline(
        repr(q),
        """\
HadamardQuantTensor([20, 64], int8, scale per row, row_rotation H16, column_rotation H32·seed4, rows+columns, dtype=torch.bfloat16, device='cpu')""",
    )


def test_bad_input_gets_one_clear_error():
    x, w = torch.randn(8, 64), torch.randn(16, 64)
    with pytest.raises(ValueError, match=r"a matrix; got shape \[2, 8, 64\]"):
        from_hp(torch.randn(2, 8, 64), INT8)
    with pytest.raises(TypeError, match="torch.int64"):
        from_hp(torch.zeros(8, 64, dtype=torch.int64), INT8)
    with pytest.raises(ValueError, match="rows, columns or both"):
        from_hp(x, INT8, rows=False)
    with pytest.raises(ValueError, match="no Hadamard matrix"):
        from_hp(x, INT8, column_rotation=Rotation(None))
    q = from_hp(x, INT8, column_rotation=Rotation(64))
    with pytest.raises(ValueError, match="different rotations on the contracted dimension, H64·seed0 and None"):
        torch.mm(q, from_hp(w, INT8).t())
    with pytest.raises(ValueError, match=r"\[8, 64\].*\[16, 64\].*differ in size"):
        torch.mm(q, from_hp(w, INT8, column_rotation=Rotation(64)))
    with pytest.raises(ValueError, match="integer format with a floating one"):
        torch.mm(from_hp(x, INT8), from_hp(w, FP8_E4M3).t())
    with pytest.raises(ValueError, match="quantise both"):
        torch.mm(q, w.t())
    with pytest.raises(ValueError, match="different devices, cpu and meta"):
        torch.mm(from_hp(x, INT8), from_hp(w.to("meta"), INT8).t())
    with pytest.raises(ValueError, match="gains on meta for a matrix on cpu"):
        from_hp(x, INT8, gains=(torch.ones(64, device="meta"), torch.ones(64, device="meta")))
    with pytest.raises(ValueError, match="dtypes differ"):
        torch.mm(from_hp(x, INT8), from_hp(w.bfloat16(), INT8).t())
    with pytest.raises(ValueError, match="scales of blocks"):
        torch.mm(from_hp(x, INT8, "32x32"), from_hp(w, INT8).t())
    with pytest.raises(NotImplementedError, match="aten.add"):
        q + 1


def test_rotations_have_gradients():
    """⟨e, rotate(x)⟩ = ⟨its gradient, x⟩, padded dimensions included."""
    for shape, left, right in (
        ((30, 64), Rotation(16), Rotation(32)),
        ((7, 48), None, Rotation(16)),
        ((5, 5), Rotation(8), None),
    ):
        x = torch.randn(shape, requires_grad=True)
        y = ops.rotate(x, left, right)
        e = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x, e)
        torch.testing.assert_close((e * y).sum(), (gradient * x).sum())
        z = ops.unrotate(y.detach().requires_grad_(), left, right, shape)
        torch.testing.assert_close(z, x)
        assert z.requires_grad


def test_flops_are_counted_as_for_a_plain_layer():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for config in (None, halo_config(1, "int8")):
        layer = torch.nn.Linear(128, 256)
        if config is not None:
            quantize_(layer, config)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(10, 128, requires_grad=True)).sum().backward()
        counts.append(counter.get_total_flops())
    a, b = torch.ones(4, 32, dtype=torch.int8), torch.ones(8, 32, dtype=torch.int8)
    with FlopCounterMode(display=False) as counter:
        ops.scaled_mm(a, b, None, None, None, None, None, (4, 8), torch.float32)
    assert counts == [3 * 2 * 10 * 128 * 256] * 2 and counter.get_total_flops() == 2 * 4 * 8 * 32


def test_names_of_0_1_0_are_deprecated():
    x, rotation = torch.randn(64, 128), Rotation(128)
    with pytest.warns(DeprecationWarning, match="right is called column_rotation now"):
        old = HadamardQuantTensor.from_hp(x, INT8, scale="row", right=rotation)
    new = HadamardQuantTensor.from_hp(x, INT8, "row", column_rotation=rotation)
    assert torch.equal(old.codes, new.codes) and old.granularity == new.granularity
    with pytest.warns(DeprecationWarning, match="scale_along is called granularity now"):
        assert (old.scale_along, old.right, old.left) == ("row", rotation, None)
    with pytest.raises(TypeError, match="unexpected keyword"):
        HadamardQuantTensor.from_hp(x, INT8, sideways=rotation)
