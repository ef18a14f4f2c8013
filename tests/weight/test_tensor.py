"""A converted layer in the life of a training script: optimisers, checkpoints, copies, checkpointing, averaging."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from halo_tensor import HaloWeight, dequantize_, halo_config, ops, quantize_
from halo_tensor.weight import ShardRole
from tests.helpers.recording import OpLog, saved_bytes
from tests.helpers.training import OPTIMIZERS, make, step_alike, train
from tests.helpers.weights import converted, in_step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_the_master_as_it_moves_a_plain_weight(name):
    """Given the same gradients, a converted and a plain model end with the same weights, bit for bit."""
    plain, model = make(converted=False), make()
    optimizer = step_alike(name, plain, model)
    for (key, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(getattr(q, "master", q), p), key
    weight = model[0].up.weight
    assert isinstance(weight, HaloWeight)
    states = optimizer.state[weight].values()
    assert all(type(v) is torch.Tensor for v in states if isinstance(v, torch.Tensor)), "its state is plain"


def test_lbfgs_runs():
    model = make(blocks=1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x = torch.randn(16, 128)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert closure() < first


def test_training_follows_high_precision():
    plain, ours = train(make(converted=False), 20), train(make(), 20)
    assert plain != ours
    assert ours[-1] == pytest.approx(plain[-1], rel=0.01)


def test_identity_is_bit_identical():
    model = make(converted=False)
    quantize_(model, halo_config(1, "bf16"))
    assert isinstance(model[0].up.weight, HaloWeight)
    assert train(model) == train(make(converted=False))


def test_gradients_accumulate():
    model = make()
    x = torch.randn(2, 16, 128)
    for part in x:
        model(part).square().sum().backward()
    accumulated = model[0].up.weight.grad.clone()
    model.zero_grad()
    sum(model(part).square().sum() for part in x).backward()
    torch.testing.assert_close(accumulated, model[0].up.weight.grad)
    assert type(accumulated) is torch.Tensor


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model = make()
    x = torch.randn(32, 128, requires_grad=True)

    def run(checkpointed):
        y = x
        with saved_bytes() as saved:
            for block in model:
                y = checkpoint(block, y, use_reentrant=reentrant) if checkpointed else block(y)
        count = saved(model)
        return [count, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]

    with OpLog() as log:
        count, *expected = run(False)
    products = len(log.products())
    if reentrant:  # it refuses torch.autograd.grad
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=True)
        y.square().sum().backward()
        actual = [x.grad, *(p.grad for p in model.parameters())]
    else:
        less, *actual = run(True)
        assert less < count / 2
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert products == 4 * 3


def test_selective_checkpointing_can_keep_products():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    model = make(blocks=1)
    x = torch.randn(32, 128, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])

    def policy(ctx, op, *args, **kwargs):
        keep = op is torch.ops.halo.scaled_mm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    y = checkpoint(model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    for a, b in zip(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]), expected, strict=True):
        assert torch.equal(a, b)


def test_offloaded_saved_tensors():
    model = make()
    x = torch.randn(32, 128, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), x)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected[0])


def test_state_dicts_are_plain_and_interchangeable(tmp_path):
    plain, model = make(converted=False), make()
    train(model, 2)
    state = model.state_dict()
    assert all(type(v) is torch.Tensor for v in state.values())
    torch.save(state, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    plain.load_state_dict(loaded)
    other = make()
    other.load_state_dict(plain.state_dict())
    assert isinstance(other[0].up.weight, HaloWeight)
    x = torch.randn(8, 128)
    assert torch.equal(other(x), model(x))
    dequantize_(other)
    assert torch.equal(other(x), plain(x))


def test_assigning_a_plain_state_dict_keeps_the_recipe():
    state = {k: v + 0 for k, v in make(converted=False).state_dict().items()}
    with torch.device("meta"):
        model = make()
    model.load_state_dict(state, assign=True)
    assert isinstance(model[0].up.weight, HaloWeight) and model[0].up.weight.requires_grad
    assert model[0].up.weight.master.data_ptr() == state["0.up.weight"].data_ptr()
    x = torch.randn(8, 128)
    assert torch.equal(model(x), make()(x))


def test_compiled_graphs_are_cached_for_weights_like_the_one_they_were_compiled_for():
    """A graph that was compiled for a weight without a gradient gives none, silently."""

    def key(convert=lambda weight: weight):
        linear = nn.Linear(128, 64)
        quantize_(linear, halo_config(1, "fp6", min_features=0))
        return convert(linear.weight)._stable_hash_for_caching()

    def packed(weight):
        weight.operand = weight.operand.packed()
        return weight

    def gathered(weight):
        weight = HaloWeight(None, weight.operand.packed(), weight.recipe)
        weight.shard_role = ShardRole.GATHERED
        return weight

    frozen = nn.Linear(128, 64).requires_grad_(False)
    quantize_(frozen, halo_config(1, "fp6", min_features=0))
    keys = [key(), key(lambda weight: weight.requires_grad_(False)), key(packed), key(gathered), key(nn.Parameter.double)]
    keys.append(frozen.weight._stable_hash_for_caching())
    assert len(set(keys)) == len(keys)
    assert key() == key()


def test_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    plain = make(converted=False)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(plain[0].up.weight, model[0].up.weight.master)


def test_models_and_optimizers_resume():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, 3, optimizer)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, 3, optimizer)
    resumed = make()
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    resumed.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    assert train(resumed, 3, optimizer) == expected


def test_whole_models_pickle():
    model = make()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(4, 128)
    assert torch.equal(loaded(x), model(x))
    buffer = io.BytesIO()
    torch.save(model[0].up.weight.detach(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).recipe == model[0].up.weight.recipe


def test_copies_are_independent():
    model = make()
    twin = copy.deepcopy(model)
    assert isinstance(twin[0].up.weight, HaloWeight)
    before = model[0].up.weight.master.clone()
    train(twin, 2)
    assert torch.equal(model[0].up.weight.master, before)
    assert not torch.equal(twin[0].up.weight.master, before)
    assert all(type(v) is torch.Tensor for v in twin.state_dict().values())


def test_to_dtype_and_device():
    model = make().to(torch.bfloat16)
    weight = model[0].up.weight
    assert isinstance(weight, HaloWeight) and weight.dtype == weight.master.dtype == torch.bfloat16
    y = model(torch.randn(4, 128, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    meta = make().to("meta")
    assert meta[0].up.weight.device.type == "meta"
    assert isinstance(meta.to_empty(device="cpu")[0].up.weight, HaloWeight)
    assert model.float()[0].up.weight.dtype == torch.float32


def test_replacing_the_data():
    weight = make()[0].up.weight
    weight.data = torch.ones_like(weight.master)
    assert (weight.master == 1).all()
    with pytest.raises(ValueError, match=r"replaced by a tensor like it, \[256, 128\] torch.float32"):
        weight.data = torch.ones(3)


def test_averaged_models():
    model = make()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    start = model[0].up.weight.master.clone()
    average.update_parameters(model)
    train(model, 2)
    average.update_parameters(model)
    expected = (start + model[0].up.weight.master) / 2
    torch.testing.assert_close(average.module[0].up.weight.master, expected)
    with OpLog() as log:
        average(torch.randn(4, 128))
    assert len(log.products()) == 4


def test_eval_and_train_modes_agree():
    model = make()
    x = torch.randn(4, 128)
    assert torch.equal(model.eval()(x), model.train()(x))


def test_tied_linears_train_one_weight():
    model = nn.ModuleList([nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)])
    model[1].weight = model[0].weight
    quantize_(model, halo_config(1, "int8"), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    assert model[1].weight is model[0].weight and len(list(model.parameters())) == 1
    x = torch.randn(4, 128)
    model[1](model[0](x)).sum().backward()
    both = model[0].weight.grad.clone()
    model.zero_grad()
    model[0](x).sum().backward()
    assert not torch.equal(both, model[0].weight.grad)


def test_other_uses_of_the_weight_see_the_master():
    weight = make()[0].up.weight
    assert torch.equal(weight.t() @ torch.ones(256), weight.master.t() @ torch.ones(256))
    assert torch.equal(nn.functional.embedding(torch.tensor([3]), weight)[0], weight.master[3])
    assert type(weight.detach() + 1) is torch.Tensor
    with torch.no_grad():
        assert type(weight + 1) is torch.Tensor
    assert "int8" in repr(weight)
    assert weight.int().dtype == torch.int32


# The codes that a weight holds.


WRITES = {
    "in place": lambda w: w.mul_(2),
    "foreach": lambda w: torch._foreach_add_([w], [torch.ones(w.shape)]),
    "copy": lambda w: w.copy_(torch.randn(w.shape)),
    "copy of another": lambda w: w.copy_(make()[1].up.weight.detach() + 1),
    "copy of another kind": lambda w: w.copy_(converted(halo_config(0, "fp8")).weight),
    "through .data": lambda w: w.data.neg_(),
    "through .data of an item": lambda w: w.data.__setitem__(0, 7.0),
    "new .data": lambda w: setattr(w, "data", torch.randn(w.shape)),
    "an item": lambda w: w.__setitem__((3, 5), 100.0),
    "a slice": lambda w: w[2:4].zero_(),
    "a view of a view": lambda w: w.view(-1)[7:].t().fill_(3.0),
    "one of several views": lambda w: w.chunk(2)[1].add_(1),
    "init": lambda w: nn.init.kaiming_uniform_(w),
    "out": lambda w: torch.add(torch.ones(w.shape), 1, out=w.data),
}


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("name", WRITES)
def test_every_write_reaches_the_codes(name, granularity):
    weight = converted(halo_config(1, "int8", granularity=granularity)).weight
    before, codes = weight.master.clone(), weight.operand.codes
    with torch.no_grad():
        WRITES[name](weight)
    assert not torch.equal(weight.master, before)
    assert in_step(weight) and weight.operand.codes is codes


def test_a_write_to_weights_of_every_kind():
    """An optimiser writes all at once; what is quantised alike, it quantises in one op."""
    configs = [
        halo_config(level, dtype, granularity=granularity)
        for level in (0, 1, 2) for dtype in ("fp8", "int8", "fp6") for granularity in ("row", "tensor")
    ]  # fmt: skip
    weights = [converted(config).weight for config in configs for _ in range(2)]
    part = converted(halo_config(1, "int8")).weight  # of which a view is written
    plain = converted(halo_config(1, "int8", keep_codes=False)).weight
    idle = converted(halo_config(1, "int8")).weight
    kept = idle.operand.codes.clone()
    with torch.no_grad():
        written = [*weights, part[3:9], part[20:], plain, torch.ones(3)]
        with OpLog() as log:
            torch._foreach_mul_(written, 3.0)
    assert all(map(in_step, [*weights, part]))
    assert torch.equal(idle.operand.codes, kept) and plain.operand is None
    for versions in (
        [w.operand.codes._version for w in weights],
        [w.operand.scale._version for w in weights],
        [w.master._version for w in weights],
    ):
        assert len(set(versions)) == 1 and versions[0] > 0, "what autograd saved would be taken for what it was"
    kinds = {(w.operand.format, w.operand.granularity, w.operand.column_rotation) for w in [*weights, part]}
    assert [name for name, _ in log.calls].count("requantize_") == len(kinds)


def test_one_that_cannot_be_written_leaves_no_other_behind():
    trained = [converted(halo_config(1, "int8")).weight for _ in range(2)]
    frozen_rows = frozen(halo_config(1, "int8")).weight[2:4]
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be written through a view"):
        torch._foreach_mul_([trained[0], frozen_rows, trained[1]], 3.0)
    assert all(map(in_step, trained))


def test_weights_are_quantised_in_the_order_of_the_arguments(monkeypatch):
    """So that what is planned for them in one step of an optimiser is found in the next, also where it meets aliases."""
    weights = [converted(halo_config(1, "int8")).weight for _ in range(12)]
    kept, given = [], []
    monkeypatch.setattr(ops, "requantize_", lambda xs, *rest: given.append([x.data_ptr() for x in xs]))
    for step in range(5):
        kept.append([object() for _ in range(7 * step)])  # aliases with other addresses
        torch._foreach_mul_([w.data for w in weights], 0.5)
    assert given == [[w.master.data_ptr() for w in weights]] * 5


def test_a_compiled_optimizer_writes_codes():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = torch.compile(optimizer.step)
    for _ in range(2):
        model(torch.randn(8, 128)).square().mean().backward()
        step()
    assert all(in_step(p) for p in model.parameters() if isinstance(p, HaloWeight))


def test_a_weight_is_quantised_once_per_step():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with OpLog() as log:
        for _ in range(3):  # micro-batches
            model(torch.randn(8, 128)).sum().backward()
        optimizer.step()
    names = [name for name, _ in log.calls]
    assert names.count("requantize_") == 1 and "rotate_quantize_" not in names, "one for all weights"
    assert names.count("rotate_quantize") == 3 * 4, "of X alone"
    assert all(p.codes_state.version[1] == p.master._version for p in model.parameters() if isinstance(p, HaloWeight))


# Frozen weights.


def frozen(config, layer: nn.Linear | None = None) -> nn.Linear:
    layer = layer or nn.Linear(128, 256, bias=False)
    layer.weight.requires_grad_(False)
    quantize_(layer, config)
    return layer


@pytest.mark.parametrize("dtype", ["int8", "fp8", "fp6"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_frozen_weight_is_its_codes(level, dtype):
    plain = nn.Linear(128, 256)
    trained, held = copy.deepcopy(plain), frozen(halo_config(level, dtype), copy.deepcopy(plain))
    quantize_(trained, halo_config(level, dtype))
    assert held.weight.master is None
    assert sum(s.nbytes() for s in get_untyped_storages(held.weight)) <= 256 * 128 + 256 * 4
    x, e = torch.randn(64, 128, requires_grad=True), torch.randn(64, 256)
    with OpLog() as log, saved_bytes() as saved:
        y = held(x)
    assert saved(held) == 0, "a frozen weight needs no X"
    assert torch.equal(y, trained(x))
    assert torch.equal(*(torch.autograd.grad(layer(x), x, e)[0] for layer in (held, trained)))
    assert len(log.products()) == 1
    error = (held.weight.dequantize() - plain.weight).norm() / plain.weight.norm()
    assert 0.003 < error < (0.01 if dtype == "int8" else 0.06)


def test_frozen_weights_compile():
    held = frozen(halo_config(1, "int8"))
    x = torch.randn(64, 128, requires_grad=True)
    f = torch.compile(held, fullgraph=True)
    torch.testing.assert_close(f(x), held(x))
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x), torch.autograd.grad(held(x).sum(), x))


def test_a_frozen_weight_can_be_written_whole():
    """As merging an adapter does."""
    held = frozen(halo_config(1, "int8"))
    before = held.weight.dequantize()
    held.weight.data += 1
    torch.testing.assert_close(held.weight.dequantize(), before + 1, atol=0.05, rtol=0)
    held.weight.data = before
    torch.testing.assert_close(held.weight.dequantize(), before, atol=2e-3, rtol=0)
    with pytest.raises(RuntimeError, match="cannot be written through a view"):
        held.weight.data[0] = 1


def test_frozen_weights_in_the_life_of_a_model(tmp_path):
    model = make(converted=False).requires_grad_(False)
    quantize_(model, halo_config(1, "int8"))
    x = torch.randn(8, 128)
    expected = model(x)
    for copied in (copy.deepcopy(model), model.to(torch.float64).float()):
        assert copied[0].up.weight.master is None and torch.equal(copied(x), expected)
    state = model.state_dict()
    assert all(type(v) is torch.Tensor for v in state.values())
    plain = make(converted=False)
    plain.load_state_dict(state)
    assert (plain(x) - expected).norm() < 0.02 * expected.norm()
    fresh = make(converted=False, blocks=2).requires_grad_(False)
    quantize_(fresh, halo_config(1, "int8"))
    fresh.load_state_dict(state)
    assert (fresh(x) - expected).norm() < 1e-3 * expected.norm(), "rounding twice is rounding once"
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), expected)
    dequantize_(model)
    assert torch.equal(model[0].up.weight, plain[0].up.weight)


def test_frozen_by_request_and_not():
    layer = converted(halo_config(1, "int8", frozen=True))
    assert layer.weight.master is None and not layer.weight.requires_grad
    layer = nn.Linear(128, 128).requires_grad_(False)
    quantize_(layer, halo_config(1, "int8", frozen=False))
    assert layer.weight.master is not None
    layer.weight.requires_grad_(True)
    layer(torch.randn(4, 128)).sum().backward()
    assert layer.weight.grad is not None


def test_unfreezing_is_a_clear_error():
    held = frozen(halo_config(1, "int8"))
    held.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"held as codes only, so it cannot be trained. Call dequantize_\(model\)"):
        held(torch.randn(4, 128))
    dequantize_(held)
    quantize_(held, halo_config(1, "int8"))
    held(torch.randn(4, 128)).sum().backward()
    assert held.weight.grad is not None


def test_a_product_with_a_part_of_a_weight_says_that_it_is_not_quantised():
    layer = nn.Linear(128, 128)
    quantize_(layer, halo_config(1, "int8"))
    x = torch.randn(4, 128)
    with pytest.warns(UserWarning, match=r"view \[128, 64\] of a converted weight \[128, 128\] runs in high precision"):
        y = F.linear(x, layer.weight[:64])
    torch.testing.assert_close(y, x @ layer.weight.master[:64].t())
    with pytest.warns(UserWarning, match=r"aten.mm.* runs in high precision, since it is not called as F.linear\(x, weight\)"):
        assert torch.equal(x @ layer.weight.T, x @ layer.weight.master.T)
    with pytest.warns(UserWarning, match="a converted weight .* runs in high precision"):  # as WavLM calls it
        F.multi_head_attention_forward(
            *[x[:, None]] * 3, 128, 2, torch.eye(128).repeat(3, 1), None, None, None, False, 0.0, layer.weight, layer.bias
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.linear(x, layer.weight), layer(x)


def test_writes_to_a_tensor_of_the_state_dict_reach_the_codes():
    """As moving averages make them."""
    model = nn.Sequential(nn.Linear(128, 128))
    quantize_(model, halo_config(1, "int8"))
    average, x = copy.deepcopy(model), torch.randn(16, 128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2)
        for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            old.copy_(new)
    assert torch.equal(average(x), model(x))
    version = average[0].weight.codes._version
    average(x)
    assert average[0].weight.codes._version == version, "what is in step is not quantised anew"


def pickled(model):
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def into(copy_weight):
    def copied(model):
        target = nn.Sequential(nn.Linear(128, 128))
        quantize_(target, halo_config(1, "int8"))
        with torch.no_grad():
            copy_weight(target[0].weight, model[0].weight)
            target[0].bias.copy_(model[0].bias)
        return target

    return copied


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        pickled,
        into(lambda target, source: target.copy_(source)),
        into(lambda target, source: target.data.copy_(source.data)),
        into(lambda target, source: torch._foreach_copy_([target], [source])),
    ],
)
def test_copies_of_a_weight_whose_master_was_written(copied):
    model = nn.Sequential(nn.Linear(128, 128))
    quantize_(model, halo_config(1, "int8"))
    model.state_dict()["0.weight"].mul_(3)
    copies, x = copied(model), torch.randn(16, 128)
    assert torch.equal(copies(x), model(x)), "which has its codes brought up to date"
    version = copies[0].weight.codes._version
    copies(x)
    assert copies[0].weight.codes._version == version


def test_what_a_weight_prints():
    layer = nn.Linear(128, 128)
    quantize_(layer, halo_config(1, "int8"))
    assert repr(layer.weight).startswith("Parameter containing:\nHaloWeight(tensor(")
    assert repr(layer.weight).endswith(", requires_grad=True)")
    assert repr(layer.weight.detach()).startswith("HaloWeight(tensor(") and "requires_grad" not in repr(layer.weight.detach())
    assert repr(layer.weight.T).endswith(", grad_fn=<TBackward0>)") or "grad_fn=<PermuteBackward0>" in repr(layer.weight.T)


def test_inference_mode():
    model = nn.Sequential(nn.Linear(128, 128))
    quantize_(model, halo_config(1, "int8"))
    with torch.inference_mode():
        state, weight = model.state_dict(), model[0].weight
        assert torch.equal(state["0.weight"], weight.master) and not weight.detach().is_inference()
        assert weight.view(-1).shape == (128 * 128,) and weight[0].shape == (128,)
    model.load_state_dict(state)
    model(torch.randn(4, 128)).sum().backward()
    assert model[0].weight.grad.isfinite().all()


def test_who_reads_the_memory_of_a_weight():
    layer = nn.Linear(128, 128, bias=False)
    quantize_(layer, halo_config(1, "int8"), filter_fn=lambda *_: True)
    layer.share_memory()
    weight = layer.weight
    assert weight.master.is_shared() and weight.codes.is_shared() and weight.scale.is_shared()
    assert layer(torch.randn(4, 128)).isfinite().all()
    with pytest.raises(BufferError, match=r"export weight.dequantize\(\)"):
        torch.from_dlpack(weight.detach())
    array = np.asarray(weight.detach())
    assert (array == weight.dequantize().detach().numpy()).all() and weight.tolist() == array.tolist()
    with pytest.raises(RuntimeError, match="Can't call numpy"):
        weight.numpy()
    array[:] = 0
    assert weight.dequantize().abs().min() > 0, "it was a copy"


def test_a_write_to_the_master_reaches_the_codes():
    layer = nn.Linear(128, 128, bias=False)
    quantize_(layer, halo_config(1, "int8"), filter_fn=lambda *_: True)
    x = torch.randn(16, 128)
    before = layer(x)
    layer.weight.master.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)


def test_a_tied_weight_is_plain_in_every_state_dict():
    model = nn.ModuleDict({"embed": nn.Embedding(256, 128), "head": nn.Linear(128, 256, bias=False)})
    model["head"].weight = model["embed"].weight
    quantize_(model, halo_config(1, "int8"), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    state = model.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    model.load_state_dict({name: value + 1 for name, value in state.items()}, assign=True)
    assert {type(value) for value in model.state_dict().values()} == {torch.Tensor}
    dequantize_(model)
    assert type(model["embed"].weight) is type(model["head"].weight) is nn.Parameter
    assert not model["embed"]._state_dict_hooks and not model["head"]._state_dict_hooks


@pytest.mark.parametrize("add", [nn.utils.parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_a_parametrised_weight_can_be_saved(add):
    layer = nn.Linear(128, 128)
    quantize_(layer, halo_config(1, "int8"), filter_fn=lambda *_: True)
    add(layer)
    assert all(type(value) is torch.Tensor for value in layer.state_dict().values())


@torch.inference_mode()
def test_a_layer_made_in_inference_mode_has_views_and_a_state_dict_there():
    layer = nn.Linear(128, 128)
    quantize_(layer, halo_config(1, "int8"))
    weight = layer.weight
    assert weight.master.is_inference() and not weight.is_inference()
    assert isinstance(weight.detach(), HaloWeight) and torch.equal(weight[2:].dequantize(), weight.master[2:])
    layer.load_state_dict({name: -value for name, value in layer.state_dict().items()})
    assert torch.equal(weight.operand.codes, HaloWeight.from_hp(weight.master, weight.recipe).codes)


def test_a_view_of_the_same_shape_follows_the_recipe():
    """DTensor.from_local makes one, and FSDP2 shards it where torchtitan annotates parameters."""
    layer, x = nn.Linear(128, 256, bias=False), torch.randn(4, 128)
    quantize_(layer, halo_config(1, "int8"))
    view = layer.weight.view_as(layer.weight)
    assert isinstance(view, HaloWeight) and view._is_view() and view.recipe == layer.weight.recipe
    with OpLog() as log:
        y = nn.functional.linear(x, view)
        y.sum().backward()
    assert log.products().count(torch.int8) == 2 and torch.equal(y, layer(x)) and layer.weight.grad.norm() > 0
    with torch.no_grad():
        view.mul_(2)
    assert torch.equal(layer(x), 2 * y), "a write through the view reaches the codes"
