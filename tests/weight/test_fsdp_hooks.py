"""FSDP2 on gloo with two and three ranks: a converted model trains as in one process, and the ranks send each other codes."""

import copy
import inspect
import io
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from halo_tensor import HaloWeight, balance_, dequantize_, halo_config, quantize_, recipe_config
from halo_tensor.fsdp import precompute_scales
from halo_tensor.recipe import FP6_E2M3
from halo_tensor.reference.packing import pack_rows
from halo_tensor.weight import ShardRole, fsdp_hooks
from halo_tensor.weight.sent_rows import ALIGNMENT
from halo_tensor.weight.sharded_parameters import shard_of
from tests.helpers import sharded as sharded_models
from tests.helpers.ranks import on_ranks
from tests.helpers.recording import OpLog
from tests.helpers.sharded import EVEN, MIXED, UNEVEN, Traffic, broadcast, make, shard

FULL = StateDictOptions(full_state_dict=True)


def data(model: nn.Module, steps: int, world: int, dtype=torch.float32):
    """Per step, per rank: x and target."""
    out, width = model[-1].weight.shape
    g = torch.Generator().manual_seed(2)
    x, target = (torch.randn(steps, world, 32, n, generator=g).to(dtype) for n in (width, out))
    return [list(zip(a, b, strict=True)) for a, b in zip(x, target, strict=True)]


def loss_of(model: nn.Module, batch) -> torch.Tensor:
    x, target = batch
    return nn.functional.mse_loss(model(x).to(target.dtype), target)


def alone(model: nn.Module, world: int, steps: int = 5, dtype=torch.float32) -> list[float]:
    return sharded_models.alone(model, data(model, steps, world, dtype), loss_of)


def together(model: nn.Module, world: int, steps: int = 5, dtype=torch.float32, precompute: bool = False) -> list[float]:
    after_step = [precompute_scales] if precompute else []
    return sharded_models.together(model, data(model, steps, world, dtype), loss_of, *after_step)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=FULL)


def assert_same(world: int, losses, expected, sharded: nn.Module, single: nn.Module) -> None:
    """Two gradients have one sum; three have several, by order."""
    trained = weights(sharded)
    if dist.get_rank():
        return
    if world == 2:
        assert losses == expected
    else:
        assert losses == pytest.approx(expected, rel=1e-3)
    for (name, a), b in zip(trained.items(), single.state_dict().values(), strict=True):
        assert type(a) is torch.Tensor and a.shape == b.shape, name
        if world == 2:
            assert torch.equal(a, b), name
        elif a.ndim == 2:  # AdamW moves a bias of no consequence by the sign of its gradient
            assert (a - b).norm() < 0.05 * b.norm(), name


# Checks of any number of ranks.


LEVELS, DTYPES, GRANULARITIES = (0, 1, 2), ("int8", "fp8", "fp6"), ("row", "tensor")
COMBINATIONS = list(itertools.product(LEVELS, DTYPES, GRANULARITIES))


@on_ranks(2)
@pytest.mark.parametrize(("level", "dtype", "granularity"), COMBINATIONS)
def test_trains_as_one_process(world, level, dtype, granularity):
    config = halo_config(level, dtype, granularity=granularity)
    single, sharded = make(config, MIXED), shard(make(config, MIXED))
    assert_same(world, together(sharded, world), alone(single, world), sharded, single)


@on_ranks(3)
@pytest.mark.parametrize(("level", "dtype", "granularity"), COMBINATIONS[::3] + COMBINATIONS[1::6])
def test_three_ranks_train_as_one_process(world, level, dtype, granularity):
    test_trains_as_one_process(world, level, dtype, granularity)


@on_ranks(2, 3)
def test_other_recipes(world):
    names = ("switchback", "ideal_int8", "hot_llm")
    for config in (*map(recipe_config, names), halo_config(dtype="bf16")):
        single, sharded = make(config), shard(make(config))
        assert_same(world, together(sharded, world, 3), alone(single, world, 3), sharded, single)


@on_ranks(2, 3)
def test_a_rank_without_rows(world):
    config, size = halo_config(1, "int8", granularity="tensor"), (128, world - 1)
    single, sharded = make(config, size), shard(make(config, size))
    assert_same(world, together(sharded, world, 4), alone(single, world, 4), sharded, single)


@on_ranks(2, 3)
def test_only_codes_are_sent(world):
    """Measured against the same model in bf16, of which norms and biases remain as they are."""
    gathered = {}
    for dtype in (None, "int8", "fp8", "fp6"):
        model = shard(make(dtype and halo_config(1, dtype), (384, 48), torch.bfloat16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(2):
            with OpLog() as log, Traffic() as traffic:
                model(torch.randn(16, 384, dtype=torch.bfloat16)).float().square().mean().backward()
            if step == 0:
                optimizer.step()
        gathered[dtype] = traffic.gathered
        if dtype is None:
            assert not log.calls
            continue
        names = [name for name, _ in log.calls]
        codes = torch.int8 if dtype == "int8" else torch.float8_e4m3fn
        assert log.products() == [codes] * 9, "three products of three layers"
        assert "rotate_quantize_" not in names and names.count("rotate_quantize") == 3, "of X alone"
    assert gathered[None] > 2 * 2 * 2 * 384 * 768, "of 2 bytes, 2 weights are gathered for forward and for backward"
    print(f"bytes gathered by {world} ranks: { {k: f'{v / gathered[None]:.3f}' for k, v in gathered.items()} }")
    beyond = 0.01 + ALIGNMENT / (2 * 384)  # norms and biases; the scale in each row
    assert gathered["int8"] <= (0.5 + beyond) * gathered[None] and gathered["fp8"] <= (0.5 + beyond) * gathered[None]
    assert gathered["fp6"] <= (0.38 + beyond) * gathered[None]


@on_ranks(2, 3)
def test_scales_are_precomputed_together(world):
    config = halo_config(0, "fp8", granularity="tensor")
    for size in (EVEN, UNEVEN):
        single, sharded = make(config, size), shard(make(config, size))
        precompute_scales(sharded)
        assert_same(world, together(sharded, world, precompute=True), alone(single, world), sharded, single)
        with Traffic() as traffic:
            sharded(torch.randn(8, size[0])).sum().backward()
            assert "allreduce_" not in traffic.calls
        for p in sharded.parameters():
            with torch.no_grad():
                p.mul_(1.5)
        with Traffic() as traffic:
            precompute_scales(sharded)
            assert traffic.calls == ["allreduce_"]
    precompute_scales(make(None))


@on_ranks(2, 3)
def test_a_shard_holds_codes_in_step(world):
    model = shard(make(halo_config(1, "int8"), UNEVEN))
    together(model, world, 2)
    for layer in (model[0].up, model[1]):
        assert isinstance(layer.weight, DTensor)
        rows = shard_of(layer.weight)
        assert rows.shard_role is ShardRole.SHARD and rows.shape[0] < layer.weight.shape[0]
        fresh = HaloWeight.from_hp(rows.master, rows.recipe).operand
        assert torch.equal(fresh.codes, rows.operand.codes) and torch.equal(fresh.scale, rows.operand.scale)
    state = torch.optim.AdamW(model.parameters()).state
    assert not any(isinstance(v, HaloWeight) for s in state.values() for v in s.values())


@on_ranks(2, 3)
def test_checkpoints_cross_world_sizes(world, tmp_path):
    config = halo_config(1, "int8")
    model = shard(make(config, UNEVEN))
    together(model, world, 2)
    state = get_model_state_dict(model)
    assert all(type(v.to_local()) is torch.Tensor for v in state.values()), "plain shards under plain names"
    dcp.save(state, checkpoint_id=f"{tmp_path}/{world}")
    expected = weights(model)
    assert list(expected) == list(make(None, UNEVEN).state_dict())
    # Saved by all ranks, read by one.
    if dist.get_rank() == 0:
        plain = make(None, UNEVEN)
        dcp.load(loaded := plain.state_dict(), checkpoint_id=f"{tmp_path}/{world}", no_dist=True)
        assert all(torch.equal(loaded[k], v) for k, v in expected.items())
        plain.load_state_dict(loaded)
        dcp.save(plain.state_dict(), checkpoint_id=f"{tmp_path}/{world}-1", no_dist=True)
    dist.barrier()
    # Saved by one, read by all ranks; then set from a dense state dict of rank 0.
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    for how in ("dcp", "full"):
        other = shard(make(config, UNEVEN))
        for p in other.parameters():
            torch.nn.init.zeros_(p)
        if how == "dcp":
            dcp.load(state := get_model_state_dict(other), checkpoint_id=f"{tmp_path}/{world}-1")
            set_model_state_dict(other, state)
        else:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(other, dict(expected) if dist.get_rank() == 0 else {}, options=options)
        assert all(torch.equal(v, expected[k]) for k, v in weights(other).items()), how
        assert torch.equal(other(x), model(x)), how


@on_ranks(2, 3)
def test_loading_with_assign(world):
    """A state dict whose tensors take the place of the shards: they are converted, whether it has been gathered before or not."""
    for dtype in ("int8", "fp6"):
        config, x = halo_config(1, dtype), torch.randn(16, EVEN[0])
        model = shard(make(config))
        expected = model(x)
        state = {key: value + 0 for key, value in model.state_dict().items()}
        for before in (False, True):
            other = shard(make(config))
            if before:
                other(x)
            other.load_state_dict(state, assign=True)
            with OpLog() as log:
                assert torch.equal(other(x), expected)
            assert log.calls, "in high precision"
            assert all(shard_of(layer.weight).operand is not None for layer in (other[0].up, other[1]))


@on_ranks(2, 3)
def test_writes_to_state_dicts(world):
    """Before sharding and after it, as dcp.load makes them; and without one nothing is quantised anew."""
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(4))
    for dtype, granularity, size in (("int8", "row", MIXED), ("fp6", "row", EVEN), ("int8", "tensor", MIXED)):
        config = halo_config(1, dtype, granularity=granularity)
        expected, model = make(config, size), make(config, size)

        def write(model):
            with torch.no_grad():
                for value in model.state_dict().values():
                    (value.to_local() if isinstance(value, DTensor) else value).mul_(-2)

        write(expected), write(model)
        shard(model)
        assert torch.equal(model(x), expected(x)), (dtype, granularity)
        write(expected), write(model)
        assert torch.equal(model(x), expected(x)), (dtype, granularity)
        held = model.state_dict()  # ops on the DTensor itself, also of a state dict from before a forward
        for _ in range(2):
            with torch.no_grad():
                for ours, plain in zip(held.values(), expected.state_dict().values(), strict=True):
                    ours.mul_(-0.5), plain.mul_(-0.5)
            assert torch.equal(model(x), expected(x)), (dtype, granularity)
        if granularity == "row":  # as is a write that changes no version
            for state in (model.state_dict(), expected.state_dict()):
                for value in state.values():
                    (value.to_local() if isinstance(value, DTensor) else value).data.mul_(3)
            assert torch.equal(model(x), expected(x)), (dtype, granularity)
        if dist.get_rank() == 0:
            model.state_dict()  # reads, and the other ranks do not
        versions = [shard_of(p).codes._version for p in model.parameters() if isinstance(shard_of(p), HaloWeight)]
        model(x)
        assert versions == [shard_of(p).codes._version for p in model.parameters() if isinstance(shard_of(p), HaloWeight)]


@on_ranks(2, 3)
def test_collectives(world):
    """Write to weights as other ops do, and DDP and ZeRO are made of them; a weight that is only sent keeps its codes."""
    rank, x = dist.get_rank(), torch.randn(8, 64)

    def layer(seed, frozen=False):
        torch.manual_seed(seed)
        linear = nn.Linear(64, 64, bias=False).bfloat16()
        quantize_(linear, halo_config(1, "int8", min_features=0, frozen=frozen), filter_fn=lambda *_: True)
        return linear

    def in_step(linear):
        fresh = HaloWeight.from_hp(linear.weight.dequantize().detach(), linear.weight.recipe).codes
        return torch.equal(linear.weight.operand.codes, fresh)  # weight.codes would be brought up to date here

    first = layer(0).weight.master
    for detached in (lambda weight: weight.data, lambda weight: weight.detach()):
        linear = layer(rank)
        dist.broadcast(detached(linear.weight), 0)
        assert torch.equal(linear.weight.master, first) and in_step(linear)
    linear = layer(rank)
    dist.all_reduce(linear.weight.data, async_op=True).wait()
    torch.testing.assert_close(linear.weight.master, sum(layer(i).weight.master for i in range(world)), rtol=0.02, atol=0.02)
    assert in_step(linear)
    linear = layer(rank)
    parts = [torch.empty_like(first) for _ in range(world)]
    parts[0] = linear.weight.data
    dist.all_gather(parts, layer(rank + 5).weight.data)
    assert torch.equal(linear.weight.master, layer(5).weight.master) and in_step(linear)
    held = layer(rank, frozen=True)
    before = held.weight.codes.clone()
    dist.broadcast(held.weight.data, 0)
    assert torch.equal(held.weight.codes, before) == (rank == 0)
    held = layer(0, frozen=True)
    DistributedDataParallel(nn.Sequential(held, nn.Linear(64, 64)))
    assert torch.equal(held.weight.codes, layer(0, frozen=True).weight.codes), "DDP sends every weight to itself"

    losses = []
    for config in (None, halo_config(1, "int8", min_features=0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        if config:
            quantize_(model, config)
        model = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05), losses


@on_ranks(2, 3)
def test_frozen_weights(world):
    """They are sharded, sent and held as codes, and give what they give in one process."""
    for dtype, granularity, size in itertools.product(("int8", "fp6"), ("row", "tensor"), (EVEN, UNEVEN)):
        model = make(None, size).requires_grad_(False)
        quantize_(model, halo_config(1, dtype, granularity=granularity), filter_fn=lambda m, _: isinstance(m, nn.Linear))
        single = copy.deepcopy(model)
        shard(model)
        assert shard_of(model[0].up.weight).master is None
        outputs = []
        for m in (single, model):
            x = torch.randn(16, size[0], generator=torch.Generator().manual_seed(4), requires_grad=True)
            y = m(x)
            y.square().sum().backward()
            outputs += [y.detach(), x.grad]
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3]), (dtype, granularity, size)
        state = weights(model)
        for name, value in state.items():  # rows are un-rotated in products of other sizes: the last bit may differ
            torch.testing.assert_close(value, single.state_dict()[name], rtol=1e-6, atol=1e-6)
        set_model_state_dict(model, {k: 2 * v for k, v in state.items()}, options=FULL)
        for name, value in weights(model).items():
            assert (value - 2 * state[name]).norm() < (0.02 if dtype == "int8" else 0.06) * value.norm() + 1e-9, name


@on_ranks(2, 3)
def test_misuse(world):
    with pytest.raises(ValueError, match=r"cannot be sharded: .* not whole blocks of 32"):
        shard(make(recipe_config("jetfire"), EVEN))
    with pytest.warns(UserWarning, match="trains in high precision"):
        fully_shard(make(halo_config(1, "int8"))[0], shard_placement_fn=lambda p: Shard(p.ndim - 1))
    model = shard(make(halo_config(1, "int8")))
    with pytest.raises(ValueError, match="sharded by FSDP"):
        dequantize_(model)
    with pytest.raises(ValueError, match="weight is a DTensor"):
        quantize_(model[1], halo_config(1, "int8"))


@on_ranks(2, 3)
def test_unlike_configs(world):
    """An error on every rank, and none of them waits for the others."""
    for mine in (halo_config(dist.get_rank() % 2, "int8"), halo_config(1, "int8" if dist.get_rank() else "fp8")):
        model = shard(make(mine))
        with pytest.raises(ValueError, match="call quantize_ with the same config on every rank"):
            model(torch.randn(4, 96))


@on_ranks(2, 3)
def test_balanced_weights(world):
    """Every shard has the whole gain, and nothing is sent of it."""
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(6)) * torch.logspace(-1, 1, 128)
    for config, size in (
        (halo_config(1, "int8"), EVEN),
        (halo_config(2, "fp6"), UNEVEN),
        (halo_config(0, "int8", granularity="tensor"), MIXED),
    ):
        models, gathered = [make(config, size) for _ in range(3)], []
        for model in models[:2]:
            assert balance_(model, x[:, : size[0]]) == 3
        single, sharded = models[0], shard(models[1])
        assert torch.equal(shard_of(sharded[1].weight).gain, single[1].weight.gain)
        for model in (sharded, shard(models[2])):
            with Traffic() as traffic:
                model(x[:, : size[0]])
            gathered.append(traffic.gathered)
        assert gathered[0] == gathered[1]
        if size is EVEN:
            sharded[0].compile(fullgraph=True, backend="aot_eager")
        assert_same(world, together(sharded, world, 4), alone(single, world, 4), sharded, single)
        rows = shard_of(sharded[1].weight)
        fresh = HaloWeight.from_hp(rows.master, rows.recipe, gains=single[1].weight.gains).operand
        if config.granularity == "row":
            assert torch.equal(fresh.packed().codes, rows.operand.packed().codes)
    frozen = make(None).requires_grad_(False)
    quantize_(frozen, halo_config(1, "int8", frozen=True), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    balance_(frozen, x[:, :96])
    expected = frozen(x[:, :96])
    assert torch.equal(shard(frozen)(x[:, :96]), expected)

    model = make(halo_config(1, "int8"))
    balance_(model, x[:, :96] ** (1 + dist.get_rank()))
    with pytest.raises(ValueError, match="and balance_ with the same batch"):
        shard(model)(x[:, :96])
    with pytest.raises(ValueError, match=r"is sharded by FSDP; call balance_ before fully_shard"):
        balance_(model, x[:, :96])


# Checks of ways to use FSDP, with two ranks.


@on_ranks(2)
def test_resharding_and_mixed_precision(world):
    config = halo_config(1, "int8")
    bf16 = torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
    single = make(config)
    expected = broadcast(alone(single, world, 5))
    for options in (
        {"reshard_after_forward": False},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))},
        {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))},
    ):
        sharded = shard(make(config), **options)
        assert_same(world, together(sharded, world, 5), expected, sharded, single)
    sharded = shard(make(config), mp_policy=policy)
    seen = []
    sharded[0].up.register_forward_hook(lambda m, *_: seen.append((m.weight.dtype, m.weight.operand.codes.dtype)))
    losses = together(sharded, world, 5)
    assert set(seen) == {(bf16, torch.int8)}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in sharded.parameters())
    assert losses != expected and losses == pytest.approx(expected, rel=0.02)


@on_ranks(2)
def test_accumulation_checkpointing_and_compilation(world):
    config = halo_config(2, "int8")
    single = make(config)
    expected = broadcast(alone(single, world, 4))

    sharded = make(config)
    for block in sharded[:1]:
        block.checkpointed = True
    assert_same(world, together(shard(sharded), world, 4), expected, sharded, single)

    # Each rank's gradients of two micro-batches are added before they are reduced.
    grads = []
    for synchronised in (True, False):
        sharded = shard(make(config))
        for i, (x, target) in enumerate(data(sharded, 1, 2)[0]):
            sharded.set_requires_gradient_sync(synchronised or i == 1)
            nn.functional.mse_loss(sharded(x), target).backward()
        grads.append([p.grad.full_tensor() for p in sharded.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)

    targets = []

    def record(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    sharded = make(config)
    sharded[0].compile(fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    shard(sharded)
    assert together(sharded, world, 4) == pytest.approx(expected, rel=1e-3)
    assert targets.count(torch.ops.halo.scaled_mm.default) == 6, "three products of two layers"
    assert torch.ops.halo.rotate_quantize_.default not in targets


@on_ranks(2)
def test_from_meta(world):
    """The usual way to a large model: made and sharded without memory, then loaded."""
    config = halo_config(1, "int8")
    expected = make(config).state_dict()
    with torch.device("meta"):
        model = make(config)
    shard(model).to_empty(device="cpu")
    set_model_state_dict(model, expected, options=FULL)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model(x), make(config)(x))


class _Collectives:
    """Calls of every op of a namespace, whose tensors are all converted weights."""

    def __init__(self, world: int):
        self.rank, self.world, group = dist.get_rank(), world, dist.group.WORLD
        self.given = {"group_name": group.group_name, "process_group": group.boxed(), "group_size": world}
        self.given |= {name: [32 // world] * world for name in ("output_split_sizes", "input_split_sizes")}
        self.given |= {"device_ids": [], "sparse_indices": None, "wait_all_ranks": False, "timeout": 20000}
        calls = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                calls.append((func, args))
                return func(*args, **(kwargs or {}))

        with Mode():
            dist.all_reduce(torch.ones(1))
        self.boxed_sum = next(args[2] for func, args in calls if func.namespace == "c10d")  # Python cannot make one

    @staticmethod
    def ops(namespace: str) -> list:
        names = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{namespace}::")}
        return [getattr(getattr(torch.ops, namespace), name).default for name in sorted(names)]

    def __call__(self, op) -> dict[str, list]:
        """The weights that were passed, and what they were, by the name of the argument."""
        before: dict[str, list] = {}

        def weights(name: str, kind: str):
            rows = self.rows(op._opname, name)
            if "List[List" in kind:
                root = self.rank == 0 or not op._opname.startswith(("gather", "scatter"))
                lists = [[weight(name, rows) for _ in range(self.world)]] if root else []
                return [[each] for each in lists[0]] if "coalesced" in op._opname else lists  # a list per rank
            if "List" in kind:
                return [weight(name, rows) for _ in range(self.world if op._opname.startswith("alltoall") else 1)]
            return weight(name, rows)

        def weight(name: str, rows: int):
            linear = nn.Linear(64, rows, bias=False)
            quantize_(linear, halo_config(1, "int8", min_features=0), filter_fn=lambda *_: True)
            before.setdefault(name, []).append((linear.weight, linear.weight.master.clone()))
            return linear.weight.detach()

        values = {}
        for argument in op._schema.arguments:
            kind = str(argument.type)
            if "Tensor" in kind and "Optional" not in kind:
                values[argument.name] = weights(argument.name, kind)
            elif argument.name == "reduce_op":
                values["reduce_op"] = self.boxed_sum if op.namespace == "c10d" else "sum"
            elif argument.name in self.given:
                values[argument.name] = self.given[argument.name]
            elif not argument.has_default_value():
                values[argument.name] = 0
        self.run(op, values)
        return before

    def rows(self, op: str, argument: str) -> int:
        flat = any(part in op for part in ("base", "tensor", "single"))
        many = "input" if "reduce_scatter" in op else "out"
        grows = flat and ("gather" in op or "scatter" in op) and argument.startswith(many)
        return 32 * (self.world if grows else 1)

    def run(self, op, values: dict) -> None:
        """Of what one rank sends to another, one rank runs the op, and the other what it takes."""
        sends, receives = "send" in op._opname, "recv" in op._opname
        if "p2p" in op._opname:
            values |= {"op_list": [["isend", "irecv"][self.rank % 2]], "peer_list": [self.rank ^ 1], "tag_list": [0]}
            sends = receives = None
        if sends or receives:
            values |= {name: 1 if sends else 0 for name in ("dst", "src") if name in values}
            if self.rank == (1 if sends else 0):
                other = torch.ones(32, 64)
                dist.recv(other, 0) if sends else dist.send(other, 1)
            if self.rank != (0 if sends else 1):
                return
        positional = [values.pop(a.name) for a in op._schema.arguments if a.name in values and not a.kwarg_only]
        out = op(*positional, **values)
        if sends:
            out.wait() if op.namespace == "c10d" else torch.ops._c10d_functional.wait_tensor(out)


@on_ranks(2)
def test_every_collective(world):
    """Of this version of PyTorch: codes are in step with the master as soon as an op returns, and inputs are not written."""
    collectives, changed = _Collectives(world), set()
    torch.manual_seed(dist.get_rank())
    for namespace in ("c10d", "_c10d_functional"):
        for op in collectives.ops(namespace):
            with torch.no_grad():
                passed = collectives(op)
            declared = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
            for name, weights in passed.items():
                for weight, before in weights:
                    fresh = HaloWeight.from_hp(weight.master, weight.recipe).operand
                    assert torch.equal(weight.operand.codes, fresh.codes), (op, name)
                    if not torch.equal(weight.master, before):
                        changed.add(op._opname)
                        assert name in declared or not name.startswith("input"), (op, name)
            dist.barrier()
    expected = {"allreduce_", "reduce_scatter_", "allgather_", "all_reduce_", "alltoall_base_", "all_gather_into_tensor_out"}
    assert expected <= changed
    assert dist.get_rank() != 1 or changed >= {"broadcast_", "recv_", "irecv", "batch_p2p_ops"}


# Hooks, without other ranks.


@pytest.mark.parametrize("dtype", ["int8", "fp6"])
def test_what_is_sent_is_made_once_and_is_up_to_date(dtype):
    linear = nn.Linear(64, 32, bias=False)
    quantize_(linear, halo_config(1, dtype, min_features=0))
    linear.weight.operand = linear.weight.operand.packed()  # as a shard holds it
    fsdp_hooks._agreed.add(linear)  # there is no other rank to ask

    def send(weight):
        return weight.fsdp_pre_all_gather(SimpleNamespace(size=lambda: 1), weight.shape, (64, 1), linear, None)[0][0]

    first, again = send(linear.weight), send(linear.weight)
    assert first is again
    with torch.no_grad():
        linear.weight.mul_(-1)
    expected = HaloWeight.from_hp(linear.weight.dequantize(), linear.weight.recipe).operand.codes
    expected = pack_rows(expected, FP6_E2M3) if dtype == "fp6" else expected.view(torch.uint8)
    assert torch.equal(send(linear.weight), expected), "the codes of the weight as it is now"
    torch.save(linear.weight, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded.operand.codes, linear.weight.operand.codes) and loaded.codes_state.sent is None


def test_fsdp_reads_the_signature_of_the_hook():
    weight = nn.Linear(64, 32, bias=False)
    quantize_(weight, halo_config(1, "int8", min_features=0))
    hook = weight.weight.fsdp_pre_all_gather
    assert list(inspect.signature(hook).parameters) == ["mesh", "outer_size", "outer_stride", "module", "mp_policy"]
    assert inspect.signature(hook) is inspect.signature(hook), "an attribute: FSDP asks in every call"
