"""Operands as large and as small as float32 holds them: what is served, and that all others are computed as ever. The kernels:
test_magnitude_kernels.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halo_tensor import find_nonfinite, halo_config, quantize_
from halo_tensor.recipe import FORMATS, INT8, Rotation, Scales
from halo_tensor.reference import hadamard
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import lift, round_to
from tests.helpers.magnitudes import (
    EDGES,
    RECIPES,
    check_layer,
    in_every_recipe,
    operands,
)

FORMAT = st.sampled_from(list(FORMATS.values()))
ROTATION = st.sampled_from([None, Rotation(16), Rotation(32, 5), Rotation(48, 1), Rotation(36, None)])
TINY = torch.finfo(torch.float32).tiny


# As ever: the formulas before anything was lifted, with ±1 for Hadamard matrices and scales of their own size.


def old_rotate_last(x, rotation, inverse=False):
    edge = rotation.edge
    a, b = hadamard.factors(edge) or (edge, 1)
    d = hadamard.signs(edge, rotation.seed).float()
    blocks = x.reshape(-1, edge)
    if a == 1:
        matrix = d[:, None] * hadamard.hadamard(edge).float()
        blocks = blocks @ (matrix.t() if inverse else matrix)
    else:
        h_a, h_b = hadamard.hadamard(a).float(), hadamard.hadamard(b).float()
        h_a, h_b = (h_a.t(), h_b.t()) if inverse else (h_a, h_b)
        blocks = blocks if inverse else blocks * d
        blocks = (h_a.t() @ (blocks.reshape(-1, b) @ h_b).view(-1, a, b)).reshape(-1, edge)
        blocks = blocks * d if inverse else blocks
    return blocks.mul_(edge**-0.5).view_as(x)


def old_rotate(x, left, right, inverse=False):
    x = old_rotate_last(x, right, inverse) if right else x
    return old_rotate_last(x.t(), left, inverse).t() if left else x


def old_quantize(x, left, right, format, scale, fold_rows=None, fold_columns=None):
    y = old_rotate(x, left, right)
    y = y if fold_rows is None else y * fold_rows.unsqueeze(1)
    y = y if fold_columns is None else y * fold_columns
    if scale == "unit":
        return round_to(y, format), y.new_ones(())
    s = (reference._largest(y, Scales.of(scale)) * (1.0 / format.max)).clamp_min(TINY)
    return round_to(y * Scales.of(scale).spread(1.0 / s, *y.shape), format), s


def old_product(a, b_t, a_scale, b_scale, left, right):
    y = reference.multiply_codes(a, b_t)
    y = y if a_scale is None else y * (a_scale.unsqueeze(1) if a_scale.ndim else a_scale)
    y = y if b_scale is None else y * b_scale
    return old_rotate(y, left, right, inverse=True)


def spread(*shape, decades):
    """Gaussian numbers of magnitudes that are as many powers of ten."""
    return torch.randn(shape) * 10.0 ** torch.empty(shape).uniform_(*decades)


def assert_same(codes, scales, old_codes, old_scales):
    assert torch.equal(codes.view(torch.int8), old_codes.view(torch.int8))
    assert torch.equal(scales.masked_fill(old_scales == TINY, TINY), old_scales)  # of a group of zeros, any scale will do


@given(
    left=ROTATION,
    right=ROTATION,
    format=FORMAT,
    scale=st.sampled_from(["row", "column", "tensor", "32x32", "unit"]),
    folds=st.tuples(st.booleans(), st.booleans()),
    size=st.floats(-22, 19),
    width=st.sampled_from([0, 3]),
)
@settings(max_examples=40)
def test_codes_and_scales_of_the_usual_range_are_what_they_were(left, right, format, scale, folds, size, width):
    rows, columns = (r.edge if r else 5 for r in (left, right))
    x = spread(rows, columns, decades=(size, size + width))
    x[0], x[:, -1] = (0, 0) if left is right is None else (x[0], x[:, -1])
    by_row, by_column = (
        spread(n, decades=(-3, 3)).abs() if fold else None for n, fold in zip((rows, columns), folds, strict=True)
    )
    actual = reference.rotate_quantize(x, left, right, format, scale, by_row, by_column)
    assert_same(*actual, *old_quantize(x, left, right, format, scale, by_row, by_column))


@given(
    left=ROTATION,
    right=ROTATION,
    format=FORMAT,
    sizes=st.tuples(st.floats(-12, 12), st.floats(-12, 12)),
    scales=st.tuples(st.sampled_from(["vector", "number", None]), st.sampled_from(["vector", "number", None])),
)
@settings(max_examples=40)
def test_products_of_the_usual_range_are_what_they_were(left, right, format, sizes, scales):
    m, n = (r.edge if r else 5 for r in (left, right))
    operands = [old_quantize(torch.randn(length, 64), None, None, format, "row")[0] for length in (m, n)]
    given_scales = [
        None if kind is None else spread(*([length] if kind == "vector" else []), decades=(size, size + 1)).abs()
        for length, size, kind in zip((m, n), sizes, scales, strict=True)
    ]
    actual = reference.scaled_mm(*operands, *given_scales, None, left, right, (m, n), torch.float32)
    assert torch.equal(actual, old_product(*operands, *given_scales, left, right))


@pytest.mark.parametrize("n", [2, 16, 36, 64, 128, 256, 576, 14336])
def test_constants_of_a_rotation_are_powers_of_two(n):
    a, b = hadamard.factors(n) or (n, 1)
    elements = hadamard.hadamard_factor(a, torch.device("cpu")), hadamard.hadamard_factor(b, torch.device("cpu"))
    whole = elements[0].abs().max() * elements[1].abs().max()
    assert torch.frexp(whole).mantissa == 0.5  # a power of two
    assert whole <= n**-0.5, "sums would be larger than the rotated values"
    assert whole.item() * hadamard.norm(Rotation(n)) == n**-0.5


@pytest.mark.parametrize("format", list(FORMATS.values()), ids=str)
def test_lifted_scales_and_their_reciprocals_are_normal(format):
    largest, smallest = torch.finfo(torch.float32).max, max(TINY * format.max / lift(format), TINY)
    for amax in (smallest, largest):
        scale = torch.tensor(max(amax * lift(format) / format.max, TINY), dtype=torch.float32)
        assert TINY <= scale < 2.0**126 and 1 / scale >= TINY
    assert smallest < 10 * TINY or not format.uniform


# A layer beside float64.


@given(
    recipe=st.sampled_from(RECIPES),
    exponents=st.tuples(st.floats(-40, 38.5), st.floats(-40, 38.5), st.floats(-40, 38.5)),
)
@settings(max_examples=50)
def test_a_layer_of_any_magnitudes(recipe, exponents):
    check_layer(*recipe, exponents, operands(exponents))


@pytest.mark.parametrize("edge", EDGES)
@in_every_recipe
def test_at_the_edges(level, dtype, usual, edge):
    exponents, served = EDGES[edge]
    assert served <= set(check_layer(level, dtype, usual, exponents, operands(exponents)))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_rows_that_a_rotation_makes_larger(granularity):
    """A row of equal numbers becomes one that is √block times as large, which float32 has to hold."""
    for size, served in ((2e37, True), (1e38, False)):
        layer = nn.Linear(128, 128, bias=False)
        nn.init.constant_(layer.weight, 1e-10)
        quantize_(layer, halo_config(1, "int8", granularity=granularity, seed=None))
        x = torch.full((4, 128), size)
        with find_nonfinite(layer) as found:
            y = layer(x)
        assert bool(found) is not served
        if served:
            torch.testing.assert_close(y, torch.full_like(y, 128e-10 * size), rtol=0.01, atol=0)
        else:
            assert found.first.product == "output" and not y.isfinite().any()


def test_bfloat16_has_the_same_range():
    for exponents in ((-36, 36, 0), (36, -36, -20), (0, 0, -36)):
        tensors = operands(exponents, dtype=torch.bfloat16)
        assert check_layer(1, "int8", 0.0105, exponents, tensors)


def test_a_cpu_that_flushes_subnormal_numbers():
    """A group of zeros divides by no zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        x = torch.randn(4, 128)
        x[1] = 0
        codes, scales = reference.rotate_quantize(x, None, None, INT8, "row")
        y = reference.scaled_mm(codes, codes, scales, scales, None, None, None, (4, 4), torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert y.isfinite().all() and not codes[1].any() and not y[1].any() and y[0, 0] > 0
