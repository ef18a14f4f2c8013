"""Trained weights that hold no codes, and are quantised in every forward and every backward."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import partition_fn
from torch.utils.checkpoint import checkpoint

from halo_tensor import HaloWeight, balance_, dequantize_, halo_config, quantize_
from tests.helpers.recording import OpLog


def make_boxed(gm, inputs):
    return make_boxed_func(gm)


#: Inductor's passes and partitioner, without its code, which takes long to compile.
PARTITIONED = aot_autograd(fw_compiler=make_boxed, bw_compiler=make_boxed, partition_fn=partition_fn)
CONFIGS = [(0, "fp8", "row"), (1, "int8", "row"), (2, "int8", "tensor"), (1, "fp6", "row")]


def mlp(config=None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128, bias=False)).to(torch.bfloat16)
    if config is not None:
        quantize_(model, config)
    return model


def pair(level=1, dtype="int8", granularity="row") -> list[nn.Sequential]:
    """Without codes, and with them."""
    return [mlp(halo_config(level, dtype, granularity=granularity, keep_codes=keep)) for keep in (False, True)]


def data() -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()


def step(f, model, x) -> list[torch.Tensor]:
    y = f(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])]


def assert_same(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("level", "dtype", "granularity"), CONFIGS)
def test_the_same_numbers(level, dtype, granularity):
    without, with_codes = pair(level, dtype, granularity)
    x = data()
    with OpLog() as log:
        results = step(without, without, x)
    assert len(log.products()) == 6 and all(d in (torch.int8, torch.float8_e4m3fn) for d in log.products())
    assert_same(results, step(with_codes, with_codes, x))


@pytest.mark.parametrize(("level", "dtype", "granularity"), CONFIGS[:2])
def test_compiled(level, dtype, granularity):
    torch._dynamo.reset()
    without, with_codes = pair(level, dtype, granularity)
    x = data()
    assert_same(step(torch.compile(without, fullgraph=True), without, x), step(torch.compile(with_codes), with_codes, x))


def test_training_goes_the_same_way():
    curves = []
    for model in pair():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(data().detach()).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == curves[1] and curves[0][-1] < curves[0][0]


def held(model) -> int:
    """Bytes of what weights hold."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(getattr(w, name).nbytes for w in weights for name in w.__tensor_flatten__()[0])


def test_nothing_but_the_master_is_held():
    without, with_codes = pair()
    elements = 2 * 128 * 256
    assert held(without) == 2 * elements
    assert held(with_codes) == 3 * elements + 4 * (256 + 128)
    for weight in (without[0].weight, copy.deepcopy(without)[0].weight, without.double()[0].weight):
        assert isinstance(weight, HaloWeight) and weight.operand is None and not weight.recipe.is_identity


def codes_saved(f, x) -> list[int]:
    """The sizes of the codes that are saved for backward, and do not belong to X."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        f(x)
    return [t.numel() for t in saved if t.element_size() == 1 and len(x) not in t.shape]


@pytest.mark.parametrize(("level", "dtype", "granularity"), CONFIGS)
@pytest.mark.parametrize("compiled", [False, True])
def test_no_codes_are_saved(level, dtype, granularity, compiled):
    torch._dynamo.reset()
    x = data()
    for model, sizes in zip(pair(level, dtype, granularity), ([], [128 * 256] * 2), strict=True):
        assert codes_saved(torch.compile(model, backend=PARTITIONED) if compiled else model, x) == sizes


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("write", ["weight", "optimizer", "state dict"])
def test_a_write_between_forward_and_backward(compiled, write):
    """What backward would multiply with is then another weight than forward's, as autograd says of any tensor."""
    torch._dynamo.reset()
    model = pair()[0]
    y = (torch.compile(model, backend=PARTITIONED) if compiled else model)(data())
    if write == "optimizer":
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    else:
        with torch.no_grad():
            (model[2].weight if write == "weight" else model.state_dict()["2.weight"]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed(compiled):
    """Then no codes are saved either."""
    torch._dynamo.reset()
    without, with_codes = pair()
    x, saved = data(), []
    f = lambda x: checkpoint(without, x, use_reentrant=False)  # noqa: E731
    f = torch.compile(f, fullgraph=True) if compiled else f
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        f(x)
    assert torch.bfloat16 in saved and torch.int8 not in saved
    assert_same(step(f, without, x), step(with_codes, with_codes, x))


def test_state_dicts():
    without, with_codes = pair()
    plain = {name: value + 1 for name, value in without.state_dict().items()}
    assert not any(isinstance(value, HaloWeight) for value in plain.values())
    for assign in (False, True):
        without.load_state_dict(plain, assign=assign)
        with_codes.load_state_dict(plain, assign=assign)
        assert without[0].weight.operand is None and torch.equal(without[0].weight.master, plain["0.weight"])
        x = data()
        assert torch.equal(without(x), with_codes(x))


def test_copies_between_the_two():
    (a, b), x = pair(), data()
    with torch.no_grad():
        a[0].weight.mul_(2)
        b[0].weight.copy_(a[0].weight)
        assert torch.equal(a[0](x), b[0](x))
        a[0].weight.copy_(b[0].weight * 3)
        b[0].weight.mul_(3)
    assert torch.equal(a[0](x), b[0](x)) and a[0].weight.operand is None and b[0].weight.operand is not None


def test_converted_anew():
    model = pair()[0]
    quantize_(model, halo_config(1, "int8"))
    assert model[0].weight.operand is not None
    quantize_(model, halo_config(1, "int8", keep_codes=False))
    assert model[0].weight.operand is None
    dequantize_(model)
    assert_same(model.parameters(), mlp().parameters())


def test_frozen_weights_are_codes_whatever():
    model = mlp().requires_grad_(False)
    quantize_(model, halo_config(1, "int8", keep_codes=False))
    assert model[0].weight.master is None and model[0].weight.operand is not None
    with pytest.raises(ValueError, match="keep_codes=False is for weights that are trained"):
        quantize_(mlp(), halo_config(1, "int8", keep_codes=False, frozen=True))


def test_a_balance_needs_codes():
    without, with_codes = pair()
    with pytest.raises(ValueError, match="0 holds no codes.*keep_codes=True"):
        balance_(without, data().detach())
    with torch.no_grad():
        with_codes[0].weight[:, :4] *= 50
    balance_(with_codes, data().detach())
    with pytest.raises(ValueError, match="leave keep_codes at True, or call dequantize_"):
        quantize_(with_codes, halo_config(1, "int8", keep_codes=False))


def test_fsdp_needs_codes():
    weight = pair()[0][0].weight
    with torch.no_grad(), pytest.raises(ValueError, match="holds no codes, which are what FSDP sends"):
        weight.new_zeros((128, 128))
