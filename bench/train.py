"""Time whole training steps of Llama shapes, compiled, with loss and fused AdamW: this library against bf16 and torchao.

    python bench/train.py --models 1b 3b --lengths 512 2048 4096 --checkpointing no layers products
    python bench/train.py --models 8b-lora --contenders bf16 bitsandbytes-nf4 halo1-fp8    # adapters of rank 16
    python bench/train.py --models 30b-a3b --contenders bf16 halo1-int8                    # six layers of Qwen3-30B-A3B
    python bench/train.py --models 30b-a3b-lora --contenders bf16 halo1-int8               # all layers, adapters of attention
    python bench/train.py --models 8b --contenders bf16 torchao-tensorwise halo1-int8-no-codes-head halo1-int8-low-head
    python bench/train.py --tiny --folder outputs --contenders bf16 halo1-int8             # small shapes, on a CPU too

Weights and data are random. The contenders run one after another in one process; each compiles from empty caches. The table is
written after every row. Rows of an earlier call in the same environment are kept, unless they are measured again.
"""

import argparse
import itertools
import time

import chart
import results
import torch
from contenders import convert, split_head
from llama import RECOMPUTED, SHAPES, Llama
from steps import BACKEND, DEVICE, Measured, allocated, check_gradients, measure_steps, need_cuda, take_turn, warm_up
from torch._functorch import config as functorch

#: name -> (shape, whether only adapters are trained, how it is compiled by default)
MODELS = {
    "1b": ("1b", False, "model"),
    "3b": ("3b", False, "blocks"),
    "8b": ("8b", False, "blocks"),
    "8b-lora": ("8b", True, "blocks"),
    "30b-a3b": ("30b-a3b-6-layers", False, "blocks"),
    "30b-a3b-lora": ("30b-a3b", True, "blocks"),
}
TINY_MODELS = {
    "tiny": ("tiny", False, "blocks"),
    "tiny-lora": ("tiny", True, "blocks"),
    "tiny-mixture": ("tiny-mixture", False, "blocks"),
    "tiny-mixture-lora": ("tiny-mixture", True, "blocks"),
}
DEFAULT = ["bf16", "torchao-tensorwise", "torchao-rowwise", "torchao-int8", "halo0-fp8", "halo1-fp8", "halo1-int8"]
PANEL = ("model", "sequences", "recomputed", "compiled")  # columns whose values say which rows are compared
NOTES = (
    "Llama-3.2-1B, -3B and Llama-3-8B shapes, all weights trained; 8b-lora: Llama-3-8B, of which PEFT adapters of rank 16 on "
    "every linear are trained; 30b-a3b: Qwen3-30B-A3B, 6 of its 48 layers, all trained; 30b-a3b-lora: the whole "
    "model, of which adapters of rank 16 on the linears of attention are trained. Names that end in head compute "
    "lm_head and the loss by linear_cross_entropy, those in liger by Liger-Kernel's function, which is not compiled; in all "
    "others both are in high precision. Weights in bf16, random. A step: forward, loss, backward, fused AdamW. "
    "torch.compile with fullgraph (bitsandbytes: with graph breaks), from empty caches; blocks: each layer by itself, "
    "and the loss. Attention is SDPA's causal kernel. Recomputed: what is not saved for backward; a budget is torch's "
    "activation_memory_budget. Names that end in no-codes have memory='balanced', in low memory='low' (docs/memory.md). ms: "
    "median of plain calls. Saved: what the forward leaves allocated besides the loss. Peak: in "
    "one step, weights, gradients and the optimiser's state included. First two steps: in seconds, compilation included. "
    "× bf16 is against the bf16 row of the same shape, which another call may have measured."
)


RECOMPUTED_AS = {"no": [], "layers": ["layers"], "products": ["all but products"]}


def make(name: str, place: dict, args: argparse.Namespace) -> Llama:
    shape, lora, _ = args.known[place["model"]]
    name, head = split_head(name)
    if lora:
        import adapters  # imports peft, which the other models do not need

        return adapters.make(name, SHAPES[shape], recompute=place["checkpointing"])[0]
    with torch.device(DEVICE):
        model = Llama(SHAPES[shape], recompute=place["checkpointing"])
    convert(model, name)
    if head:
        model.fuse_head(head)
    return model


def measure(name: str, place: dict, args: argparse.Namespace) -> Measured:
    torch.manual_seed(0)
    others, length = allocated(), place["length"]
    model = make(name, place, args).train()
    vocab, size = model.llama.config.vocab_size, (max(args.tokens // length, 1), length)
    ids, labels = (torch.randint(vocab, size, device=DEVICE) for _ in range(2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    model.compile_as(place["compiled"], fullgraph=not name.startswith("bitsandbytes"), backend=BACKEND)

    def step() -> None:
        optimizer.zero_grad()
        model(ids, labels).backward()
        optimizer.step()

    with functorch.patch(activation_memory_budget=args.memory_budget):
        measured = measure_steps(step, lambda: model(ids, labels), others, args.reps, graph=False)
    check_gradients(model)
    return measured


def places(args: argparse.Namespace):
    """Yield each combination of model, length and checkpointing, as the table names it and as it is measured."""
    for model, length, checkpointing in itertools.product(args.models, args.lengths, args.checkpointing):
        compiled = args.compile or args.known[model][2]
        recomputed = RECOMPUTED_AS[checkpointing] + [f"budget {args.memory_budget:g}"] * (args.memory_budget < 1)
        sequences = f"{max(args.tokens // length, 1)}×{length}"
        panel = dict(zip(PANEL, (model, sequences, ", ".join(recomputed) or "nothing", compiled), strict=True))
        yield panel, panel | {"length": length, "checkpointing": checkpointing}


def row_of(panel: dict, name: str, measured: Measured, tokens: int) -> dict:
    numbers = {"ms": round(measured.ms, 2), "× bf16": None, "tokens/s": round(1e3 * tokens / measured.ms)}
    return panel | {"contender": name} | numbers | measured.memory() | {"first two steps s": round(measured.first, 1)}


def key(row: dict) -> tuple:
    return tuple(row[column] for column in (*PANEL, "contender"))


def compared(rows: dict[tuple, dict]) -> list[dict]:
    """Compare each row with bf16 in its panel, and sort the rows by panel."""
    panels = list(dict.fromkeys(k[:-1] for k in rows))
    for k, row in rows.items():
        reference = rows.get((*k[:-1], "bf16"))
        row["× bf16"] = results.speedup(reference and reference["ms"], row["ms"])
    return sorted(rows.values(), key=lambda row: panels.index(key(row)[:-1]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "train")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *TINY_MODELS], help="default: 1b, or all tiny ones")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens in a sequence (default: 2048)")
    parser.add_argument("--tokens", type=int, help="tokens in a step (default: 8192)")
    parser.add_argument("--checkpointing", nargs="+", default=["no"], choices=list(RECOMPUTED), help="what to recompute")
    parser.add_argument("--memory-budget", type=float, default=1.0, help="torch._functorch.config.activation_memory_budget")
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, metavar="NAME", help="as in contenders.py and adapters.py")
    parser.add_argument("--compile", choices=["model", "blocks", "no"], help="default: 1b one graph, others by layer")
    parser.add_argument("--reps", type=int, default=1000, help="milliseconds of repetitions")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no row after this")
    parser.add_argument("--missing", action="store_true", help="measure only rows that the table does not have")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run")
    args = parser.parse_args(argv)
    args.known = TINY_MODELS if args.tiny else MODELS
    args.models = args.models or (list(TINY_MODELS) if args.tiny else ["1b"])
    args.lengths = args.lengths or ([64] if args.tiny else [2048])
    args.tokens = args.tokens or (128 if args.tiny else 8192)
    return args


def main() -> None:
    start, args = time.perf_counter(), parse_args()
    if not args.tiny:
        need_cuda("train.py")
    rows = {key(row): row for row in results.earlier(args.name, args.folder)}
    title = f"Training steps of {args.tokens} tokens" + (", small shapes" if args.tiny else "")
    asked = list(itertools.product(list(places(args)), args.contenders))
    why_not = {(*panel.values(), name): results.ENDED for (panel, _), name in asked}
    warm_up()
    for (panel, place), name in asked:
        at = (*panel.values(), name)
        if args.missing and at in rows:
            continue
        if time.perf_counter() - start > args.budget_seconds:
            print(f"stopped before {name}, {', '.join(panel.values())}: {args.budget_seconds:g} s are spent")
            break
        measured, why_not[at] = take_turn(name, measure, place, args)
        if measured is not None:
            rows[at] = row_of(panel, name, measured, args.tokens)
        if rows:
            options = {"panels": PANEL, "expected": DEFAULT, "why_not": why_not}
            results.write(args.name, title, compared(rows), NOTES, args.folder, quiet=True, **options)
        done = {column: value for column, value in rows.get(at, {}).items() if column != "made"}
        print(f"{time.perf_counter() - start:.0f} s: {done or why_not[at]}", flush=True)
    if rows:
        print((args.folder / f"{args.name}.md").read_text())
        chart.draw(args.name, args.folder)


if __name__ == "__main__":
    main()
