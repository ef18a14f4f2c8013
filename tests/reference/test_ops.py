"""MXFP8 and NVFP4 in the reference, against definitions in float64 that are written without it."""

from math import inf, ldexp, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor.recipe import E8M0, FORMATS, FP4_E2M1, FP8_E4M3, Rotation, Scales
from halo_tensor.reference import ops as reference
from tests.helpers.errors import relative_error

MX = Scales.per(E8M0, rows=1, columns=32)
NV = Scales.per(FP8_E4M3, two_levels=True, rows=1, columns=16)
NV_SQUARE = Scales.per(FP8_E4M3, two_levels=True, rows=16, columns=16)
#: The values that a code can have, from the smallest, of both signs.
GRIDS = {
    FP8_E4M3: sorted({
        sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
        for sign in (-1, 1) for exponent in range(16) for mantissa in range(8) if (exponent, mantissa) != (15, 7)
    }),
    FP4_E2M1: [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6],
}  # fmt: skip


def matrix(rows: int, columns: int, decades: float) -> torch.Tensor:
    """Gaussian numbers, of magnitudes that are as many powers of ten in different blocks, a few zeros among them."""
    x = (
        torch.randn(rows, columns)
        * 10.0 ** (torch.rand(rows, -(-columns // 16)) * decades).repeat_interleave(16, 1)[:, :columns]
    )
    return x * (torch.rand(rows, columns) > 0.05)


def blocks(x: torch.Tensor, height: int, width: int):
    """The blocks of a matrix, each with its place among them."""
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            yield (i // height, j // width), x[i : i + height, j : j + width]


def distance_to(grid: list[float], values: torch.Tensor) -> torch.Tensor:
    """How far each value is from the nearest of the grid."""
    points = torch.tensor(grid, dtype=torch.float64)
    above = torch.searchsorted(points, values.contiguous()).clamp(1, len(grid) - 1)
    return torch.minimum((values - points[above - 1]).abs(), (values - points[above]).abs())


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    decades=st.sampled_from([0, 3, 12]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_mxfp8(rows, columns, decades, dtype):
    """A scale is the smallest power of two with which no element of its 32 saturates; a code is the value nearest to x / scale,
    exactly, since a division by a power of two is exact."""
    x = matrix(rows, columns, decades).to(dtype)
    codes, scale = reference.rotate_quantize(x, None, None, FP8_E4M3, MX)
    assert scale.shape == (rows, -(-columns // 32)) and scale.dtype == torch.float32
    for (i, j), block in blocks(x.double(), 1, 32):
        largest, exponent = block.abs().max().item(), -126
        while largest > 448 * ldexp(1.0, exponent):
            exponent += 1
        assert scale[i, j].item() == ldexp(1.0, exponent)
        ideal = block / ldexp(1.0, exponent)
        error = (codes[i, 32 * j : 32 * j + 32].double() - ideal).abs()
        assert torch.equal(error.flatten(), distance_to(GRIDS[FP8_E4M3], ideal.flatten()))


@pytest.mark.parametrize("largest", [448.0, 447.9, 448.1, 1.75, 1.7500001, 1e-30, 3e38])
def test_powers_of_two_are_rounded_up_exactly(largest):
    _, scale = reference.rotate_quantize(torch.full((1, 32), largest), None, None, FP8_E4M3, MX)
    largest = torch.tensor(largest).double().item()  # the float32 that x had
    assert largest / 448 <= scale.item() < largest / 224
    assert torch.frexp(scale).mantissa.item() == 0.5, "no power of two"


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 70),
    decades=st.sampled_from([0, 1, 4]),
    layout=st.sampled_from([NV, NV_SQUARE]),
)
def test_nvfp4(rows, columns, decades, layout):
    """A scale is an E4M3 number, nearest to what its block asks for, times one float32, with which the largest of the E4M3
    numbers is 448. A code is a value nearest to x / scale. Products of float32 may be off by some of their last bits."""
    x = matrix(rows, columns, decades)
    x[0, 0] = 10.0 ** (decades + 1)
    codes, scale = reference.rotate_quantize(x, None, None, FP4_E2M1, layout)
    whole = x.double().abs().max().item() / 6 / 448
    height = layout.length("rows")
    for (i, j), block in blocks(x.double(), height, 16):
        first, ideal = scale[i, j].item() / whole, block.abs().max().item() / 6 / whole
        assert distance_to(GRIDS[FP8_E4M3], torch.tensor([first]).double()).item() <= 1e-6 * first, "no E4M3 number"
        nearest = distance_to(GRIDS[FP8_E4M3], torch.tensor([ideal]).double()).item()
        assert abs(first - max(ideal, 2.0**-9)) <= nearest + 1e-6 * first
        error = (codes[height * i : height * (i + 1), 16 * j : 16 * (j + 1)].double() - block / scale[i, j].double()).abs()
        assert (error.flatten() <= distance_to(GRIDS[FP4_E2M1], (block / scale[i, j].double()).flatten()) + 1e-5).all()
    assert scale.max().item() == pytest.approx(448 * whole, rel=1e-6)


@pytest.mark.parametrize(
    ("format", "layout", "typical"), [(FP8_E4M3, MX, 0.0264), (FP4_E2M1, NV, 0.095), (FP4_E2M1, NV_SQUARE, 0.108)], ids=str
)
def test_the_error_of_gaussian_numbers(format, layout, typical):
    """Of E4M3 about 2⁻⁴·0.42; of E2M1 what blocks of 16 and of 256 elements leave."""
    x = torch.randn(512, 512)
    codes, scale = reference.rotate_quantize(x, None, None, format, layout)
    error = relative_error(reference.dequantize(codes, scale, layout), x)
    assert 0.95 * typical < error < 1.05 * typical, error


@pytest.mark.parametrize("layout", [MX, MX.transposed, NV, NV_SQUARE, Scales.per(FP8_E4M3, rows=1, columns=16)], ids=str)
@pytest.mark.parametrize("format", list(FORMATS.values()), ids=str)
def test_every_format_takes_every_layout(format, layout):
    """Zeros stay zeros, nothing divides by zero, and a NaN or Inf shows in its block."""
    x = torch.randn(48, 64)
    x[:16, :32] = 0
    codes, scale = reference.rotate_quantize(x, None, Rotation(16), format, layout)
    y = reference.unrotate(reference.dequantize(codes, scale, layout), None, Rotation(16), (48, 64))
    assert scale.isfinite().all() and (scale > 0).all() and (y[:16, :32] == 0).all()
    assert 1e-3 < relative_error(y, x) < 0.5
    nothing = reference.rotate_quantize(torch.zeros(3, 5), None, None, format, layout)
    assert (reference.dequantize(*nothing, layout) == 0).all()
    for bad in (nan, inf, -inf):
        x[20, 40] = bad
        codes, scale = reference.rotate_quantize(x, None, None, format, layout)
        y = reference.dequantize(codes, scale, layout)
        assert not y[20, 40].isfinite()
        others = y[:16, :32]
        assert layout.two_levels or others.isfinite().all(), "only two levels share a scale with all other blocks"
    assert reference.rotate_quantize(torch.randn(0, 64), None, None, format, layout)[1].numel() == 0


def test_stochastic_rounding_keeps_the_mean():
    """As NVFP4 asks for in E: many draws average to x, which rounding to nearest does not."""
    x = torch.rand(16, 16) * 5
    draws = []
    for _ in range(600):
        noise = torch.rand(x.shape)
        draws.append(reference.dequantize(*reference.rotate_quantize(x, None, None, FP4_E2M1, NV, noise=noise), NV))
    _, scale = reference.rotate_quantize(x, None, None, FP4_E2M1, NV)
    inside = x < 5.9 * NV.spread(scale, 16, 16)  # a block's largest element may saturate
    error = (torch.stack(draws).mean(0) - x)[inside]
    assert error.abs().max() < 0.15 and error.pow(2).mean().sqrt() < 0.04
    once = reference.dequantize(*reference.rotate_quantize(x, None, None, FP4_E2M1, NV), NV)
    assert (once - x)[inside].pow(2).mean().sqrt() > 0.15
