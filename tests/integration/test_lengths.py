"""Lengths that vary under torch.compile: as many graphs as the model in high precision has, and no more.

On a CPU, ops are traced with the strides that a GPU's kernels give, since those are what a compiler asks about.
"""

from functools import lru_cache

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from halo_tensor import halo_config, quantize_, recipe_config
from halo_tensor.ops import quantizers
from halo_tensor.reference import ops as reference
from tests.helpers.small_models import llama

#: Sequences and tokens: odd numbers, multiples of 16, and other numbers of sequences.
SHAPES = [(2, 20), (2, 33), (2, 48), (2, 37), (2, 16), (3, 50), (5, 31), (4, 32)]
CONFIGS = {
    "halo0": halo_config(0, "fp8"),
    "halo1": halo_config(1, "int8"),
    "halo2": halo_config(2, "int8"),
    "hot_llm": recipe_config("hot_llm"),
    "tensor": halo_config(1, "int8", granularity="tensor"),
    "keep_codes": halo_config(1, "int8", keep_codes=False),
}


@pytest.fixture(autouse=True)
def _strides_of_a_gpu(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    if not torch.cuda.is_available():
        monkeypatch.setattr(quantizers, "runs_kernels", lambda device: torch._guards.TracingContext.try_get() is not None)
    # C++ takes minutes to compile, and what Inductor's kernels compute changes no graph.
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda self, *args, **options: lambda *pointers: None)


def model(config, kind: str):
    torch.manual_seed(0)
    made = llama(num_hidden_layers=1, use_cache=False).to(torch.bfloat16)
    if "lora" in kind:
        made.requires_grad_(False)
    if config is not None:
        quantize_(made, config)
    if "lora" in kind:
        made = peft.get_peft_model(made, peft.LoraConfig(r=4, target_modules="all-linear"))
        made.enable_input_require_grads()
    if "checkpointed" in kind:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made.train()


def compiled(made, kind: str):
    backend = "inductor" if "inductor" in kind else "aot_eager"
    if "layers" not in kind:
        return torch.compile(made, backend=backend)
    for layer in (m for m in made.modules() if isinstance(m, LlamaDecoderLayer)):
        layer.compile(backend=backend)
    return made


def batch(sequences: int, tokens: int, masked: bool) -> dict[str, torch.Tensor]:
    """What a collator gives to Trainer."""
    ids = torch.arange(sequences * tokens).remainder(128).view(sequences, tokens)
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 + 1 :] = 0
    return {"input_ids": ids, "labels": ids} | ({"attention_mask": mask} if masked else {})


def graphs(made, kind: str, shapes: list[tuple[int, int]]) -> list[int]:
    """Return how many graphs there are after each step."""
    torch._dynamo.reset()
    counters.clear()
    f, found = compiled(made, kind), []
    # On a CPU, codes do not have the strides of those that were traced.
    with fresh_cache(), config.patch(size_asserts=False):
        for shape in shapes:
            f(**batch(*shape, "masked" in kind)).loss.backward()
            made.zero_grad()
            found.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    return found


@lru_cache
def graphs_in_high_precision(kind: str, shapes: int) -> list[int]:
    return graphs(model(None, kind), kind, SHAPES[:shapes])


@pytest.mark.parametrize(
    ("name", "kind", "shapes"),
    [
        ("halo1", "model, masked, inductor", 5),
        ("halo2", "layers, checkpointed", 5),
        ("hot_llm", "layers, checkpointed", 5),
        ("halo1", "lora, layers", 5),
    ],
)
def test_as_many_graphs_as_in_high_precision(name, kind, shapes):
    expected = graphs_in_high_precision(kind, shapes)
    assert expected[1:5] == [2] * 4, "the first length, then one graph for any"
    assert graphs(model(CONFIGS[name], kind), kind, SHAPES[:shapes]) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_for_every_length(name, monkeypatch):
    """And each step is that of eager mode, with every product in low precision."""
    layer = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128, bias=False))
    quantize_(layer, CONFIGS[name])
    f, products, multiply = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager"), [], reference.scaled_mm
    monkeypatch.setattr(reference, "scaled_mm", lambda *args: products.append(args[0].shape) or multiply(*args))
    for tokens in (20, 33, 48, 2, 64, 777):
        x, results = torch.randn(tokens, 128), []
        for run in (layer, f):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().mean(), [*layer.parameters()])])
        assert len(products) == 2 * {"hot_llm": 3}.get(name, 5)
        products.clear()
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    assert counters["stats"]["unique_graphs"] == 1
