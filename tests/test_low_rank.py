"""A low rank of tokens, and what else is rotated along the dimension that a scale lies along, in the kernels."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")
from halo_tensor import hot_config
from halo_tensor.ops import reference
from halo_tensor.ops import rotate_quantize as quantizer
from halo_tensor.recipe import INT8, Rotation
from tests import interpreter
from tests.interpreter import DEVICE, runs_kernels
from tests.test_hot import project, rounded
from tests.test_kernels import DTYPES, FORMAT, LAYOUTS, assert_layout, check, examples, matrix
from tests.test_linear import converted, gradients
from tests.util import relative_error

ROTATIONS = [
    Rotation(16, None, 8), Rotation(16, None, 3), Rotation(2, None, 1), Rotation(128, None, 1), Rotation(64, None, 64),
    Rotation(32, None, 31), Rotation(256, None, 128), Rotation(16, 3), Rotation(64), Rotation(128, 0),
]  # fmt: skip


@pytest.mark.skipif(interpreter.INTERPRETED, reason="runs the others")
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=8)


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
