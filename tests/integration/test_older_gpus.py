"""The kernels of GPUs before Hopper, run on a newer one: PTX for sm_80, sm_86 and sm_89 against the reference.

``HALO_RUN_AS=89 python -m pytest tests/kernels/matmul/test_plan.py`` runs any module like this. Here some modules are run whole
for sm_89, which has all formats; what sm_80 has is tested one by one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from halo_tensor import halo_config, ops, quantize_
from halo_tensor.kernels.matmul import plan as scaled_mm
from halo_tensor.kernels.matmul import sm80
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers import launches
from tests.helpers.errors import relative_error, typical_error
from tests.helpers.older_gpu import running_as

pytestmark = [pytest.mark.gpu, pytest.mark.skipif("HALO_RUN_AS" in os.environ, reason="one GPU at a time")]

H = Rotation(128)
SIZES = [(512, 384, 1024), (1000, 1040, 1000), (129, 144, 4100), (64, 256, 512), (1, 128, 128), (33, 4096, 160)]


def codes(rows, width, format):
    """Codes whose rows begin at multiples of 16 bytes, beside others that no product may read as its own."""
    x = torch.randint(-127, 128, (rows, (width + 15) // 16 * 16), device="cuda")
    x = x.to(torch.int8) if format is INT8 else (x / 8).to(torch.float8_e4m3fn)
    return x[:, :width]


@pytest.fixture
def launched(monkeypatch):
    return launches.noted(monkeypatch)


@pytest.mark.parametrize("capability", [80, 86, 89])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["bare", "rows", "undone", "undone, all", "float32"])
def test_products(launched, capability, size, kind):
    (m, n, k), format = size, FP8_E4M3 if capability == 89 else INT8
    a, b = codes(m, k, format), codes(n, k, format)
    right = H if "undone" in kind and n % 128 == 0 else None
    whole = kind == "undone, all"
    scales = (torch.rand(m, device="cuda") + 0.5, None if right else torch.rand(n, device="cuda") + 0.5)
    scales = (None, None) if kind == "bare" else scales
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    bias = torch.randn(n, device="cuda", dtype=dtype) if whole else None
    gain = torch.exp2(torch.randint(-3, 4, (n,), device="cuda").float()) if whole else None
    for formats in [(a, b)] if format is INT8 else [(a, b), (a.to(torch.float8_e5m2), b)]:
        arguments = (*formats, *scales, bias, None, right, (m, n), dtype, gain)
        with running_as(capability):
            y = ops.scaled_mm(*arguments)
        assert launched[-1] == "mma_kernel"
        # On a CPU, where the reference takes any width.
        on_cpu = (t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments)
        expected = reference.scaled_mm(*on_cpu).cuda()
        assert y.dtype == dtype and y.shape == (m, n)
        bound = 1e-6 if kind == "float32" and format is INT8 else 2e-3 if format is FP8_E4M3 else 3e-3
        error = relative_error(y, expected)
        assert error < (6e-3 if right else bound), error


@pytest.mark.parametrize("capability", [80, 86, 89])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [4096, 14336])
@pytest.mark.parametrize("block", [None, 128, 256, -1], ids=lambda b: {None: "plain", -1: "full width"}.get(b, f"block {b}"))
def test_codes(capability, dtype, width, block):
    format = INT8 if capability < 89 else FP8_E4M3
    x = torch.randn(300, width, device="cuda").to(dtype)
    right = None if block is None else Rotation(width if block == -1 else block)
    gain = torch.exp2(torch.randint(-3, 4, (width,), device="cuda").float())
    for by in (None, gain):
        with running_as(capability):
            made, made_t, scales = ops.rotate_quantize(x, None, right, format, "row", columns=True, gain=by)
        expected, expected_scales = reference.rotate_quantize(x if by is None else x.float() * by, None, right, format, "row")
        assert torch.equal(made.view(torch.int8).t(), made_t.view(torch.int8))
        torch.testing.assert_close(scales, expected_scales, rtol=2e-3 if by is not None else 1e-5, atol=0)
        close = (made.float() - expected.float()).abs() <= format.max / (16 if format.uniform else 4)
        differing = (made.float() != expected.float()).float().mean()
        assert close.all() and differing < (1e-2 if by is not None else 5e-4), differing


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "tokens rotated"])
def test_pairs(capability, rotated):
    format, left = INT8 if capability < 89 else FP8_E4M3, H if rotated else None
    x = torch.randn(1000, 1040, device="cuda", dtype=torch.bfloat16)
    folds = torch.rand(1040, device="cuda") + 0.5, torch.rand(1000, device="cuda") + 0.5
    with running_as(capability):
        by_row, by_column, *_ = ops.quantize_pair(x, left, format, *folds)
    rows, _ = reference.rotate_quantize(x, left, None, format, "row", None, folds[0])
    columns, _ = reference.rotate_quantize(x, None, None, format, "column", folds[1], None)
    assert (by_row.float() != rows.float()).float().mean() < 1e-5
    assert (by_column.float() != columns.t().float()).float().mean() < 1e-5


@pytest.mark.parametrize("capability", [80, 86, 89])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("config", [(0, "int8"), (1, "int8"), (2, "int8"), (0, "fp8"), (1, "fp6")], ids=str)
def test_a_layer(launched, capability, dtype, config):
    if capability < 89 and config[1] != "int8":
        pytest.skip("fp8 and fp6 need compute capability 8.9")
    layer = nn.Linear(1024, 2048, device="cuda", dtype=dtype)
    x = torch.randn(999, 1024, device="cuda", dtype=dtype, requires_grad=True)
    e = torch.randn(999, 2048, device="cuda", dtype=dtype)
    with running_as(capability):
        quantize_(layer, halo_config(*config))
        y = layer(x)
        made = [y, *torch.autograd.grad(y, [x, layer.weight], e)]
    assert launched.count("mma_kernel") == 3, "a product did not run quantised"
    w, xd, ed = layer.weight.master.double(), x.double(), e.double()
    exact = [xd @ w.t() + layer.bias.double(), ed @ w, ed.t() @ xd]
    typical = typical_error(layer.weight.operand.format)
    for a, b in zip(made, exact, strict=True):
        assert 0.6 * typical < relative_error(a, b) < 2.2 * typical


def test_the_kernel_is_what_these_gpus_get():
    """On the GPU itself, another kernel runs."""
    with running_as(80):
        int8 = torch.int8
        planned = scaled_mm.plan(torch.device("cuda", 0), int8, int8, 256, 0, 0, False, None, None, None, torch.bfloat16)
        assert planned.variant((256, 256, 256, 256, 256)).launch.kernel is sm80.mma_kernel


@pytest.mark.parametrize(
    "module",
    # Not test_two_gradients: Inductor asks the GPU that is there what it may generate.
    ["kernels/quantize/test_kernels", "kernels/matmul/test_plan", "kernels/test_rotate", "integration/test_hot_kernels"],
)
def test_modules_of_kernels(module):
    command = [sys.executable, "-m", "pytest", f"tests/{module}.py", "-q", "-p", "no:cacheprovider", "-k", "not compile"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"HALO_RUN_AS": "89"}, capture_output=True, text=True
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 2, done.stdout[-6000:] + done.stderr[-2000:]
