"""Layers with a plain forward in eager code: launches on plain tensors, which give what the operand path gives, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from halo_tensor import HaloWeight, hot_config, quantize_, recipe_config
from halo_tensor.kernels.recorded import Recorded
from halo_tensor.layers.linear import convert_weight
from halo_tensor.products import eager_backward
from halo_tensor.products.lowered import can_lower_backward
from halo_tensor.products.operands import grad_input_operand
from halo_tensor.recipe import INT4, INT8, RECIPES, Recipe, halo, hot
from tests.helpers import interpreter, launches
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels

#: Calls with one shape: the first runs the functions of the path, the second records them, the third repeats the recording.
CALLS = 3
LOWERED = [name for name, recipe in RECIPES.items() if can_lower_backward(recipe)]
#: With small blocks, since the interpreter is slow; on a GPU all that are lowered.
CASES = {
    "hot": hot(),
    "hot_llm": hot(None, 16, grad_input=INT8, scale="tokens", granularity="row", rounding="nearest", seed=0),
    "X in int4": hot(None, 16, saved=INT4),
    "X in int4, an odd number": hot(5, 16, saved=INT4),
    "hot_external": hot(low_rank_input="external"),
    "luq": RECIPES["luq"],
} | ({name: RECIPES[name] for name in LOWERED} if GPU else {})


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=14)


def linear(recipe: Recipe | None = None, bias: bool = True, **options) -> nn.Sequential:
    torch.manual_seed(0)
    width = 128 if GPU else 32
    model = nn.Sequential(nn.Linear(width, width, bias=bias, device=DEVICE, dtype=torch.bfloat16))
    if recipe is None:
        quantize_(model, hot_config(min_features=16, skip="", **options))
    else:
        convert_weight(model[0], recipe)
    assert isinstance(model[0].weight, HaloWeight)
    return model


def inputs(model: nn.Module, tokens: int = 9) -> torch.Tensor:
    return torch.randn(tokens, model[0].weight.shape[1], device=DEVICE, dtype=torch.bfloat16)


def results(call: Callable, model: nn.Module, x: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """The output and all gradients, for random numbers that begin with ``seed``."""
    torch.manual_seed(seed)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = call(leaf * 1)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def taken(monkeypatch):
    """The results of the eager path, None for each call that it left to the operand path."""
    calls = []
    for name in ("linear", "pointwise"):
        function = getattr(eager_backward, name)
        monkeypatch.setattr(
            eager_backward, name, lambda *args, function=function: (calls.append(function(*args)), calls[-1])[1]
        )
    return calls


def compare(model: nn.Module, x: torch.Tensor, taken: list, monkeypatch: pytest.MonkeyPatch, calls: int = CALLS) -> None:
    """All results of the last call are those of the operand path, and the eager path was taken."""
    taken.clear()
    made = [results(model, model, x * (i + 1), i) for i in range(calls)][-1]
    assert len(taken) == calls and all(y is not None for y in taken)
    for name in ("linear", "pointwise"):
        monkeypatch.setattr(eager_backward, name, lambda *args: None)
    expected = results(model, model, x * calls, calls - 1)
    assert len(made) == len(expected)
    for actual, wanted in zip(made, expected, strict=True):
        assert torch.equal(actual, wanted) and actual.dtype == wanted.dtype
        assert 0 < actual.abs().max() < torch.inf


@runs_kernels
@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_the_operand_path_gives(name, taken, monkeypatch):
    model = linear(CASES[name])
    compare(model, inputs(model), taken, monkeypatch)


@runs_kernels
def test_weights_that_hold_no_codes(taken, monkeypatch):
    model = linear(bias=False, keep_codes=False)
    assert model[0].weight.grad_input_operand is None
    compare(model, inputs(model).view(3, 3, -1), taken, monkeypatch)


@runs_kernels
@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolutions(stride, taken, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 16, 1, stride=stride, bias=stride == 1)).to(DEVICE, torch.bfloat16)
    quantize_(model, hot_config(min_features=16, skip="", quantized_convolutions="pointwise"))
    x = torch.randn(2, 32, 5, 4, device=DEVICE, dtype=torch.bfloat16)
    if stride == 2:
        x = x.to(memory_format=torch.channels_last)
    compare(model, x, taken, monkeypatch)


@runs_kernels
def test_launches_are_repeated(monkeypatch):
    """Backward is a recording with seeds of its own in each call; on a GPU all launches are C functions."""
    model = linear()
    x, e = inputs(model).requires_grad_(), inputs(model)
    eager_backward._lowered.clear()
    torch.manual_seed(0)
    noise = set()
    for _ in range(CALLS + 2):
        (grad,) = torch.autograd.grad(model(x), x, e)
        noise.add(grad.float().sum().item())
    assert len(noise) > 2, "each call rounds otherwise"
    ((_, lowered),) = eager_backward._lowered.values()
    (program,) = lowered.recorded.programs.values()
    assert program.steps and all(bool(step.bound) == GPU for step in program.steps)


@runs_kernels
def test_what_is_launched(monkeypatch):
    """Nothing without autograd, and nothing of X for a weight that is not trained."""
    model = linear()
    x = inputs(model)
    launched = launches.noted(monkeypatch)
    with torch.no_grad():
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight.master, model[0].bias))
    assert not launched
    model(x.requires_grad_()).sum().backward()
    both, one = ["amax_of_operands", "cast_for_operands"], ["amax_tiles", "cast_tiles"]
    quantised = [name for name in launched if name in (*both, *one)]
    assert quantised == both * 2, "X, and E for both products; the weight holds its codes"
    launched.clear()
    model.requires_grad_(False)
    y = model(x)
    assert not launched
    y.sum().backward()
    assert [name for name in launched if name in (*both, *one)] == one


@runs_kernels
def test_layers_that_follow_each_other_share_codes_of_x(monkeypatch):
    model, other = linear(), linear()
    launched = launches.noted(monkeypatch)
    h = inputs(model).requires_grad_() * 1
    model(h), other(h)
    assert launched.count("cast_for_operands") == 1
    with torch.no_grad():
        h.mul_(2)
    model(h)
    assert launched.count("cast_for_operands") == 2, "h was written to"


@runs_kernels
@pytest.mark.parametrize("keep_codes", [True, False])
def test_a_weight_written_between_forward_and_backward_is_an_error(keep_codes, taken):
    model = linear(keep_codes=keep_codes)
    y = model(inputs(model).requires_grad_())
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert len(taken) == 1 and taken[0] is not None


@runs_kernels
def test_writes_of_optimisers_repeat_a_recording(monkeypatch):
    """Two passes over a weight, which leave what a new weight of the same values would hold."""
    model = linear()
    weight = model[0].weight
    repeated, run = [], Recorded.__call__
    monkeypatch.setattr(Recorded, "__call__", lambda self, *args: (repeated.append(self), run(self, *args))[1])
    optimizer = torch.optim.SGD([weight], 0.5)
    weight.grad = torch.randn_like(weight.dequantize())
    for _ in range(CALLS):
        before = weight.grad_input_codes.clone()
        optimizer.step()
        fresh = grad_input_operand(weight.master, weight.recipe)
        assert torch.equal(weight.grad_input_codes, fresh.codes_t) and torch.equal(weight.grad_input_scale, fresh.scale)
        assert not torch.equal(before, weight.grad_input_codes)
    (requantize,) = set(repeated)
    (program,) = requantize.programs.values()
    assert len(repeated) == CALLS and len(program.steps) == 3 and not program.results, "zeros, magnitudes and codes"


@runs_kernels
def test_what_is_saved_and_checkpointed(taken):
    """Codes of X alone, which hooks may give back in other strides: 9 tokens are rows of 16 bytes."""
    model = linear(rounding="nearest")
    x, saved = inputs(model), []
    expected = results(model, model, x)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t.contiguous().clone())[1], lambda t: t)
    for _ in range(CALLS):
        saved.clear()
        with hooks:
            y = model(leaf := x.clone().requires_grad_())
        assert [t.dtype for t in saved] == [torch.int8, torch.float32]
        model.zero_grad()
        y.square().sum().backward()
        assert torch.equal(leaf.grad, expected[1]) and torch.equal(model[0].weight.grad, expected[2])
    checkpointed = results(lambda h: checkpoint(model, h, use_reentrant=False), model, x)
    assert all(map(torch.equal, checkpointed, expected)) and all(y is not None for y in taken)


@runs_kernels
def test_autocast_gives_its_dtype(taken, monkeypatch):
    model = linear().float()
    x = inputs(model).float()

    def call(h):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return model(h)

    made = results(call, model, x)
    assert made[0].dtype == torch.bfloat16 and made[1].dtype == torch.float32 and taken[0] is not None
    monkeypatch.setattr(eager_backward, "linear", lambda *args: None)
    assert all(map(torch.equal, made, results(call, model, x)))


@runs_kernels
def test_gradients_are_accumulated_and_a_bias_can_be_trained_alone(taken):
    model = linear(rounding="nearest")
    x = inputs(model)
    once = results(model, model, x)[2].clone()
    model(x).square().sum().backward()
    assert torch.equal(model[0].weight.grad, once * 2)
    model[0].weight.requires_grad_(False)
    bias = model[0].bias
    bias.grad = None
    model(x).sum().backward()
    assert (bias.grad == len(x)).all() and all(y is not None for y in taken)


@runs_kernels
def test_errors_are_those_of_the_operand_path():
    model = linear()
    x = inputs(model)
    with pytest.raises(ValueError, match="must be of one dtype"):
        model(x.float())
    with pytest.raises(ValueError, match="does not fit"):
        model(x[:, :16])
    y = model(x.requires_grad_())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert model(x[:0]).shape == (0, x.shape[1])


@pytest.mark.gpu
def test_replays_of_a_captured_graph():
    """Recordings take zeroed memory of what was filled before, which no replay would fill again."""
    model = linear(rounding="nearest")
    x, stream = inputs(model).requires_grad_(), torch.cuda.Stream()

    def step() -> None:
        x.grad = None
        model.zero_grad()
        model(x * 1).square().sum().backward()

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CALLS + 1):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    captured = [x.grad, model[0].weight.grad]
    model.zero_grad()
    for _ in range(3):
        new = inputs(model)
        with torch.no_grad():
            x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, results(model, model, new)[1:3]))


def test_which_recipes_are_lowered():
    """Those of HOT, and LUQ. LBP-WHT multiplies in high precision, and the others' forward is not plain."""
    assert [name for name in RECIPES if name.startswith("hot")] + ["luq"] == LOWERED
    assert not can_lower_backward(halo(1, INT8))


def test_it_is_not_taken_where_no_kernel_runs(taken):
    if GPU:
        pytest.skip("kernels run")
    layer = nn.Sequential(nn.Linear(64, 64))
    quantize_(layer, recipe_config("hot"), filter_fn=lambda *_: True)
    layer(torch.randn(2, 64)).sum().backward()
    assert interpreter.INTERPRETED or taken == [None]
