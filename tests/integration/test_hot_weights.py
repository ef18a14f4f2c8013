"""Weights under HOT hold the operand of grad_input, and quantise it once for each write."""

import copy
import io
import pickle

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from halo_tensor import HaloWeight, dequantize_, hot_config, predict_peak, quantize_, recipe_config
from halo_tensor.analysis import measure_saved
from halo_tensor.products.linear import linear
from halo_tensor.products.steps import holds_for_grad_input
from halo_tensor.recipe import INT8, RECIPES, Operand, Product, Recipe
from halo_tensor.weight.copies import renewed
from halo_tensor.weight.roles import ShardRole
from tests.helpers.recording import OpLog

NEAREST = hot_config(rounding="nearest")
HELD = [name for name, recipe in RECIPES.items() if holds_for_grad_input(recipe)]


def make(config=NEAREST, k=128, n=64, **options) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(k, n, **options))
    quantize_(layer, config)
    return layer[0]


def grads(f, weight, x, e) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(f(x), (x, weight), e))


def as_before(layer, x, e) -> list[torch.Tensor]:
    """The gradients if W is quantised in every backward."""
    w = layer.weight.master.detach().clone().requires_grad_()
    return grads(lambda x: linear(x, w, layer.bias, layer.weight.recipe), w, x, e)


def data(k=128, n=64, tokens=40, dtype=torch.float32):
    return torch.randn(tokens, k, dtype=dtype, requires_grad=True), torch.randn(tokens, n, dtype=dtype)


def assert_up_to_date(layer) -> None:
    x, e = data(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
    for a, b in zip(grads(layer, layer.weight, x, e), as_before(layer, x, e), strict=True):
        assert torch.equal(a, b) and a.count_nonzero()


def test_who_holds_one():
    assert {"hot", "hot_llm", "hot_per_token", "luq"} <= set(HELD)
    assert not {"lbp_wht", "switchback", "jetfire", "mxfp8"} & set(HELD), "W is plain there, or the same in output"
    noisy = Recipe(grad_input=Product(Operand(INT8), Operand(INT8, rounding="stochastic")))
    assert not holds_for_grad_input(noisy), "each backward draws anew"
    assert make(recipe_config("lbp_wht", min_features=0)).weight.grad_input_operand is None


@given(name=st.sampled_from(HELD), k=st.sampled_from([16, 48, 128]), n=st.sampled_from([16, 64, 272]), bf16=st.booleans())
@settings(max_examples=15)
def test_the_numbers_are_those_of_a_weight_that_is_quantised_in_every_backward(name, k, n, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    layer = make(recipe_config(name, min_features=0), k, n, dtype=dtype)
    assert layer.weight.grad_input_operand is not None and layer.weight.operand is None
    x, e = data(k, n, dtype=dtype)
    for a, b in zip(grads(layer, layer.weight, x, e), as_before(layer, x, e), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keep", [True, False])
def test_a_weight_is_quantised_once_for_each_step_of_an_optimiser(keep):
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    quantize_(model, hot_config(rounding="nearest", keep_codes=keep))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        with OpLog() as log:
            for _ in range(3):
                model(torch.randn(32, 128, requires_grad=True)).sum().backward()
        # X of each layer, and W where no codes are held; E's operands come from quantize_both.
        names = [name for name, _ in log.calls]
        assert names.count("rotate_quantize") == (6 if keep else 12) and names.count("scaled_mm") == 12
        with OpLog() as log:
            optimizer.step()
        assert [name for name, _ in log.calls] == ["requantize_"] * keep, "one op for both"


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_codes_follow_optimisers(options):
    layer = make()
    optimizer = torch.optim.SGD([layer.weight], 0.1, **options)
    before = layer.weight.grad_input_codes.clone()
    for _ in range(2):
        x, e = data()
        optimizer.zero_grad()
        layer(x).backward(e)
        optimizer.step()
        assert_up_to_date(layer)
    assert not torch.equal(before, layer.weight.grad_input_codes)


WRITES = {
    "mul_": lambda layer, new: layer.weight.mul_(2),
    "copy_": lambda layer, new: layer.weight.copy_(new),
    "a converted weight": lambda layer, new: layer.weight.copy_(make(k=128).weight),
    "slice": lambda layer, new: layer.weight[3:5].zero_(),
    "set data": lambda layer, new: setattr(layer.weight, "data", new),
    "data": lambda layer, new: layer.weight.data.mul_(3),
    "master": lambda layer, new: layer.weight.master.mul_(3),
    "state dict": lambda layer, new: layer.state_dict()["weight"].data.mul_(3),
    "load": lambda layer, new: layer.load_state_dict({"weight": new, "bias": layer.bias}),
    "assign": lambda layer, new: layer.load_state_dict({"weight": new, "bias": layer.bias}, assign=True),
    "to": lambda layer, new: layer.double().float(),
}


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_codes_follow_every_write(name):
    layer = make()
    before = layer.weight.grad_input_codes.clone(), layer.weight.grad_input_scale.clone()
    WRITES[name](layer, torch.randn(64, 128))
    with torch.enable_grad():
        assert_up_to_date(layer)
    if name not in ("to", "a converted weight"):
        assert not torch.equal(before[1], layer.weight.grad_input_scale) or not torch.equal(
            before[0], layer.weight.grad_input_codes
        )


def test_a_write_between_forward_and_backward_is_an_error():
    layer = make()
    x, e = data()
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(e)
    assert_up_to_date(layer)


def test_copies_have_codes_of_their_own():
    layer = make()
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert_up_to_date(other)
        with torch.no_grad():
            other.weight.mul_(-1)
        assert_up_to_date(other)
        assert_up_to_date(layer)
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    assert renewed(layer.weight, torch.zeros(32, 128), ShardRole.PADDED).grad_input_operand is None, "FSDP sends the master"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_reads_them_too(backend):
    torch._dynamo.reset()
    layer = make()
    f = torch.compile(layer, backend=backend, fullgraph=True)
    x, e = data()
    for _ in range(2):
        expected = grads(layer, layer.weight, x, e)
        for a, b in zip(grads(f, layer.weight, x, e), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            layer.weight.master.mul_(-2)  # which the next call notices


def test_a_compiled_backward_does_not_quantise_them():
    graphs = []

    def keep(gm, inputs):
        graphs.append([node.target for node in gm.graph.nodes])
        return make_boxed_func(gm)

    layer = make()
    x, e = data()
    grads(torch.compile(layer, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)), layer.weight, x, e)
    quantisers = torch.ops.halo.rotate_quantize.default, torch.ops.halo.rotate_quantize_.default
    assert [sum(target in quantisers for target in graph) for graph in graphs] == [1, 0], "X in forward"


def test_a_compiled_optimiser_makes_them():
    layer = make()
    optimizer = torch.optim.SGD([layer.weight], 0.1)
    layer.weight.grad = torch.randn(64, 128)
    torch.compile(optimizer.step, backend="aot_eager")()
    assert_up_to_date(layer)


def test_what_they_cost():
    """A byte for each element, which is memory of the weight and not of the graph."""
    model, without = (nn.Sequential(make(hot_config(keep_codes=keep), 256, 128, bias=False)) for keep in (True, False))
    x = torch.randn(64, 256, requires_grad=True)
    peaks = [predict_peak(m, x).codes for m in (model, without)]
    assert peaks == [256 * 128 + 4, 0]
    for m in (model, without):
        with measure_saved(m) as saved:
            m(x)
        assert saved.total == 32 * 256 + 4, "codes of half of X"
    dequantize_(model)
    assert not isinstance(model[0].weight, HaloWeight) and predict_peak(model, x).codes == 0


def test_frozen_weights_hold_them_beside_their_values():
    layer = nn.Sequential(nn.Linear(128, 64).requires_grad_(False))
    quantize_(layer, NEAREST)
    assert layer[0].weight.grad_input_operand is not None and layer[0].weight.master is not None
    x, e = data()
    with OpLog() as log:
        layer(x).backward(e)
    assert [name for name, _ in log.calls] == ["rotate_quantize", "scaled_mm"], "E alone is quantised"
