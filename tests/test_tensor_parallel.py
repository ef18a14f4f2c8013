"""Tensor and sequence parallelism on gloo: ranks train as one process, and send each other codes."""

import math
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from halo_tensor import HadamardQuantTensor, HaloWeight, balance_, halo_config, quantize_
from halo_tensor.tensor_parallel import HaloColwiseParallel, HaloPrepareInput, HaloRowwiseParallel
from halo_tensor.weight.sharded_parameters import shard_of
from tests.helpers.ranks import on_ranks
from tests.helpers.recording import OpLog

WIDTH, HIDDEN = 256, 512
INT8 = halo_config(1, "int8")
FULL = StateDictOptions(full_state_dict=True)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x):
        return x + self.mlp(torch.tanh(x))


def make(config=INT8, kind=Mlp) -> nn.Module:
    torch.manual_seed(1)
    model = kind()
    if config is not None:
        quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))
    return model


def parallelize(model: nn.Module, mesh, sequence: bool, prefix: str = "", **options) -> nn.Module:
    layout = Shard(1) if sequence else Replicate()
    names = [f"{prefix}{name}" for name in ("gate", "up", "down")]
    styles = HaloColwiseParallel(), HaloColwiseParallel(), HaloRowwiseParallel(output_layouts=layout, **options)
    plan = dict(zip(names, styles, strict=True))
    return parallelize_module(model, mesh, plan | {prefix.rstrip("."): HaloPrepareInput(input_layouts=layout)})


def batches(count: int):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 2, 64, WIDTH, generator=generator) for _ in range(count)]


def own(x: torch.Tensor, mesh, sequence: bool) -> torch.Tensor:
    """This rank's tokens."""
    return x.chunk(mesh.size(), 1)[mesh.get_local_rank()].contiguous() if sequence else x


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


def run(model: nn.Module, x: torch.Tensor, e: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and all gradients, of a step."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(e)
    grads = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return {"y": y.detach(), "x": x.grad} | grads


class Sent(TorchDispatchMode):
    """Records collectives: name, dtype and number of elements of the result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, (HadamardQuantTensor, HaloWeight, DTensor)) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        collective = func.namespace == "_c10d_functional" and func._opname != "wait_tensor"
        if collective or func._opname == "gather_tokens":
            self.calls.append((func._opname, out.dtype, out.numel()))
        return out

    def gathered(self) -> int:
        """Bytes."""
        return sum(dtype.itemsize * count for name, dtype, count in self.calls if name == "all_gather_into_tensor")


@pytest.fixture(params=[False, True], ids=["replicated", "sequence"])
def sequence(request) -> bool:
    return request.param


@on_ranks(2, 4)
def test_ranks_train_as_one_process(world, sequence):
    """X of a rowwise layer and the gradients of colwise ones have scales of their own on each rank, over fewer elements than
    one process has: errors are about as large, and not the same."""
    mesh = init_device_mesh("cpu", (world,))
    dense, alone, ranks = make(None), make(), parallelize(make(), mesh, sequence)
    x, e = batches(1)[0]
    exact, one = run(dense, x, e), run(alone, x, e)
    with OpLog() as log:
        parts = run(ranks, own(x, mesh, sequence), own(e, mesh, sequence))
    assert log.products() == [torch.int8] * 9
    for name in exact.keys() - {"down.bias"}:
        cut = name in ("y", "x")
        a, b = (own(t[name], mesh, sequence) if cut else t[name] for t in (exact, one))
        assert 0.6 * error(b, a) < error(parts[name], a) < 1.15 * error(b, a) < 0.05, name
        assert not torch.equal(parts[name], b), name
    torch.testing.assert_close(parts["down.bias"], exact["down.bias"])

    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (alone, ranks)]
    losses = []
    for x, target in batches(4):
        one = F.mse_loss(alone(x), target)
        one.backward()
        part = F.mse_loss(ranks(own(x, mesh, sequence)), own(target, mesh, sequence)) / (world if sequence else 1)
        part.backward()
        part = part.detach()
        dist.all_reduce(part, dist.ReduceOp.SUM if sequence else dist.ReduceOp.AVG) if sequence else None
        losses.append((one.item(), part.item()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in losses), losses
    assert len({round(a, 4) for a, _ in losses}) == 4


@on_ranks(2)
def test_tokens_are_gathered_once_as_codes(world):
    mesh = init_device_mesh("cpu", (world,))
    x, e = (own(t, mesh, True).bfloat16() for t in batches(1)[0])
    model, tokens = parallelize(make().bfloat16(), mesh, True), 2 * 64
    x.requires_grad_()
    with Sent() as forward:
        y = model(x)
    assert forward.calls == [
        ("all_gather_into_tensor", torch.int8, tokens * WIDTH),
        ("all_gather_into_tensor", torch.float32, tokens),
        ("reduce_scatter_tensor", torch.bfloat16, tokens * WIDTH // world),
    ]
    assert forward.gathered() == tokens * (WIDTH + 4)
    with Sent() as backward:
        y.backward(e)
    assert backward.calls == [
        ("all_reduce", torch.bfloat16, WIDTH),
        ("all_gather_into_tensor", torch.bfloat16, tokens * WIDTH),
        ("reduce_scatter_tensor", torch.bfloat16, tokens * WIDTH // world),
    ]
    halved = parallelize(make().bfloat16(), mesh, True, gathered_grad="int8")
    y = halved(x)
    with Sent() as backward:
        y.backward(e)
    assert backward.gathered() == tokens * (WIDTH + 2 * WIDTH // 128)


@on_ranks(2)
def test_gradients_gathered_as_codes(world):
    """They are rounded once more."""
    mesh = init_device_mesh("cpu", (world,))
    x, e = (own(t, mesh, True) for t in batches(1)[0])
    plain, halved = (run(parallelize(make(), mesh, True, gathered_grad=g), x, e) for g in ("dense", "int8"))
    assert torch.equal(plain["y"], halved["y"])
    for name in plain.keys() - {"y", "down.bias"}:
        assert 0.002 < error(halved[name], plain[name]) < 0.025, name


@on_ranks(2)
def test_other_recipes(world):
    """Of a recipe whose codes of X depend on all tokens, or that quantises X twice, X is gathered in high precision."""
    mesh = init_device_mesh("cpu", (world,))
    x, e = batches(1)[0]
    configs = {
        torch.float32: halo_config(1, "int8", granularity="tensor"),
        torch.uint8: halo_config(2, "fp8"),
        torch.int8: halo_config(0, "int8", keep_codes=False),
    }
    for gathered, config in configs.items():
        exact, one = run(make(None), x, e), run(make(config), x, e)
        model = parallelize(make(config), mesh, True)
        with Sent() as sent:
            parts = run(model, own(x, mesh, True), own(e, mesh, True))
        name = "gather_tokens" if gathered == torch.float32 else "all_gather_into_tensor"
        assert sent.calls[0] == (name, gathered, 2 * 64 * WIDTH)
        for name in exact.keys() - {"down.bias"}:
            a, b = (own(t[name], mesh, True) if name in ("y", "x") else t[name] for t in (exact, one))
            assert 0.5 * error(b, a) < error(parts[name], a) < 1.15 * error(b, a), (name, config)


@on_ranks(2)
def test_balanced_layers(world):
    mesh = init_device_mesh("cpu", (world,))
    x, e = batches(1)[0]
    x[..., 3] *= 60
    exact, plain = run(make(None), x, e), run(parallelize(make(), mesh, True), own(x, mesh, True), own(e, mesh, True))
    model = make()
    balance_(model, x)
    assert model.gate.weight.gain is not None
    parts = run(parallelize(model, mesh, True), own(x, mesh, True), own(e, mesh, True))
    assert error(parts["y"], own(exact["y"], mesh, True)) < 0.8 * error(plain["y"], own(exact["y"], mesh, True))
    assert error(parts["gate.weight"], exact["gate.weight"]) < 0.04


@on_ranks(4)
def test_a_mesh_with_fsdp_and_checkpoints(world, sequence):
    """2 × 2 ranks train as one process, and their checkpoint loads on 4 ranks and into one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp, dp = mesh["tp"], mesh["dp"]
    alone, ranks = make(), fully_shard(parallelize(make(), tp, sequence), mesh=dp)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (alone, ranks)]
    for replicas in zip(batches(3), batches(6)[3:], strict=True):
        for replica, (x, target) in enumerate(replicas):
            loss = F.mse_loss(alone(x), target)
            (loss / 2).backward()
            if replica == dp.get_local_rank():
                part = F.mse_loss(ranks(own(x, tp, sequence)), own(target, tp, sequence)) / (2 if sequence else 1)
                part.backward()
                part = part.detach()
                dist.all_reduce(part, group=tp.get_group()) if sequence else None
                assert part.item() == pytest.approx(loss.item(), rel=1e-3)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    shard = shard_of(ranks.down.weight)
    assert shard.shape == (WIDTH // 2, HIDDEN // 2) and shard.codes.dtype == torch.int8

    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)
    dcp.save(ranks.state_dict(), checkpoint_id=path[0])
    full = get_model_state_dict(ranks, options=FULL)
    whole = init_device_mesh("cpu", (world,))
    others = [parallelize(make(), whole, sequence) for _ in range(2)]
    state = others[0].state_dict()
    dcp.load(state, checkpoint_id=path[0])
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(others[1], dict(full), options=broadcast)
    x = own(batches(1)[0][0], whole, sequence)
    assert torch.equal(others[0](x), others[1](x)), "codes follow"
    assert shard_of(others[0].gate.weight).shape == (HIDDEN // world, WIDTH)
    if dist.get_rank() == 0:
        alone.load_state_dict(full)
    dist.barrier()
    values = others[0].state_dict()["down.weight"].full_tensor()
    if dist.get_rank() == 0:
        assert torch.equal(values, alone.down.weight)


@on_ranks(2)
def test_frozen_layers(world):
    """Their codes are cut as they are, packed fp6 too; a trained adapter beside them would get its gradient of X."""
    mesh = init_device_mesh("cpu", (world,))
    x, e = batches(1)[0]
    for dtype in ("int8", "fp6"):
        dense = make(None).requires_grad_(False)
        alone, ranks = make(None).requires_grad_(False), make(None).requires_grad_(False)
        for model in (alone, ranks):
            quantize_(model, halo_config(1, dtype), filter_fn=lambda module, _: isinstance(module, nn.Linear))
        parallelize(ranks, mesh, True)
        assert shard_of(ranks.down.weight).master is None
        results = []
        for model, cut in ((dense, False), (alone, False), (ranks, True)):
            a = own(x, mesh, cut).clone().requires_grad_()
            y = model(a)
            y.backward(own(e, mesh, cut))
            results.append([own(t, mesh, not cut) for t in (y.detach(), a.grad)])
        for exact, one, part in zip(*results, strict=True):
            assert 0.6 * error(one, exact) < error(part, exact) < 1.15 * error(one, exact)


@on_ranks(2)
def test_other_readers_of_a_prepared_input(world):
    """Any function but a converted layer reads the dense value, exactly."""
    mesh = init_device_mesh("cpu", (world,))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN // world, bias=False)

        def forward(self, x):
            assert x.shape == (2, 64, WIDTH) and x.dtype == torch.float32 and x.size(1) == 64
            with torch.no_grad():
                mean = x.mean()
            assert "tokens split" in repr(x)
            return self.a(x), self.b(x), mean

    torch.manual_seed(0)
    model = Two()
    quantize_(model, halo_config(1, "int8"), filter_fn=lambda module, name: name == "a", min_gain=0)
    parallelize_module(model, mesh, {"a": HaloColwiseParallel(), "": HaloPrepareInput(input_layouts=Shard(1))})
    whole = batches(1)[0][0]
    x = own(whole, mesh, True).requires_grad_()
    with OpLog() as log:
        a, b, mean = model(x)
    assert log.products() == [torch.int8] and a.shape == b.shape
    assert torch.equal(b, F.linear(whole, model.b.weight)) and mean == whole.mean()
    b.sum().backward()
    expected = model.b.weight.sum(0).detach().expand_as(x) * world
    torch.testing.assert_close(x.grad, expected)


@on_ranks(2)
def test_layouts_of_inputs_and_outputs(world):
    """A layer takes plain tensors and DTensors, and gathers tokens itself where nothing has prepared them."""
    mesh = init_device_mesh("cpu", (world,))
    whole = batches(1)[0][0]
    layer = nn.Sequential(nn.Linear(WIDTH, HIDDEN))
    quantize_(layer, halo_config(1, "int8"))
    parallelize_module(layer, mesh, {"0": HaloColwiseParallel(input_layouts=Shard(1), use_local_output=False)})
    expected = layer(own(whole, mesh, True))
    assert expected.placements == (Shard(2),) and expected.shape == (2, 64, HIDDEN)
    split = DTensor.from_local(own(whole, mesh, True), mesh, [Shard(1)])
    same = DTensor.from_local(whole, mesh, [Replicate()])
    for x in (split, same):
        assert torch.equal(layer(x).to_local(), expected.to_local())
    for wrong in (Shard(2), Partial()):
        with pytest.raises(ValueError, match="takes one that is whole, or split along tokens"):
            layer(DTensor.from_local(whole, mesh, [wrong], run_check=False))
    down = nn.Sequential(nn.Linear(HIDDEN, WIDTH))
    quantize_(down, halo_config(1, "int8"))
    parallelize_module(down, mesh, {"0": HaloRowwiseParallel(output_layouts=Shard(1), use_local_output=False)})
    y = down(expected)
    assert y.placements == (Shard(1),) and y.shape == (2, 64, WIDTH)
    with pytest.raises(ValueError, match="takes one whose in_features are split"):
        down(same)


@on_ranks(2)
def test_what_is_refused(world):
    mesh = init_device_mesh("cpu", (world,))

    def split(layer, style, config=INT8):
        model = nn.Sequential(layer)
        if config is not None:
            quantize_(model, config, filter_fn=lambda module, _: True, min_gain=0)
        return parallelize_module(model, mesh, {"0": style})

    with pytest.raises(ValueError, match=r"2 ranks do not divide 129 out_features"):
        split(nn.Linear(128, 129), HaloColwiseParallel())
    with pytest.raises(ValueError, match=r"192 of 384 in_features, which are not whole blocks of the rotation, 128"):
        split(nn.Linear(384, 128), HaloRowwiseParallel())
    with pytest.raises(ValueError, match=r"72 of 144 out_features, no multiple of 16"):
        split(nn.Linear(128, 144), HaloColwiseParallel())
    with pytest.raises(ValueError, match=r"this Linear is not one. Call quantize_ before .* torch's ColwiseParallel"):
        split(nn.Linear(128, 128), HaloColwiseParallel(), None)
    layer = nn.Linear(128, 256)
    model = split(layer, HaloColwiseParallel())
    with pytest.raises(ValueError, match="sharded already"):
        parallelize_module(model, mesh, {"0": HaloColwiseParallel()})
    with pytest.raises(ValueError, match="converted differently on the ranks"):
        split(nn.Linear(128, 256), HaloColwiseParallel(), halo_config(dist.get_rank(), "int8"))
    with pytest.raises(ValueError, match="HaloRowwiseParallel: output_layouts is Replicate"):
        HaloRowwiseParallel(output_layouts=Partial())
    with pytest.raises(ValueError, match="'dense' or 'int8'"):
        HaloRowwiseParallel(output_layouts=Shard(1), gathered_grad="bf16")
    with pytest.raises(ValueError, match=r"needs output_layouts=Shard\(1\)"):
        HaloRowwiseParallel(gathered_grad="int8")
    with pytest.raises(ValueError, match="multiple of 128"):
        split(nn.Linear(256, 192), HaloRowwiseParallel(output_layouts=Shard(1), gathered_grad="int8"))


@on_ranks(2)
def test_compiled(world):
    """A graph trains as eager code does, bit for bit, and gathers codes only."""
    mesh, graphs = init_device_mesh("cpu", (world,)), []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    eager = parallelize(make(kind=Block), mesh, True, "mlp.")
    compiled = parallelize(make(kind=Block), mesh, True, "mlp.")
    compiled.compile(fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (eager, compiled)]
    for x, e in batches(2):
        a, b = (run(model, own(x, mesh, True), own(e, mesh, True)) for model in (eager, compiled))
        for name in a:
            assert torch.equal(a[name], b[name]), name
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            model(own(x, mesh, True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    called = [[node for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs[:2]]
    gathers, scatters = (
        [[n.meta["val"].dtype for n in nodes if name in str(n.target)] for nodes in called]
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor")
    )
    assert gathers == [[torch.int8, torch.float32], [torch.float32]]
    assert [len(each) for each in scatters] == [1, 1]
    assert not any("gather_tokens" in str(n.target) for nodes in called for n in nodes)
    assert math.isfinite(compiled.mlp.down.weight.full_tensor().norm())
