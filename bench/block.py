"""Transformer blocks and whole training steps, compiled: this library against bf16 and torchao's low-precision training.

    python bench/block.py                                                     # two Llama-3-8B blocks, forward + backward
    python bench/block.py --model-size 1b --contenders bf16 halo1-int8        # a training step of the Llama-3.2-1B shape

Random weights and data. The contenders take turns in one process; each compiles everything anew, from empty caches.
"""

import argparse
import functools
import gc
import sys
import time

import chart
import results
import torch
import torch.nn.functional as F
from contenders import CONTENDERS, convert, requantize
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.jit import JITFunction
from triton.testing import do_bench, do_bench_cudagraph

DEVICE = "cuda"
SHAPES = {
    "8b-blocks": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "vocab_size": 128},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
}
TITLES = {
    "8b-blocks": "Two Llama-3-8B blocks, forward + backward, {}×{} tokens",
    "1b": "Llama-3.2-1B shape, training steps with fused AdamW, {}×{} tokens",
}
PEERS = ["bf16", "torchao-tensorwise", "torchao-rowwise"]
OURS = ["halo0-fp8", "halo1-fp8", "halo2-fp8", "halo1-int8", "halo1-fp6"]
NOTES = (
    "torch.compile of the {} with fullgraph, from empty caches; attention is SDPA's causal kernel. ms: median of plain calls; "
    "graph ms: of replays of a CUDA graph. Without an optimiser, weights are quantised anew in every step, as its write would "
    "cause. Saved: what the forward leaves allocated besides its result. Peak: in one step, weights, gradients and the "
    "optimiser's state included. First two steps: in seconds, compilation included."
)


class Llama(nn.Module):
    """Llama called without a mask: LlamaModel.forward makes one under torch.compile, and attention misses its causal kernel.
    Without labels ``x`` is what enters the first block; with them it is token ids, and the result the loss."""

    def __init__(self, shape: dict):
        super().__init__()
        config = LlamaConfig(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, **shape)
        self.llama = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        model = self.llama.model
        hidden = x if labels is None else model.embed_tokens(x)
        angles = model.rotary_emb(hidden, torch.arange(hidden.shape[1], device=x.device).unsqueeze(0))
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=angles)
        if labels is None:
            return hidden
        logits = self.llama.lm_head(model.norm(hidden)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def measure(name: str, args: argparse.Namespace) -> tuple[float, float | None, float, float, float]:
    """(ms plain, ms as a CUDA graph, GiB saved for backward, GiB at the peak, seconds of the first two steps)."""
    torch.manual_seed(0)
    others = torch.cuda.memory_allocated()
    shape, train = SHAPES[args.model_size], args.model_size == "1b"
    size = (args.batch, args.length, shape["hidden_size"])
    with torch.device(DEVICE):
        model = Llama(shape)
        if train:
            inputs, e = [torch.randint(shape["vocab_size"], size[:2]) for _ in range(2)], None
        else:
            inputs = [torch.randn(size, dtype=torch.bfloat16, requires_grad=True)]
            e = torch.randn(size, dtype=torch.bfloat16)
    convert(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if train else None
    for module in [model] if args.compile == "model" else model.llama.model.layers:
        module.compile(fullgraph=True)

    def step() -> None:
        inputs[0].grad = None
        model.zero_grad()
        if optimizer is None:
            requantize(model)
        model(*inputs).backward(e)
        if optimizer is not None:
            optimizer.step()

    start = time.perf_counter()
    for _ in range(2):
        step()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    before = torch.cuda.memory_allocated()
    y = model(*inputs)
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    del y
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - others
    plain, graph = do_bench(step, warmup=200, rep=args.reps, return_mode="median"), None
    if not train:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                graph = do_bench_cudagraph(step, rep=args.reps, return_mode="median")
        except Exception as error:
            print(f"{name} as a CUDA graph: {error!r:.300}")
    return plain, graph, saved / 2**30, peak / 2**30, seconds


def forget() -> None:
    """Free what a contender held, and the kernels that this library compiled for it; Inductor's go with ``fresh_cache``."""
    torch._dynamo.reset()
    for module in [module for name, module in sys.modules.items() if name.startswith("halo_tensor")]:
        for value in vars(module).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
            elif isinstance(value, JITFunction):
                value.device_caches.clear()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-size", default="8b-blocks", choices=list(SHAPES))
    parser.add_argument("--compile", default="model", choices=["model", "blocks"], help="one graph, or block by block")
    parser.add_argument("--contenders", nargs="+", default=PEERS + OURS, choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--reps", type=int, default=1000, help="milliseconds of repetitions")
    parser.add_argument("--name", help="of the result files (default: block, or block_1b)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/block.py needs a CUDA device")
    # What the first compilation of a process pays once is no contender's.
    torch.compile(nn.Linear(64, 64, device=DEVICE))(torch.ones(64, 64, device=DEVICE)).sum().backward()
    AsyncCompile.wait_pool_ready()
    rows, reference = [], (None, None)
    for name in args.contenders:
        with fresh_cache():
            try:
                plain, graph, saved, peak, seconds = measure(name, args)
            except Exception as error:
                print(f"{name}: {error!r:.300}")
                continue
            finally:
                forget()
        reference = (plain, graph) if name == "bf16" else reference
        row = {
            "model": args.model_size,
            "contender": name,
            "ms": round(plain, 2),
            "× bf16": f"{reference[0] / plain:.2f}" if reference[0] else None,
            "graph ms": graph and round(graph, 2),
            "× bf16 (graph)": f"{reference[1] / graph:.2f}" if reference[1] and graph else None,
            "tokens/s": round(1e3 * args.batch * args.length / plain),
            "saved GiB": f"{saved:.2f}",
            "peak GiB": f"{peak:.2f}",
            "first two steps s": round(seconds, 1),
        }
        rows.append(row)
        print(row, flush=True)
    name = args.name or {"8b-blocks": "block", "1b": "block_1b"}[args.model_size]
    results.write(name, TITLES[args.model_size].format(args.batch, args.length), rows, NOTES.format(args.compile))
    chart.draw(name)


if __name__ == "__main__":
    main()
