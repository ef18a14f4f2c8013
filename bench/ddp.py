"""Time DDP training steps of a compiled Hugging Face Llama: bf16, this library, and torchao's float8.

    torchrun --standalone --nproc-per-node 2 bench/ddp.py
    torchrun --standalone --nproc-per-node 2 bench/ddp.py --contenders bf16 halo1-int8 --blocks 8

``LlamaForCausalLM`` with the widths of Llama-3-8B and a small vocabulary, ``torch.compile(DistributedDataParallel(model))``:
Dynamo's DDPOptimizer splits the graph where buckets of gradients are sent. Weights (bf16) and data are random.
"""

import argparse

import ranks
import results
import torch
import torch.distributed as dist
from contenders import convert
from ranks import timed
from steps import BACKEND
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

DEFAULT = ["bf16", "halo1-int8", "torchao-tensorwise"]
NOTES = (
    "A step: forward, backward and fused AdamW. ms: median of the steps, of the slowest rank. Issue: what the CPU takes to "
    "issue one step to idle GPUs. Peak: of one rank's allocations. Same: whether all ranks held equal weights after the last "
    "step. Loss: of the first batch of rank 0, before any step. The first steps, which compile, are left out."
)


def model_of(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.blocks,
        vocab_size=args.vocabulary,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=max(args.hidden // 512, 1),
        use_cache=False,
    )
    return LlamaForCausalLM(config).bfloat16()


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Return the columns of a contender without those that compare it."""
    torch.manual_seed(0)
    with device:
        model = model_of(args)
    convert(model, name)
    step_model = torch.compile(
        DistributedDataParallel(model, bucket_cap_mb=args.bucket, gradient_as_bucket_view=True), backend=BACKEND
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    ids = torch.randint(args.vocabulary, (args.batch, args.length), device=device, generator=generator)
    losses = []

    def step() -> None:
        loss = step_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    for _ in range(args.warmup):
        step()
    ms, issue, peak = timed(step, args.steps, device)
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    most, least = sums.clone(), -sums
    for tensor in (most, least):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    same = "yes" if torch.equal(most, -least) else "no"
    return {
        "ms": round(ms, 2),
        "issue ms": round(issue, 1),
        "peak GiB": f"{peak:.2f}" if peak else None,
        "same": same,
        "loss": f"{losses[0]:.4f}",
    }


def row_of(name: str, args: argparse.Namespace, device: torch.device, rows: list[dict]) -> dict:
    """Return the row of a contender. It is compared with the row of bf16 in ``rows``, if there is one."""
    columns = measure(name, args, device)
    ms = columns.pop("ms")
    return {"contender": name, "ms": ms, "× bf16": results.speedup(ranks.reference(rows, name, ms), ms)} | columns


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ranks.parser_of(__doc__.splitlines()[0], DEFAULT, warmup=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--bucket", type=float, default=500, help="MB of gradients in a bucket; DDP's own default is 25")
    results.add_arguments(parser, "ddp")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(ranks.TINY, vocabulary=256, bucket=1)
    return args


def main() -> None:
    args = parse_args()
    with ranks.process_group("ddp.py", args.tiny) as device:
        title = ranks.title("DDP, compiled,", args)
        ranks.take_turns(args, title, NOTES, DEFAULT, lambda name, rows: row_of(name, args, device, rows))


if __name__ == "__main__":
    main()
