"""FSDP2 training steps of Llama-3-8B-shaped blocks on the GPUs of a machine: bf16, torchao's fp8 all-gather, this library.

    torchrun --standalone --nproc-per-node 2 bench/fsdp.py
    torchrun --standalone --nproc-per-node 2 bench/fsdp.py --contenders bf16 halo1-int8 --blocks 8

Random weights and data, bf16 weights, fused AdamW, every block compiled and sharded by itself. The contenders take turns in
one process.
"""

import argparse
import gc
import itertools
import os
import statistics
import sys
import time

import results
import torch
import torch.distributed as dist
from contenders import CONTENDERS, convert
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from halo_tensor.fsdp import precompute_scales

FP8_ALL_GATHER = "torchao-tensorwise-fp8-all-gather"
DEFAULT = ["bf16", "torchao-tensorwise", FP8_ALL_GATHER, "halo0-fp8", "halo1-fp8", "halo1-int8"]
NOTES = (
    "A step: forward, backward, fused AdamW, and what a contender does to its scales after it. ms: median of the steps, of "
    "the slowest rank. Issue: what the CPU takes to issue one step to idle GPUs. Peak: of one rank's allocations. Gathered: "
    "what all-gathers bring to one rank in a step, counted where they are called. Compiled block by block, with fullgraph; "
    "the first steps, which compile, are left out."
)


class Blocks(nn.Module):
    """``count`` decoder blocks of Llama-3-8B. x [batch, tokens, 4096] -> the same."""

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
    """Counts the bytes that all-gathers bring to this rank."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is not torch.Tensor and t is not nn.Parameter for t in types):
            return NotImplemented  # subclasses take themselves apart; their inner ops come here again
        if func.namespace == "c10d" and func._opname == "_allgather_base_":
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def prepare(name: str, model: nn.Module):
    """Convert ``model``; returns what is to be called after each optimiser step."""
    if name != FP8_ALL_GATHER:
        convert(model, name)
        return lambda: precompute_scales(model)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training, precompute_float8_dynamic_scale_for_fsdp

    convert_to_float8_training(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
    return lambda: precompute_float8_dynamic_scale_for_fsdp(model)


def measure(name: str, args, device: torch.device) -> tuple[float, float, float, float]:
    """(ms per step, ms to issue one, GiB at the peak, GiB gathered per step)."""
    torch.manual_seed(0)
    with device:
        model = Blocks(args.blocks, args.hidden, args.intermediate).bfloat16()
    after_step = prepare(name, model)
    for layer in model.layers:
        layer.compile(fullgraph=True)
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    x, e = torch.randn(2, args.batch, args.length, args.hidden, device=device, dtype=torch.bfloat16)

    def step() -> None:
        model(x).backward(e)
        optimizer.step()
        optimizer.zero_grad()
        after_step()

    for _ in range(args.warmup):
        step()
    with torch.compiler.set_stance("force_eager"), Gathered() as gathered:  # compiled code does not run under a mode
        step()
    step()
    torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    peak = torch.cuda.max_memory_allocated() / 2**30
    issue = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        issue.append(1e3 * (time.perf_counter() - start))
    measured = torch.tensor([ms, statistics.median(issue), peak], device=device)
    dist.all_reduce(measured, dist.ReduceOp.MAX)
    return *measured.tolist(), gathered.bytes / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=[*CONTENDERS, FP8_ALL_GATHER], metavar="NAME")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--batch", type=int, default=2, help="sequences per GPU")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first that is timed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--name", default="fsdp", help="of the result files")
    args = parser.parse_args()
    if not torch.cuda.is_available() or "LOCAL_RANK" not in os.environ:
        sys.exit("bench/fsdp.py needs CUDA devices and torchrun: torchrun --standalone --nproc-per-node 2 bench/fsdp.py")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    world, first = dist.get_world_size(), dist.get_rank() == 0
    title = f"FSDP2 on {world} GPUs, {args.blocks} blocks of {args.hidden}, {args.batch}×{args.length} tokens per GPU"
    rows: list[dict] = []
    for name in args.contenders:
        try:
            ms, issue, peak, gathered = measure(name, args, device)
        except Exception as error:  # the ranks run alike, so it is everyone's
            print(f"rank {dist.get_rank()}, {name}: {error!r:.500}", flush=True)
            continue
        finally:
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
        bf16 = next((row for row in rows if row["contender"] == "bf16"), None)
        row = {
            "contender": name,
            "ms": round(ms, 2),
            "× bf16": f"{(bf16['ms'] if bf16 else ms) / ms:.2f}" if bf16 or name == "bf16" else None,
            "tokens/s": round(1e3 * world * args.batch * args.length / ms),
            "issue ms": round(issue, 1),
            "peak GiB": f"{peak:.2f}",
            "gathered GiB": f"{gathered:.3f}",
            "gathered, × bf16": f"{gathered / float(bf16['gathered GiB']):.3f}" if bf16 else None,
        }
        rows.append(row)
        if first:
            print(row, flush=True)
            results.write(args.name, title, rows, NOTES, quiet=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
