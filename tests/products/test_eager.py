"""The eager path: launches on plain tensors, which give what the operand path gives, bit for bit."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from halo_tensor import balance_, halo_config, quantize_
from halo_tensor.fences.fast_paths import FAST_PATHS
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.kernels.repeating import Program
from halo_tensor.products import eager
from halo_tensor.products.lowered import can_lower
from halo_tensor.recipe import FP8_E4M3, INT8, RECIPES, halo, hot
from halo_tensor.tensor_parallel import HaloColwiseParallel, HaloPrepareInput
from tests.helpers import interpreter, launches
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels

# (config, with a bias, balanced)
LAYERS = {
    "int8 level 1": (halo_config(1, "int8", skip=""), False, False),
    "int8 level 1, balanced": (halo_config(1, "int8", skip=""), True, True),
    "int8 level 2": (halo_config(2, "int8", skip=""), True, False),
    "fp8 level 0, no codes kept": (halo_config(0, "fp8", skip="", keep_codes=False), True, False),
    "fp8, one scale": (halo_config(1, "fp8", skip="", granularity="tensor"), False, False),
    "fp6 level 2": (halo_config(2, "fp6", skip=""), False, False),
}
#: Calls with one shape: the first runs the functions of the path, the second records them, the third repeats the recording.
CALLS = 3


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=12)


def model_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    config, bias, balanced = LAYERS[name]
    model = nn.Sequential(nn.Linear(128, 256, bias=bias), nn.Linear(256, 128, bias=bias)).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 5, 128, device=DEVICE, dtype=torch.bfloat16)
    x[..., 3] *= 30
    quantize_(model, config)
    if balanced:
        balance_(model, x)
    return model, x


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output with and without autograd, and all gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x * 1)
    y.square().sum().backward()
    with torch.no_grad():
        evaluated = model(x)
    return [y.detach(), evaluated, x.grad, *(p.grad for p in model.parameters())]


@pytest.fixture
def taken(monkeypatch):
    """The results of the eager path, None for each call that it left to the operand path."""
    calls, linear = [], eager.linear
    monkeypatch.setattr(eager, "linear", lambda *args: (calls.append(linear(*args)), calls[-1])[1])
    return calls


@runs_kernels
@pytest.mark.parametrize("name", LAYERS)
def test_it_gives_what_the_operand_path_gives(name, taken, monkeypatch):
    model, x = model_of(name)
    taken.clear()
    repeated, repeat = [], Program._repeat_and_write
    monkeypatch.setattr(
        Program, "_repeat_and_write", lambda self, *tensors: (repeated.append(self), repeat(self, *tensors))[1]
    )
    inputs = [x * scale for scale in (1, 2, -3)[:CALLS]]
    eagerly = [results(model, x) for x in inputs]
    assert len(taken) == 4 * CALLS and all(y is not None for y in taken)
    assert len({*repeated}) >= 2 * 3, "quantised X and output of two layers, one after the other and in one without autograd"
    monkeypatch.setattr(eager, "linear", lambda *args: None)
    for made, x in zip(eagerly, inputs, strict=True):
        for actual, expected in zip(made, results(model, x), strict=True):
            assert torch.equal(actual, expected)
            assert actual.abs().max() > 0


@runs_kernels
@pytest.mark.parametrize(("dtype", "frozen", "beyond"), [("fp6", True, 0), ("fp6", True, 32), ("int8", False, 32)])
def test_codes_that_are_packed_or_lie_apart(dtype, frozen, beyond, taken, monkeypatch):
    """As FSDP2 gathers them, beside a layer of the same widths whose codes lie otherwise."""
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128, bias=False, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    for layer, packed in zip(layers, (False, frozen), strict=True):
        quantize_(nn.Sequential(layer.requires_grad_(not packed)), halo_config(1, dtype))
    operand = layers[1].weight.operand
    assert operand.is_packed == frozen
    memory = nn.functional.pad(operand.codes.view(torch.uint8), (0, beyond))
    operand.codes = memory[:, : operand.codes.shape[1]].view(operand.codes.dtype)
    model, x = nn.Sequential(*layers), torch.randn(5, 128, device=DEVICE, dtype=torch.bfloat16)

    def trained(scale):
        leaf = (x * scale).requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        return y.detach(), leaf.grad

    taken.clear()
    eagerly = [trained(scale) for scale in range(1, CALLS + 1)]
    assert len(taken) == 2 * CALLS and all(y is not None for y in taken)
    monkeypatch.setattr(eager, "linear", lambda *args: None)
    for i, made in enumerate(eagerly):
        assert all(map(torch.equal, made, trained(i + 1)))


@pytest.fixture
def mesh():
    """Of one rank, which still quantises its tokens and gathers their codes."""
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE.type, (1,))
    dist.destroy_process_group()


class Branches(nn.Module):
    """Two layers that share X."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(128, 128), nn.Linear(128, 128, bias=False)

    def forward(self, x):
        return self.gate(x) * self.up(x)


@runs_kernels
@pytest.mark.parametrize("name", ["int8 level 1, balanced", "fp6 level 2"])
def test_codes_that_ranks_have_gathered(name, mesh, taken, monkeypatch):
    """Sequence parallelism: X is a placeholder without values, and its codes are given."""
    torch.manual_seed(0)
    config, _, balanced = LAYERS[name]
    model = Branches().to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    x[..., 3] *= 30
    quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear), min_gain=0)
    if balanced:
        balance_(model, x)
        assert model.up.weight.gain is not None
    plan = {"gate": HaloColwiseParallel(), "up": HaloColwiseParallel(), "": HaloPrepareInput(input_layouts=Shard(1))}
    parallelize_module(model, mesh, plan)
    given, linear = [], eager._linear
    monkeypatch.setattr(eager, "_linear", lambda *args: (given.append(args[-1]), linear(*args))[1])
    looked_up, look_up = [], eager._look_up
    monkeypatch.setattr(eager, "_look_up", lambda *args: (looked_up.append(args), look_up(*args))[1])
    taken.clear()
    eagerly = [results(model, x * scale) for scale in (1, 2, -3)[:CALLS]][-1]
    assert len(taken) == 4 * CALLS and all(y is not None for y in taken) and len(looked_up) == 2
    assert len(given) == 2 * CALLS and all(codes.rows.shape == (16, 128) == codes.columns.shape[::-1] for codes in given)
    monkeypatch.setattr(eager, "linear", lambda *args: None)
    for actual, expected in zip(eagerly, results(model, x * -3), strict=True):
        actual, expected = (t.to_local() if isinstance(t, DTensor) else t for t in (actual, expected))
        assert torch.equal(actual, expected) and 0 < actual.abs().max() < torch.inf


@runs_kernels
def test_programs_are_repeated(monkeypatch):
    """Other values, the same shape; on a GPU all launches are C functions."""
    model, x = model_of("int8 level 1")
    layer, e = model[0], torch.randn(2, 5, 256, device=DEVICE, dtype=torch.bfloat16)
    eager._lowered.clear()
    for _ in range(CALLS):
        layer(x.clone().requires_grad_()).backward(e)
    (lowered,) = (lowered for _, lowered in eager._lowered.values())
    for function in (lowered.quantize_x.quantize, lowered.output, lowered.backward):
        (program,) = function.programs.values()
        assert program.steps and all(bool(step.bound) == GPU for step in program.steps)
    assert lowered.quantize_x.quantize.function((x.shape, x.stride()), x, None)[0] is not None
    monkeypatch.setattr(lowered.output, "function", None)
    with torch.no_grad():
        assert layer(x).shape == (2, 5, 256)


@runs_kernels
def test_what_is_launched(monkeypatch):
    """Two kernels without autograd; nothing is made for backward."""
    model, x = model_of("int8 level 1")
    launched = launches.noted(monkeypatch)
    with torch.no_grad():
        model[0](x)
    assert launched == ["whole_rows", "few_rows_kernel"]
    launched.clear()
    model[0](x.clone().requires_grad_()).sum().backward()
    expected = {"whole_rows": 1, "transpose_codes": 2, "amax_tiles": 1, "cast_tiles": 1}
    assert {name: launched.count(name) for name in expected} == expected and len(launched) == 8


@runs_kernels
def test_layers_that_follow_each_other_share_an_operand(monkeypatch):
    model, x = model_of("int8 level 1")
    other = nn.Linear(128, 64, bias=False, device=DEVICE, dtype=torch.bfloat16)
    quantize_(other, halo_config(1, "int8", skip="", min_features=16), filter_fn=lambda *_: True)
    launched = launches.noted(monkeypatch)
    h = x.clone().requires_grad_() * 1
    model[0](h), other(h)
    assert launched.count("whole_rows") == 1
    with torch.no_grad():
        h.mul_(2)
    model[0](h)
    assert launched.count("whole_rows") == 2, "h was written to"


@runs_kernels
def test_a_weight_written_between_forward_and_backward_is_an_error(taken):
    model, x = model_of("int8 level 1")
    y = model[0](x.clone().requires_grad_())
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert len(taken) == 1 and taken[0] is not None


@runs_kernels
def test_hooks_on_saved_tensors_see_no_codes_of_weights():
    """Only what a graph keeps alive: the codes of X, and the master of a weight that holds no codes."""
    for name, count in (("int8 level 1", 2), ("fp8 level 0, no codes kept", 3)):
        (layer, _), x = model_of(name)
        saved: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t)
        with hooks:
            y = layer(x.clone().requires_grad_())
        assert len(saved) == count
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
        layer.requires_grad_(False)
        saved.clear()
        with hooks:
            layer(x.clone().requires_grad_()).sum().backward()
        assert len(saved) == count - 2


@runs_kernels
def test_codes_that_hooks_give_back_in_other_strides():
    """As offloading does: rows of 10 transposed codes begin at multiples of 16 bytes, and those of a copy do not."""
    model, x = model_of("int8 level 1")
    expected = [results(model[0], x)[1:] for _ in range(CALLS)][-1]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        made = [results(model[0], x)[1:] for _ in range(CALLS)]
    assert all(torch.equal(a, b) for results in made for a, b in zip(results, expected, strict=True))


@runs_kernels
def test_a_bias_can_be_trained_alone(taken):
    model, x = model_of("int8 level 2")
    model[0].weight.requires_grad_(False)
    model[0](x).sum().backward()
    assert (model[0].bias.grad == 10).all() and taken[-1] is not None


@runs_kernels
def test_what_a_weight_remembers_of_its_last_call():
    """Another dtype, bias, autocast, recipe's gain or set of codes: each is seen by the next call."""
    model, x = model_of("int8 level 1, balanced")
    layer = model[0]
    first, state = layer(x), layer.weight.codes_state
    ready = state.ready
    assert torch.equal(layer(x), first) and state.ready is ready
    bias = layer.bias.detach().clone()
    layer.bias.data = bias + 1
    assert (layer(x) - first - 1).abs().max() < 0.05
    layer.bias.data = torch.stack([bias] * 2, 1)[:, 0]
    assert layer.bias.stride() == (2,) and torch.equal(layer(x), first)
    layer.bias.data = bias
    with torch.autocast(x.device.type, dtype=torch.float16):
        assert layer(x).dtype == torch.float16
    assert torch.equal(layer(x), first)
    operand = layer.weight.operand
    operand.codes = operand.codes * 0
    assert torch.equal(layer(x), layer.bias.detach().expand_as(first))


@runs_kernels
def test_modes_transforms_and_tracers_take_the_operand_path(taken):
    model, x = model_of("int8 level 1")
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert taken == [None, None] and counter.get_total_flops() == 2 * 2 * 10 * 128 * 256
    with pytest.raises(RuntimeError, match=r"torch.jit.trace"):
        torch.jit.trace(model, x)
    assert taken[2:] == [None]


@runs_kernels
def test_products_with_views_leave_nothing_behind():
    """A view of a weight has a recipe of its own, and so would be remembered in every call."""
    model, x = model_of("int8 level 1")
    before = len(eager._lowered)
    with pytest.warns(UserWarning, match="runs in high precision"):
        y = nn.functional.linear(x, model[0].weight[:64])
    assert y.shape == (2, 5, 64) and len(eager._lowered) == before


@runs_kernels
def test_errors_are_those_of_the_operand_path():
    model, x = model_of("int8 level 1")
    with pytest.raises(ValueError, match="must be of one dtype"):
        model(x.float())
    with pytest.raises((ValueError, RuntimeError), match="128"):
        model(x[..., :64])
    y = model(x.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(y.sum(), model[0].weight, retain_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), model[0].weight, create_graph=True)


@runs_kernels
def test_every_backend_gets_a_matrix(monkeypatch):
    """Backends write to a matrix, also where X has more dimensions."""
    for name in ("gluon", "cublas", "tma", "sm80"):
        monkeypatch.setattr(FAST_PATHS[name], "disabled", True)
    for cache in (product.plan.cache_clear, eager._lowered.clear):
        cache()
    model, x = model_of("fp8 level 0, no codes kept")
    in_pytorch = results(model, x)
    monkeypatch.undo()
    for cache in (product.plan.cache_clear, eager._lowered.clear):
        cache()
    for actual, expected in zip(in_pytorch, results(model, x), strict=True):
        assert actual.shape == expected.shape and (actual - expected).norm() <= 6e-2 * expected.norm()


@pytest.mark.gpu
def test_the_vendors_library_gets_a_matrix(monkeypatch):
    layer = nn.Linear(2048, 8192, bias=False, device="cuda", dtype=torch.bfloat16)
    quantize_(layer, halo_config(0, "fp8"), filter_fn=lambda *_: True)
    x = torch.randn(4, 2048, 2048, device="cuda", dtype=torch.bfloat16)
    eagerly = results(layer, x)
    monkeypatch.setattr(eager, "linear", lambda *args: None)
    assert all(map(torch.equal, eagerly, results(layer, x)))


@runs_kernels
def test_empty_inputs_and_vectors():
    model, x = model_of("int8 level 2")
    assert model(x[:0]).shape == (0, 5, 128)
    assert torch.equal(model(x[0, 0]), model(x[:1, :1])[0, 0])


@runs_kernels
def test_autocast_gives_its_dtype(taken):
    model, x = model_of("int8 level 1")
    model.float()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = model(x.float())
    assert y.dtype == torch.bfloat16 and all(t is not None for t in taken)


def test_which_recipes_are_lowered():
    assert all(can_lower(halo(level, format)) for level in (0, 1, 2) for format in (INT8, FP8_E4M3))
    assert can_lower(halo(1, INT8, "tensor"))
    assert not any(map(can_lower, [hot(), RECIPES["switchback"], RECIPES["jetfire"], RECIPES["ideal_int8"], RECIPES["mxfp8"]]))
