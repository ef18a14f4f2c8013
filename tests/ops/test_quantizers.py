"""Transposed codes as their memory, which compiled graphs ask for where the number of tokens is a symbol."""

import pytest
import torch

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.ops.quantizers import flattened, unflattened
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, runs_kernels


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=5)


def matrix(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(rows)
    return torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16, generator=generator)


def assert_flat(flat, plain):
    """The same codes, in rows that begin at multiples of 16."""
    assert flat.ndim == 1
    matrix = unflattened(flat, len(plain))
    assert matrix.shape == plain.shape and matrix.stride() == (-(-plain.shape[1] // 16) * 16, 1)
    assert torch.equal(matrix.float(), plain.float())


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_size_of_the_memory_determines_the_matrix(rows):
    for columns in range(1, 100):
        codes = torch.randint(-9, 9, (rows, columns), dtype=torch.int8)
        assert_flat(flattened(codes), codes)
        padded = flattened(codes).as_strided(codes.shape, (-(-columns // 16) * 16, 1))
        assert flattened(padded).data_ptr() == padded.data_ptr()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_flat_codes_are_the_transposed_codes(rounding):
    x, rotation = matrix(37, 64), Rotation(64)
    made = []
    for flat in (False, True):
        torch.manual_seed(0)
        made.append(ops.rotate_quantize(x, None, rotation, INT8, "row", columns=True, rounding=rounding, flat=flat))
    (codes, codes_t, scales), (same, view, as_well) = made
    assert torch.equal(codes, same) and torch.equal(scales, as_well)
    assert_flat(view, codes_t)


@pytest.mark.parametrize("format", [INT8, FP8_E4M3])
def test_a_product_of_flat_codes(format):
    """Their padding, which holds anything, is not read."""
    e, x = matrix(37, 32), matrix(37, 64)
    fold = torch.rand(37, device=DEVICE) + 0.5
    results = []
    for flat in (False, True):
        _, e_t, _, e_scales = ops.quantize_pair(e, None, format, None, fold, flat)
        _, x_t, _ = ops.rotate_quantize(x, None, None, format, "tensor", rows=False, columns=True, flat=flat)
        results.append(
            (e_t, x_t, ops.scaled_mm(e_t, x_t, e_scales, None, None, None, None, (32, 64), torch.float32, None, flat))
        )
    for plain, view in zip(results[0][:2], results[1][:2], strict=True):
        assert_flat(view, plain)
    assert torch.equal(results[0][2], results[1][2])


@runs_kernels
def test_two_gradients():
    a, b, folds = matrix(37, 32), matrix(38, 32)[:37], (torch.rand(32, device=DEVICE), torch.rand(37, device=DEVICE))
    plain, flat = (ops.quantize_pairs(a, b, INT8, *folds, *folds, flat) for flat in (False, True))
    for i, (x, y) in enumerate(zip(plain, flat, strict=True)):
        if i in (1, 5):
            assert_flat(y, x)
        else:
            assert torch.equal(x, y)
