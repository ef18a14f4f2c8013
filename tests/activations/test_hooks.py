"""What eager code saves, compressed by hooks on saved tensors."""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from halo_tensor import dequantize_, halo_config, quantize_
from halo_tensor.activations import choice, hooks, packed
from halo_tensor.analysis.saved_memory import measure_saved
from tests.helpers.recording import OpLog
from tests.helpers.small_models import llama

IDS = torch.arange(128).view(2, 64)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(choice, "FEWEST_ELEMENTS", 2**9)


@pytest.fixture
def log(monkeypatch):
    """What is packed: (shape, bits, the function that made it)."""
    seen, pack = [], packed.Packed.__init__

    def record(self, x, bits, *options, **named):
        seen.append((tuple(x.shape), bits, x.grad_fn.name()))
        pack(self, x, bits, *options, **named)

    monkeypatch.setattr(packed.Packed, "__init__", record)
    return seen


def model_of(activations=None, attention="sdpa", **options):
    torch.manual_seed(0)
    model = llama(attn_implementation=attention)
    quantize_(model, halo_config(activations=activations, **options))
    return model


def step(model) -> tuple[float, torch.Tensor]:
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 − cos"""
    return 1 - float(F.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_a_llama(attention, log):
    """They lose no more than the study found (docs/memory.md), and the loss stays what it was."""
    loss, exact = step(model_of("plain", attention))
    assert not log
    for activations, least, most in (("int8", 1e-6, 1.5e-4), ("int6", 5e-5, 1e-3))[: 2 if attention == "sdpa" else 1]:
        with OpLog() as ops:
            same, gradient = step(model_of(activations, attention))
        assert same == loss and least < distance(gradient, exact) < most
        count = Counter(name for name, _ in ops.calls)
        assert count["scaled_mm"] == 42 and count["decompress"] >= count["compress"] >= 20


def test_what_is_compressed_and_how_often(log):
    step(model_of("int6"))
    stream, inner, heads = (2, 64, 128), (2, 64, 256), (2, 4, 64, 32)
    found = Counter((shape, bits) for shape, bits, _ in log)
    # For each of two layers: both norms save their input and what they normalise; the latter is what a weight multiplies.
    assert found == {(stream, 4): 8, (inner, 6): 6, (heads, 8): 8}
    streams = Counter(function for shape, _, function in log if shape == stream)
    assert streams == {"EmbeddingBackward0": 1, "AddBackward0": 3, "MulBackward0": 4}
    gates = Counter(function for shape, _, function in log if shape == inner)
    assert gates == {"_LinearBackward": 4, "SiluBackward0": 2}, "SiLU and the product save one gate each, packed once"


def test_bytes():
    saved = {}
    for activations in ("plain", "int8", "int6"):
        with measure_saved(model := model_of(activations)) as found:
            model(IDS, use_cache=False)
        saved[activations] = found.total
    assert 0.35 < saved["int8"] / saved["plain"] < 0.5 and saved["int6"] < 0.9 * saved["int8"]


class Parts(nn.Module):
    """What must stay as it is, beside a layer that is converted."""

    def __init__(self):
        super().__init__()
        self.plain, self.layer = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x):
        x = self.layer(x)
        y = self.plain(x).softmax(-1)
        z = F.cross_entropy(self.plain(x).exp().log_softmax(-1), torch.zeros(len(x), dtype=torch.long))
        return (y.log() * x[:, :1]).sum() + z + F.embedding(torch.arange(64), self.plain.weight).sum()


def test_what_is_left_alone(log):
    model = Parts()
    quantize_(model, halo_config(activations="int8"), filter_fn=lambda module, name: name == "layer")
    model(torch.randn(64, 128)).backward()
    assert {function for _, _, function in log} == {"_LinearBackward"}, "the input of the plain layer"


def test_a_tensor_that_two_ops_save_is_packed_once(log):
    model = nn.Sequential(nn.Linear(128, 128), nn.Identity())
    quantize_(model, halo_config(activations="int8"))
    model[1].forward = lambda x: x.sin() + x.cos() * x
    model(torch.randn(64, 128)).sum().backward()
    assert [function for _, _, function in log] == ["_LinearBackward", "CosBackward0"]


def test_a_write_between_forward_and_backward():
    """PyTorch does not count writes to what passes through hooks, so the hooks do."""
    for activations in ("plain", "int8"):
        model = Parts()
        quantize_(model, halo_config(activations=activations), filter_fn=lambda module, name: name == "layer")
        loss = model(torch.randn(64, 128))
        with torch.no_grad():
            model.plain.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_nothing_is_kept_alive():
    model = model_of("int8")
    kept = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: kept.append(weakref.ref(args[0])))
    loss = model(IDS, labels=IDS, use_cache=False).loss
    gc.collect()
    assert kept[0]() is None, "the product of gate and up is in no cycle"
    handle.remove()
    del loss


def test_checkpointing(log):
    """Of a layer that transformers recomputes, the input is compressed, and nothing that the recomputation saves. Versions that
    checkpoint a layer with its hooks compress nothing."""
    model, exact = model_of("int8"), step(model_of("plain"))[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gradient = step(model.train())[1]
    if "__init_subclass__" in vars(GradientCheckpointingLayer):
        assert [function for _, _, function in log] == ["EmbeddingBackward0", "AddBackward0"]
        assert 0 < distance(gradient, exact) < 5e-4
    else:
        assert not log and torch.equal(gradient, exact)


def test_a_block_that_is_checkpointed(log):
    layer = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))
    quantize_(layer, halo_config(activations="int8"))
    x = torch.randn(64, 128, requires_grad=True)
    for _ in range(2):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert not log


def test_checkpointing_inside_of_a_block(log):
    """What is checkpointed is computed again from the compressed input."""
    layer = nn.Linear(128, 128)
    model = nn.Sequential(nn.Linear(128, 128), nn.Identity())
    quantize_(model, halo_config(activations="int8"))
    model[1].forward = lambda x: checkpoint(lambda y: layer(y).sin(), x, use_reentrant=False)
    model(torch.randn(64, 128)).sum().backward()
    assert [function for _, _, function in log] == ["_LinearBackward"] and layer.weight.grad.any()


def test_hooks_around_the_model():
    """They get codes and scales, as they would get any saved tensor: offloading moves these."""
    model, seen = model_of("int8"), Counter()
    expected = step(model_of("int8"))[1]
    move = lambda t: seen.update([t.dtype]) or t.clone()  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(move, lambda t: t):
        assert torch.equal(step(model)[1], expected)
    assert seen[torch.int8] > 20 and seen[torch.bfloat16] > 20


def test_an_error_in_forward():
    model = model_of("int8")
    broken = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    broken.remove()
    assert hooks.top_saved_tensors_hooks() is None and not hooks.state.entered
    step(model)


def test_copies_and_dequantize():
    model = model_of("int8")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(step(copied)[1], step(model_of("int8"))[1])
    dequantize_(model)
    assert not any(m._forward_hooks or m._forward_hooks_always_called for m in model.modules())
    quantize_(model, halo_config())
    assert not any(m._forward_hooks for m in model.modules())


def test_blocks():
    model = nn.Sequential(nn.Linear(128, 128), nn.Sequential(nn.Linear(128, 128), nn.GELU()), nn.ModuleList([Parts()]))
    assert [hooks.block_of(model, name) for name in ("0", "1.0", "2.0.layer")] == ["", "", "2.0"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(128), nn.Linear(128, 128)

    def forward(self, x):
        return self.layer(self.norm(x))


def test_equal_blocks_share_compiled_code():
    blocks = nn.ModuleList(Block() for _ in range(3))
    quantize_(nn.ModuleDict({"blocks": blocks}), halo_config(memory="low"))
    assert all(block._forward_hooks for block in blocks)
    counter = CompileCounter()
    run = torch.compile(lambda block, x: block(x), backend=counter, fullgraph=True)
    for block in blocks:
        run(block, torch.randn(16, 128)).sum().backward()
    assert counter.frame_count == 1


def test_without_gradients(log):
    with torch.no_grad():
        model_of("int8")(IDS)
    assert not log


def test_training_goes_the_same_way():
    """The loss with 8-bit activations stays closer to the one without than to another draw of signs."""
    curves = {}
    for name, options in {"plain": {}, "int8": {"activations": "int8"}, "other signs": {"seed": 1}}.items():
        model = model_of(**options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            losses.append(step(model)[0])
            optimizer.step()
        curves[name] = torch.tensor(losses)
    assert curves["int8"][-1] < 0.9 * curves["int8"][0]
    differ = {name: float((curve - curves["plain"]).abs().max()) for name, curve in curves.items()}
    assert 0 < differ["int8"] < 2 * differ["other signs"]
