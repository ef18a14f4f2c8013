"""Train LoRA adapters on a high-precision base and on frozen quantised ones, side by side.

    python examples/lora.py                                        # SmolLM2-135M on Python's documentation, on this machine
    python examples/lora.py --model meta-llama/Llama-3.1-8B --data chats.jsonl --recipes high halo0-fp8 --rank 16

PEFT is used as it is. Prints a table, and keeps it in a file.
"""

import argparse
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import batches, environment, fail, load_model, load_tokens, saved_for_backward
from finetune import config_of, validate
from torch import nn
from torch.distributed._tools.common_utils import get_untyped_storages
from tqdm import tqdm

from halo_tensor import dequantize_, quantize_


@dataclass
class Run:
    name: str
    losses: list[float] = field(default_factory=list)
    validation: float = float("nan")  # of the base and the adapter as they were trained
    merged: float = float("nan")  # of the plain model that they were merged into
    seconds: float = float("nan")
    weights: int = 0
    saved: int = 0


def train(model, name: str, tokens: torch.Tensor, valid: torch.Tensor, args) -> Run:
    from peft import LoraConfig, get_peft_model

    config, run = config_of(name), Run(name)
    model.requires_grad_(False)
    if config is not None:
        print(quantize_(model, config))  # frozen weights are held as codes only
    torch.manual_seed(0)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    run.weights = base_bytes(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    data, times = batches(tokens, args.batch, args.length), []
    bar = tqdm(range(args.steps), desc=name)
    for step in bar:
        start = time.perf_counter()
        ids = next(data).to(model.device)
        if step == 0:
            with saved_for_backward(model) as saved:
                loss = model(input_ids=ids, labels=ids).loss
            run.saved = saved[0]
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{run.losses[-1]:.4f}")
    run.seconds = sorted(times)[len(times) // 2]
    model.eval()
    run.validation = validate(model, valid, args)
    dequantize_(model)  # before merging, so that the merged weights are not rounded again
    run.merged = validate(model.merge_and_unload(), valid, args)
    return run


def base_bytes(model) -> int:
    """Of the weights of the linear layers that adapters sit on."""
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith("base_layer")]
    return sum(s.nbytes() for m in layers for s in get_untyped_storages(m.weight))


def table(runs: list[Run]) -> str:
    """Markdown; changes and shares are against the first run."""
    first = runs[0]
    lines = [
        "| recipe | train loss | validation loss | change | merged, plain | s/step | base weights | saved for backward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        loss = sum(run.losses[-4:]) / len(run.losses[-4:])
        sizes = [
            f"{size / 2**20:.1f} MiB ({size / reference:.2f}×)"
            for size, reference in ((run.weights, first.weights), (run.saved, first.saved))
        ]
        change = f"{run.validation / first.validation - 1:+.2%}"
        lines.append(
            f"| {run.name} | {loss:.4f} | {run.validation:.4f} | {change} | {run.merged:.4f} | {run.seconds:.2f} "
            f"| {' | '.join(sizes)} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub name of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--data", help=".txt, or .jsonl with a text or messages field (default: Python's documentation)")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["high", "halo1-int8", "halo0-fp8", "halo1-fp6"],
        help="of the base: high, haloLEVEL-DTYPE[-tensor]; the first is what the others are compared with",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--valid", type=int, default=8, help="sequences held out for validation")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="of the base (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the table")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for name in args.recipes:
        try:
            config_of(name)
        except ValueError as error:
            fail(f"--recipes {name}: {error}")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    model, tokenizer = load_model(args.model, dtype, args.device)
    tokens = load_tokens(tokenizer, args.data, (args.valid + args.steps * args.batch) * args.length)
    valid, rest = tokens.split([args.valid * args.length, len(tokens) - args.valid * args.length])

    runs = [train(deepcopy(model), name, rest, valid, args) for name in args.recipes]
    title = f"{args.model or 'SmolLM2-135M-Instruct'} on {args.data or 'Python documentation'}"
    report = f"{title}, LoRA of rank {args.rank}, {args.steps} steps of {args.batch}×{args.length} tokens\n{environment()}\n"
    report += f"\n{table(runs)}\n"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "lora.md").write_text(report)
    print(f"\n{report}\nwritten to {args.output}/lora.md")


if __name__ == "__main__":
    main()
