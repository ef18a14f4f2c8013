"""A compiled graph launches the kernels itself, and computes what eager mode does."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

pytest.importorskip("triton")
from halo_tensor import halo_config, hot_config, quantize_, recipe_config
from halo_tensor.ops import library
from halo_tensor.recipe import INT8, Rotation
from tests import interpreter
from tests.interpreter import DEVICE, runs_kernels
from tests.util import relative_error, typical_error


@pytest.mark.skipif(interpreter.INTERPRETED, reason="runs the others")
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=10)


def model(config) -> nn.Module:
    torch._dynamo.reset()
    mlp = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128, bias=False)).to(DEVICE, torch.bfloat16)
    quantize_(mlp, config)
    return mlp


def step(f, mlp, x, e) -> list[torch.Tensor]:
    y = f(x)
    return [y, *torch.autograd.grad(y, [x, *mlp.parameters()], e[: len(y)])]


def data(tokens: int = 20) -> list[torch.Tensor]:
    return [torch.randn(tokens, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=i == 0) for i in range(2)]


@runs_kernels
@pytest.mark.parametrize(("level", "dtype", "granularity"), [(0, "fp8", "row"), (1, "int8", "row"), (2, "int8", "tensor")])
def test_no_op_is_left(level, dtype, granularity):
    mlp, (x, e) = model(halo_config(level, dtype, granularity=granularity)), data()
    f = torch.compile(mlp, fullgraph=True)
    expected = step(mlp, mlp, x, e)
    with fresh_cache():
        results, code = run_and_get_code(lambda: step(f, mlp, x, e))
    assert not any("torch.ops.halo" in source for source in code), "every op became launches"
    # X of two layers and its transpose, two products; E's two passes or four, W and E transposed for two products each
    launches = [sum(line.lstrip().startswith("halo_") and "Launch" not in line for line in s.splitlines()) for s in code]
    assert len(code) == 2 and launches[0] in (6, 8) and 10 <= launches[1] <= 16
    for a, b in zip(results, expected, strict=True):
        assert relative_error(a, b) < 0.6 * typical_error(mlp[0].weight.operand.format)


@runs_kernels
@pytest.mark.parametrize(("granularity", "rounding"), [("tensor", "stochastic"), ("row", "nearest")])
def test_no_op_of_hot_is_left(granularity, rounding):
    """Two layers' X of low rank in forward; then W and E, twice, each measured and cast."""
    mlp, (x, e) = model(hot_config(rounding=rounding, granularity=granularity)), data()
    f = torch.compile(mlp, fullgraph=True)
    expected = step(mlp, mlp, x, e)
    with fresh_cache():
        results, code = run_and_get_code(lambda: step(f, mlp, x, e))
    assert not any("torch.ops.halo" in source for source in code), "every op became launches"
    launches = [sum(line.lstrip().startswith("halo_") and "Launch" not in line for line in s.splitlines()) for s in code]
    assert launches == [4, 16]
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        # The draws are not eager mode's, and E of the first layer is the second's E_X.
        assert relative_error(a, b) < (0.01 if rounding == "nearest" or i == 0 else 0.6)
    if rounding == "stochastic":
        draws = [(torch.manual_seed(seed), step(f, mlp, x, e)[1])[1] for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and 0.05 < relative_error(draws[2], draws[0]) < 0.6


@runs_kernels
def test_each_dtype_has_its_launch():
    """A launch loads its kernel once, and then hands it pointers, whatever they point to."""

    def f(a, b):
        return [library.rotate_quantize(x, None, None, INT8, "row")[0] for x in (a, b)]

    a, b = torch.randn(2, 32, 64, device=DEVICE)
    torch._dynamo.reset()
    codes, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), a, b.bfloat16())
    assert len(set(re.findall(r"^halo_\w+(?= = Launch)", code, re.MULTILINE))) == 2
    for x, y in zip(codes, f(a, b.bfloat16()), strict=True):
        assert torch.equal(x, y)


@runs_kernels
def test_codes_that_lie_askew_are_copied():
    w = torch.randint(-9, 9, (48, 80), device=DEVICE, dtype=torch.int8)
    f = lambda a, w: library.scaled_mm(a, w[:, 8:72], None, None, None, None, None, (16, 48), torch.float32)  # noqa: E731
    torch._dynamo.reset()
    a = w[:16, :64].contiguous()
    assert torch.equal(torch.compile(f, fullgraph=True)(a, w), (a.double() @ w[:, 8:72].double().t()).float())


@runs_kernels
def test_a_regions_graph_keeps_its_ops():
    @torch.compiler.nested_compile_region
    def region(x):
        return library.rotate(x, None, Rotation(16)) * 2

    x = torch.randn(32, 64, device=DEVICE)
    torch._dynamo.reset()
    assert relative_error(torch.compile(region, fullgraph=True)(x), region(x)) < 1e-6


@runs_kernels
def test_dynamic_shapes_stay_ops():
    mlp, (x, e) = model(halo_config(1, "int8")), data(40)
    f = torch.compile(mlp, fullgraph=True, dynamic=True)
    _, code = run_and_get_code(lambda: step(f, mlp, x, e))
    assert all("torch.ops.halo" in source for source in code)
    for tokens in (20, 33):
        part = x[:tokens].detach().requires_grad_()
        for a, b in zip(step(f, mlp, part, e), step(mlp, mlp, part, e), strict=True):
            assert relative_error(a, b) < 0.01


@runs_kernels
def test_what_launchers_compute_with_tensors_stays_an_op():
    mlp, (x, e) = model(recipe_config("jetfire")), data()
    _, code = run_and_get_code(lambda: step(torch.compile(mlp, fullgraph=True), mlp, x, e))
    assert all("torch.ops.halo" in source for source in code)
