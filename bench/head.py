"""Time a head with its loss, forward and backward: linear_cross_entropy against PyTorch and Liger-Kernel.

    python bench/head.py
    python bench/head.py --models 1b --scratch 128 1024

The weight has random values; times do not depend on them. Times are medians. The peak is measured above the hidden states, the
weight (with its codes, where it has some) and the targets, without the gradients of hidden states and weight.
"""

import argparse
import sys
from collections.abc import Callable

import results
import torch
import torch.nn.functional as F

from halo_tensor import halo_config, linear_cross_entropy, quantize_

DEVICE = "cuda"
#: model -> hidden size and vocabulary
MODELS = {
    "1b": (2048, 128256),
    "3b": (3072, 128256),
    "8b": (4096, 128256),
    "smollm2": (576, 49152),
    "gemma2-2b": (2304, 256000),
}
OURS = "int8 / fp8"
NOTES = (
    "int8 / fp8: the products of forward and backward. Codes kept: the weight is a HaloWeight, whose int8 codes are made by "
    "the optimiser's step; otherwise they are made in the call. × bf16: the time of compiled bf16 divided by the contender's; "
    "more is better. MiB: the most memory above the inputs, without the gradients. Liger: liger_fused_linear_cross_entropy."
)


def pytorch(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets)


def ours(**options) -> Callable:
    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, **options)


def contenders(scratch: list[int]) -> dict[str, tuple[Callable, bool]]:
    """Return name -> (the loss, whether the weight is converted). The first ones matter most if a run is cut short."""
    return {
        f"{OURS}, codes kept": (ours(), True),
        f"{OURS}": (ours(), False),
        "bf16, eager": (pytorch, False),
        "Liger": (liger, False),
        **{f"{OURS}, codes kept, scratch {mib} MiB": (ours(scratch=mib * 2**20), True) for mib in scratch},
        "int8 / bf16, codes kept": (ours(backward="bf16"), True),
        "bf16, compiled": (torch.compile(pytorch), False),
    }


def measure(step: Callable, clear: Callable, reps: int) -> tuple[float, int]:
    """Return the median time in ms and the peak in bytes of a step. ``clear`` frees its gradients."""
    for _ in range(2):
        clear()
        step()
    clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    times = []
    for _ in range(reps):
        clear()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[reps // 2], peak


def rows_of(model: str, args: argparse.Namespace, why_not: dict) -> list[dict]:
    """Return a row for each contender that runs, and add the reason to ``why_not`` for each one that does not."""
    width, vocabulary = MODELS[model]
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (args.tokens,), device=DEVICE)
    rows = []
    for name, (loss, converted) in contenders(args.scratch).items():
        head = torch.nn.Linear(width, vocabulary, bias=False, device=DEVICE, dtype=torch.bfloat16)
        torch.nn.init.normal_(head.weight, std=0.02)
        if converted:
            quantize_(head, halo_config(level=1, dtype="int8"), filter_fn=lambda module, name: True)

        def step(loss: Callable = loss, head: torch.nn.Linear = head) -> None:
            loss(hidden, head.weight, targets).backward()

        def clear(head: torch.nn.Linear = head) -> None:
            hidden.grad = head.weight.grad = None

        try:
            ms, peak = measure(step, clear, args.reps)
        except Exception as error:
            print(f"{model} {name}: {error!r:.300}", flush=True)
            why_not[model, name] = results.reason(error)
            continue
        peak -= (hidden.numel() + head.weight.numel()) * 2
        rows.append({"model": model, "contender": name, "ms": round(ms, 2), "× bf16": None, "MiB": round(peak / 2**20)})
        print(rows[-1], flush=True)
        del head, step, clear
        torch.cuda.empty_cache()
    bf16 = [row["ms"] for row in rows if row["contender"] == "bf16, compiled"]
    for row in rows:
        row["× bf16"] = results.speedup(bf16[0] if bf16 else None, row["ms"])
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "head")
    parser.add_argument("--models", nargs="+", default=["1b", "3b"], choices=list(MODELS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--scratch", nargs="*", type=int, default=[128, 1024, 3072], help="MiB, besides the default")
    parser.add_argument("--reps", type=int, default=9)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/head.py needs a CUDA device")
    rows: list[dict] = []
    why_not: dict = {}
    for model in args.models:
        rows += rows_of(model, args, why_not)
        title = f"The head and its loss, {args.tokens} tokens"
        expected = list(contenders(args.scratch))
        results.write(args.name, title, rows, NOTES, args.folder, panels=["model"], expected=expected, why_not=why_not)


if __name__ == "__main__":
    main()
