"""Fine-tune a causal LM in high precision and under HALO, side by side.

    python examples/compare.py                                     # SmolLM2-135M on Python's documentation, on this machine
    python examples/compare.py --model meta-llama/Llama-3.2-1B --data chats.jsonl --recipes high halo2-int8

Prints a table and writes the loss curves to a PNG.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import (
    compared_model_and_data,
    comparison_arguments,
    config_of,
    fail,
    report,
    train,
    validate,
)

from halo_tensor import dequantize_, quantize_


@dataclass
class Run:
    name: str
    losses: list[float] = field(default_factory=list)
    validation: float = float("nan")  # loss of the fine-tuned weights in high precision
    quantised: float = float("nan")  # loss of the same weights under the recipe
    seconds: float = float("nan")
    saved: int = 0


def finetune(model, name: str, tokens: torch.Tensor, valid: torch.Tensor, args) -> Run:
    config, run = config_of(name), Run(name)
    if config is not None:
        print(quantize_(model, config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    warmup = max(args.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (args.steps - i) / max(args.steps - warmup, 1))
    )
    train(run, model, optimizer, tokens, args, torch.compile(model) if args.compile else None, schedule)
    run.quantised = run.validation = validate(model, valid, args)
    if config is not None:
        dequantize_(model)
        run.validation = validate(model, valid, args)
    return run


def table(runs: list[Run]) -> str:
    """Return the runs as Markdown.

    "Validation" is the loss of the fine-tuned weights in high precision. "By recipe" is the loss of the same weights under the
    recipe. Changes are relative to the first run.
    """
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


def main() -> None:
    parser = comparison_arguments(__doc__, recipes=["high", "halo1-int8", "halo0-fp8"], valid=16, lr=5e-5)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()
    model, tokens, valid, title = compared_model_and_data(args)
    runs: list[Run] = []
    try:
        for name in args.recipes:
            runs.append(finetune(deepcopy(model), name, tokens, valid, args))
    except KeyboardInterrupt:
        if not runs:
            fail("interrupted before the first run was done; nothing was written")
        print(f"\ninterrupted: {len(runs)} of {len(args.recipes)} runs are done, and only they are reported")
    args.output.mkdir(parents=True, exist_ok=True)
    plot(runs, args.output / "compare.png", title)
    report(args, "compare", title, table(runs))


if __name__ == "__main__":
    main()
