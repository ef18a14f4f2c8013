"""A converted parameter beside a plain one: what users and libraries hang on it, move it with and wrap it in."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from halo_tensor import HaloWeight, dequantize_, halo_config, quantize_
from tests.helpers.recording import OpLog

X = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))


def hung(model: nn.Linear, fired: list | None = None) -> list:
    """Hang attributes on its weight, a gradient, and if ``fired`` is given hooks; their handles."""
    model.weight._no_weight_decay, model.weight.tags = True, {"lr": 2}
    model.weight.grad = torch.ones(model.weight.shape)
    if fired is None:
        return []
    return [
        model.weight.register_hook(lambda grad: fired.append("gradient")),
        model.weight.register_post_accumulate_grad_hook(lambda parameter: fired.append("accumulated")),
    ]


def what_hangs(model: nn.Linear, fired: list) -> tuple:
    weight = model.weight
    found = [getattr(weight, "_no_weight_decay", None), getattr(weight, "tags", None)]
    found.append(None if weight.grad is None else (weight.grad.dtype, weight.grad.sum().item()))
    del fired[:]
    weight.grad = None
    model(X.to(weight.dtype)).sum().backward()
    return *found, list(fired), weight.grad is not None


def quantized(model):
    quantize_(model, halo_config(1, "int8"))
    return model


def emptied(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to_empty(device="cpu").load_state_dict(state)
    model.weight.grad.fill_(3)  # which was emptied too
    return model


def dequantized(model):
    dequantize_(model)
    return model


KEEP = {
    "nothing": lambda m: m,
    "quantize_ again": quantized,
    "dequantize_": dequantized,
    "to(dtype)": lambda m: m.to(torch.float64),
    "bfloat16": lambda m: m.bfloat16(),
    "to(device)": lambda m: m.to("cpu"),
    "there and back": lambda m: m.double().float(),
    "to_empty": emptied,
    "share_memory": lambda m: m.share_memory(),
    "requires_grad_": lambda m: m.requires_grad_(False).requires_grad_(True),
    "load_state_dict": lambda m: (m.load_state_dict(m.state_dict()), m)[1],
}


@pytest.mark.parametrize("before", [False, True], ids=["on the converted", "on the plain"])
@pytest.mark.parametrize("name", KEEP)
def test_what_hangs_on_a_parameter_stays_as_on_a_plain_one(name, before):
    plain_keep = KEEP["nothing" if name in ("quantize_ again", "dequantize_") else name]
    fired: list = []
    plain = nn.Linear(128, 256)
    hung(plain, fired)
    expected = what_hangs(plain_keep(plain), fired)

    fired = []
    model = nn.Linear(128, 256)
    handles = hung(model, fired) if before else []
    quantized(model)
    handles = handles or hung(model, fired)
    model = KEEP[name](model)
    assert isinstance(model.weight, HaloWeight) == (name != "dequantize_")
    assert what_hangs(model, fired) == expected
    for handle in handles:
        handle.remove()
    assert what_hangs(model, fired)[3] == [], "the handles are those of the new parameter"


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, assigned])
def test_copies_have_at_least_what_those_of_a_plain_one_have(copied):
    found = []
    for convert in (lambda m: m, quantized):
        model = nn.Linear(128, 256)
        hung(model)
        weight = copied(convert(model)).weight
        found.append({name: getattr(weight, name, None) for name in ("_no_weight_decay", "tags")})
    plain, ours = found
    assert isinstance(weight, HaloWeight) and weight.is_leaf and weight.requires_grad
    assert ours == plain or not any(plain.values())


def test_an_attribute_that_would_replace_one_of_the_weight_is_refused():
    model = nn.Linear(128, 256)
    model.weight.master = True
    with pytest.raises(ValueError, match="attribute 'master', a name that converted weights need: rename it"):
        quantized(model)


def test_optimisers_that_read_tags_group_as_they_would():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model[0].weight._no_weight_decay = True
    quantized(model)
    untouched, decayed = (model[i].weight.detach().clone().dequantize() for i in (0, 1))
    groups = [[p for p in model.parameters() if getattr(p, "_no_weight_decay", False) == tag] for tag in (True, False)]
    assert [len(group) for group in groups] == [1, 3]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": 0.5}])
    for parameter in model.parameters():
        parameter.grad = torch.zeros(parameter.shape)
    optimizer.step()
    assert torch.equal(model[0].weight.dequantize(), untouched) and not torch.equal(model[1].weight.dequantize(), decayed)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused(original, frozen):
    model = nn.Sequential(nn.Linear(128, 128).requires_grad_(not frozen))
    quantized(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(
            RuntimeError, match=r"\(FSDP1\) makes a converted weight \[128, 128\] plain.*shard with fully_shard"
        ):
            FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))(X)
        plain = nn.Sequential(nn.Linear(128, 128))
        wrapped = FullyShardedDataParallel(plain, use_orig_params=original, device_id=torch.device("cpu"))
        assert wrapped(X).isfinite().all()
    finally:
        dist.destroy_process_group()


# Libraries that make parameters anew.


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)))
    expected = model(X)
    moved = accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    accelerate.utils.set_module_tensor_to_device(moved, "0.weight", "cpu")
    with OpLog() as log:
        assert torch.equal(moved(X), expected)
    assert len(log.products()) == 2
    torch.save({name: value * 2 for name, value in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    loaded = accelerate.load_checkpoint_and_dispatch(copy.deepcopy(model), str(tmp_path))
    with OpLog() as log:
        assert not torch.equal(loaded(X), expected)
    assert len(log.products()) == 2
    refused = pytest.raises(
        TypeError, match=r"put plain tensors in place of converted weights: keep every converted layer on a GPU"
    )
    with refused:
        accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    with refused:
        accelerate.load_checkpoint_and_dispatch(copy.deepcopy(model), str(tmp_path), device_map={"": "cpu"})


def test_accelerate_moves_a_weight():
    weight = quantized(nn.Linear(128, 128)).weight
    moved = HaloWeight(weight.to(torch.float64), requires_grad=False)  # as accelerate does
    assert isinstance(moved, nn.Parameter) and isinstance(moved, HaloWeight) and not moved.requires_grad
    assert moved.dtype == torch.float64 and moved.recipe == weight.recipe


@pytest.mark.parametrize("frozen", [False, True])
def test_safetensors_of_parameters_says_what_to_save(frozen, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Linear(128, 128).requires_grad_(not frozen)
    quantized(model)
    with pytest.raises(RuntimeError, match=r"no memory of its own: save model.state_dict\(\), or weight.dequantize\(\)"):
        safetensors.save_file(dict(model.named_parameters()), tmp_path / "model.safetensors")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = safetensors.load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["weight"], model.weight.dequantize())
