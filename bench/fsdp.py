"""Time FSDP2 training steps of Llama-3-8B-shaped blocks: bf16, torchao's fp8 all-gather, and this library.

    torchrun --standalone --nproc-per-node 2 bench/fsdp.py
    torchrun --standalone --nproc-per-node 2 bench/fsdp.py --contenders bf16 halo1-int8 --blocks 8

Weights (bf16) and data are random. The optimiser is fused AdamW, and every block is compiled and sharded by itself. The
contenders run one after another in one process.
"""

import argparse

import ranks
import results
import torch
import torch.distributed as dist
from contenders import FP8_ALL_GATHER, convert, precompute_scales
from ranks import timed
from steps import BACKEND
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
    ms, issue, peak = timed(step, args.steps, device)
    return ms, issue, peak or None, gathered.bytes / 2**30


def row_of(name: str, ms: float, issue: float, peak: float | None, gathered: float, rows: list[dict], tokens: int) -> dict:
    """Return the row of a contender. It is compared with the row of bf16 in ``rows``, if there is one."""
    bf16 = next((row for row in rows if row["contender"] == "bf16"), None)
    return {
        "contender": name,
        "ms": round(ms, 2),
        "× bf16": results.speedup(ranks.reference(rows, name, ms), ms),
        "tokens/s": round(1e3 * tokens / ms),
        "issue ms": round(issue, 1),
        "peak GiB": peak and f"{peak:.2f}",
        "gathered GiB": f"{gathered:.3f}",
        "gathered, × bf16": f"{gathered / float(bf16['gathered GiB']):.3f}" if bf16 else None,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ranks.parser_of(__doc__.splitlines()[0], DEFAULT, warmup=5)
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    results.add_arguments(parser, "fsdp")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(ranks.TINY)
    return args


def main() -> None:
    args = parse_args()
    with ranks.process_group("fsdp.py", args.tiny) as device:
        tokens = dist.get_world_size() * args.batch * args.length
        ranks.take_turns(
            args,
            ranks.title("FSDP2", args),
            NOTES + (EAGER if args.eager else COMPILED),
            DEFAULT,
            lambda name, rows: row_of(name, *measure(name, args, device), rows, tokens),
        )


if __name__ == "__main__":
    main()
