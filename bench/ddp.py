"""Time DDP training steps of a compiled Hugging Face Llama: bf16, this library, and torchao's float8.

    torchrun --standalone --nproc-per-node 2 bench/ddp.py
    torchrun --standalone --nproc-per-node 2 bench/ddp.py --contenders bf16 halo1-int8 --blocks 8

``LlamaForCausalLM`` with the widths of Llama-3-8B and a small vocabulary, ``torch.compile(DistributedDataParallel(model))``:
Dynamo's DDPOptimizer splits the graph where buckets of gradients are sent. Weights (bf16) and data are random.
"""

import argparse
import gc
import os
import statistics
import sys

import results
import torch
import torch.distributed as dist
from contenders import CONTENDERS, convert
from fsdp import TINY, alone, milliseconds
from steps import BACKEND, CUDA
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
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    ms = milliseconds(step, args.steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    issue = statistics.median(alone(step) for _ in range(5))
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    most, least = sums.clone(), -sums
    slowest = torch.tensor([ms, issue, peak], device=device)
    for tensor in (slowest, most, least):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    ms, issue, peak = slowest.tolist()
    same = "yes" if torch.equal(most, -least) else "no"
    return {
        "ms": round(ms, 2),
        "issue ms": round(issue, 1),
        "peak GiB": f"{peak:.2f}" if peak else None,
        "same": same,
        "loss": f"{losses[0]:.4f}",
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2, help="sequences per GPU")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bucket", type=float, default=500, help="MB of gradients in a bucket; DDP's own default is 25")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first that is timed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run on a CPU too")
    results.add_arguments(parser, "ddp")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(TINY, vocabulary=256, bucket=1)
    return args


def main() -> None:
    args = parse_args()
    if "LOCAL_RANK" not in os.environ or not (CUDA or args.tiny):
        sys.exit("bench/ddp.py needs CUDA devices and torchrun: torchrun --standalone --nproc-per-node 2 bench/ddp.py")
    device = torch.device("cpu")
    if CUDA:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo", device_id=device if CUDA else None)
    world, first = dist.get_world_size(), dist.get_rank() == 0
    shape = f"{args.blocks} blocks of {args.hidden}, {args.batch}×{args.length} tokens per GPU"
    title = f"DDP, compiled, on {world} {'GPUs' if CUDA else 'processes of a CPU'}, {shape}"
    rows: list[dict] = []
    why_not = {(name,): results.ENDED for name in args.contenders}
    for name in args.contenders:
        try:
            columns = measure(name, args, device)
        except Exception as error:  # all ranks run the same code, so all of them fail
            print(f"rank {dist.get_rank()}, {name}: {error!r:.2000}", flush=True)
            why_not[(name,)] = results.reason(error)
        else:
            bf16 = next((row["ms"] for row in rows if row["contender"] == "bf16"), columns["ms"] if name == "bf16" else None)
            rows.append({"contender": name, "ms": columns.pop("ms"), "× bf16": None} | columns)
            rows[-1]["× bf16"] = results.speedup(bf16, rows[-1]["ms"])
            if first:
                print(rows[-1], flush=True)
        finally:
            torch._dynamo.reset()
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        if first and rows:
            results.write(args.name, title, rows, NOTES, args.folder, quiet=True, expected=DEFAULT, why_not=why_not)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
