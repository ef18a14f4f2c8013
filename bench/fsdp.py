"""Time FSDP2 training steps of Llama-3-8B-shaped blocks: bf16, torchao's fp8 all-gather, and this library.

    torchrun --standalone --nproc-per-node 2 bench/fsdp.py
    torchrun --standalone --nproc-per-node 2 bench/fsdp.py --contenders bf16 halo1-int8 --blocks 8

Weights (bf16) and data are random. The optimiser is fused AdamW, and every block is compiled and sharded by itself. The
contenders run one after another in one process.
"""

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable

import results
import torch
import torch.distributed as dist
from contenders import CONTENDERS, FP8_ALL_GATHER, convert, precompute_scales
from steps import BACKEND, CUDA
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

DEFAULT = [
    "bf16",
    "torchao-tensorwise",
    FP8_ALL_GATHER,
    "torchao-rowwise",
    "torchao-int8",
    "halo0-fp8",
    "halo1-fp8",
    "halo1-int8",
]
TINY = {"blocks": 2, "hidden": 128, "intermediate": 256, "batch": 1, "length": 64, "warmup": 2, "steps": 2}
NOTES = (
    "A step: forward, backward, fused AdamW, and what a contender does to its scales after it. ms: median of the steps, of "
    "the slowest rank. Issue: what the CPU takes to issue one step to idle GPUs. Peak: of one rank's allocations. Gathered: "
    "what all-gathers bring to one rank in a step, counted where they are called. "
)
COMPILED = "Compiled block by block, with fullgraph; the first steps, which compile, are left out."
EAGER = "Eager code, not compiled."


class Blocks(nn.Module):
    """``count`` decoder blocks of Llama-3-8B. They map [batch, tokens, 4096] to the same shape."""

    def __init__(self, count: int, hidden: int, intermediate: int):
        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=hidden // 128,
            num_key_value_heads=max(hidden // 512, 1), num_hidden_layers=count,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(count))
        self.rope = LlamaRotaryEmbedding(config)

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device)[None]
        embeddings = self.rope(x, positions)
        for layer in self.layers:
            x = layer(x, position_embeddings=embeddings)
        return x


class Gathered(TorchDispatchMode):
    """Count the bytes that all-gathers bring to this rank."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is not torch.Tensor and t is not nn.Parameter for t in types):
            return NotImplemented  # the subclass runs ops on its inner tensors, which arrive here again
        if func.namespace == "c10d" and func._opname == "_allgather_base_":
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], None], count: int) -> float:
    """Return the median time of ``count`` consecutive steps."""
    if not CUDA:
        return statistics.median(alone(step) for _ in range(count))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def alone(step: Callable[[], None]) -> float:
    """Return the milliseconds until a step that starts on an idle device has been issued."""
    synchronize()
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, args: argparse.Namespace, device: torch.device) -> tuple[float, float, float | None, float]:
    """Return the ms of a step, the ms to issue one, the GiB at the peak, and the GiB gathered in a step."""
    torch.manual_seed(0)
    with device:
        model = Blocks(args.blocks, args.hidden, args.intermediate).bfloat16()
    convert(model, name)
    for layer in model.layers:
        if not args.eager:
            layer.compile(fullgraph=True, backend=BACKEND)
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    x, e = torch.randn(2, args.batch, args.length, args.hidden, device=device, dtype=torch.bfloat16)

    def step() -> None:
        model(x).backward(e)
        optimizer.step()
        optimizer.zero_grad()
        precompute_scales(name, model)

    for _ in range(args.warmup):
        step()
    with torch.compiler.set_stance("force_eager"), Gathered() as gathered:  # compiled code ignores dispatch modes
        step()
    step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    ms = milliseconds(step, args.steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    issue = statistics.median(alone(step) for _ in range(5))
    slowest = torch.tensor([ms, issue, peak], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    ms, issue, peak = slowest.tolist()
    return ms, issue, peak or None, gathered.bytes / 2**30


def row_of(name: str, ms: float, issue: float, peak: float | None, gathered: float, rows: list[dict], tokens: int) -> dict:
    """Return the row of a contender. It is compared with the row of bf16 in ``rows``, if there is one."""
    bf16 = next((row for row in rows if row["contender"] == "bf16"), None)
    reference = bf16["ms"] if bf16 else ms if name == "bf16" else None
    return {
        "contender": name,
        "ms": round(ms, 2),
        "× bf16": results.speedup(reference, ms),
        "tokens/s": round(1e3 * tokens / ms),
        "issue ms": round(issue, 1),
        "peak GiB": peak and f"{peak:.2f}",
        "gathered GiB": f"{gathered:.3f}",
        "gathered, × bf16": f"{gathered / float(bf16['gathered GiB']):.3f}" if bf16 else None,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--batch", type=int, default=2, help="sequences per GPU")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first that is timed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run on a CPU too")
    results.add_arguments(parser, "fsdp")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(TINY)
    return args


def main() -> None:
    args = parse_args()
    if "LOCAL_RANK" not in os.environ or not (CUDA or args.tiny):
        sys.exit("bench/fsdp.py needs CUDA devices and torchrun: torchrun --standalone --nproc-per-node 2 bench/fsdp.py")
    device = torch.device("cpu")
    if CUDA:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo", device_id=device if CUDA else None)
    world, first = dist.get_world_size(), dist.get_rank() == 0
    shape = f"{args.blocks} blocks of {args.hidden}, {args.batch}×{args.length} tokens per GPU"
    title = f"FSDP2 on {world} {'GPUs' if CUDA else 'processes of a CPU'}, {shape}"
    notes = NOTES + (EAGER if args.eager else COMPILED)
    rows: list[dict] = []
    why_not = {(name,): results.ENDED for name in args.contenders}
    for name in args.contenders:
        try:
            row = row_of(name, *measure(name, args, device), rows, world * args.batch * args.length)
        except Exception as error:  # all ranks run the same code, so all of them fail
            print(f"rank {dist.get_rank()}, {name}: {error!r:.500}", flush=True)
            why_not[(name,)] = results.reason(error)
        else:
            rows.append(row)
            if first:
                print(row, flush=True)
        finally:
            torch._dynamo.reset()
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        if first and rows:
            results.write(args.name, title, rows, notes, args.folder, quiet=True, expected=DEFAULT, why_not=why_not)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
