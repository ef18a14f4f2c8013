"""Every write to a weight reaches its codes: whatever writes, whatever dispatch mode is active, whatever its schema says."""

import warnings
from contextlib import ExitStack, nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor.debug import CommDebugMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._debug_mode import DebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from halo_tensor import HaloWeight, halo_config, quantize_
from halo_tensor.fences.pytorch import is_recorded, is_symbolic
from halo_tensor.weight import ShardRole
from tests.helpers.recording import OpLog
from tests.helpers.weights import in_step

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))


def converted(config=None, **kwargs) -> nn.Linear:
    layer = nn.Linear(64, 32, bias=False)
    quantize_(layer, config or halo_config(1, "int8", min_features=0, **kwargs), filter_fn=lambda *_: True)
    return layer


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Refusing(Passing):
    """As PyTorch's documentation has it: subclasses first."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is not torch.Tensor and t is not nn.Parameter for t in types):
            return NotImplemented
        return func(*args, **(kwargs or {}))


def selective():
    """The mode of a selective checkpoint's forward."""
    return create_selective_checkpoint_contexts(lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE)[0]


MODES = {
    "none": nullcontext,
    "FLOP counter": lambda: FlopCounterMode(display=False),
    "passing": Passing,
    "refusing": Refusing,
    "op log": OpLog,
    "debug": DebugMode,
    "memory tracker": MemTracker,
    "communication": CommDebugMode,
    "selective checkpoint": selective,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def optimize(layer: nn.Linear, kind, **options) -> None:
    layer.weight.grad = torch.ones(layer.weight.shape)
    kind(layer.parameters(), lr=0.1, **options).step()


def of_state(write):
    return lambda layer: write(layer.state_dict()["weight"])


WRITES = {
    "in place": lambda layer: layer.weight.mul_(-2),
    "SGD": lambda layer: optimize(layer, torch.optim.SGD),
    "AdamW, fused": lambda layer: optimize(layer, torch.optim.AdamW, fused=True),
    "AdamW, foreach": lambda layer: optimize(layer, torch.optim.AdamW, foreach=True),
    "data": lambda layer: layer.weight.data.neg_(),
    "set data": lambda layer: setattr(layer.weight, "data", torch.randn(layer.weight.shape)),
    "view": lambda layer: layer.weight[:].add_(1),
    "view of a view": lambda layer: layer.weight.view(-1)[7:].view(-1).mul_(3),
    "item": lambda layer: layer.weight.__setitem__((3, 5), 100.0),
    "chunk": lambda layer: layer.weight.chunk(2)[1].add_(1),
    "columns": lambda layer: layer.weight.detach().split(32, 1)[0].add_(1),
    "copy": lambda layer: layer.weight.copy_(torch.randn(layer.weight.shape)),
    "copy of a weight": lambda layer: layer.weight.copy_(converted().weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 0.5),
    "out": lambda layer: torch.add(torch.ones(layer.weight.shape), 1, out=layer.weight.data),
    "load_state_dict": lambda layer: layer.load_state_dict(converted().state_dict()),
    "master": lambda layer: layer.weight.master.mul_(-1),
    "another master": lambda layer: setattr(layer.weight, "master", torch.randn(layer.weight.shape)),
    "state dict": of_state(lambda value: value.mul_(0)),
    "view of a state dict": of_state(lambda value: value[2:].add_(1)),
    "data of a state dict": of_state(lambda value: value.data.neg_()),
    "NumPy of a state dict": of_state(lambda value: value.numpy().__setitem__(0, 7.0)),
    "state dict, foreach": of_state(lambda value: torch._foreach_add_([value], 1.0)),
}


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from([*WRITES]), st.sampled_from([*MODES])), min_size=1, max_size=3),
    inside=st.lists(st.sampled_from([*MODES]), max_size=2),
    granularity=st.sampled_from(["row", "tensor"]),
    forward_within=st.booleans(),
)
def test_every_write_in_every_mode(steps, inside, granularity, forward_within):
    layer = converted(granularity=granularity)
    before, codes = layer.weight.master.clone(), layer.weight.operand.codes
    with warnings.catch_warnings(), ExitStack() as around:
        warnings.simplefilter("ignore")  # columns of a weight are plain
        for name, mode in steps:
            with torch.no_grad(), MODES[mode]():
                WRITES[name](layer)
            if forward_within:
                layer(X)
        for mode in inside:
            around.enter_context(MODES[mode]())
        y = layer(X)
    weight = layer.weight
    assert in_step(weight) and weight.operand.codes is codes
    fresh = HaloWeight.from_hp(weight.master.clone(), weight.recipe)
    with torch.inference_mode("inference" in inside), MODES["autocast" if "autocast" in inside else "none"]():
        assert torch.equal(y, F.linear(X, fresh))
    assert len(steps) > 1 or not torch.equal(before, weight.master)


def test_a_model_built_in_inference_mode():
    """Its parameters are inference tensors; the weights made of them are not, and have views in both modes."""
    with torch.inference_mode():
        layer = converted()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(layer.state_dict()["weight"], layer.weight.master)
            layer.weight[:].mul_(-2)
            layer.weight.detach().view(-1)[7:].add_(1)
            fresh = HaloWeight.from_hp(layer.weight.master.clone(), layer.weight.recipe)
            assert in_step(layer.weight) and torch.equal(layer(X), F.linear(X, fresh))


def test_a_forward_under_a_flop_counter_sees_writes_to_the_state_dict():
    layer = converted()
    layer.state_dict()["weight"].mul_(0)
    with FlopCounterMode(display=False):
        assert not layer(X).any()


def test_a_view_made_under_a_mode_that_leaves_subclasses_alone_writes_codes():
    layer = converted()
    with torch.no_grad(), Refusing():
        view = layer.weight[:]
        view.zero_()
    assert isinstance(view, HaloWeight) and not layer.weight.operand.codes.any()


def test_two_questions_about_modes():
    seen = []

    def f(x):
        seen.append((is_symbolic(), is_recorded()))
        return x + 1

    f(X)
    for mode in (FlopCounterMode(display=False), DebugMode(), Refusing(), selective()):
        with mode:
            f(X)
    with FakeTensorMode(allow_non_fake_inputs=True):
        f(X)
    with FakeTensorMode(allow_non_fake_inputs=True), Refusing():
        f(X)
    for tracing in ("real", "fake", "symbolic"):
        make_fx(f, tracing_mode=tracing)(X)
    assert seen == [(False, False)] + [(False, True)] * 4 + [(True, True)] * 5


@pytest.mark.parametrize("keep", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_a_selective_checkpoint_follows_a_write_and_records_none_of_it(keep):
    expected, layer = converted(), converted()
    layer.load_state_dict(expected.state_dict())
    for model in (expected, layer):
        model.state_dict()["weight"].mul_(-3)
    x = X.clone().requires_grad_()
    wanted = expected(x).sin()
    contexts = lambda: create_selective_checkpoint_contexts(lambda *args, **kwargs: keep)  # noqa: E731
    y = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False, context_fn=contexts)
    assert torch.equal(y, wanted) and in_step(layer.weight)
    layer.state_dict()  # gives the next use of the weight, the recomputation, a reason to quantise again
    for a, b in zip(*(torch.autograd.grad(z.sum(), [x, m.weight]) for z, m in ((y, layer), (wanted, expected))), strict=True):
        assert torch.equal(a, b)


def test_a_state_dict_between_forward_and_backward_hinders_neither():
    layer = converted()
    first = layer(X.requires_grad_())
    layer.state_dict()
    second = layer(X)
    (first + second).sum().backward()
    X.requires_grad_(False)
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_a_trace_follows_a_write_before_it_and_has_none_of_it(tracing):
    layer = converted()
    layer.state_dict()["weight"].mul_(-3)
    with torch.no_grad():
        traced = make_fx(lambda x: layer(x), tracing_mode=tracing, _allow_non_fake_inputs=True)(X)
        targets = [node.target for node in traced.graph.nodes]
        assert torch.ops.halo.scaled_mm.default in targets and torch.ops.halo.rotate_quantize_.default not in targets
        assert in_step(layer.weight) and torch.equal(traced(X), layer(X))


def test_fake_weights_are_chunked_and_viewed_as_real_ones_are():
    """As tools do that estimate what sharding takes."""
    layer = converted()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(layer.weight)
        chunks = fake.chunk(2)
        assert all(isinstance(chunk, HaloWeight) and chunk.shard_role is ShardRole.CHUNK for chunk in chunks)
        assert chunks[0].operand.codes.shape == (16, 64) and isinstance(fake[3:], HaloWeight)
        with torch.no_grad():
            fake[3:].zero_()
        assert F.linear(mode.from_tensor(X), fake).shape == (4, 32)


# Ops of other libraries.

foreign = torch.library.Library("a_library_of_others", "DEF")
foreign.define("scribble(Tensor w) -> ()")
foreign.define("scribble_all(Tensor[] ws, *, Tensor? other=None) -> ()")
foreign.define("honest(Tensor(a!) w) -> ()")
foreign.define("read(Tensor w) -> Tensor")


@torch.library.impl(foreign, "scribble", "CompositeExplicitAutograd")
def _(w):
    w.mul_(-2)


@torch.library.impl(foreign, "scribble_all", "CompositeExplicitAutograd")
def _(ws, *, other=None):
    for w in [*ws, *([] if other is None else [other])]:
        w.mul_(-2)


@torch.library.impl(foreign, "honest", "CompositeExplicitAutograd")
def _(w):
    w.mul_(-2)


@torch.library.impl(foreign, "read", "CompositeExplicitAutograd")
def _(w):
    return w.abs().sum()


@torch.library.custom_op("a_library_of_others::undeclared", mutates_args=())
def undeclared(w: torch.Tensor) -> None:
    w.mul_(-2)


@torch.library.custom_op("a_library_of_others::declared", mutates_args=("w",))
def declared(w: torch.Tensor) -> None:
    w.mul_(-2)


ops = torch.ops.a_library_of_others
FOREIGN = {
    "undeclared": lambda w: ops.scribble(w),
    "a list": lambda w: ops.scribble_all([torch.ones(2), w]),
    "a keyword": lambda w: ops.scribble_all([], other=w),
    "declared": lambda w: ops.honest(w),
    "custom_op, undeclared": undeclared,
    "custom_op, declared": declared,
}


@pytest.mark.parametrize("mode", ["none", "refusing", "FLOP counter"])
@pytest.mark.parametrize("name", FOREIGN)
def test_ops_of_other_libraries_may_write(name, mode):
    layer = converted()
    for part in (layer.weight.detach(), layer.weight.detach()[4:9]):
        before = part.dequantize().clone()
        with torch.no_grad(), MODES[mode]():
            FOREIGN[name](part)
        assert torch.equal(part.dequantize(), before * -2) and in_step(layer.weight)


def test_ops_of_other_libraries_may_only_read():
    """Autograd then hears of no write, and frozen codes are not rounded a second time."""
    layer = converted()
    y = layer(X)
    assert ops.read(layer.weight.detach()) == layer.weight.master.abs().sum()
    y.sum().backward()
    frozen = converted(frozen=True).weight
    codes = frozen.operand.codes.clone()
    ops.read(frozen), ops.read(frozen[3:])
    assert torch.equal(frozen.operand.codes, codes)


def test_ops_of_other_libraries_and_frozen_weights():
    frozen = converted(frozen=True).weight
    before = frozen.dequantize()
    with pytest.raises(RuntimeError, match="a frozen weight cannot be written through a view of it"):
        ops.scribble(frozen[3:])
    assert torch.equal(frozen.dequantize(), before)
    ops.scribble(frozen)
    torch.testing.assert_close(frozen.dequantize(), before * -2)
