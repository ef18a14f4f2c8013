"""What compiled graphs save, compressed after they were partitioned."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._subclasses.fake_tensor import FakeTensorMode

from halo_tensor import halo_config, hot_config, quantize_
from halo_tensor.activations import choice
from halo_tensor.analysis.saved_memory import storages
from halo_tensor.compiler import partition
from halo_tensor.fences.fast_paths import SAVED
from halo_tensor.fences.pytorch import partition_only
from halo_tensor.recipe import Activations

WIDTH, INNER, TOKENS = 128, 256, 64


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(choice, "FEWEST_ELEMENTS", 2**9)
    with config.patch(custom_partitioner_fn=None, joint_custom_post_pass=None):
        yield


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Head(nn.Module):
    """A loss on logits of a plain layer, behind one that is converted."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1024)

    def forward(self, x):
        return F.cross_entropy(self.head(self.body(x).relu()).flatten(0, 1), torch.arange(x.numel() // WIDTH))


def make(kind=Block, activations="plain", **options):
    torch.manual_seed(0)
    model = kind().to(torch.bfloat16)
    quantize_(model, halo_config(activations=activations, **options), filter_fn=lambda module, name: name != "head")
    return model


def step(model, f=None):
    """(gradients as one vector, the saved tensors that are no parameters, by dtype and bytes)"""
    x = torch.randn(2, TOKENS // 2, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = (model if f is None else f)(x)
    y.float().square().sum().backward()
    held = {storage.data_ptr() for p in model.parameters() for storage in storages(p)}
    found = [t for t in saved if t.untyped_storage().data_ptr() not in held and t.numel() >= 2**9]
    return torch.cat([p.grad.float().flatten() for p in [x, *model.parameters()]]), found


def compiled(model):
    return torch.compile(model, fullgraph=True, backend=partition_only())


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 − cos"""
    return 1 - float(F.cosine_similarity(a.double(), b.double(), dim=0))


def test_a_block():
    exact, plain = step(*[model := make(keep_codes=False)], compiled(model))
    assert len([t for t in plain if t.is_floating_point()]) >= 6
    blocks = TOKENS * WIDTH // 128
    # The input and the result of o, of which backward computes the stream again; q, k, v and the result of attention; gate and
    # up.
    expected = {"int8": [(blocks, 128)] * 6 + [(2 * blocks, 128)] * 2}
    expected["int6"] = [(blocks, 64), (blocks, 96)] + [(blocks, 128)] * 4 + [(2 * blocks, 96)] * 2
    for activations, least, most in (("int8", 1e-6, 1.5e-4), ("int6", 5e-5, 1e-3)):
        torch._dynamo.reset()
        model = make(activations=activations, keep_codes=False)
        gradient, saved = step(model, compiled(model))
        assert least < distance(gradient, exact) < most
        assert not any(t.is_floating_point() for t in saved), "all are compressed"
        # X's codes are saved for grad_weight, transposed: of both norms and of the product of gate and up.
        own = [(WIDTH, TOKENS)] * 2 + [(INNER, TOKENS)]
        assert sorted(tuple(t.shape) for t in saved) == sorted(expected[activations] + own)


def test_statistics_stay(monkeypatch):
    """Whatever their size: attention's logarithms of sums, and the inverse lengths of norms."""
    monkeypatch.setattr(choice, "FEWEST_ELEMENTS", 2**5)
    model, saved = make(activations="int8", keep_codes=False), []
    x = torch.randn(2, TOKENS // 2, WIDTH).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(model)(x)
    statistics = sorted(tuple(t.shape) for t in saved if t.dtype == torch.float32 and t.ndim == 3)
    assert statistics == [(2, 2, TOKENS // 2), (2, TOKENS // 2, 1), (2, TOKENS // 2, 1)]


def test_eager_and_compiled_save_alike():
    """The same blocks are rounded in the same way, so gradients differ by the order of sums only."""
    model = make(activations="int8")
    eager, _ = step(model)
    model = make(activations="int8")
    assert distance(step(model, compiled(model))[0], eager) < 1e-4


def test_logits_and_parameters_stay():
    model = make(Head, "int8")
    _, saved = step(model, compiled(model))
    assert sorted(t.numel() for t in saved if t.is_floating_point()) == [1024 * TOKENS], "logits, and no parameter is copied"


def test_a_graph_that_does_not_ask():
    model = make(activations="int8")
    step(model, compiled(model))
    torch._dynamo.reset()
    _, saved = step(*[plain := make()], compiled(plain))
    assert isinstance(config.custom_partitioner_fn, partition._Partitioner)
    assert any(t.is_floating_point() for t in saved)


def test_the_users_partitioner():
    class Count(CustomPartitionerFn):
        calls = 0

        def __call__(self, gm, inputs, **options):
            self.calls += 1
            return partition.min_cut_rematerialization_partition(gm, inputs, **options)

        def uuid(self):
            return "count"

    with config.patch(custom_partitioner_fn=(count := Count())):
        model = make(activations="int8")
        _, saved = step(model, compiled(model))
        key = config.custom_partitioner_fn.uuid()
    assert count.calls == 1 and not any(t.is_floating_point() and t.numel() == TOKENS * INNER for t in saved)
    assert "count" in key and key != partition._Partitioner(None).uuid()


def test_without_the_fast_path(monkeypatch):
    monkeypatch.setattr(SAVED, "disabled", True)
    model = make(activations="int8")
    _, saved = step(model, compiled(model))
    assert any(t.is_floating_point() and t.numel() == TOKENS * INNER for t in saved)


def test_two_views_of_one_memory():
    """Their codes are saved once."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            y = self.layer(x)
            return (y.sin() * y).sum(-1) + (y.transpose(0, 1).contiguous().transpose(0, 1) * y).sum(-1)

    model = make(Twice, "int8")
    _, saved = step(model, compiled(model))
    codes = [t for t in saved if t.dtype == torch.int8 and t.shape == (TOKENS * WIDTH // 128, 128)]
    assert len(codes) <= 2 and not any(t.is_floating_point() and t.numel() == TOKENS * WIDTH for t in saved)


def test_dynamic_shapes():
    """They are saved as they are, and a warning says so."""
    model = make(activations="int8")
    f = torch.compile(model, dynamic=True, backend=partition_only())
    with pytest.warns(UserWarning, match="a graph with dynamic shapes was compiled, and activations .* saved as they are"):
        _, saved = step(model, f)
    assert sum(t.is_floating_point() for t in saved) >= 6


class Images(nn.Module):
    """Convolutions behind ReLUs, one of whose results is read by something else."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1), nn.Linear(64, 64)
        self.norm = nn.BatchNorm2d(64)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)) + x)
        x = F.relu(self.b(x) * x).flatten(2).mT
        return F.gelu(self.c(x))


def images(activations, compile):
    """(the gradients as one vector, the saved tensors)"""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Images()
    options = {"grad_input_bits": 8, "granularity": "row", "grad_output_granularity": "row", "rounding": "nearest"}
    quantize_(model, hot_config(None, **options, activations=activations))
    x = torch.randn(4, 64, 7, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = (compiled(model) if compile else model)(x)
    y.square().sum().backward()
    held = {storage.data_ptr() for p in [x, *model.parameters()] for storage in storages(p)}
    found = [t for t in saved if t.untyped_storage().data_ptr() not in held and t.numel() >= 2**9]
    return torch.cat([p.grad.flatten() for p in [x, *model.parameters()]]), found


def test_images_and_relus():
    """What a plain forward of a converted layer makes is compressed, images of 7×7 and results of ReLUs too. The partitioner may
    compute ReLUs again from what was rounded, so their zeros move a little, and not so in eager code."""
    exact, plain = images("plain", True)
    assert any(t.is_floating_point() for t in plain)
    for activations, most in (("all", 1e-3), ("all-int4", 3e-2)):
        gradient, saved = images(activations, True)
        assert 1e-6 < distance(gradient, exact) < most
        assert len(saved) >= 3 and not any(t.is_floating_point() or t.dtype == torch.bool for t in saved)
        eager, _ = images(activations, False)
        assert distance(eager, exact) < 0.3 * most and distance(gradient, eager) < most


def test_a_relu_that_others_read():
    """A mask is saved beside the codes, so that zeros come back as zeros, and other elements positive."""
    with FakeTensorMode():
        value = torch.empty(64, 128)
    forward, backward = fx.Graph(), fx.Graph()
    x = forward.placeholder("x")
    made = forward.call_function(torch.ops.aten.relu.default, (x,))
    forward.output([x, made])
    read = backward.placeholder(made.name)
    smaller = backward.call_function(torch.ops.aten.le.Scalar, (read, 0))
    backward.output([smaller, backward.call_function(torch.ops.aten.sin.default, (read,))])
    for node in (x, made, read):
        node.meta["val"] = value
    chosen = partition.choose(forward, backward, 1, set(), Activations())
    assert [one.names for one in chosen] == [("codes", "scales", "mask")]
    partition._compress_in_forward(forward, 1, chosen)
    partition._decompress_in_backward(backward, chosen)
    numbers = torch.randn(64, 128)
    _, *saved = fx.GraphModule({}, forward)(numbers)
    is_zero, sine = fx.GraphModule({}, backward)(*saved)
    assert torch.equal(is_zero, numbers <= 0) and 0 < (sine - numbers.relu().sin()).abs().max() < 0.05
