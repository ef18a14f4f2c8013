"""A compiled graph launches the kernels itself, and computes what eager mode does."""

import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.codecache import PyCodeCache
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

pytest.importorskip("triton")
from halo_tensor import HaloWeight, halo_config, hot_config, ops, quantize_, recipe_config
from halo_tensor.activations import choice
from halo_tensor.compiler import joint_graph
from halo_tensor.fences.fast_paths import FEW_ROWS
from halo_tensor.kernels.matmul import cublas
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.products.experts import grouped_linear
from halo_tensor.recipe import INT8, Rotation, halo
from tests.helpers import interpreter
from tests.helpers.errors import relative_error, typical_error
from tests.helpers.generated_code import calls_ops, compiled, lowered_again, work
from tests.helpers.interpreter import DEVICE, runs_kernels


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=32)


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


def compiled_step(config):
    """A compiled step without an op in it: (f, the model, its data, results, eager mode's, launches in each graph)."""
    mlp, (x, e) = model(config), data()
    f = torch.compile(mlp, fullgraph=True)
    expected = step(mlp, mlp, x, e)
    with lowered_again():
        results, code = run_and_get_code(lambda: step(f, mlp, x, e))
    assert not any(map(calls_ops, code)), "every op became launches"
    assert not any("randint64" in s for s in code), "seeds are read where they are drawn"
    for s in code:  # code from a cache runs in processes that have imported less
        assert all(f"import {module}" in s for module in re.findall(r"= Launch\(([\w.]+)\.\w+,", s))
    launches = [sum(line.lstrip().startswith("halo_") and "Launch" not in line for line in s.splitlines()) for s in code]
    return f, mlp, (x, e), results, expected, launches


@runs_kernels
@pytest.mark.parametrize(("level", "dtype", "granularity"), [(0, "fp8", "row"), (1, "int8", "row"), (2, "int8", "tensor")])
def test_no_op_is_left(level, dtype, granularity):
    _, mlp, _, results, expected, launches = compiled_step(halo_config(level, dtype, granularity=granularity))
    # X of two layers and its transpose, two products; E's two passes or four, W and E transposed for two products each
    assert len(launches) == 2 and launches[0] in (6, 8) and 10 <= launches[1] <= 16
    for a, b in zip(results, expected, strict=True):
        assert relative_error(a, b) < 0.6 * typical_error(mlp[0].weight.operand.format)


@runs_kernels
def test_no_op_of_experts_is_left():
    """Rows of three experts: sizes of groups stay on the device."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight = nn.Parameter(HaloWeight.from_hp(torch.randn(3, 32, 64, device=DEVICE), halo(1, INT8)))
    offs = torch.tensor([5, 5, 18], dtype=torch.int32, device=DEVICE)
    x, e = torch.randn(20, 64, device=DEVICE, requires_grad=True), torch.randn(20, 32, device=DEVICE)

    def step(f):
        y = f(x, weight, offs)
        return [y, *torch.autograd.grad(y, [x, weight], e)]

    expected = step(grouped_linear)
    with lowered_again():
        results, code = run_and_get_code(lambda: step(torch.compile(grouped_linear, fullgraph=True)))
    assert len(code) == 2 and not any(map(calls_ops, code)), "every op became launches"
    assert all(map(torch.equal, results, expected))


@runs_kernels
@pytest.mark.parametrize(
    ("options", "rounding", "packs"),
    [
        ({}, "stochastic", 0),
        ({"granularity": "row"}, "nearest", 0),
        ({"rank": None, "saved_bits": 4}, "nearest", 1),
    ],
)
def test_no_op_of_hot_is_left(options, rounding, packs):
    """Two layers. X of low rank in forward; then E for both products, twice, measured and cast. W is held as codes. INT4 codes of
    X are packed, and unpacked."""
    f, mlp, (x, e), results, expected, launches = compiled_step(hot_config(rounding=rounding, **options))
    assert launches == [4 + 2 * packs, 8 + 2 * packs], "two launches for E of a layer, and two products"
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        # The draws are not eager mode's, and E of the first layer is the second's E_X.
        assert relative_error(a, b) < (0.01 if rounding == "nearest" or i == 0 else 0.6)
    if rounding == "stochastic":
        draws = [(torch.manual_seed(seed), step(f, mlp, x, e)[1])[1] for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and 0.05 < relative_error(draws[2], draws[0]) < 0.6


class Squared(nn.Module):
    """A layer whose E is computed from two matrices, and its sum over tokens is the gradient of the bias."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(128, 256)

    def forward(self, x):
        y = self.layer(x)
        return y * y


@runs_kernels
@pytest.mark.parametrize("config", [hot_config(), halo_config(1, "int8")])
def test_a_gradient_is_computed_once(config):
    """The sum for the bias reads what was computed for the quantiser."""
    torch._dynamo.reset()
    model = Squared().to(DEVICE, torch.bfloat16)
    quantize_(model, config)
    x, e = (torch.randn(2, 40, n, device=DEVICE, dtype=torch.bfloat16) for n in (128, 256))
    with lowered_again():
        _, (_, code) = run_and_get_code(lambda: torch.compile(model, fullgraph=True)(x.requires_grad_()).backward(e))
    readers = re.findall(
        r"^ +(\w+)(?:\.run)?\(.*\btangents_1\b.*\)", code.replace("assert_size_stride(tangents_1", ""), re.MULTILINE
    )
    assert len(readers) == 1
    assert any("sum" in kernel for kernel in re.findall(r"^ +((?:cpp|triton)_\w+)(?:\.run)?\(", code, re.MULTILINE))
    expected = e.float() * 2 * model.layer(x).float()
    assert relative_error(model.layer.bias.grad, expected.sum((0, 1))) < 1e-2


@runs_kernels
def test_what_is_quantised_again_in_backward():
    """X of the layer behind attention: the transpose of its codes is made by launches of the other graph."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.o = (nn.Linear(128, 128, bias=False) for _ in range(2))

        def forward(self, x):
            v = self.v(x).unflatten(-1, (2, 64)).transpose(1, 2)
            return self.o(scaled_dot_product_attention(v, v, v).transpose(1, 2).flatten(2))

    attention, x = Attention().to(DEVICE, torch.bfloat16), data()[0][None]
    quantize_(attention, halo_config(1, "int8"))
    results, launches = [], []
    for on in (True, False):
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch, lowered_again():
            patch.setattr(joint_graph, "REPEAT_FOR_BACKWARD", on)
            made, code = run_and_get_code(lambda: step(torch.compile(attention, fullgraph=True), attention, x, x.detach()))
        assert not any(map(calls_ops, code)), "every op became launches"
        launches.append([len(re.findall(r"^ +halo_\w+\(", s, re.MULTILINE)) for s in code])
        results.append(made)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    (forward, backward), (once, without) = launches
    assert forward == once - 1 and backward == without + 2  # the transpose moved, and its codes were made again


@runs_kernels
@pytest.mark.parametrize("memory", ["balanced", "low"])
def test_no_op_of_less_memory_is_left(memory, monkeypatch):
    """Weights are quantised in both graphs, and activations compressed in forward and decompressed in backward."""
    monkeypatch.setattr(choice, "FEWEST_ELEMENTS", 2**8)
    _, mlp, _, results, expected, launches = compiled_step(halo_config(memory=memory))
    forward, backward = [6 + 2, 16], [6 + 2 + 1, 16 + 1]
    assert launches[0] == (forward if memory == "balanced" else backward)[0] and mlp[0].weight.operand is None
    for a, b in zip(results, expected, strict=True):
        assert relative_error(a, b) < 0.01


@runs_kernels
def test_compressed_attention(monkeypatch):
    """q, k and v are compressed in the order in which they lie in memory."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(128, 384, bias=False), nn.Linear(128, 128, bias=False)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 64)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.o(scaled_dot_product_attention(q.sin(), k.cos(), v).transpose(1, 2).flatten(2))

    monkeypatch.setattr(choice, "FEWEST_ELEMENTS", 2**8)
    attention, x = Attention().to(DEVICE, torch.bfloat16), data()[0][None]
    exact = []
    for activations in ("plain", "int8"):
        torch._dynamo.reset()
        quantize_(attention, halo_config(activations=activations))
        with lowered_again():
            made, code = run_and_get_code(lambda: step(torch.compile(attention, fullgraph=True), attention, x, x.detach()))
        assert not any(map(calls_ops, code)), "every op became launches"
        exact.append(made)
    for i, (a, b) in enumerate(zip(*exact, strict=True)):
        assert torch.equal(a, b) if i == 0 else 0 < relative_error(a, b) < 0.03


@runs_kernels
def test_each_dtype_has_its_launch():
    """A launch loads its kernel once, and then hands it pointers, whatever they point to."""

    def f(a, b):
        return [ops.rotate_quantize(x, None, None, INT8, "row")[0] for x in (a, b)]

    a, b = torch.randn(2, 32, 64, device=DEVICE)
    torch._dynamo.reset()
    codes, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), a, b.bfloat16())
    assert len(set(re.findall(r"^halo_\w+(?= = Launch)", code, re.MULTILINE))) == 2
    for x, y in zip(codes, f(a, b.bfloat16()), strict=True):
        assert torch.equal(x, y)


@runs_kernels
def test_codes_that_lie_askew_are_copied():
    w = torch.randint(-9, 9, (48, 80), device=DEVICE, dtype=torch.int8)
    f = lambda a, w: ops.scaled_mm(a, w[:, 8:72], None, None, None, None, None, (16, 48), torch.float32)  # noqa: E731
    torch._dynamo.reset()
    a = w[:16, :64].contiguous()
    assert torch.equal(torch.compile(f, fullgraph=True)(a, w), (a.double() @ w[:, 8:72].double().t()).float())


@runs_kernels
def test_a_regions_graph_keeps_its_ops():
    @torch.compiler.nested_compile_region
    def region(x):
        return ops.rotate(x, None, Rotation(16)) * 2

    x = torch.randn(32, 64, device=DEVICE)
    torch._dynamo.reset()
    assert relative_error(torch.compile(region, fullgraph=True)(x), region(x)) < 1e-6


@runs_kernels
def test_dynamic_shapes_stay_ops():
    """Of all lengths, one graph."""
    mlp, (x, e) = model(halo_config(1, "int8")), data(50)
    f = torch.compile(mlp, fullgraph=True, dynamic=True)
    _, code = run_and_get_code(lambda: step(f, mlp, x, e))
    assert all(map(calls_ops, code))
    for tokens in (48, 20, 33, 32, 2, 39):
        part = x[:tokens].detach().requires_grad_()
        expected = step(mlp, mlp, part, e)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for a, b in zip(step(f, mlp, part, e), expected, strict=True):
                assert relative_error(a, b) < 0.01


@runs_kernels
def test_a_view_as_a_result_stays_an_op():
    """As where a size was a symbol when the op was traced, and a number when it is lowered."""
    f = lambda x: ops.rotate_quantize(x, None, None, INT8, "row", rows=False, columns=True, flat=True)[1:]  # noqa: E731
    (x,) = tensors(20, 64, count=1)
    results, code = compiled(f, x)
    assert calls_ops(code) and results[0].shape == (63 * 32 + 20,)
    (codes, scales), (expected, expected_scales) = results, f(x)
    written = [vector.as_strided((64, 20), (32, 1)) for vector in (codes, expected)]  # what lies between the rows is not
    assert torch.equal(*written) and torch.equal(scales, expected_scales)


@runs_kernels
def test_what_launchers_compute_with_tensors_stays_an_op():
    mlp, (x, e) = model(recipe_config("jetfire")), data()
    _, code = run_and_get_code(lambda: step(torch.compile(mlp, fullgraph=True), mlp, x, e))
    assert all(map(calls_ops, code))


# Producers.

FUSION = "halo_tensor.compiler.inductor.FUSE_PRODUCERS"


def quantize(x, right=None, format=INT8, gain=None) -> list[torch.Tensor]:
    return [y for y in ops.rotate_quantize(x.flatten(0, -2), None, right, format, "row", gain=gain) if y is not None]


def lines(code: str) -> str:
    buffers, launches = work(code)
    return "\n".join(buffers + launches)


def tensors(*shape: int, count: int = 2, dtype=torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [torch.randn(shape, device=DEVICE, dtype=dtype, generator=generator) for _ in range(count)]


def swiglu(gate, up):
    return quantize(silu(gate) * up, Rotation(128))


@runs_kernels
def test_swiglu_is_not_written():
    fused, code = compiled(swiglu, *tensors(2, 20, 256))
    assert_expected_inline(
        lines(code),
        """\
int8[40, 256]
float32[40]
whole_rows""",
    )
    written, code = compiled(swiglu, *tensors(2, 20, 256), off=FUSION)
    assert_expected_inline(
        lines(code),
        """\
bfloat16[40, 256]
int8[40, 256]
float32[40]
Inductor's
whole_rows""",
    )
    for a, b in zip(fused, written, strict=True):
        assert torch.equal(a, b)


def powers_of_two(n: int) -> torch.Tensor:
    return 2.0 ** torch.arange(n, device=DEVICE).remainder(5).sub(2)


@runs_kernels
@pytest.mark.parametrize("right", [None, Rotation(128)], ids=str)
def test_a_gain_is_in_the_launch(right):
    def f(gate, up, gain):
        return quantize(silu(gate) * up, right, gain=gain)

    arguments = (*tensors(2, 20, 256), powers_of_two(256))
    fused, code = compiled(f, *arguments)
    assert "halo_producer" in code and "'GAIN': True" in code
    assert_expected_inline(
        lines(code),
        """\
int8[40, 256]
float32[40]
whole_rows""",
    )
    written, code = compiled(f, *arguments, off=FUSION)
    assert not calls_ops(code) and "halo_producer" not in code
    for a, b, c in zip(fused, written, quantize(silu(arguments[0]) * arguments[1], right), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


@runs_kernels
@pytest.mark.parametrize(("block", "op"), [(None, False), (64, False), (256, True)])
def test_a_product_with_a_gain(block, op):
    """A launch, but where the gain follows an un-rotation of its own."""
    a = torch.randint(-9, 9, (256, 64), device=DEVICE, dtype=torch.int8)
    right, scale, gain = block and Rotation(block), torch.rand(256, device=DEVICE), powers_of_two(256)
    f = lambda a, s, g: [ops.scaled_mm(a, a, s, None, s, None, right, (256, 256), torch.bfloat16, g)]  # noqa: E731
    (y,), code = compiled(f, a, scale, gain)
    assert calls_ops(code) == op
    assert torch.equal(y, f(a, scale, gain)[0])


@runs_kernels
def test_what_is_multiplied_first_stays_an_op():
    def f(x, gain):
        return [y for y in ops.rotate_quantize(x, None, None, INT8, "column", gain=gain) if y is not None]

    (x,), gain = tensors(40, 256, count=1), powers_of_two(256)
    results, code = compiled(f, x, gain)
    assert calls_ops(code)
    for a, b in zip(results, f(x, gain), strict=True):
        assert torch.equal(a, b)


def negligible(x):
    """Whose columns beyond the last would be by far the largest: exp(0)."""
    return quantize(torch.exp(x.float() - 9).to(x.dtype), Rotation(8))


def half(x):
    """Two parts of one tensor."""
    a, b = x.chunk(2, -1)
    return quantize(a * b.sigmoid().neg() - 0.5)


@runs_kernels
@pytest.mark.parametrize("f", [negligible, half])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_producers_of_every_index(f, dtype):
    (x,) = tensors(9, 200, count=1, dtype=dtype)
    fused, code = compiled(f, x)
    assert lines(code).splitlines()[2:] == ["whole_rows"]
    for a, b in zip(fused, f(x), strict=True):
        assert (a.float() - b.float()).abs().max() <= (1 if a.dtype == torch.int8 else 1e-2 * b.float().abs().max())


def read_twice(a, b):
    x = a * b
    return *quantize(x), x


def unknown(a, b):
    return quantize(a * b.sin())


def of_three(a, b):
    """Which would read more than it spares, if another kernel read all three as well."""
    return quantize(a * b + torch.ops.halo.rotate(a, [], [128, 0]))


def norm(a, b):
    """Which would be read again: by what makes its statistics, too."""
    return quantize(rms_norm(a, a.shape[-1:], b[0]), Rotation(64))


def full_width(a, b):
    return quantize(a * b, Rotation(a.shape[-1]))


@runs_kernels
@pytest.mark.parametrize("f", [read_twice, unknown, of_three, norm, full_width])
def test_what_is_written_first(f):
    a, b = tensors(16, 768)
    expected = f(a.clone(), b)
    results, code = compiled(f, a, b)
    assert re.search(r"bfloat16\[16, 768\]\n(.*\n)*Inductor's\n(.*\n)*whole_rows", lines(code))
    assert "halo_producer" not in code
    for x, y in zip(results, expected, strict=True):
        assert relative_error(x.float(), y.float()) < 1e-2


@runs_kernels
def test_the_vendors_product_in_a_graph(monkeypatch):
    def multiply(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum, out):
        return out.copy_(a.float() @ b.float() * scale_a * scale_b)

    monkeypatch.setattr(FEW_ROWS, "disabled", True)
    monkeypatch.setattr(cublas, "is_faster", lambda *sizes: True)
    monkeypatch.setattr(cublas, "why_not", lambda request: None)
    product.plan.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    a, b = (t.to(torch.float8_e4m3fn) for t in tensors(32, 64))
    f = lambda a, b, s: ops.scaled_mm(a, b, s, None, None, None, None, (32, 32), torch.bfloat16)  # noqa: E731
    scale = torch.rand(32, device=DEVICE)
    (y,), code = compiled(lambda a, b, s: [f(a, b, s)], a, b, scale)
    product.plan.cache_clear()
    assert "VendorProduct()" in code and torch.equal(y, f(a, b, scale))


@runs_kernels
def test_what_is_written_later():
    def f(a, b):
        x = quantize(a * b)
        a.add_(1)
        return x

    (a, b), (changed, _) = tensors(16, 256), tensors(16, 256)
    fused, code = compiled(f, changed, b)
    assert "halo_producer" in code and torch.equal(changed, a + 1)
    for x, y in zip(fused, f(a, b), strict=True):
        assert torch.equal(x, y)


@runs_kernels
def test_a_cached_graph_has_its_producer():
    gate, up = tensors(8, 128)
    with fresh_cache():
        results = []
        for _ in range(2):
            torch._dynamo.reset()
            PyCodeCache.cache_clear()
            counters.clear()
            outputs, (code,) = run_and_get_code(torch.compile(swiglu, fullgraph=True), gate, up)
            results.append(outputs)
        caches = counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]
    assert "halo_producer" in code and any(caches)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
