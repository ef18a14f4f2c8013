"""FSDP2 with the weights of experts: cut along experts or along rows, gathered as codes, trained as by one process."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, INT8, halo
from halo_tensor.weight import ShardRole
from halo_tensor.weight.sent_rows import ALIGNMENT
from halo_tensor.weight.sharded_parameters import shard_of
from tests.helpers import sharded as sharded_models
from tests.helpers.mixtures import mixtures
from tests.helpers.ranks import on_ranks
from tests.helpers.recording import OpLog
from tests.helpers.sharded import Traffic, broadcast

FULL = StateDictOptions(full_state_dict=True)


def shard(model: nn.Module, dim: int = 0, **options) -> nn.Module:
    options["shard_placement_fn"] = lambda p: Shard(dim) if p.ndim == 3 else None
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def batches(world: int, steps: int, d: int = 64) -> torch.Tensor:
    return torch.randn(steps, world, 24, d, generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def alone(model: nn.Module, world: int, steps: int = 2) -> list[float]:
    return sharded_models.alone(model, batches(world, steps), loss_of)


def together(model: nn.Module, world: int, steps: int = 2) -> list[float]:
    return sharded_models.together(model, batches(world, steps), loss_of)


def dense(model: nn.Module) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=FULL)


def assert_same(world, sharded, single):
    losses, trained = together(sharded, world), dense(sharded)
    if dist.get_rank():
        return
    expected = alone(single, world)
    assert losses == (expected if world == 2 else pytest.approx(expected, rel=1e-3)), "several gradients have several sums"
    for name, b in single.state_dict().items():
        a = trained[name]
        assert type(a) is torch.Tensor and a.shape == b.shape
        assert torch.equal(a, b) if world == 2 else (a - b).norm() < 0.05 * b.norm(), name


# format, experts, dim, [experts, in, out]
CASES = [
    (INT8, 4, 0, False),
    (INT8, 4, 1, False),
    (FP8_E4M3, 5, 0, False),  # not shared out evenly; a rank of four has none
    (FP6_E2M3, 5, 1, False),
    (FP6_E2M3, 4, 0, True),
]


@on_ranks(2, 4)
@pytest.mark.parametrize(("format", "count", "dim", "in_features_first"), CASES, ids=str)
def test_trains_as_one_process(world, format, count, dim, in_features_first):
    """With four ranks and rows of each expert, a shard has 24 rows, which no product could read."""
    options = {"count": count, "in_features_first": in_features_first}
    single, sharded = (mixtures(halo(1, format), **options) for _ in range(2))
    shard(sharded, dim)
    held, whole = shard_of(sharded[0].gate_up), single[0].gate_up
    assert held.shard_role is ShardRole.SHARD and held.turned_stack is None and whole.turned_stack is not None
    assert held.shape[1 - dim] == whole.shape[1 - dim] and held.shape[dim] < whole.shape[dim]
    assert_same(world, sharded, single)


@on_ranks(2)
def test_only_codes_are_sent(world):
    """Against the same model in bf16. Scales lie in the rows, or come in an all-gather of their own."""
    gathered, x = {}, torch.randn(16, 256, dtype=torch.bfloat16)
    sizes = {"count": 4, "d": 256, "f": 256, "layers": 1}
    for name, recipe, dim in (
        ("bf16", None, 0),
        ("int8", halo(1, INT8), 0),
        ("fp6", halo(1, FP6_E2M3), 0),
        ("int8, rows", halo(1, INT8), 1),
    ):
        model = shard(mixtures(recipe, **sizes).bfloat16(), dim)
        with OpLog() as log, Traffic() as traffic:
            model(x).float().square().mean().backward()
        gathered[name] = traffic.gathered
        names = [name for name, _ in log.calls]
        assert names.count("grouped_mm") == (3 if recipe else 0) and "rotate_quantize_" not in names
    assert gathered["bf16"] > 2 * 2 * 4 * 3 * 256 * 256, "gathered for forward and for backward"
    beyond = 0.01 + ALIGNMENT / (2 * 256)  # the router; the scale in each row
    for name, share in (("int8", 0.5), ("fp6", 0.375), ("int8, rows", 0.5)):
        assert share < gathered[name] / gathered["bf16"] <= share + beyond, name


@on_ranks(2)
def test_frozen_experts(world):
    for format, dim, count in ((INT8, 0, 4), (FP6_E2M3, 0, 3), (FP6_E2M3, 1, 4)):
        single, sharded = (mixtures(halo(1, format), frozen=True, count=count) for _ in range(2))
        shard(sharded, dim)
        assert shard_of(sharded[0].gate_up).master is None
        results = []
        for model in (single, sharded):
            x = batches(1, 1)[0, 0].requires_grad_()
            y = model(x)
            y.square().sum().backward()
            results.append((y, x.grad))
        assert all(map(torch.equal, *results)), (format, dim)
        for name, value in dense(sharded).items():
            torch.testing.assert_close(value, single.state_dict()[name], rtol=1e-6, atol=1e-6)


@on_ranks(2)
def test_codes_follow_state_dicts(world):
    """Ranks write their part of a state dict, a new one takes its place, and codes are those of the new values."""
    x = batches(1, 1)[0, 0]
    for dim in (0, 1):
        expected, model = mixtures(), shard(mixtures(), dim)
        model(x)
        with torch.no_grad():
            for value in expected.state_dict().values():
                value.mul_(-2)
            for value in model.state_dict().values():
                assert type(value.to_local()) is torch.Tensor
                value.to_local().mul_(-2)
        assert torch.equal(model(x), expected(x))
        other = shard(mixtures(), dim)
        other.load_state_dict({name: value + 0 for name, value in model.state_dict().items()}, assign=True)
        with OpLog() as log:
            y = other(x)
        assert torch.equal(y, expected(x))
        assert [name for name, _ in log.calls].count("grouped_mm") == 4
        fresh = shard(mixtures(), dim)
        set_model_state_dict(fresh, dense(expected), options=FULL)
        assert torch.equal(fresh(x), expected(x))


@on_ranks(4)
def test_checkpoints_cross_world_sizes(world, tmp_path):
    """Four shards are saved. Two, each held twice, and a plain model of one process are loaded, and the other way round."""
    x, halves = batches(1, 1)[0, 0], init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(mixtures())
    together(model, world, 1)
    expected = dense(model)
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{tmp_path}/four")
    for dim in (0, 1):
        two = shard(mixtures(), dim, mesh=halves)
        assert not torch.equal(two(x), model(x))
        dcp.load(state := get_model_state_dict(two), checkpoint_id=f"{tmp_path}/four")
        set_model_state_dict(two, state)
        assert torch.equal(two(x), model(x))
    if dist.get_rank() == 0:
        plain = mixtures(None)
        dcp.load(loaded := plain.state_dict(), checkpoint_id=f"{tmp_path}/four", no_dist=True)
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
        dcp.save(loaded, checkpoint_id=f"{tmp_path}/one", no_dist=True)
    dist.barrier()
    again = shard(mixtures())
    dcp.load(state := get_model_state_dict(again), checkpoint_id=f"{tmp_path}/one")
    set_model_state_dict(again, state)
    assert torch.equal(again(x), model(x))


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


@on_ranks(2)
def test_accumulated_checkpointed_and_in_two_dtypes(world):
    single = mixtures()
    expected = broadcast(alone(single, world))
    sharded = nn.Sequential(*map(Checkpointed, mixtures()))
    assert together(shard(sharded), world) == expected

    grads = []
    for synchronised in (True, False):  # each rank's gradients of two micro-batches are added before they are reduced
        sharded = shard(mixtures())
        for i, x in enumerate(batches(2, 1)[0]):
            sharded.set_requires_gradient_sync(synchronised or i == 1)
            sharded(x).square().mean().backward()
        grads.append([p.grad.full_tensor() for p in sharded.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)

    sharded, seen = mixtures(), []
    sharded[0].register_forward_hook(lambda m, *_: seen.append((m.down.dtype, m.down.operand.codes.dtype)))
    shard(sharded, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    losses = together(sharded, world)
    assert set(seen) == {(torch.bfloat16, torch.int8)} and losses != expected
    assert losses == pytest.approx(expected, rel=0.02)


@on_ranks(2)
def test_compiled(world):
    expected = broadcast(alone(mixtures(), world))
    for dim in (0, 1):
        sharded = mixtures()
        for layer in sharded:
            layer.compile(fullgraph=True, backend="aot_eager")
        assert together(shard(sharded, dim), world) == pytest.approx(expected, rel=1e-3)


@on_ranks(2)
def test_misuse(world):
    """Other shards have no codes; other ranks must have converted alike."""
    for first, dims in ((False, (2,)), (True, (1, 2))):
        for dim in dims:
            with pytest.warns(UserWarning, match=rf"parts along dim {dim} of a converted weight .* Shard it along dim 0"):
                model = shard(mixtures(in_features_first=first), dim)
            assert isinstance(model[0].down, DTensor) and shard_of(model[0].down) is None
    model = shard(mixtures(halo(dist.get_rank() % 2, INT8)))
    with pytest.raises(ValueError, match=r"a weight of \[4, 96, 64\] of experts is converted differently on ranks"):
        model(batches(1, 1)[0, 0])
    with pytest.raises(ValueError, match="it holds no codes, which are what FSDP sends"):
        shard(mixtures(keep_codes=False))
