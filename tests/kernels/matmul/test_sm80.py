"""The product for GPUs before SM 9.0 in Triton's interpreter. On a GPU, and compiled: test_older_gpus.py and test_aot.py."""

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from halo_tensor import ops
from halo_tensor.fences.fast_paths import FEW_ROWS
from halo_tensor.kernels.launch import Launch
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.kernels.matmul import sm80, tma
from halo_tensor.kernels.matmul.request import size_class
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers import interpreter
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import INTERPRETED

H = Rotation(128)


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=3)


@pytest.fixture(autouse=True)
def as_before_hopper(monkeypatch):
    """Products are planned as for a GPU without TMA, and those of few rows as others."""
    monkeypatch.setattr(tma, "has_tma", lambda device: False)
    monkeypatch.setattr(FEW_ROWS, "disabled", True)
    monkeypatch.setattr(sm80, "shared_memory", lambda device: 99 * 1024)
    product.plan.cache_clear()
    yield
    product.plan.cache_clear()


def codes(rows, width, format):
    """Codes beside others, in the same 16 bytes, that no product may read as its own."""
    x = torch.randint(-127, 128, (rows, (width + 15) // 16 * 16))
    x = x.to(torch.int8) if format is INT8 else (x / 8).to(torch.float8_e4m3fn)
    return x[:, :width]


sizes = st.tuples(st.integers(1, 200), st.sampled_from([16, 128, 144, 256]), st.integers(1, 300))


@pytest.mark.skipif(not INTERPRETED, reason="see test_in_the_interpreter")
@given(
    size=sizes,
    format=st.sampled_from([INT8, FP8_E4M3]),
    scaled=st.sampled_from(["none", "rows", "one for all"]),
    left=st.booleans(),
    right=st.booleans(),
    extras=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(size=(130, 256, 132), format=INT8, scaled="rows", left=True, right=True, extras=True, dtype=torch.float32)
@example(size=(64, 128, 128), format=FP8_E4M3, scaled="rows", left=False, right=True, extras=True, dtype=torch.bfloat16)
@settings(max_examples=25, phases=[Phase.explicit, Phase.generate], deadline=None)
def test_every_epilogue(size, format, scaled, left, right, extras, dtype):
    (m, n, k), vectors = size, scaled == "rows"
    left, right = H if left else None, H if right and n % 128 == 0 else None
    a, b = codes(reference.padded(m, left), k, format), codes(n, k, format)
    a_scale = None if scaled == "none" else torch.rand(a.shape[0] if vectors else ()) + 0.5
    b_scale = None if scaled == "none" or (vectors and right) else torch.rand(n if vectors else ()) + 0.5
    if left and vectors:
        a_scale = None  # a scale of rotated rows is folded
    bias = torch.randn(n).to(dtype) if extras else None
    gain = torch.exp2(torch.randint(-3, 4, (n,)).float()) if extras else None
    arguments = (a, b, a_scale, b_scale, bias, left, right, (m, n), dtype, gain)
    y, expected = ops.scaled_mm(*arguments), reference.scaled_mm(*arguments)
    assert y.shape == expected.shape == (m, n) and y.dtype == dtype
    if expected.double().norm():
        assert relative_error(y, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="see test_in_the_interpreter")
def test_which_kernel_runs(monkeypatch):
    launched = []
    call = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (launched.append(self), call(self, *args))[1])
    ops.scaled_mm(codes(32, 64, INT8), codes(16, 64, INT8), None, None, None, None, None, (32, 16), torch.float32)
    (launch,) = launched
    assert launch.kernel is sm80.mma_kernel and not launch.blocks


def test_the_launch_table():
    """Two programs share a multiprocessor: twice a tile's stages, less the one that is multiplied, fit its memory."""
    for shared, whole in ((163 * 1024, 164 * 1024), (99 * 1024, 100 * 1024)):
        for m, n, integer in ((8192, 4096, True), (8192, 4096, False), (64, 4096, True), (512, 512, False)):
            tile = sm80.tile_for(size_class(m, n, 108), integer, False, shared)
            needed = (tile.stages - 1) * (tile.m + tile.n) * tile.k
            assert 2 * (needed + 1024) <= whole, tile
        assert sm80.tile_for(size_class(8192, 4096, 108), True, False, shared).m == 128
        assert sm80.tile_for(size_class(64, 4096, 108), True, False, shared).m == 64
