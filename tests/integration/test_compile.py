"""torch.compile: one graph, the ops one expects in it, the numbers of eager mode."""

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.utils import counters

from halo_tensor import HaloWeight, dequantize_, halo_config, quantize_
from tests.helpers.graphs import graphs
from tests.helpers.training import make, train
from tests.helpers.weights import converted, in_step


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def linear(level: int, dtype: str = "int8") -> nn.Linear:
    layer = nn.Linear(128, 128, bias=False)
    quantize_(layer, halo_config(level, dtype))
    return layer


def test_graph_of_halo_0():
    assert_expected_inline(
        graphs(linear(0), torch.randn(128, 128, requires_grad=True)),
        """\
forward:
  view
  halo.rotate_quantize(left=[], right=[], int8, row)
  halo.scaled_mm
  _unsafe_view
  t
backward:
  view
  halo.quantize_pair
  halo.scaled_mm
  halo.scaled_mm
  view""",
    )


def test_graph_of_halo_1():
    assert_expected_inline(
        graphs(linear(1), torch.randn(128, 128, requires_grad=True)),
        """\
forward:
  view
  halo.rotate_quantize(left=[], right=[128, 0], int8, row)
  halo.scaled_mm
  _unsafe_view
  t
backward:
  view
  halo.quantize_pair
  halo.scaled_mm
  halo.scaled_mm
  view""",
    )


def test_graph_of_halo_2():
    assert_expected_inline(
        graphs(linear(2, "fp8"), torch.randn(128, 128, requires_grad=True)),
        """\
forward:
  view
  halo.rotate_quantize(left=[], right=[128, 0], fp8_e4m3, row)
  halo.scaled_mm
  _unsafe_view
  t
backward:
  view
  halo.quantize_pair
  halo.scaled_mm
  halo.scaled_mm
  view""",
    )


def test_x_is_quantised_once_for_all_its_layers():
    """q, k and v read one X: common-subexpression elimination leaves one quantisation, and one saved copy."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(128, 128, bias=False) for _ in range(3))

        def forward(self, x):
            return self.q(x) * self.k(x) * self.v(x)

    model = Attention()
    quantize_(model, halo_config(1, "int8"))
    forward, backward = graphs(model, torch.randn(2, 64, 128, requires_grad=True)).split("backward:")
    assert forward.count("rotate_quantize") == 1, "of X; the weights come as codes"
    assert forward.count("scaled_mm") == 3
    assert backward.count("scaled_mm") == 6


@pytest.mark.parametrize(("level", "dtype"), [(0, "fp8"), (2, "int8")])
def test_inductor_agrees_with_eager(level, dtype):
    model = make(converted=False)
    quantize_(model, halo_config(level, dtype))
    x = torch.randn(4, 33, 128, requires_grad=True)
    results = []
    for f in (model, torch.compile(model, fullgraph=True)):
        y = f(x)
        results.append([y, *torch.autograd.grad(y.square().mean(), [x, *model.parameters()])])
    assert counters["graph_break"] == {}
    for eager, compiled in zip(*results, strict=True):
        # Inductor's norms and activations differ in the last bits, which moves a few codes to a neighbour.
        assert (eager - compiled).norm() < 1e-2 * eager.norm()


def test_training_compiled():
    eager, compiled = make(), make()
    losses = train(torch.compile(compiled, fullgraph=True), 5)
    assert losses == pytest.approx(train(eager, 5), rel=1e-3)


def test_token_counts_share_a_graph():
    model = make()
    f = torch.compile(model, fullgraph=True)
    for length in (16, 24, 40, 56, 72):
        f(torch.randn(2, length, 128)).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2, "the first length, then one graph for any"


def test_autocast_and_no_grad_compile():
    model = make()
    f = torch.compile(model, fullgraph=True)
    x = torch.randn(8, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x).dtype == model(x).dtype
    with torch.no_grad():
        torch.testing.assert_close(f(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused_and_says_what_to_do(strict):
    model, x = nn.Sequential(nn.Linear(128, 128)), torch.randn(8, 128)
    quantize_(model, halo_config(1, "int8"))
    with pytest.raises(Exception, match=r"torch\.export knows no converted weights: call dequantize_\(model\) first"):
        torch.export.export(model, (x,), strict=strict)
    dequantize_(model)
    assert torch.export.export(model, (x,), strict=strict).module()(x).shape == (8, 128)


# Writes to the master that no op of the weight makes, as those to a state dict's tensors.


@torch.no_grad()
def average_state_dicts(average: nn.Module, model: nn.Module) -> None:
    """As timm's ModelEmaV3 does."""
    ours, theirs = ([v for v in m.state_dict().values() if v.is_floating_point()] for m in (average, model))
    torch._foreach_lerp_(ours, theirs, 0.5)


@torch.no_grad()
def average_one_by_one(average: nn.Module, model: nn.Module) -> None:
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        ours.copy_(0.5 * ours + 0.5 * theirs)


@torch.no_grad()
def average_data(average: nn.Module, model: nn.Module) -> None:
    for name, value in average.state_dict().items():
        value.data.lerp_(model.state_dict()[name].data, 0.5)


@torch.no_grad()
def average_parameters(average: nn.Module, model: nn.Module) -> None:
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.data.copy_(0.5 * ours.data + 0.5 * theirs.data)


def update_swa(average: nn.Module, model: nn.Module) -> None:
    swa = torch.optim.swa_utils.AveragedModel(average, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    swa.update_parameters(average)
    swa.update_parameters(model)
    average.load_state_dict(swa.module.state_dict())


@pytest.mark.parametrize(
    ("average_", "backend"),
    [
        (average_state_dicts, "inductor"),
        (average_state_dicts, "aot_eager"),
        (average_one_by_one, "aot_eager"),
        (average_data, "aot_eager"),
        (average_parameters, "aot_eager"),
        (update_swa, "aot_eager"),
    ],
)
def test_a_compiled_forward_sees_averages(average_, backend):
    """Without a recompilation, and with nothing quantised anew where nothing was written."""
    average, model = make(blocks=1), make(blocks=1)
    train(model, 2)
    f, x = torch.compile(average, fullgraph=True, backend=backend), torch.randn(8, 128)
    before = f(x)
    average_(average, model)
    y = f(x)
    fresh = make(converted=False, blocks=1)
    fresh.load_state_dict(average.state_dict())
    quantize_(fresh, halo_config(1, "int8"))
    torch.testing.assert_close(y, fresh(x), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(y, before, rtol=1e-3, atol=1e-3) and counters["stats"]["unique_graphs"] == 1
    versions = [p.operand.codes._version for p in average.parameters() if isinstance(p, HaloWeight)]
    f(x)
    assert versions == [p.operand.codes._version for p in average.parameters() if isinstance(p, HaloWeight)]


def test_a_compiled_average_of_a_model_with_buffers():
    """swa_utils: update_parameters, update_bn, and a forward of the compiled average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.Linear(128, 128))
    quantize_(model, halo_config(1, "int8"))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    f, batches = torch.compile(average, backend="aot_eager"), torch.randn(3, 16, 128).unbind()
    f(batches[0])
    for _ in range(2):
        model(batches[0]).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        average.update_parameters(model)
    torch.optim.swa_utils.update_bn(batches, f)
    assert all(in_step(p) for p in average.parameters() if isinstance(p, HaloWeight))
    f.eval()
    assert torch.equal(f(batches[1]), average(batches[1]))


def test_a_compiled_training_step_sees_writes_to_the_state_dict():
    """And its backward multiplies with what its forward did."""
    model = make(blocks=1)
    twin = copy.deepcopy(model)
    f, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(8, 128, requires_grad=True)
    f(x).sum().backward()
    model.zero_grad()
    for m in (model, twin):
        for value in m.state_dict().values():
            value.mul_(-1.5)
    for a, b in zip(
        *(torch.autograd.grad(g(x).sum(), [x, *m.parameters()]) for g, m in ((f, model), (twin, twin))), strict=True
    ):
        torch.testing.assert_close(a, b)


WRITES = {
    "slice": lambda w: w[2:4].zero_(),
    "view of a view": lambda w: w.view(-1)[7:].t().fill_(3.0),
    "item": lambda w: w.__setitem__((3, 5), 100.0),
    "chunk": lambda w: w.chunk(2)[1].add_(1),
    "data": lambda w: w.data.neg_(),
    "in place": lambda w: w.mul_(2),
    "foreach": lambda w: torch._foreach_add_([w], [torch.ones(w.shape)]),
}


@pytest.mark.parametrize("name", WRITES)
def test_compiled_writes_reach_the_codes(name):
    weight = converted(halo_config(1, "int8")).weight
    before = weight.master.clone()

    def write():
        WRITES[name](weight)  # and return nothing: compiled code may not return a view that it has written to

    with torch.no_grad():
        torch.compile(write, backend="aot_eager")()
    assert in_step(weight) and not torch.equal(weight.master, before)
