"""What HOT asks of the kernels: low ranks, scales along a dimension that is rotated, stochastic rounding."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")
from halo_tensor import hot_config, ops
from halo_tensor.kernels.device import has_wgmma
from halo_tensor.kernels.quantize import plan as quantizer
from halo_tensor.recipe import FP4_E3M0, FP6_E2M3, FP8_E4M3, INT4, INT8, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.noise import uniform
from tests.helpers import interpreter
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import DEVICE, runs_kernels
from tests.helpers.kernel_checks import DTYPES, FORMAT, LAYOUTS, assert_layout, check, examples, matrix
from tests.helpers.launches import noted
from tests.helpers.linear_layers import converted, gradients
from tests.helpers.projections import project, rounded

ROTATIONS = [
    Rotation(16, None, 8), Rotation(16, None, 3), Rotation(2, None, 1), Rotation(128, None, 1), Rotation(64, None, 64),
    Rotation(32, None, 31), Rotation(256, None, 128), Rotation(16, 3), Rotation(64), Rotation(128, 0),
]  # fmt: skip


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=30)


@pytest.fixture
def rotates_on_the_way(monkeypatch):
    """Nothing may be rotated by PyTorch, or written in high precision."""

    def refuse(*args):
        raise AssertionError("rotated in a pass of its own")

    monkeypatch.setattr(quantizer, "rotate", refuse)


@runs_kernels
@given(
    tokens=st.sampled_from([1, 37, 128, 197, 300]),
    features=st.sampled_from([5, 64, 200]),
    rotation=st.sampled_from(ROTATIONS),
    of_rows=st.booleans(),
    scale=st.sampled_from(["row", "column", "tensor", "unit"]),
    format=FORMAT,
    fold=st.booleans(),
    layouts=st.sampled_from([(True, False), (False, True), (True, True)]),
    dtype=DTYPES,
    layout=st.sampled_from(list(LAYOUTS)),
)
@examples
def test_any_rank(tokens, features, rotation, of_rows, scale, format, fold, layouts, dtype, layout):
    assume(tokens > 1 and layout != "expanded")  # a sum that cancels, its own scale, is noise
    shape, sides = ((tokens, features), (rotation, None)) if of_rows else ((features, tokens), (None, rotation))
    x = matrix(*shape, dtype, layout)
    folds = [None, None]
    if fold and scale in ("row", "column"):
        dim = 0 if scale == "column" else 1
        folds[dim] = torch.rand(reference.rotated(shape[dim], sides[dim]), device=DEVICE) + 0.5
    check(x, *sides, format, scale, *folds, *layouts, rtol=1e-4)


@runs_kernels
@pytest.mark.usefixtures("rotates_on_the_way")
@pytest.mark.parametrize("rank", [8, 3, 16])
@pytest.mark.parametrize("scale", ["tensor", "column"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_by_their_definition(dtype, scale, rank):
    """In float64: 197 tokens padded to 208, projected on the slowest functions of each block, over 127 steps."""
    if dtype == torch.float32 and not has_wgmma(DEVICE):
        pytest.skip("there float32 is rotated first")
    x = torch.randn(197, 72, device=DEVICE).to(dtype)
    rotation = Rotation(16, None, rank)
    codes, codes_t, scales = quantizer.rotate_quantize(x, rotation, None, INT8, scale, None, None, False, True)
    exact = project(x.cpu(), 16, rank)
    assert codes is None and codes_t.shape == (72, 13 * rank)
    assert_layout(codes_t)
    steps = exact / (exact.abs().amax() if scale == "tensor" else exact.abs().amax(0)) * 127
    off = (codes_t.t().cpu().double() - steps).abs()
    assert off.max() < 0.5 + 1e-4
    torch.testing.assert_close(steps * scales.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@runs_kernels
@pytest.mark.usefixtures("rotates_on_the_way")
@pytest.mark.parametrize(
    "options", [{}, {"granularity": "row"}, {"rank": None, "block_size": 64, "granularity": "row"}], ids=str
)
def test_a_layer_of_hot(options):
    """grad_weight of 2×100 tokens, padded to 208, is what its formula says."""
    plain = nn.Linear(128, 192).to(DEVICE, torch.bfloat16)
    layer = converted(plain, hot_config(**options, rounding="nearest"))
    x, e = (torch.randn(2, 100, width, device=DEVICE).to(torch.bfloat16) for width in (128, 192))
    *_, grad_w, _ = gradients(layer, x, e)
    block, dim = options.get("block_size", 16), 0 if options else None
    e_low, x_low = (rounded(project(t.flatten(0, 1).cpu(), block, options.get("rank", 8)), 127, dim) for t in (e, x))
    assert relative_error(grad_w.cpu(), e_low.t() @ x_low) < 4e-3, "bf16's rounding of the result, and a few ties"


# Stochastic rounding.

STOCHASTIC = {
    "E of hot": (None, Rotation(16), "tensor", (True, False)),
    "E of hot_per_token": (None, Rotation(16), "row", (True, False)),
    "E of hot_internal": (None, Rotation(16, None, 8), "tensor", (True, False)),
    "E of hot_external": (Rotation(16, None, 8), None, "tensor", (True, False)),
    "E of luq": (None, None, "tensor", (True, True)),
    "columns": (None, None, "column", (False, True)),
}


def drawn(x, left, right, format, scale, layouts=(True, False)):
    codes, codes_t, scales = ops.rotate_quantize(
        x, left, right, format, scale, rows=layouts[0], columns=layouts[1], rounding="stochastic"
    )
    if codes is not None and codes_t is not None:
        assert torch.equal(codes.view(torch.int8), codes_t.t().view(torch.int8)), "the layouts are rounded alike"
    return codes_t.t() if codes is None else codes, scales


@runs_kernels
@pytest.mark.usefixtures("rotates_on_the_way")
@pytest.mark.parametrize("format", [INT8, INT4, FP8_E4M3, FP6_E2M3, FP4_E3M0], ids=str)
@pytest.mark.parametrize("operand", list(STOCHASTIC))
def test_the_mean_is_exact(operand, format):
    """Every code is one of the two next to the exact value, and their mean over many elements is right."""
    left, right, scale, layouts = STOCHASTIC[operand]
    x = torch.randn(96, 160, device=DEVICE).to(torch.bfloat16)
    exact = reference.rotate(x, left, right).double()
    amax = exact.abs().amax({"tensor": (0, 1), "row": 1, "column": 0}[scale], keepdim=True)
    y = exact / amax * format.max
    codes, scales = drawn(x, left, right, format, scale, layouts)
    torch.testing.assert_close(scales.double(), amax.flatten().view(scales.shape) / format.max, rtol=1e-5, atol=0)
    exponent = torch.frexp(y).exponent - 1
    step = torch.ones_like(y) if format.uniform else 2.0 ** (exponent.clamp_min(format.min_exponent) - format.mantissa_bits)
    off = (codes.double() - y) / step
    assert codes.double().abs().max() <= format.max and off.abs().max() < 1 + 1e-4
    assert off.abs().mean() > 0.29, "a third of a step; rounded to nearest, a quarter"
    # Of a fraction f the variance is f(1 − f), 1/6 on average.
    assert off.mean().abs() < 5 * (1 / 6 / off.numel()) ** 0.5
    assert not (codes.double() / step).frac().any()


@runs_kernels
@pytest.mark.parametrize("operand", list(STOCHASTIC))
def test_the_noise_is_the_references(operand):
    """The same element gets the same number from the reference and from kernels, which may hold it in a transpose."""
    left, right, scale, layouts = STOCHASTIC[operand]
    x, seed = torch.randn(96, 160, device=DEVICE).to(torch.bfloat16), torch.tensor([2**62 + 12345], device=DEVICE)
    codes, codes_t, _ = quantizer.rotate_quantize(x, left, right, INT4, scale, None, None, *layouts, seed=seed)
    shape = reference.rotated(96, left), reference.rotated(160, right)
    expected, _ = reference.rotate_quantize(x, left, right, INT4, scale, noise=uniform(seed, *shape))
    codes = codes_t.t() if codes is None else codes
    assert (codes != expected).float().mean() < 1e-3, "sums in another order"


@runs_kernels
@pytest.mark.parametrize("options", [{}, {"grad_output_granularity": "row"}, {"granularity": "row", "rank": None}], ids=str)
def test_launches_of_a_layer(monkeypatch, options):
    """Two launches quantise E for both products."""
    layer = converted(nn.Linear(128, 192).to(DEVICE, torch.bfloat16), hot_config(**options))
    x, e = (torch.randn(200, width, device=DEVICE).to(torch.bfloat16) for width in (128, 192))
    names = noted(monkeypatch)
    y = layer(x.requires_grad_())
    assert [name.split("_")[0] for name in names] == ["amax", "cast"], "of X"
    names.clear()
    y.backward(e)
    assert names[:2] == ["amax_of_operands", "cast_for_operands"] and len(names) == 4, "of E, and two products"
    names.clear()
    with torch.no_grad():
        layer.weight.mul_(2)
    recorded = [name for name in names if name != "fill"]  # on a CPU, recordings fill zeros by a launch
    assert recorded == ["amax_of_operands", "cast_for_operands"], "of W, where it is written"


@runs_kernels
def test_noise_is_drawn_anew_for_every_element():
    """Half a step everywhere, in nine tiles: zeros and ones, as many, of which no two rows, columns or tiles have the same."""
    x = torch.full((384, 384), 0.5, device=DEVICE)
    x[0, 0] = 7

    def draw(seed):
        torch.manual_seed(seed)
        return drawn(x, None, None, INT4, "tensor")[0][1:, 1:].double()

    first = draw(1)
    assert torch.equal(first, draw(1)) and not torch.equal(first, draw(2))
    assert set(first.unique().tolist()) == {0, 1} and abs(first.mean() - 0.5) < 5 * 0.5 / 383
    for m in (first, first.t()):
        correlation = torch.corrcoef(m).fill_diagonal_(0)
        assert correlation.abs().max() < 6.5 / 383**0.5
    shifted = torch.stack([first[64 * i : 64 * i + 63, 64 * j : 64 * j + 63].flatten() for i in range(5) for j in range(5)])
    assert torch.corrcoef(shifted).fill_diagonal_(0).abs().max() < 6.5 / 63
