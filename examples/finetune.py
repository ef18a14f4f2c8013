"""Fine-tune a causal LM in high precision and under HALO, side by side.

    python examples/finetune.py                                    # SmolLM2-135M on Python's documentation, on this machine
    python examples/finetune.py --model meta-llama/Llama-3.2-1B --data chats.jsonl --recipes high halo2-int8

Prints a table and writes the loss curves to a PNG.
"""

import argparse
import re
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import batches, environment, fail, load_model, load_tokens, saved_for_backward
from tqdm import tqdm

from halo_tensor import dequantize_, halo_config, quantize_, recipe_config
from halo_tensor.recipe import RECIPES


@dataclass
class Run:
    name: str
    losses: list[float] = field(default_factory=list)
    validation: float = float("nan")  # of the fine-tuned weights, exported plain
    quantised: float = float("nan")  # the same, run by the recipe
    seconds: float = float("nan")
    saved: int = 0


def config_of(name: str):
    """ "high" -> None, "halo1-int8" or "halo1-int8-tensor" -> that halo_config, else a recipe's name."""
    if name == "high":
        return None
    if halo := re.fullmatch(r"halo(\d)-(\w+?)(?:-(row|tensor))?", name):
        return halo_config(int(halo[1]), halo[2], granularity=halo[3] or "row")
    return recipe_config(name)


def finetune(model, name: str, train: torch.Tensor, valid: torch.Tensor, args) -> Run:
    config, run = config_of(name), Run(name)
    if config is not None:
        print(quantize_(model, config))
    step_model = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    warmup = max(args.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (args.steps - i) / max(args.steps - warmup, 1))
    )
    times = []
    data = batches(train, args.batch, args.length)
    bar = tqdm(range(args.steps), desc=name)
    for step in bar:
        start = time.perf_counter()
        ids = next(data).to(model.device)
        if step == 0 and not args.compile:  # hooks on saved tensors would split a compiled graph
            with saved_for_backward(model) as saved:
                loss = model(input_ids=ids, labels=ids).loss
            run.saved = saved[0]
        else:
            loss = step_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{run.losses[-1]:.4f}")
    run.seconds = sorted(times)[len(times) // 2]
    run.quantised = run.validation = validate(model, valid, args)
    if config is not None:
        dequantize_(model)
        run.validation = validate(model, valid, args)
    return run


@torch.no_grad()
def validate(model, tokens: torch.Tensor, args) -> float:
    rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length).to(model.device)
    losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in rows.split(args.batch)]
    return sum(losses) / len(rows)


def table(runs: list[Run]) -> str:
    """Markdown. "Validation" is the loss of the fine-tuned weights in high precision, "by recipe" that of the same weights
    run by the recipe; changes are against the first run."""
    lines = [
        "| recipe | train loss | validation loss | change | by recipe | s/step | saved by linears for backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        change = run.validation / runs[0].validation - 1
        train = sum(run.losses[-4:]) / len(run.losses[-4:])
        saved = f"{run.saved / 2**20:.1f} MiB ({run.saved / runs[0].saved:.2f}×)" if run.saved and runs[0].saved else "–"
        lines.append(
            f"| {run.name} | {train:.4f} | {run.validation:.4f} | {change:+.2%} | {run.quantised:.4f} "
            f"| {run.seconds:.2f} | {saved} |"
        )
    return "\n".join(lines)


def plot(runs: list[Run], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        label = f"{run.name}: validation {run.validation:.4f}"
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=label, linestyle="-" if i == 0 else "--", linewidth=1.8)
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub name of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--data", help=".txt, or .jsonl with a text or messages field (default: Python's documentation)")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["high", "halo1-int8", "halo0-fp8"],
        help=f"high, haloLEVEL-DTYPE[-tensor], {', '.join(RECIPES)}; the first is what the others are compared with",
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--valid", type=int, default=16, help="sequences held out for validation")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="of the master weights (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the table and the plot")
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
    valid, train = tokens.split([args.valid * args.length, len(tokens) - args.valid * args.length])

    runs: list[Run] = []
    try:
        for name in args.recipes:
            runs.append(finetune(deepcopy(model), name, train, valid, args))
    except KeyboardInterrupt:
        if not runs:
            fail("interrupted before the first run was done; nothing was written")
        print(f"\ninterrupted: {len(runs)} of {len(args.recipes)} runs are done, and only they are reported")
    args.output.mkdir(parents=True, exist_ok=True)
    title = f"{args.model or 'SmolLM2-135M-Instruct'} on {args.data or 'Python documentation'}"
    report = f"{title}, {args.steps} steps of {args.batch}×{args.length} tokens\n{environment()}\n\n{table(runs)}\n"
    (args.output / "finetune.md").write_text(report)
    plot(runs, args.output / "finetune.png", title)
    print(f"\n{report}\nwritten to {args.output}/finetune.md and finetune.png")


if __name__ == "__main__":
    main()
