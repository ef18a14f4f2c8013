"""The quantisers of experts and copies of their rows by kernels, against the reference, code by code."""

import pytest
import torch

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.kernels.experts import quantizers
from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, INT8, Gate, Rotation
from halo_tensor.reference import experts as reference
from halo_tensor.reference import ops as dense
from tests.helpers import interpreter
from tests.helpers.expert_layers import GPT_OSS, offsets
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels

DTYPE = torch.bfloat16 if GPU else torch.float32
SIZES = [3, 0, 130, 700, 257] if GPU else [3, 0, 130]
ROWS = sum(SIZES) + 5
C, F = (512, 320) if GPU else (48, 32)
FORMATS = [INT8, FP8_E4M3, FP6_E2M3]
GATES = [Gate(), GPT_OSS, Gate(limit=0.5, interleaved=False)]


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=25)


@pytest.fixture
def groups():
    """Tiles and starts, which rows belong to an expert, and which columns of transposed codes are used."""
    torch.manual_seed(0)
    tiles, starts = ops.group_tiles(offsets(SIZES).to(DEVICE), ROWS)
    used = torch.arange(ROWS, device=DEVICE) < sum(SIZES)
    columns = torch.arange(tiles.shape[0] * reference.TILE, device=DEVICE) < starts[-2] * reference.TILE
    return tiles, starts, used, columns


def random(*shape):
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def positive(*shape):
    return torch.rand(shape, device=DEVICE) + 0.1


def assert_alike(codes, expected, differing=0.0):
    """Codes are the same, but for the share that the approximate exp may round to a neighbour."""
    share = (codes.float() != expected.float()).float().mean().item()
    assert share <= (differing if GPU else 0.0), share


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item() if b.numel() else 0)


@runs_kernels
@pytest.mark.parametrize(("experts", "rows"), [(1, 0), (1, 500), (5, 129), (130, 300)])
def test_tiles(experts, rows):
    torch.manual_seed(0)
    ends = torch.randint(0, rows + 1, (experts,)).sort().values.to(torch.int32)
    expected = reference.group_tiles(ends, rows)
    assert all(map(torch.equal, map(torch.Tensor.cpu, ops.group_tiles(ends.to(DEVICE), rows)), expected))


@runs_kernels
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("indexed", [True, False])
def test_rows(groups, format, indexed):
    tiles, _, used, _ = groups
    index = torch.randint(0, 20, (ROWS,), device=DEVICE).int() if indexed else None
    x, fold = random(20 if indexed else ROWS, C), positive(len(SIZES), C)
    codes, scales = ops.quantize_groups(x, index, fold, tiles, format)
    expected, expected_scales = reference.quantize_groups(x, index, fold, tiles, format)
    assert_alike(codes[used], expected[used])
    assert torch.equal(scales[used], expected_scales[used])


@pytest.mark.parametrize("how", [quantizers.group_rows, quantizers.gated_grad_rows])
def test_programs_share_a_tile(how):
    """Whatever the width, all of its rows are taken."""
    for width in (16, 32, 48, 768, 2048, 2880, 14336, 28672):
        shape = how(width)
        assert shape.rows * shape.steps <= 16 and reference.TILE % (shape.rows * shape.steps) == 0


@runs_kernels
def test_narrow_rows(groups):
    tiles, _, used, _ = groups
    x, fold = random(ROWS, 16), positive(len(SIZES), 16)
    codes, scales = ops.quantize_groups(x, None, fold, tiles, INT8)
    expected, expected_scales = reference.quantize_groups(x, None, fold, tiles, INT8)
    assert torch.equal(codes[used], expected[used]) and torch.equal(scales[used], expected_scales[used])


@runs_kernels
def test_rows_in_pieces(groups, monkeypatch):
    """Rows that no program holds are read twice."""
    tiles, _, used, _ = groups
    monkeypatch.setattr(quantizers, "group_rows", lambda c: quantizers.Rows(16, 32, 4, 4))
    quantizers._plan_rows.cache_clear()
    x, fold = random(ROWS, C), positive(len(SIZES), C)
    codes, scales = ops.quantize_groups(x, None, fold, tiles, INT8)
    quantizers._plan_rows.cache_clear()
    expected, expected_scales = reference.quantize_groups(x, None, fold, tiles, INT8)
    assert torch.equal(codes[used], expected[used]) and torch.equal(scales[used], expected_scales[used])


@runs_kernels
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("summed", [True, False])
def test_columns(groups, format, summed):
    tiles, starts, _, used = groups
    index = torch.randint(0, 20, (ROWS,), device=DEVICE).int() if summed else None
    weight = positive(ROWS) if summed else None
    x, fold = random(20 if summed else ROWS, C), positive(ROWS)
    codes_t, scales, sums = ops.quantize_groups_t(x, index, weight, fold, tiles, starts, summed, format)
    expected = reference.quantize_groups_t(x, index, weight, fold, tiles, starts, format)
    assert_alike(codes_t[:, used], expected[0][:, used], 1e-4)  # gaps between groups are zeros
    assert_close(scales, expected[1])
    assert sums.numel() == 0 if not summed else torch.allclose(sums, expected[2], rtol=1e-4, atol=1e-3)


@runs_kernels
def test_no_sum_of_a_long_group_overflows(groups, monkeypatch):
    """Codes of a group that is n times too long are n times smaller."""
    tiles, starts, _, used = groups
    for module in (quantizers, dense):
        monkeypatch.setattr(module, "LONGEST_SUM", 50)  # the third expert has 130 rows
    quantizers._plan_columns.cache_clear()
    x, fold = random(ROWS, C), positive(ROWS)
    codes_t, scales, _ = ops.quantize_groups_t(x, None, None, fold, tiles, starts, False, INT8)
    expected = reference.quantize_groups_t(x, None, None, fold, tiles, starts, INT8)
    assert (codes_t[:, used].int() - expected[0][:, used].int()).abs().max() <= 1  # divided by another number than 1 / s
    assert_close(scales, expected[1])
    third = codes_t[:, starts[2] * reference.TILE : starts[3] * reference.TILE].int()
    size = SIZES[2]
    assert 120 // -(-size // 50) <= third.abs().max() <= -(-127 // -(-size // 50)) and size * third.abs().max() <= 50 * 130
    quantizers._plan_columns.cache_clear()


@runs_kernels
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize(("rotation", "gained"), [(None, False), (16, False), (16, True)])
def test_gated(gate, rotation, gained):
    torch.manual_seed(0)
    h, format = random(70, 2 * F), FP8_E4M3 if gained else INT8
    gain = 2.0 ** torch.randint(-2, 3, (F,), device=DEVICE) if gained else None
    rotation = rotation and Rotation(64 if GPU else rotation)
    codes, scales = ops.quantize_gated(h, gate, rotation, format, gain)
    expected = dense.rotate_quantize(reference.activate(h, gate), None, rotation, format, "row", gain=gain)
    assert_alike(codes, expected[0], 1e-3)
    torch.testing.assert_close(scales, expected[1], rtol=1e-2 if GPU else 1e-5, atol=0)


@runs_kernels
def test_gated_with_a_rotation_of_its_own():
    """What no program rotates PyTorch computes first."""
    torch.manual_seed(0)
    h, rotation = random(20, 512), Rotation(256)
    codes, scales = ops.quantize_gated(h, Gate(), rotation, INT8, None)
    expected = dense.rotate_quantize(reference.activate(h, Gate()), None, rotation, INT8, "row")
    assert (codes.float() - expected[0].float()).abs().max() <= 1
    torch.testing.assert_close(scales, expected[1], rtol=1e-2, atol=0)


@runs_kernels
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_of_the_gate(groups, gate, weighted):
    tiles, _, rows, _ = groups
    h, grad, weight = random(ROWS, 2 * F), random(ROWS, F), positive(ROWS) if weighted else None
    fold = positive(len(SIZES), 2 * F)
    grad_h, dots = reference.activate_backward(h, grad, weight, gate)

    codes, scales, got, kept = ops.quantize_gated_grad(h, grad, weight, gate, fold, tiles, weighted, INT8)
    expected = reference.quantize_groups(grad_h, None, fold, tiles, INT8)
    assert_alike(codes[rows], expected[0][rows], 1e-3)
    assert_close(scales[rows], expected[1][rows])
    assert_close(got[rows], dots[rows])
    assert not got[~rows].any(), "rows of no expert"
    assert kept.dtype == h.dtype and (kept.shape == h.shape if weighted else kept.numel() == 0)
    if weighted:
        torch.testing.assert_close(kept[rows], grad_h[rows].to(h.dtype), rtol=1e-2 if GPU else 1e-5, atol=1e-4)


@runs_kernels
@pytest.mark.parametrize("held", [0, 96])
def test_gradients_of_the_gate_in_pieces(groups, monkeypatch, held):
    """Which registers hold, or which are computed twice."""
    tiles, _, rows, _ = groups
    monkeypatch.setattr(quantizers, "HELD", held)
    monkeypatch.setattr(quantizers, "gated_grad_rows", lambda f: quantizers.Rows(16, 32, 4, 4))
    quantizers._plan_gated_grad.cache_clear()
    h, grad, fold = random(ROWS, 2 * F), random(ROWS, F), positive(len(SIZES), 2 * F)
    for gate in (Gate(), GPT_OSS):
        codes, scales, dots, kept = ops.quantize_gated_grad(h, grad, None, gate, fold, tiles, True, INT8)
        grad_h, expected_dots = reference.activate_backward(h, grad, None, gate)
        expected = reference.quantize_groups(grad_h, None, fold, tiles, INT8)
        assert_alike(codes[rows], expected[0][rows], 1e-3)
        assert_close(scales[rows], expected[1][rows])
        assert_close(dots[rows], expected_dots[rows])
        torch.testing.assert_close(kept[rows], grad_h[rows].to(h.dtype), rtol=1e-2 if GPU else 1e-5, atol=1e-4)
    quantizers._plan_gated_grad.cache_clear()


@runs_kernels
def test_a_nan_is_not_hidden(groups):
    """It reaches the scale of its row, and of its column of its expert only."""
    tiles, starts, _, _ = groups
    x = random(ROWS, C)
    x[10, 7] = float("nan")  # of the third expert: the first has three rows, and the second none
    _, scales = ops.quantize_groups(x, None, positive(len(SIZES), C), tiles, INT8)
    assert scales[10].isnan() and not scales[9].isnan()
    _, scales, _ = ops.quantize_groups_t(x, None, None, positive(ROWS), tiles, starts, False, INT8)
    assert scales[2, 7].isnan() and scales.isnan().sum() == 1
    h, grad = random(ROWS, 2 * F), random(ROWS, F)
    h[10, 7] = float("nan")
    for gate in (Gate(), GPT_OSS):
        fold = positive(len(SIZES), 2 * F)
        _, scales, dots, kept = ops.quantize_gated_grad(h, grad, None, gate, fold, tiles, True, INT8)
        assert kept[10].isnan().any() and not kept[9].isnan().any()
        assert scales[10].isnan() and dots[10].isnan() and not scales[9].isnan()
        assert ops.quantize_gated(h, gate, None, INT8, None)[1][10].isnan()


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_copies(groups, dtype):
    tiles, _, _, used = groups
    codes = torch.randint(-100, 100, (40, C), device=DEVICE).to(torch.int8).view(dtype)
    index, scales = torch.randint(0, 40, (ROWS,), device=DEVICE).int(), positive(40)
    rows, row_scales = ops.gather_codes(codes, scales, index)
    at = index.long()
    assert torch.equal(rows.view(torch.int8), codes.view(torch.int8)[at]) and torch.equal(row_scales, scales[at])
    turned = ops.turn_codes(codes, index, tiles)
    expected = reference.turn_codes(codes.view(torch.int8), index, tiles)
    assert torch.equal(turned.view(torch.int8)[:, used], expected[:, used])
    stack = torch.randint(-100, 100, (3, 48, 96), device=DEVICE).to(torch.int8)
    for part in (stack, stack[:, :, :80]):  # a weight that FSDP2 has gathered lies in longer rows
        assert torch.equal(ops.turn_stack(part.view(dtype)).view(torch.int8), part.transpose(1, 2))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_weights_are_transposed(dtype):
    gradient = torch.randn(3, 80, 144, device=DEVICE).to(dtype)
    turned = ops.turn_stack(gradient)
    assert turned.is_contiguous() and torch.equal(turned, gradient.transpose(1, 2))


@runs_kernels
@pytest.mark.parametrize("top_k", [1, 3])
def test_combine_adds_in_order(top_k):
    torch.manual_seed(0)
    y, position = random(60, C), torch.randint(0, 60, (20, top_k), device=DEVICE).int()
    assert torch.equal(ops.combine(y, position, DTYPE), reference.combine(y, position, DTYPE))
