"""The product in Gluon, which nothing but a GPU of SM 9.0 can run. tests/integration/test_aot.py compiles it anywhere, and its algebra is
tested here on tensors."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")
from halo_tensor.fences.fast_paths import FEW_ROWS, GLUON
from halo_tensor.kernels.device import is_hopper
from halo_tensor.kernels.launch import Launch
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.kernels.matmul import sm90
from halo_tensor.recipe import FP8_E4M3, FP8_E5M2, INT8, Rotation
from halo_tensor.reference.hadamard import block_diagonal
from halo_tensor.reference.ops import rotated
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import DEVICE
from tests.helpers.kernel_checks import DTYPES, ROUNDING, codes_of, exact_product, gain_of, scales_of

HERE = is_hopper(torch.device(DEVICE)) and GLUON.load("halo_tensor.kernels.matmul.sm90") is not None
skip_elsewhere = pytest.mark.skipif(not HERE, reason="needs a GPU of SM 9.0, and Triton 3.6 to 3.9")


def on_hopper(test):
    return pytest.mark.gpu(skip_elsewhere(test))


def test_a_thread_gets_columns_in_a_row():
    """Lane c of the four that share a row has columns 2c and 2c + 1 of every 8 (PTX, accumulators of wgmma)."""
    held = sm90._order().view(16, 4, 2).transpose(0, 1).reshape(4, 4, 8)  # by lanes
    assert torch.equal(held, 8 * torch.arange(4).view(4, 1, 1) + 32 * torch.arange(4).view(4, 1) + torch.arange(8))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_what_undoes_a_rotation(block):
    y, right = torch.randn(16, 128, dtype=torch.float64), Rotation(block, 7)
    unrotated = torch.empty_like(y)
    unrotated[:, sm90._order()] = y @ sm90._matrix(right, torch.device("cpu")).double()
    whole = block_diagonal(right, 128, torch.float64, torch.device("cpu"), transposed=True)
    torch.testing.assert_close(unrotated, y @ whole)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that run, of which small products are made to be one in Gluon."""
    names = []
    call = Launch.__call__

    def noted(self, *args):
        names.append(self.kernel.fn.__name__)
        call(self, *args)

    monkeypatch.setattr(Launch, "__call__", noted)
    monkeypatch.setattr(FEW_ROWS, "disabled", True)
    monkeypatch.setattr(sm90, "why_not", lambda request: request.row_rotation and "it undoes none on the left")
    product.plan.cache_clear()
    yield names
    product.plan.cache_clear()


SIZES = [(1, 1, 1), (70, 192, 200), (128, 256, 128), (300, 528, 1000), (1000, 1040, 640)]


@on_hopper
@given(
    size=st.sampled_from(SIZES),
    left=st.sampled_from([None, None, 16, 128]),
    right=st.sampled_from([None, 16, 32, 64, 128]),
    scales=st.tuples(*[st.sampled_from([None, "one", "vector"])] * 2),
    biased=st.booleans(),
    gained=st.booleans(),
    dtype=DTYPES,
    layouts=st.tuples(*[st.sampled_from(["contiguous", "misaligned", "transposed"])] * 2),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_epilogue(launched, size, left, right, scales, biased, gained, dtype, layouts):
    """A pass of its own undoes a rotation on the left; but of float32 results it is slow, so they are multiplied elsewhere."""
    m, n, k = size
    rotation = Rotation(right, 7) if right and n % right == 0 else None
    of_rows = Rotation(left, 8) if left and rotation else None
    height = rotated(m, of_rows)
    a, b_t = (codes_of((r, k), INT8, layout) for r, layout in zip((height, n), layouts, strict=True))
    a_scale, b_scale = scales_of(scales, (height, n), [INT8.max] * 2)
    if dtype == torch.float16 and None in scales:  # sums of codes are too large for it
        dtype = torch.bfloat16
    bias = torch.randn(n, device=DEVICE, dtype=dtype) if biased else None
    gain = gain_of(n) if gained else None
    launched.clear()
    y = product.scaled_mm(a, b_t, a_scale, b_scale, bias, of_rows, rotation, (m, n), dtype, gain)
    here, elsewhere = ("wgmma_kernel", "scaled_mm_kernel")[:: -1 if of_rows and dtype == torch.float32 else 1]
    assert here in launched and elsewhere not in launched
    error = relative_error(y, exact_product(a, b_t, a_scale, b_scale, bias, of_rows, rotation, (m, n), gain))
    # Sums are whole numbers, all else is float32: what is left is the rounding of the result, and of what is un-rotated.
    few, rounding = y.numel() < 1000, ROUNDING[dtype]
    if rotation:
        rounding = (rounding**2 + ROUNDING[torch.bfloat16] ** 2) ** 0.5
    if of_rows:
        rounding = (2 * rounding**2) ** 0.5 + 1e-3 * (dtype != torch.bfloat16)
    assert error < (3 if few else 1.1) * rounding + 1e-6
    assert error >= (0.4 if of_rows else 0.8) * rounding or few


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (8192, 4096, 1000), (2048, 8192, 4096)])
def test_as_the_other_kernel(launched, monkeypatch, size, dtype):
    """Bit for bit, where there is no rotation: over several tiles a program, and with rows that TMA pads."""
    m, n, k = size
    a, b_t = codes_of((m, k), INT8), codes_of((n, k), INT8)
    a_scale, b_scale = (torch.rand(length, device=DEVICE) + 0.5 for length in (m, n))
    args = (a, b_t, a_scale, b_scale, None, None, None, (m, n), dtype, gain_of(n))
    y = product.scaled_mm(*args)
    monkeypatch.setattr(sm90, "why_not", lambda request: "it shall not")
    product.plan.cache_clear()
    assert torch.equal(y, product.scaled_mm(*args))
    assert "wgmma_kernel" in launched and launched[-1] == "scaled_mm_kernel"


@on_hopper
def test_a_nan_stays_in_its_row(launched):
    a, b_t, scale = codes_of((256, 128), INT8), codes_of((512, 128), INT8), torch.ones(256, device=DEVICE)
    scale[37] = torch.nan
    y = product.scaled_mm(a, b_t, scale, None, None, None, Rotation(128), (256, 512), torch.bfloat16)
    assert launched == ["wgmma_kernel"]
    assert y[37].isnan().all() and y.isnan().sum() == 512


@on_hopper
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("formats", [(FP8_E4M3, FP8_E4M3), (FP8_E5M2, FP8_E4M3)], ids=str)
def test_fp8(launched, formats, block):
    m, n, k = 300, 512, 1000
    a, b_t = codes_of((m, k), formats[0]), codes_of((n, k), formats[1])
    scale, right = torch.rand(m, device=DEVICE) + 0.5, Rotation(block, 7)
    y = product.scaled_mm(a, b_t, scale, None, None, None, right, (m, n), torch.bfloat16)
    assert "wgmma_kernel" in launched and "scaled_mm_kernel" not in launched
    error = relative_error(y, exact_product(a, b_t, scale, None, None, None, right, (m, n)))
    # The unit keeps about 14 bits of a sum.
    assert 1.1 * ROUNDING[torch.bfloat16] < error < 1.2 * (2 * ROUNDING[torch.bfloat16] ** 2 + 2e-3**2) ** 0.5
