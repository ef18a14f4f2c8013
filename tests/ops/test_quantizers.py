"""Transposed codes as views of their memory, which compiled graphs ask for where the number of tokens is a symbol."""

import pytest
import torch

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, runs_kernels


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=5)


def matrix(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(rows)
    return torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16, generator=generator)


def assert_turned(turned, plain):
    """The same codes, and the same memory."""
    assert turned.shape == plain.shape[::-1] and turned.stride() == plain.stride()[::-1]
    assert torch.equal(turned.t().float(), plain.float())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_turned_codes_are_the_transposed_codes(rounding):
    x, rotation = matrix(37, 64), Rotation(64)
    made = []
    for turned in (False, True):
        torch.manual_seed(0)
        made.append(ops.rotate_quantize(x, None, rotation, INT8, "row", columns=True, rounding=rounding, turned=turned))
    (codes, codes_t, scales), (same, view, as_well) = made
    assert torch.equal(codes, same) and torch.equal(scales, as_well)
    assert_turned(view, codes_t)


@pytest.mark.parametrize("format", [INT8, FP8_E4M3])
def test_a_product_of_turned_codes(format):
    """Their padding, which holds anything, is not read."""
    e, x = matrix(37, 32), matrix(37, 64)
    fold = torch.rand(37, device=DEVICE) + 0.5
    results = []
    for turned in (False, True):
        _, e_t, _, e_scales = ops.quantize_pair(e, None, format, None, fold, turned)
        _, x_t, _ = ops.rotate_quantize(x, None, None, format, "tensor", rows=False, columns=True, turned=turned)
        results.append(
            (e_t, x_t, ops.scaled_mm(e_t, x_t, e_scales, None, None, None, None, (32, 64), torch.float32, None, turned))
        )
    for plain, view in zip(results[0][:2], results[1][:2], strict=True):
        assert_turned(view, plain)
    assert torch.equal(results[0][2], results[1][2])


@runs_kernels
def test_two_gradients():
    a, b, folds = matrix(37, 32), matrix(38, 32)[:37], (torch.rand(32, device=DEVICE), torch.rand(37, device=DEVICE))
    plain, turned = (ops.quantize_pairs(a, b, INT8, *folds, *folds, turned) for turned in (False, True))
    for i, (x, y) in enumerate(zip(plain, turned, strict=True)):
        if i in (1, 5):
            assert_turned(y, x)
        else:
            assert torch.equal(x, y)
