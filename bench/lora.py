"""Time LoRA on a frozen base, compiled: two Llama-3-8B blocks, PEFT rank 16 on every linear layer, forward + backward.

    python bench/lora.py
    python bench/lora.py --contenders bf16 halo1-int8 halo1-int8-A      # -A: the adapters' A matrices in 8 bits as well

Weights and data are random. The contenders run one after another in one process; each compiles from empty caches.
"""

import argparse
import sys

import chart
import results
import torch
from adapters import make
from llama import SHAPES, Llama, split
from steps import DEVICE, Measured, allocated, check_gradients, measure_steps, need_cuda, take_turn, warm_up
from torch._functorch import config as functorch
from torch.distributed._tools.common_utils import get_untyped_storages

DEFAULT = [
    "bf16",
    "torchao-tensorwise",
    "torchao-rowwise",
    "torchao-int8",
    "bitsandbytes-nf4",
    "halo0-fp8",
    "halo0-fp8/products",
    "halo1-fp8",
    "halo1-fp8/products",
    "halo1-int8",
    "halo1-int8/products",
    "halo1-fp6",
]
NOTES = (
    "torch.compile with fullgraph (bitsandbytes: with graph breaks) and an activation memory budget of {:g}, from empty "
    "caches; attention is SDPA's causal kernel; adapters in bf16; every layer makes its grad_input; no optimiser. ms: median "
    "of plain calls; graph ms: of replays of a CUDA graph. Weights: of both blocks, adapters included. Saved: what the "
    "forward leaves allocated besides its result. Peak: in one step, weights included. Converting: of bf16 weights on the "
    "device. -A: A matrices follow the recipe too. /products: with keep_products."
)


def weight_bytes(model: Llama) -> int:
    tensors = list(model.llama.model.layers.parameters())
    for state in [p.quant_state for p in tensors if hasattr(p, "quant_state")]:  # bitsandbytes quantises its scales too
        tensors += [state.absmax, state.state2.absmax]
    storages = {s.data_ptr(): s for tensor in tensors for s in get_untyped_storages(tensor)}
    return sum(s.nbytes() for s in storages.values())


def measure(name: str, args: argparse.Namespace) -> tuple[Measured, float, float]:
    """Return times and memory, the GiB of weights, and the seconds that converting took."""
    torch.manual_seed(0)
    others = allocated()
    name, recompute = split(name)
    model, converting = make(name, SHAPES["8b-blocks"], recompute)
    size = (args.batch, args.length, SHAPES["8b-blocks"]["hidden_size"])
    x = torch.randn(size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    model.compile_as("model", fullgraph=not name.startswith("bitsandbytes"))

    def step() -> None:
        x.grad = None
        model.zero_grad()
        model(x).backward(e)

    with functorch.patch(activation_memory_budget=args.memory_budget):
        measured = measure_steps(step, lambda: model(x), others, args.reps, graph=True)
    check_gradients(model)
    assert x.grad is not None
    return measured, weight_bytes(model) / 2**30, converting


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "lora")
    parser.add_argument(
        "--contenders", nargs="+", default=DEFAULT, metavar="NAME", help="also haloLEVEL-DTYPE[-A], NAME/products"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--reps", type=int, default=1000, help="milliseconds of repetitions")
    parser.add_argument("--memory-budget", type=float, default=1.0, help="torch._functorch.config.activation_memory_budget")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    need_cuda("lora.py")
    warm_up()
    title = f"Two Llama-3-8B blocks, LoRA of rank 16 on all linears, forward + backward, {args.batch}×{args.length} tokens"
    rows, reference, why_not = [], None, {(name,): results.ENDED for name in args.contenders}
    for name in args.contenders:
        found, why_not[(name,)] = take_turn(name, measure, args)
        if found is not None:
            measured, weights, converting = found
            reference = measured if name == "bf16" else reference
            row = {"model": "8b-blocks", "contender": name, **measured.columns(reference, args.batch * args.length)}
            row |= {"weights GiB": f"{weights:.3f}", **measured.memory()}
            row |= {"first two steps s": round(measured.first, 1), "converting s": round(converting, 2)}
            rows.append(row)
            print(row, flush=True)
        if rows:
            notes = NOTES.format(args.memory_budget)
            results.write(args.name, title, rows, notes, args.folder, True, expected=DEFAULT, why_not=why_not)
    if not rows:
        sys.exit("bench/lora.py: no contender ran")
    print((args.folder / f"{args.name}.md").read_text())
    chart.draw(args.name, args.folder)


if __name__ == "__main__":
    main()
