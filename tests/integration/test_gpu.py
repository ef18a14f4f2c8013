"""What only a GPU can show: real shapes, no synchronisation, CUDA graphs. Kernels one by one: tests/kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, balance_, halo_config, hot_config, ops, quantize_
from halo_tensor.fences import triton_launch
from halo_tensor.fences.fast_paths import FAST_PATHS, GLUON, LAUNCHER, PRECOMPILED
from halo_tensor.kernels.device import is_hopper
from halo_tensor.kernels.launch import Launch
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.kernels.quantize import whole_rows
from halo_tensor.products.operands import weight_operand
from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, INT8, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers.errors import relative_error, typical_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("format", [INT8, FP8_E4M3, FP6_E2M3], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1000, 4096), (513, 14336)])
def test_codes_are_the_references(rows, columns, format):
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    folds = torch.rand(columns, device="cuda") + 0.5, torch.rand(rows, device="cuda") + 0.5
    for right in (None, Rotation(128), Rotation(columns)):
        codes, codes_t, scales = ops.rotate_quantize(x, None, right, format, "row", columns=True)
        expected, expected_scales = reference.rotate_quantize(x, None, right, format, "row")
        differing = (codes.float() != expected.float()).float().mean()
        # Full width multiplies twice, in other orders; the more codes lie near zero, the more of them that moves.
        assert differing < (5e-4 if right and right.block == columns else 1e-6)
        assert torch.equal(codes.view(torch.int8).t(), codes_t.view(torch.int8)), "the trap of transposed stores"
        torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
    for left in (None, Rotation(128)):
        codes, codes_t, _, _ = ops.quantize_pair(x, left, format, *folds)
        by_row, _ = reference.rotate_quantize(x, left, None, format, "row", None, folds[0])
        by_column, _ = reference.rotate_quantize(x, None, None, format, "column", folds[1], None)
        assert (codes.float() != by_row.float()).float().mean() < 1e-6
        assert (codes_t.float() != by_column.t().float()).float().mean() < 1e-6


def test_fp8_accumulation_costs_less_than_half_a_decibel():
    x, w = torch.randn(2, 512, 16384, device="cuda")
    a, b = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    y = ops.scaled_mm(a, b, None, None, None, None, None, (512, 512), torch.float32)
    true = x.double() @ w.double().t()
    exact = relative_error(a.double() @ b.double().t(), true)
    assert 0.02 < exact < 0.06 and relative_error(y, true) < exact * 10 ** (0.5 / 20)


@pytest.mark.parametrize("size", [(5, 33, 7), (300, 1000, 520)])
@pytest.mark.parametrize("off", [("gluon", "cublas", "tma"), ("gluon", "cublas", "tma", "sm80")])
def test_products_without_backends(monkeypatch, off, size):
    """Other backends serve what ``HALO_DISABLE`` takes from one; codes are small integers, and so all sums are exact."""
    for name in off:
        monkeypatch.setattr(FAST_PATHS[name], "disabled", True)
    product.plan.cache_clear()
    (m, k, n), scale = size, torch.rand(size[0], device="cuda")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        a, b_t = (torch.randint(-4, 5, (rows, k), device="cuda").float().to(dtype) for rows in (m, n))
        y = ops.scaled_mm(a, b_t, scale, None, None, None, None, (m, n), torch.float32)
        expected = a.double() @ b_t.double().t() * scale[:, None]
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=0)
    product.plan.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are asked for, and of those that Triton's C function launches; plans are made anew."""
    asked, launched, prepare, call = [], [], triton_launch._bare, Launch.__call__

    def asked_for(self, *tensors):
        asked.append(self.kernel.fn.__name__)
        call(self, *tensors)

    def prepared(compiled, described):
        function, head = prepare(compiled, described)

        def c_function(*args):
            launched.append(compiled.name)
            function(*args)

        return c_function, head

    monkeypatch.setattr(Launch, "__call__", asked_for)
    monkeypatch.setattr(triton_launch, "_bare", prepared)
    plans = whole_rows.plan_whole_rows, product.plan
    for plan in plans:
        plan.cache_clear()
    yield asked, launched
    for plan in plans:
        plan.cache_clear()


@pytest.mark.skipif(LAUNCHER.why_off() is not None, reason=f"launcher: {LAUNCHER.why_off()}")
def test_every_launch_is_by_the_c_function(launches, recwarn):
    """Of kernels with and without descriptors, in Triton's language and in Gluon, from the first launch on."""
    asked, launched = launches
    rows, right = 4096, Rotation(128)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    for m in (rows, 64, rows, 64):
        codes, _, scale = ops.rotate_quantize(x, None, right, INT8, "row")
        y = ops.scaled_mm(codes[:m], codes, scale[:m], scale, None, None, right, (m, rows), torch.bfloat16)
        expected = (codes[:m].double() @ codes.double().t()) * scale[:m, None] * scale
        assert relative_error(y, reference.unrotate(expected, None, right, (m, rows))) < 5e-3
    assert len(asked) == 8 and launched == asked
    if is_hopper(x.device) and GLUON.why_off() is None:
        assert launched[:4] == ["whole_rows", "wgmma_kernel", "whole_rows", "scaled_mm_kernel"]
    assert not [path.failure for path in (GLUON, PRECOMPILED, LAUNCHER) if path.failure]
    assert not [w for w in recwarn if "halo_tensor" in str(w.message)]


def layer(config, k=1024, n=2048):
    linear = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    quantize_(linear, config)
    x = torch.randn(1000, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return linear, x, torch.randn(1000, n, device="cuda", dtype=torch.bfloat16)


def gradients(f, linear, x, e):
    y = f(x)
    return [y, *torch.autograd.grad(y, [x, linear.weight], e)]


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize(("level", "dtype"), [(0, "fp8"), (1, "int8"), (2, "fp8"), (2, "int8"), (1, "fp6")])
def test_a_layer_eager_and_compiled(level, dtype, granularity):
    torch._dynamo.reset()
    linear, x, e = layer(halo_config(level, dtype, granularity=granularity))
    w, xd, ed = linear.weight.master.double(), x.double(), e.double()
    exact = [xd @ w.t() + linear.bias.double(), ed @ w, ed.t() @ xd]
    eager, compiled = (gradients(f, linear, x, e) for f in (linear, torch.compile(linear, fullgraph=True)))
    typical = typical_error(linear.weight.operand.format)
    for a, b, c in zip(eager, compiled, exact, strict=True):
        assert 0.6 * typical < relative_error(a, c) < 2.2 * typical
        assert relative_error(b, a) < 1e-3


@pytest.mark.parametrize(("level", "dtype"), [(0, "fp8"), (1, "int8"), (0, "int8"), (1, "fp6")])
def test_a_balanced_layer_while_an_optimizer_writes(level, dtype):
    """Eager or compiled, it stays as exact as its format, and its codes in step."""
    torch._dynamo.reset()
    linear, x, e = layer(halo_config(level, dtype))
    with torch.no_grad():
        x[:, ::50] *= 30
    balance_(linear, x)
    assert len(linear.weight.gain.unique()) > 1
    compiled, typical = torch.compile(linear, fullgraph=True), typical_error(linear.weight.operand.format)
    optimizer = torch.optim.AdamW([linear.weight], lr=1e-3, fused=True)
    for _ in range(3):
        w, xd, ed = linear.weight.master.double(), x.double(), e.double()
        exact = [xd @ w.t() + linear.bias.double(), ed @ w, ed.t() @ xd]
        eager, fast = (gradients(f, linear, x, e) for f in (linear, compiled))
        for a, b, c in zip(eager, fast, exact, strict=True):
            assert 0.2 * typical < relative_error(a, c) < 2.2 * typical
            assert relative_error(b, a) < 1e-3
        linear.weight.grad = fast[2]
        optimizer.step()
        fresh = HaloWeight.from_hp(linear.weight.master, linear.weight.recipe, gains=linear.weight.gains).operand
        assert torch.equal(fresh.codes.view(torch.int8), linear.weight.operand.codes.view(torch.int8))
        assert torch.equal(fresh.scale, linear.weight.operand.scale)


def test_a_step_does_not_synchronise():
    linear, x, e = layer(halo_config(2, "int8"))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3, fused=True)

    def step():
        linear(x).backward(e)
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    fresh = weight_operand(linear.weight.master, linear.weight.recipe)
    assert torch.equal(fresh.codes, linear.weight.operand.codes), "the codes followed the optimiser"


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs CUDA's compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    """On small, ragged shapes. PyTorch's caching of memory would hide a write beyond the end of a tensor."""
    modules = ["tests/kernels/quantize/test_kernels.py", "tests/kernels/matmul/test_plan.py"]
    small = (
        "test_into or test_every_fold or test_transposed or test_integer_products or test_nothing or padded_to_whole_blocks"
    )
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command = [*sanitizer, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules, "-k", small]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "SUMMARY: 0 " in done.stdout and " passed" in done.stdout


def test_cuda_graphs():
    torch._dynamo.reset()
    linear, x, e = layer(halo_config(1, "int8"))
    f = torch.compile(linear, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x.grad = None  # it lies in the graph's memory
        torch.compiler.cudagraph_mark_step_begin()
        f(x).backward(e)
        linear.zero_grad()
    with torch.no_grad():
        linear.weight.mul_(2)  # a replay must read the new codes
    torch.compiler.cudagraph_mark_step_begin()
    assert relative_error(f(x).detach().clone(), linear(x)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", ["tensor", "column"])
@pytest.mark.parametrize("left", [Rotation(16, None, 8), Rotation(16, None, 3), Rotation(64), Rotation(128, 0)], ids=str)
def test_tokens_are_the_references(left, scale, dtype):
    """Of 63 images of 197 tokens, in both layouts."""
    x = torch.randn(63 * 197, 768, device="cuda").to(dtype)
    codes, codes_t, scales = ops.rotate_quantize(x, left, None, INT8, scale, columns=True)
    expected, expected_scales = reference.rotate_quantize(x, left, None, INT8, scale)
    differing = (codes != expected).float().mean()
    assert differing < (1e-6 if dtype == torch.bfloat16 else 1e-4), "float32 goes in three tf32 products"
    assert torch.equal(codes.t(), codes_t)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)


def test_a_graph_draws_anew_in_every_replay():
    torch._dynamo.reset()
    linear, x, e = layer(hot_config())
    f = torch.compile(linear, mode="reduce-overhead", fullgraph=True)

    def draw(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(f(x), x, e)[0].clone()

    for _ in range(4):
        draw()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2)) and not torch.equal(draw(), draw())
    mean = sum(draw().double() for _ in range(50)) / 50
    errors = [relative_error(g, e.double() @ linear.weight.double()) for g in (draw(), mean)]
    assert errors[1] < 0.75 * errors[0], "what W's int4 costs is left"


def test_hot_does_not_synchronise():
    linear, x, e = layer(hot_config())
    gradients(linear, linear, x, e)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(linear, linear, x, e)
    finally:
        torch.cuda.set_sync_debug_mode("default")
