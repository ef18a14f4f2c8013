"""X's transposed codes are made in backward where backward has X anyway."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.compile_fx import partition_fn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from halo_tensor import HaloWeight, balance_, halo_config, keep_products, quantize_
from halo_tensor.compiler import joint_graph
from halo_tensor.products.experts import experts
from tests.helpers.generated_code import lowered_again

WIDTH, INNER, TOKENS = 128, 256, 40
halo = torch.ops.halo
QUANTIZE = halo.rotate_quantize.default


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(), nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def converted(model: nn.Module, *args, dtype=torch.bfloat16, **kwargs) -> nn.Module:
    quantize_(model.to(dtype), halo_config(*args, **kwargs))
    return model


def data(dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(2, TOKENS // 2, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(3), requires_grad=True)


@contextmanager
def switched(on: bool):
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_graph, "REPEAT_FOR_BACKWARD", on)
        yield


def backend(graphs: list[fx.Graph]):
    """Inductor's joint passes and partitioner without its code. ``graphs``: forward's and backward's, as they come."""

    def keep(gm, inputs):
        graphs.append(gm.graph)
        return make_boxed_func(gm)

    decompositions = select_decomp_table()
    return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition_fn, decompositions=decompositions)


def step(f, model, x) -> tuple[list[torch.Tensor], list[tuple]]:
    """The result, its gradients, and the shapes of X's codes that were saved for them."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = f(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    codes = [tuple(t.shape) for t in saved if t.dtype in (torch.int8, torch.float8_e4m3fn) and TOKENS in t.shape]
    return [y, *torch.autograd.grad(y.float().square().sum(), wanted)], sorted(codes)


def compiled(model, on: bool, f=None):
    """(results, shapes of saved codes, the graphs)"""
    graphs: list[fx.Graph] = []
    with switched(on):
        return *step(torch.compile(f or model, fullgraph=True, backend=backend(graphs)), model, data()), graphs


def quantisations(graph: fx.Graph) -> str:
    """Each with what X comes from, and with the layouts of its codes."""
    lines = []
    for node in graph.find_nodes(op="call_function", target=QUANTIZE):
        source = node.args[0]
        while source.args and any(name in str(source.target) for name in ("view", "permute", "getitem")):
            source = source.args[0]
        layouts = [name for name, wanted in zip(("codes", "codes_t"), node.args[7:9], strict=True) if wanted]
        lines.append(f"{'saved' if source.op == 'placeholder' else source.target}: {' '.join(layouts)}")
    return "\n".join(lines)


def assert_same(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("level", "dtype", "granularity"), [(0, "fp8", "row"), (1, "int8", "row"), (1, "fp8", "tensor"), (2, "int8", "row")]
)
def test_only_what_attention_keeps_is_quantised_again(level, dtype, granularity):
    model = converted(Block(), level, dtype, granularity=granularity)
    results, saved, _ = compiled(model, on=True)
    expected, once, _ = compiled(model, on=False)
    assert once == sorted([(WIDTH, TOKENS)] * 3 + [(INNER, TOKENS)])
    assert saved == sorted([(WIDTH, TOKENS)] * 2 + [(INNER, TOKENS)]), "the codes of norms and of SwiGLU"
    assert_same(results, expected)


def test_graphs():
    *_, (forward, backward) = compiled(converted(Block(), 1, "int8"), on=True)
    assert_expected_inline(
        quantisations(forward),
        """\
prims.convert_element_type.default: codes codes_t
aten._scaled_dot_product_flash_attention_for_cpu.default: codes
prims.convert_element_type.default: codes codes_t
aten.mul.Tensor: codes codes_t""",
    )
    assert_expected_inline(quantisations(backward), "saved: codes_t")


def test_inductor_runs_it():
    """And does not take what was cached with it for what is compiled without."""
    model, x = converted(Attention(), 1, "int8"), data()
    with fresh_cache():
        steps = []
        for on in (True, False):
            with switched(on):
                steps.append(step(torch.compile(model, fullgraph=True), model, x))
    (results, saved), (expected, once) = steps
    assert saved == [(WIDTH, TOKENS)] and once == [(WIDTH, TOKENS)] * 2
    assert_same(results, expected)


def test_dynamic_shapes():
    model, graphs = converted(Attention(), 1, "int8"), []
    f = torch.compile(model, fullgraph=True, dynamic=True, backend=backend(graphs))
    for length in (16, 24):
        x = torch.randn(2, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        assert_same(step(f, model, x)[0], step(model, model, x)[0])
    forward, backward = graphs
    assert quantisations(forward).endswith(": codes") and quantisations(backward).endswith(": codes_t")


def test_a_gain():
    model = converted(Attention(), 1, "int8")
    with torch.no_grad():
        model.v.weight[:4] *= 50  # four columns of o's X
    assert balance_(model, data().detach()) == 4
    (results, saved, graphs), (expected, once, _) = (compiled(model, on) for on in (True, False))
    (again,) = graphs[1].find_nodes(op="call_function", target=QUANTIZE)
    assert again.args[-2] is not None and len(saved) == len(once) - 1
    assert_same(results, expected)


@pytest.mark.parametrize("kind", ["keep_products", "layers"])
def test_checkpointing_is_left_alone(kind):
    model = converted(Block(), 1, "int8")
    options = {"context_fn": keep_products} if kind == "keep_products" else {}
    f = lambda x: checkpoint(model, x, use_reentrant=False, **options)  # noqa: E731
    (results, saved, graphs), (expected, once, unchanged) = (compiled(model, on, f) for on in (True, False))
    assert saved == once == []
    assert [str(g) for g in graphs] == [str(g) for g in unchanged]
    assert_same(results, expected)


def test_frozen_weights_are_left_alone():
    model = Attention()
    model.o.weight.requires_grad_(False)
    model = converted(model, 1, "int8")
    (results, _, graphs), (expected, _, unchanged) = (compiled(model, on) for on in (True, False))
    assert "flash" in quantisations(graphs[0]) and [str(g) for g in graphs] == [str(g) for g in unchanged]
    assert_same(results, expected)


@pytest.mark.parametrize("dtype", ["int8", "fp6"])
@pytest.mark.parametrize("in_features_first", [False, True])
def test_frozen_experts_are_turned_in_backward(dtype, in_features_first):
    recipe, index = halo_config(1, dtype).recipe, torch.arange(TOKENS).remainder(2).unsqueeze(1)
    stacks = (torch.randn(2, 2 * INNER, WIDTH), torch.randn(2, WIDTH, INNER))
    stacks = [w.transpose(1, 2).contiguous() if in_features_first else w for w in stacks]
    weights = [HaloWeight.from_hp(w, recipe, frozen=True, in_features_first=in_features_first) for w in stacks]
    weights = [nn.Parameter(w, requires_grad=False) for w in weights]
    graphs: list[fx.Graph] = []

    def layer(x):
        return experts(x, index, torch.ones(TOKENS, 1), *weights)

    x, gradients = torch.randn(TOKENS, WIDTH, requires_grad=True), []
    for f in (layer, torch.compile(layer, fullgraph=True, backend=backend(graphs))):
        gradients += torch.autograd.grad(f(x).square().sum(), x)
    forward, backward = graphs
    turned = [len(graph.find_nodes(op="call_function", target=halo.turn_stack.default)) for graph in (forward, backward)]
    assert turned == [0, 2]
    torch.testing.assert_close(*gradients)


class Product(nn.Module):
    """Between two layers something that backward reads, or not."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), between

    def forward(self, x):
        return self.between(self.a(x), self.b)


@pytest.mark.parametrize(
    ("between", "kept"),
    [
        (lambda y, f: f(y), False),
        (lambda y, f: f(y) * y, True),
        (lambda y, f: f(y) + y, False),
        (lambda y, f: f(y.relu()), False),
        (lambda y, f: f(y.relu()) * y.relu(), False),
    ],
)
def test_what_backward_keeps(between, kept):
    model = converted(Product(between), 1, "int8")
    results, saved, _ = compiled(model, on=True)
    expected, once, _ = compiled(model, on=False)
    assert len(once) == 2 and len(saved) == 2 - kept
    assert_same(results, expected)


# The user's own passes.


class Count(CustomGraphPass):
    def __init__(self, uuid):
        self.calls, self.id = 0, uuid

    def __call__(self, graph):
        self.calls += 1

    def uuid(self):
        return self.id


def test_the_users_pass_runs_as_well():
    count, model = Count("count"), converted(Attention(), 1, "int8")
    with config.patch(joint_custom_post_pass=count):
        *_, saved, _ = compiled(model, on=True)
        assert count.calls == 1 and saved == [(WIDTH, TOKENS)]
        compiled(model, on=True)
        assert count.calls == 2, "and once a graph, however many were compiled"


def test_a_fake_tensor_alone_leaves_inductors_config():
    with config.patch(joint_custom_post_pass=None):
        with FakeTensorMode():
            halo.rotate_quantize(torch.empty(32, 32), [], [], "int8", "row", None, None, True, True, None, None, False)
        assert config.joint_custom_post_pass is None


class ByHand(Attention):
    """Inductor finds attention in it, and puts the kernel's backward before the gradient that it reads."""

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.matmul(q, k.transpose(-2, -1)).div(8.0).softmax(dim=-1).matmul(v)
        return self.o(y.transpose(1, 2).flatten(2))


def test_attention_by_hand():
    model, found = converted(ByHand(), 1, "int8"), []
    for on in (True, False):
        counters.clear()
        results, *_ = compiled(model, on)
        assert counters["inductor"]["fuse_attention"]
        found.append(results)
    assert_same(*found)


def test_the_users_option():
    count, model = Count("count"), converted(Attention(), 1, "int8")
    with switched(True), lowered_again():
        f = torch.compile(model, fullgraph=True, options={"joint_custom_post_pass": count})
        assert step(f, model, data())[1] == [(WIDTH, TOKENS)] and count.calls == 1


def test_keys_of_cached_graphs():
    ours, others = joint_graph._Pass(()), joint_graph._Pass((Count("count"),))
    keys = {ours.uuid(), others.uuid()}
    with switched(False):
        keys |= {ours.uuid(), others.uuid()}
    assert len(keys) == 4 and None not in keys
    assert joint_graph._Pass((print,)).uuid() is None and joint_graph._Pass((Count(None),)).uuid() is None


# Each thing that leaves a quantisation as it is.


def joint(made=torch.mm, left=(), rows=True, fold=False, gain=False, seeded=False, read=True, returned=False) -> fx.Graph:
    """X of two matrices, and quantised; its codes are forward's result, and backward reads their transpose, and X."""

    def f(primals_1, primals_2, primals_3, tangents_1):
        x, seed = made(primals_1, primals_2), torch.ops.aten.ones([1], dtype=torch.int64) if seeded else None
        fold_columns, gained = primals_3 if fold else None, primals_3 if gain else None
        codes, codes_t, scales = halo.rotate_quantize(
            x.view(32, 16), left, [16, 0], "int8", "row", None, fold_columns, rows, True, seed, gained, False
        )
        gradients = codes_t * tangents_1, x * tangents_1.sum() if read else None
        return codes, scales, codes_t.t() if returned else None, *gradients

    shapes = [(16, 16), (16, 32), (16,), (16, 32)]
    return make_fx(f, tracing_mode="fake")(*map(torch.ones, shapes)).graph


def is_split(graph: fx.Graph) -> bool:
    joint_graph.quantize_again_in_backward(graph)
    graph.lint()
    nodes = graph.find_nodes(op="call_function", target=QUANTIZE)
    assert [node.args[7:9] for node in nodes] in ([(False, True), (True, False)], [(True, True)], [(False, True)])
    return len(nodes) == 2


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (True, {}),
        (True, {"gain": True}),
        (True, {"made": lambda a, b: torch.mm(a, b).t()}),
        (False, {"left": [16, 0]}),
        (False, {"rows": False}),
        (False, {"fold": True}),
        (False, {"seeded": True}),
        (False, {"read": False}),
        (False, {"returned": True}),
        (False, {"made": lambda a, b: torch.mm(a, b).relu()}),
        (False, {"made": lambda a, b: torch.mm(a, b).t().contiguous()}),
    ],
)
def test_what_is_split(expected, options):
    assert is_split(joint(**options)) == expected


def test_a_reader_whose_result_is_dropped():
    graph = joint(read=False)
    (x,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    tangents = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.ops.aten.mul.Tensor, (x, tangents))
    assert not is_split(graph)


@pytest.mark.parametrize("tagged", [torch.ops.aten.mm.default, QUANTIZE], ids=str)
def test_tags_of_checkpointing(tagged):
    graph = joint()
    (node,) = graph.find_nodes(op="call_function", target=tagged)
    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    assert not is_split(graph)


def test_once_is_enough():
    graph = joint()
    assert is_split(graph)
    before = str(graph)
    assert is_split(graph) and str(graph) == before
