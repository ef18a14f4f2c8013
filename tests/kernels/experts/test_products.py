"""Grouped products by kernels, against the reference."""

import pytest
import torch

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.fences.fast_paths import TMA
from halo_tensor.kernels.experts import products, triton_products
from halo_tensor.products.experts import experts
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation, halo
from halo_tensor.reference import experts as reference
from halo_tensor.reference.codes import code_dtype
from tests.helpers import interpreter
from tests.helpers.errors import relative_error
from tests.helpers.expert_layers import exact_experts, offsets, routed
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels

#: Triton's interpreter computes in float32 only.
DTYPE = torch.bfloat16 if GPU else torch.float32
LIMIT = 5e-3 if GPU else 1e-6
SIZES = [3, 0, 130, 700, 257] if GPU else [3, 0, 130]
REST = 5
WIDTHS = (512, 768) if GPU else (48, 80)


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=14)


@pytest.fixture(params=["first", "triton"] if GPU else ["triton"])
def backend(request, monkeypatch):
    """The backend that is asked first, and Triton's."""
    chosen = products.BACKENDS if request.param == "first" else products.BACKENDS[-1:]
    monkeypatch.setattr(products, "BACKENDS", chosen)
    products.plan.cache_clear()
    yield
    products.plan.cache_clear()


def codes(format, *shape):
    if format.uniform:
        return torch.randint(-127, 128, shape, device=DEVICE).to(torch.int8)
    return torch.randn(shape, device=DEVICE).to(code_dtype(format))


def groups():
    torch.manual_seed(0)
    rows = sum(SIZES) + REST
    return rows, *ops.group_tiles(offsets(SIZES).to(DEVICE), rows)


@runs_kernels
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
@pytest.mark.parametrize("what", ["scaled", "bias, weight", "rotated", "rotated, gain"])
def test_products_of_rows(backend, format, what):
    rows, tiles, starts = groups()
    n, k = WIDTHS
    a, b = codes(format, rows, k), codes(format, len(SIZES), n, k)
    a_scale, b_scale = torch.rand(rows, device=DEVICE), torch.rand(len(SIZES), n, device=DEVICE)
    bias = weight = rotation = gain = None
    if "bias" in what:
        bias, weight = torch.randn(len(SIZES), n, device=DEVICE, dtype=DTYPE) * 1e3, torch.rand(rows, device=DEVICE)
    if "rotated" in what:
        b_scale, rotation = None, Rotation(128 if GPU else 16)
    if "gain" in what:
        gain = torch.rand(n, device=DEVICE)
    args = a_scale, b_scale, bias, weight, rotation
    y = ops.grouped_mm(a, b, tiles, starts, *args, DTYPE, gain)
    expected = reference.grouped_mm(a, b, tiles, *args, torch.float32, gain)
    assert relative_error(y, expected) < LIMIT
    assert not y[-REST:].any(), "rows of no expert"


@runs_kernels
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
@pytest.mark.parametrize("what", ["plain", "rotated", "rotated, gain"])
def test_products_along_tokens(backend, format, what):
    rows, tiles, starts = groups()
    n, k = WIDTHS
    a_t, b_t = (ops.turn_codes(codes(format, rows, width), None, tiles) for width in (n, k))
    a_scale = torch.rand(len(SIZES), n, device=DEVICE)
    rotation = Rotation(64 if GPU else 16) if "rotated" in what else None
    gain = torch.rand(k, device=DEVICE) if "gain" in what else None
    g = ops.grouped_grad(a_t, b_t, starts, a_scale, rotation, DTYPE, gain)
    expected = reference.grouped_grad(a_t, b_t, starts, a_scale, rotation, torch.float32, gain)
    assert relative_error(g, expected) < LIMIT
    assert not g[SIZES.index(0)].any(), "an expert without tokens"


@runs_kernels
def test_what_an_epilogue_cannot_undo(backend):
    """Blocks of 256, and full widths, are undone in a pass of their own."""
    rows, tiles, starts = groups()
    n, k, rotation = 256, WIDTHS[1], Rotation(256)
    a, b, scale = codes(INT8, rows, k), codes(INT8, len(SIZES), n, k), torch.rand(rows, device=DEVICE)
    y = ops.grouped_mm(a, b, tiles, starts, scale, None, None, None, rotation, DTYPE)
    assert relative_error(y, reference.grouped_mm(a, b, tiles, scale, None, None, None, rotation, DTYPE, None)) < 2 * LIMIT


@runs_kernels
@pytest.mark.parametrize(("level", "without"), [(0, TMA), (1, None), (2, None)], ids=["0, without TMA", "1", "2"])
def test_a_layer_by_kernels(monkeypatch, level, without):
    """Output and all gradients, with a rotation of tokens too, and where operands are read by pointers."""
    if without is not None:
        monkeypatch.setattr(without, "disabled", True)
        monkeypatch.setattr(products, "BACKENDS", products.BACKENDS[-1:])
    products.plan.cache_clear()
    torch.manual_seed(0)
    index, e = routed(40, 3, 2, unused=1).to(DEVICE), torch.randn(40, 32, device=DEVICE, dtype=DTYPE)
    index[::5] = 3  # no expert here
    shapes = (40, 32), (40, 2), (3, 64, 32), (3, 32, 32), (3, 64), (3, 32)
    given = [(torch.randn(s, device=DEVICE) * (0.2 if len(s) == 3 else 1)).to(DTYPE).requires_grad_() for s in shapes]
    names = {"gate_up_bias": given[4], "down_bias": given[5]}
    y = experts(given[0], index, *given[1:4], recipe=halo(level, INT8), **names)
    actual = [y, *torch.autograd.grad(y, given, e)]
    exact = [t.detach().double().requires_grad_() for t in given]
    y = exact_experts(exact[0], index, *exact[1:])
    for a, b in zip(actual, [y, *torch.autograd.grad(y, exact, e.double())], strict=True):
        assert relative_error(a.detach(), b.detach()) < 0.04
    assert not any(a[2].any() for a in actual[3:]), "an expert without tokens"
    products.plan.cache_clear()


@runs_kernels
def test_no_row_at_all():
    tiles, starts = ops.group_tiles(torch.zeros(3, dtype=torch.int32, device=DEVICE), 0)
    y = ops.grouped_mm(
        codes(INT8, 0, 32), codes(INT8, 3, 16, 32), tiles, starts, torch.rand(0, device=DEVICE), None, None, None, None, DTYPE
    )
    nothing = codes(INT8, 32, tiles.shape[0] * reference.TILE)
    g = ops.grouped_grad(nothing, nothing, starts, torch.rand(3, 32, device=DEVICE), None, DTYPE)
    assert y.shape == (0, 16) and not g.any()


@pytest.mark.parametrize("generation", [8, 9, 10, 12])
@pytest.mark.parametrize("integer", [True, False])
def test_a_tile_of_tokens_is_whole_steps(generation, integer):
    assert reference.TILE % triton_products.tile_for(generation, integer).k == 0
