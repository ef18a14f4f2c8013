"""Operands of kernels, and comparisons of kernels with the reference."""

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import nn

from halo_tensor.kernels.quantize import plan as quantizer
from halo_tensor.recipe import FORMATS, INT8
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import code_dtype, to_bits
from tests.helpers.interpreter import DEVICE, GPU

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
FORMAT = st.sampled_from(list(FORMATS.values()))
# On a GPU almost every example compiles a kernel. Shrinking takes too long there and in the interpreter.
examples = settings(max_examples=25 if GPU else 60, phases=[Phase.explicit, Phase.generate])
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, torch.full_like(x, 99)], dim=2)[:, :, 0],
    "misaligned": lambda x: nn.functional.pad(x, (1, 0), value=99)[:, 1:],
    "expanded": lambda x: x[:1].expand_as(x),
}


def matrix(rows, columns, dtype=torch.float32, layout="contiguous", integers=False):
    """Return a random matrix. With ``integers`` its elements are small integers, whose sums are exact in any order."""
    x = torch.randint(-8, 9, (rows, columns)) if integers else torch.randn(rows, columns)
    if rows > 2:
        x[2] = 0
    return LAYOUTS[layout](x.to(DEVICE, dtype))


def ordinals(codes, format):
    """Return the position of each code among all codes of the format, sorted by value. NaN has no meaningful position."""
    if format.uniform:
        return codes.int()
    bits = to_bits(codes, format).int()
    top = 1 << (format.bits - 1)
    return torch.where(bits >= top, top - bits, bits)


def assert_same_codes(codes, expected, format, exact, rtol=1e-6):
    """Compare codes.

    With ``exact`` all codes must be equal. Otherwise the sums before rounding may differ by ``rtol`` times the largest element:
    one code in ten thousand may be the next one, and codes near zero may differ by as much as that error.
    """
    assert codes.dtype == expected.dtype == code_dtype(format) and codes.shape == expected.shape
    nan = expected.float().isnan()
    if GPU or codes.dtype != torch.float8_e4m3fn:  # Triton's interpreter makes 384 of NaN
        assert torch.equal(codes.float().isnan(), nan)
    steps = (ordinals(codes, format) - ordinals(expected, format)).abs().masked_fill(nan, 0)
    if exact or codes.numel() == 0:
        assert not steps.any(), f"{steps.count_nonzero()} of {steps.numel()} codes differ"
    else:
        steps[(codes.float() - expected.float()).abs() <= 4 * rtol * format.max] = 0
        assert steps.max() <= 1 and steps.count_nonzero() <= 1 + max(1e-4, 50 * rtol) * steps.numel()


def assert_same_scales(scales, expected, exact=False, rtol=1e-6):
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales, expected, rtol=0 if exact else rtol, atol=0, equal_nan=True)


def assert_same_bytes(codes, expected):
    assert codes.dtype == expected.dtype and torch.equal(codes.view(torch.int8), expected.view(torch.int8))


def assert_layout(codes):
    """Rows must begin at multiples of 16 bytes, as TMA requires."""
    assert codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0


def gain_of(n, dtype=torch.float32):
    """Return powers of two. For float16 none is below 1, because a smaller one could make subnormal numbers, which are rounded."""
    return 2.0 ** torch.randint(0 if dtype == torch.float16 else -2, 3, (n,), device=DEVICE)


def check(
    x, left, right, format, scale, fold_rows=None, fold_columns=None, rows=True, columns=True, exact=False, rtol=1e-6,
    quantize=quantizer.rotate_quantize, gain=None,
):  # fmt: skip
    """Compare ``quantize`` of ``x``, in the requested layouts, with the reference."""
    folds = {"fold_rows": fold_rows, "fold_columns": fold_columns, "gain": gain}
    codes, codes_t, scales = quantize(x, left, right, format, scale, **folds, rows=rows, columns=columns)
    expected, expected_scales = reference.rotate_quantize(x.contiguous(), left, right, format, scale, **folds)
    assert (codes is not None, codes_t is not None) == (rows, columns)
    if codes is not None:
        assert_layout(codes)
        assert_same_codes(codes, expected, format, exact, rtol)
    if codes_t is not None:
        assert_layout(codes_t)
        assert_same_codes(codes_t.t(), expected, format, exact, rtol)
    if rows and columns:
        assert_same_bytes(codes_t.t(), codes)
    assert_same_scales(scales, expected_scales, exact, rtol)


def codes_of(shape, format, layout="contiguous"):
    """Return random codes."""
    if format is INT8:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)
    else:
        codes, _ = reference.rotate_quantize(torch.randn(shape, device=DEVICE), None, None, format, "tensor")
    return LAYOUTS[layout](codes.view(torch.int8)).view(codes.dtype)


def exact_product(a, b_t, a_scale=None, b_scale=None, bias=None, left=None, right=None, shape=None, gain=None):
    """Return in float64 what ``scaled_mm`` computes."""
    y = a.double() @ b_t.double().t()
    for scale, dim in ((a_scale, 1), (b_scale, 0)):
        if scale is not None:
            y = y * (scale.double().unsqueeze(dim) if scale.ndim else scale.double())
    y = reference.unrotate(y, left, right, shape).double() if left or right else y
    y = y if gain is None else y * gain
    return y if bias is None else y + bias.double()


def scales_of(kinds, lengths, largest):
    """Return a scale for each operand: None, a number or a vector. ``largest`` are the largest codes of the operands."""
    return [
        None if kind is None else (torch.rand((length,) if kind == "vector" else (), device=DEVICE) + 0.5) / most
        for kind, length, most in zip(kinds, lengths, largest, strict=True)
    ]


#: Root mean square of the relative error that rounding to a dtype makes.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.07e-4, torch.bfloat16: 1.66e-3}
