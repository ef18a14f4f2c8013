"""Train LoRA adapters on a high-precision base and on frozen quantised ones, side by side.

    python examples/lora.py                                        # SmolLM2-135M on Python's documentation, on this machine
    python examples/lora.py --model meta-llama/Llama-3.1-8B --data chats.jsonl --recipes high halo0-fp8 --rank 16

PEFT is used without changes. The table is printed and written to a file.
"""

from copy import deepcopy
from dataclasses import dataclass, field

import torch
from common import (
    add_record_argument,
    compared_model_and_data,
    comparison_arguments,
    config_of,
    integer,
    record,
    report,
    train,
    validate,
)
from torch import nn
from torch.distributed._tools.common_utils import get_untyped_storages

from halo_tensor import dequantize_, quantize_


@dataclass
class Run:
    name: str
    losses: list[float] = field(default_factory=list)
    validation: float = float("nan")  # loss of the base with the adapter, as trained
    merged: float = float("nan")  # loss of the plain model after merging
    seconds: float = float("nan")
    weights: int = 0
    saved: int = 0


def train_adapters(model, name: str, tokens: torch.Tensor, valid: torch.Tensor, args) -> Run:
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
    train(run, model, optimizer, tokens, args)
    model.eval()
    run.validation = validate(model, valid, args)
    dequantize_(model)  # before merging, so that the merged weights are not rounded again
    run.merged = validate(model.merge_and_unload(), valid, args)
    return run


def base_bytes(model) -> int:
    """Return the bytes of the weights of the linear layers that have adapters."""
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith("base_layer")]
    return sum(s.nbytes() for m in layers for s in get_untyped_storages(m.weight))


def table(runs: list[Run]) -> str:
    """Return the runs as Markdown. Changes and fractions are relative to the first run."""
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


def rows(runs: list[Run]) -> list[dict]:
    """Return the runs as numbers, for a record."""
    return [
        {
            "recipe": run.name,
            "train loss": sum(run.losses[-4:]) / len(run.losses[-4:]),
            "validation loss": run.validation,
            "merged, plain": run.merged,
            "s/step": run.seconds,
            "base weights, MiB": run.weights / 2**20,
            "saved for backward, MiB": run.saved / 2**20,
        }
        for run in runs
    ]


def main() -> None:
    recipes = ["high", "halo1-int8", "halo0-fp8", "halo1-fp6"]
    parser = comparison_arguments(__doc__, recipes, valid=8, lr=5e-4)
    parser.add_argument("--rank", type=integer(1), default=16)
    add_record_argument(parser)
    args = parser.parse_args()
    model, tokens, valid, title = compared_model_and_data(args)
    runs = [train_adapters(deepcopy(model), name, tokens, valid, args) for name in args.recipes]
    title = f"{title}, LoRA of rank {args.rank}"
    report(args, "lora", title, table(runs))
    record(args.record, f"{title}, {args.steps} steps of {args.batch}×{args.length} tokens", rows(runs))


if __name__ == "__main__":
    main()
