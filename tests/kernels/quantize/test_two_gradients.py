"""Two gradients that elementwise operations make from the same matrices are quantised by one op, and neither is written."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu, silu

from halo_tensor import halo_config, ops, quantize_
from halo_tensor.compiler import joint_graph
from halo_tensor.recipe import FP8_E4M3, INT8
from tests.helpers import interpreter
from tests.helpers.errors import relative_error, typical_error
from tests.helpers.generated_code import compiled, lowered_again, work
from tests.helpers.interpreter import DEVICE, runs_kernels

halo, aten = torch.ops.halo, torch.ops.aten
SHAPE = (48, 32)
AT_ONCE = "halo_tensor.compiler.joint_graph.QUANTIZE_TWO_AT_ONCE"
GPU_ONLY = pytest.mark.skipif(interpreter.INTERPRETED, reason="its like runs, and compiling takes long")


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=21)


# What is merged.


def gated(tangents_1, gate, up):
    return tangents_1 * silu(gate), aten.silu_backward(tangents_1 * up, gate)


def gated_by_gelu(dh, gate, up):
    """As Gemma's."""
    return dh * gelu(gate, approximate="tanh"), aten.gelu_backward(dh * up, gate, approximate="tanh")


def quantized(a, b, columns, rows, format="int8", other_format=None, left=()):
    first = halo.quantize_pair(a, left, format, columns, rows, False)
    return (*first, *halo.quantize_pair(b, left, other_format or format, columns, rows, False))


def graph_of(f, *inputs) -> fx.GraphModule:
    """``inputs``: real; what a compiler would see of a joint graph."""
    return make_fx(f, tracing_mode="fake")(*inputs)


def inputs(shape=SHAPE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for _ in range(3)]
    return [*matrices, *(torch.rand(n, generator=generator) + 0.5 for n in (shape[1], shape[0]))]


def merged(f, monkeypatch) -> int:
    """How many pairs are left that were not merged; what the graph computes stays the same."""
    monkeypatch.setattr(joint_graph, "runs_kernels", lambda device: True)
    graph_module, arguments = graph_of(f, *inputs()), inputs()
    expected = graph_module(*arguments)
    joint_graph.quantize_two_gradients_at_once(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    for a, b in zip(graph_module(*arguments), expected, strict=True):
        assert torch.equal(a, b)
    pairs, both = (
        graph_module.graph.find_nodes(op="call_function", target=t) for t in (joint_graph._PAIR, joint_graph._PAIRS)
    )
    assert len(pairs) + 2 * len(both) == 2
    for node in both:
        some = [torch.ones(a.meta["val"].shape) if isinstance(a, fx.Node) else a for a in node.args]
        assert [value.shape for value in node.meta["val"]] == [made.shape for made in node.target(*some)]
    return len(pairs)


def of_a_gated_mlp(dh, gate, up, columns, rows):
    return quantized(*gated(dh, gate, up), columns, rows)


def of_different_scales(dh, gate, up, columns, rows):
    a, b = gated(dh, gate, up)
    return *halo.quantize_pair(a, [], "int8", columns, rows, False), *halo.quantize_pair(
        b, [], "int8", columns * 2, rows + 1, False
    )


def through_views(dh, gate, up, columns, rows):
    a, b = gated(*(x.view(2, -1, SHAPE[1]) for x in (dh, gate, up)))
    return quantized(a.view(SHAPE), b.view(SHAPE), columns, rows)


def read_in_between(dh, gate, up, columns, rows):
    """What the first pair gives is used before the second one's E is made."""
    a, b = dh * silu(gate), dh * up
    first = halo.quantize_pair(a, [], "int8", columns, rows, False)
    read = first[2] * 2
    return (*first, read, *halo.quantize_pair(b, [], "int8", columns, rows, False))


@pytest.mark.parametrize("f", [of_a_gated_mlp, of_different_scales, through_views, read_in_between])
def test_what_is_merged(f, monkeypatch):
    assert merged(f, monkeypatch) == 0


def of_different_formats(dh, gate, up, columns, rows):
    return quantized(*gated(dh, gate, up), columns, rows, other_format="fp8_e4m3")


def rotated(dh, gate, up, columns, rows):
    return quantized(*gated(dh, gate, up), columns, rows, left=[16, 0])


def of_different_matrices(dh, gate, up, columns, rows):
    return quantized(dh.exp(), gate * up, columns, rows)


def of_too_many(dh, gate, up, columns, rows):
    return quantized(dh * gate, dh * up * dh.t().sum(), columns, rows)


def not_elementwise(dh, gate, up, columns, rows):
    return quantized(dh * gate, dh, columns, rows)


def read_by_others(dh, gate, up, columns, rows):
    a, b = gated(dh, gate, up)
    return *quantized(a, b, columns, rows), a.sum(0)


def without_a_fold(dh, gate, up, columns, rows):
    return quantized(*gated(dh, gate, up), None, rows)


def one_after_the_other(dh, gate, up, columns, rows):
    """The second E is made with what the first one's codes gave."""
    first = halo.quantize_pair(dh * gate, [], "int8", columns, rows, False)
    return (*first, *halo.quantize_pair(dh * gate * first[2].unsqueeze(1), [], "int8", columns, rows, False))


def folded_with_the_others_scale(dh, gate, up, columns, rows):
    first = halo.quantize_pair(dh * gate, [], "int8", columns, rows, False)
    return (*first, *halo.quantize_pair(dh * up, [], "int8", first[3], rows, False))


@pytest.mark.parametrize(
    "f",
    [
        of_different_formats, rotated, of_different_matrices, of_too_many, not_elementwise, read_by_others, without_a_fold,
        one_after_the_other, folded_with_the_others_scale,
    ],
)  # fmt: skip
def test_what_is_not_merged(f, monkeypatch):
    assert merged(f, monkeypatch) == 2


def experts(m1, m2, dh, gate, up):
    """Each reads as many rows as its mask has ones: how many is not known, nor whether they are as many."""
    made = []
    for mask in (m1, m2):
        rows = mask.nonzero().squeeze(-1)
        a, b = gated(dh[rows], gate[rows], up[rows])
        made += quantized(a, b, torch.ones(SHAPE[1]), torch.ones(a.shape[0]))
    return made


def alone(m1, m2, dh, gate, up):
    """Experts that are not gated: one E each, of a size of its own."""
    made = []
    for mask in (m1, m2):
        d = (dh * mask.sum())[mask.nonzero().squeeze(-1)]
        made += halo.quantize_pair(d * up.exp().sum(), [], "int8", torch.ones(SHAPE[1]), torch.ones(d.shape[0]), False)
    return made


@pytest.mark.parametrize(("f", "left", "pairs"), [(experts, 0, 2), (alone, 2, 0)])
def test_sizes_that_depend_on_data(f, left, pairs, monkeypatch):
    monkeypatch.setattr(joint_graph, "runs_kernels", lambda device: True)
    masks = [torch.arange(SHAPE[0]) % n == 0 for n in (2, 3)]
    arguments = [*masks, *inputs()[:3]]
    graph_module = make_fx(f, tracing_mode="symbolic")(*arguments)
    guards = len(graph_module.shape_env.guards)
    joint_graph.quantize_two_gradients_at_once(graph_module.graph)
    graph_module.recompile()
    found = [len(graph_module.graph.find_nodes(op="call_function", target=t)) for t in (joint_graph._PAIR, joint_graph._PAIRS)]
    assert found == [left, pairs] and len(graph_module.shape_env.guards) == guards
    for a, b in zip(graph_module(*arguments), f(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(interpreter.INTERPRETED, reason="there it does")
def test_nothing_is_merged_where_no_kernel_runs():
    graph = graph_of(of_a_gated_mlp, *inputs()).graph
    joint_graph.quantize_two_gradients_at_once(graph)
    assert len(graph.find_nodes(op="call_function", target=joint_graph._PAIR)) == 2


# What is computed.


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """For a CPU, Inductor would write every exp that is used twice."""
    monkeypatch.setattr("torch._inductor.ir.is_cpu", lambda _: False)


def matrices(shape, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [x.to(DEVICE, dtype if x.ndim == 2 else torch.float32) for x in inputs(shape)]


def assert_same_numbers(results, expected, format):
    """But for what a faster exp, and no fused multiply-adds, round otherwise: one bfloat16 in many, and one code."""
    names = ["codes", "codes_t", "row_scales", "column_scales"]
    for name, a, b in zip(names, results, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
        a, b = a.float(), b.float()
        if "codes" in name:
            assert (a != b).float().mean() < 2e-3, name
            assert ((a - b).abs() <= (1 if format is INT8 else b.abs() / 8 + 2**-9)).all(), name
        else:
            assert ((a - b).abs() <= 2**-7 * b).all(), name


@runs_kernels
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    ("f", "shape", "dtype", "format"),
    [
        (gated, (256, 128), torch.bfloat16, INT8),  # whole tiles
        (gated, (40, 200), torch.float32, FP8_E4M3),
        (gated, (1, 16), torch.bfloat16, FP8_E4M3),
        (gated, (129, 72), torch.float32, INT8),
        (gated_by_gelu, (40, 72), torch.bfloat16, INT8),
    ],
    ids=["whole tiles", "float32 to fp8", "one row", "odd tiles", "gelu"],
)
def test_against_the_pairs_alone(f, shape, dtype, format):
    def quantized_otherwise(dh, gate, up, columns, rows):
        a, b = f(dh, gate, up)
        return [
            *ops.quantize_pair(a, None, format, columns, rows),
            *ops.quantize_pair(b, None, format, columns + 1, rows * 2),
        ]

    arguments = matrices(shape, dtype)
    results, code = compiled(quantized_otherwise, *arguments)
    assert "amax_of_two" in code and "cast_two" in code and "halo_producer" in code
    assert "amax_tiles" not in code and "cast_tiles" not in code
    expected, code = compiled(quantized_otherwise, *arguments, off=AT_ONCE)
    assert "amax_tiles" in code and "halo_producer" not in code
    for i in (0, 4):
        assert_same_numbers(results[i : i + 4], expected[i : i + 4], format)


@runs_kernels
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_hidden(value):
    dh, *rest = matrices((64, 64))
    dh[3, 5] = value
    results, code = compiled(of_a_gated_mlp, dh, *rest)
    assert "amax_of_two" in code
    for *_, row_scales, column_scales in (results[:4], results[4:]):
        assert (~row_scales.isfinite()).nonzero().tolist() == [[3]]
        assert (~column_scales.isfinite()).nonzero().tolist() == [[5]]


@runs_kernels
@pytest.mark.usefixtures("_as_on_a_gpu")
def test_rows_of_zeros():
    dh, *rest = matrices((64, 64))
    results, code = compiled(of_a_gated_mlp, dh * 0, *rest)
    assert "amax_of_two" in code
    for codes, codes_t, row_scales, column_scales in (results[:4], results[4:]):
        assert not codes.any() and not codes_t.any()
        assert (row_scales > 0).all() and (column_scales > 0).all()


@runs_kernels
def test_what_cannot_be_computed_is_written():
    """Merged, but by an operation that ``producers`` has no words for: the two kernels read what Inductor wrote."""

    def f(dh, gate, up, columns, rows):
        return list(quantized(dh * gate.sin(), dh * up, columns, rows))

    arguments = matrices((64, 64))
    results, code = compiled(f, *arguments)
    assert "amax_tiles" in code and "amax_of_two" not in code
    expected, _ = compiled(f, *arguments, off=AT_ONCE)
    for i in (0, 4):
        assert_same_numbers(results[i : i + 4], expected[i : i + 4], INT8)


# A model.


class Gated(nn.Module):
    def __init__(self, activation, bias: bool):
        super().__init__()
        self.gate, self.up = (nn.Linear(128, 256, bias=bias) for _ in range(2))
        self.down, self.activation = nn.Linear(256, 128, bias=False), activation

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


def backward_of(model, x, at_once=True):
    """The gradients, and what backward's graph launches."""
    torch._dynamo.reset()

    def step():
        y = f(x)
        return torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y).cumsum(-1).cos())

    with pytest.MonkeyPatch.context() as patch, lowered_again():
        patch.setattr(AT_ONCE, at_once)
        f = torch.compile(model, fullgraph=True)
        results, (_, code) = run_and_get_code(step)
    return results, "\n".join(work(code)[1])


@runs_kernels
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    ("activation", "bias", "level", "dtype", "computed"),
    [
        (silu, False, 1, "int8", True),
        pytest.param(silu, False, 0, "fp8", True, marks=GPU_ONLY),
        pytest.param(gelu, False, 1, "int8", True, marks=GPU_ONLY),
        pytest.param(silu, True, 1, "int8", False, marks=GPU_ONLY),  # E is summed for the bias
        pytest.param(silu, False, 2, "int8", False, marks=GPU_ONLY),  # and rotated
    ],
    ids=["silu-int8", "silu-fp8", "gelu", "bias", "rotated"],
)
def test_a_gated_mlp(activation, bias, level, dtype, computed):
    model = Gated(activation, bias).to(DEVICE, torch.bfloat16)
    quantize_(model, halo_config(level, dtype))
    x = torch.randn(2, 20, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    results, launches = backward_of(model, x)
    expected, written = backward_of(model, x, at_once=False)
    assert "amax_of_two" not in written and ("amax_of_two" in launches) == computed
    if (activation, level) == (silu, 1) and computed:
        assert_expected_inline(
            launches,
            """\
Inductor's
amax_tiles
cast_tiles
transpose_codes
scaled_mm_kernel
scaled_mm_kernel
Inductor's
amax_of_two
cast_two
transpose_codes
scaled_mm_kernel
scaled_mm_kernel
transpose_codes
scaled_mm_kernel
scaled_mm_kernel
Inductor's""",
        )
    for a, b in zip(results, expected, strict=True):
        assert relative_error(a, b) < 0.05 * typical_error(model.gate.weight.operand.format)
