"""Time two Llama-3-8B blocks, forward + backward, compiled: this library against bf16 and torchao's low-precision training.

    python bench/block.py
    python bench/block.py --contenders bf16 halo1-int8 --memory-budget 0.5

Weights and data are random. The contenders run one after another in one process; each compiles from empty caches.
"""

import argparse

import chart
import results
import torch
from contenders import BALANCED, CONTENDERS, TUNING, convert, requantize
from llama import SHAPES, Llama, split
from steps import BACKEND, DEVICE, Measured, allocated, measure_steps, need_cuda, take_turn, warm_up
from torch._functorch import config as functorch

from halo_tensor import balance_

PEERS = ["bf16", "torchao-tensorwise", "torchao-rowwise", "torchao-int8"]
OURS = [
    "halo0-fp8",
    "halo1-fp8",
    "halo1-fp8/products",
    "halo2-fp8",
    "halo1-int8",
    "halo1-int8-balanced",
    "halo1-int8/products",
    "halo1-fp6",
]
HELP = (
    f"of {', '.join(CONTENDERS)}; NAME{BALANCED}: after balance_; NAME/layers, NAME/products: backward recomputes all, or all "
    "but products"
)
NOTES = (
    "torch.compile of the {} with fullgraph and an activation memory budget of {:g}, from empty caches; attention is SDPA's "
    "causal kernel. ms: median of plain calls; graph ms: of replays of a CUDA graph. There is no optimiser: weights are "
    "quantised anew in every step, as its write would cause. Saved: what the forward leaves allocated besides its result. "
    "-balanced: after balance_. /products: with keep_products. Peak: in one step, weights and gradients included. "
    "First two steps: in seconds, with compilation, and for torchao-int8 with the tuning of its product: all of its 27 "
    f"configurations for each size, {TUNING['rep']} ms each."
)


def measure(name: str, args: argparse.Namespace) -> Measured:
    torch.manual_seed(0)
    name, recompute = split(name)
    shape = SHAPES["tiny" if args.tiny else "8b-blocks"]
    others, size = allocated(), (args.batch, args.length, shape["hidden_size"])
    with torch.device(DEVICE):
        model = Llama(shape, recompute)
        x = torch.randn(size, dtype=torch.bfloat16, requires_grad=True)
        e = torch.randn(size, dtype=torch.bfloat16)
    convert(model, name)
    if name.endswith(BALANCED):
        balance_(model, x)
    model.compile_as(args.compile, fullgraph=True, backend=BACKEND)

    def step() -> None:
        x.grad = None
        model.zero_grad()
        requantize(model)
        model(x).backward(e)

    with functorch.patch(activation_memory_budget=args.memory_budget):
        return measure_steps(step, lambda: model(x), others, args.reps, graph=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "block")
    parser.add_argument("--compile", default="model", choices=["model", "blocks"], help="one graph, or block by block")
    parser.add_argument("--contenders", nargs="+", default=PEERS + OURS, metavar="NAME", help=HELP)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--reps", type=int, default=1000, help="milliseconds of repetitions")
    parser.add_argument("--memory-budget", type=float, default=1.0, help="torch._functorch.config.activation_memory_budget")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run on a CPU too")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not args.tiny:
        need_cuda("block.py")
    warm_up()
    title = f"{'Small' if args.tiny else 'Two Llama-3-8B'} blocks, forward + backward, {args.batch}×{args.length} tokens"
    rows, reference, why_not = [], None, {(name,): results.ENDED for name in args.contenders}
    for name in args.contenders:
        measured, why_not[(name,)] = take_turn(name, measure, args)
        if measured is not None:
            reference = measured if name == "bf16" else reference
            row = {"model": "tiny" if args.tiny else "8b-blocks", "contender": name}
            row |= measured.columns(reference, args.batch * args.length)
            row |= {**measured.memory(), "first two steps s": round(measured.first, 1)}
            rows.append(row)
            print(row, flush=True)
        if rows:
            notes = NOTES.format(args.compile, args.memory_budget)
            results.write(args.name, title, rows, notes, args.folder, True, expected=PEERS + OURS, why_not=why_not)
    if rows:
        print((args.folder / f"{args.name}.md").read_text())
        chart.draw(args.name, args.folder)


if __name__ == "__main__":
    main()
