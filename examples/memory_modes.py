"""Train a model of Llama's shape for a few steps with each memory mode and each optimiser, and compare the peak with the
predicted one.

    python examples/memory_modes.py                                                       # a small shape, on a CPU too
    python examples/memory_modes.py --model 1b --memory speed balanced low --optimizers adamw adamw8bit
    python examples/memory_modes.py --model 3b --memory low --optimizers stochastic offloaded --compile

The optimisers are torch's fused AdamW and torchao's: "adamw8bit" keeps its state in 8 bits, "offloaded" keeps it in the memory
of the CPU, and "stochastic" is AdamW that rounds bfloat16 weights stochastically, which then need no float32 copy.
"""

import argparse
import gc
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from halo_tensor import halo_config, quantize_
from halo_tensor.analysis import predict_peak

#: hidden and intermediate size, layers, heads, heads of k and v, vocabulary
SHAPES = {
    "tiny": (128, 384, 2, 4, 2, 512),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
#: name -> the optimiser in halo_tensor.analysis.OPTIMIZERS whose state takes as much
OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "stochastic": "adamw", "offloaded": "offloaded"}
MODES = ["speed", "balanced", "low"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(shape: str, memory: str) -> nn.Module:
    """Return a converted model with random weights in bfloat16, on the default device."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    )  # fmt: skip
    config = LlamaConfig(**dict(zip(names, SHAPES[shape], strict=True)), tie_word_embeddings=shape != "8b", use_cache=False)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if memory != "bf16":
        quantize_(model, halo_config(memory=memory))
    return model.train()


def optimizer_of(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return an optimiser. All of them update converted weights as they update any other."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, fused=True)
    from torchao import optim

    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw8bit": lambda: optim.AdamW8bit(parameters, lr=lr),
        "stochastic": lambda: optim._AdamW(parameters, lr=lr, bf16_stochastic_round=True),
        "offloaded": lambda: optim.CPUOffloadOptimizer(parameters, torch.optim.AdamW, lr=lr),
    }
    return makers[name]()


def run(memory: str, name: str, args: argparse.Namespace) -> dict[str, object]:
    """Train for some steps, and return the predicted and the measured peak in GiB, the time of a step, and the last loss."""
    size = args.batch, args.length
    with torch.device("meta"):
        ids = torch.zeros(size, dtype=torch.long)
        how = {"optimizer": OPTIMIZERS[name], "compiled": "blocks" if args.compile else None}
        predicted = predict_peak(make(args.model, memory), ids, labels=ids, **how)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = make(args.model, memory)
        ids = torch.randint(model.config.vocab_size, size)
    for layer in model.model.layers if args.compile else []:
        layer.compile()
    optimizer = optimizer_of(name, list(model.parameters()), args.lr)
    losses = []
    for step in range(args.steps):
        if step == 1 and DEVICE == "cuda":  # the first step compiles, and makes the optimiser's state
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    return {
        "memory": memory, "optimizer": name, "predicted GiB": predicted.total / 2**30, "peak GiB": peak,
        "step ms": 1e3 * (time.perf_counter() - start), "first loss": losses[0], "last loss": losses[-1],
    }  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--memory", nargs="+", choices=["bf16", *MODES], default=MODES)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, help="tokens in a sequence (default: 2048, or 64 of the small shape)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--compile", action="store_true", help="compile each layer")
    args = parser.parse_args(argv)
    args.length = args.length or (64 if args.model == "tiny" else 2048)
    return args


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    """Print and return a row for each memory mode and optimiser."""
    args, rows = parse_args(argv), []
    for memory in args.memory:
        for name in args.optimizers:
            rows.append(run(memory, name, args))
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
