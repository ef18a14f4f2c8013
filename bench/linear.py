"""Time one linear layer, forward and backward, compiled: this library against bf16 and torchao's low-precision training.

    python bench/linear.py                                   # 8192 tokens, the shapes of Llama-3-8B
    python bench/linear.py --shapes 4096x4096 --contenders bf16 halo1-int8

All contenders run in one process on the same random data. Times are medians: of replays of a CUDA graph of the compiled
forward and backward ("graph"), and of plain calls ("plain"), which include launching.
"""

import argparse
import sys

import chart
import results
import torch
from contenders import CONTENDERS, convert, requantize
from torch import nn
from triton.testing import do_bench, do_bench_cudagraph

DEFAULT = [
    "bf16",
    "torchao-tensorwise",
    "torchao-rowwise",
    "torchao-int8",
    "halo0-fp8",
    "halo1-fp8",
    "halo2-fp8",
    "halo1-int8",
    "halo2-int8",
    "halo1-fp6",
]


def measure(name: str, tokens: int, k: int, n: int, reps: int, plain: bool = True) -> tuple[float, float | None, float]:
    """Return the ms of a replayed CUDA graph, of a plain call (None unless ``plain``), and the MiB saved for backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16))
    convert(layer, name)
    f = torch.compile(layer, fullgraph=True)
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)

    def step():
        x.grad = None
        layer.zero_grad()
        requantize(layer)
        f(x).backward(e)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = f(x)
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    y.backward(e)
    del y
    called = do_bench(step, warmup=25, rep=reps, return_mode="median") if plain else None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = do_bench_cudagraph(step, rep=reps, return_mode="median")
    return graph, called, saved / 2**20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "linear")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", default=["4096x14336", "14336x4096", "4096x6144", "4096x4096"], help="INxOUT")
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--reps", type=int, default=200, help="milliseconds of repetitions")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/linear.py needs a CUDA device")
    title = f"One linear layer, forward + backward, {args.tokens} tokens"
    rows, why_not = [], {(shape, name): results.ENDED for shape in args.shapes for name in args.contenders}
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        operations = 3 * 2 * args.tokens * k * n
        reference = None, None
        for name in args.contenders:
            try:
                graph, plain, saved = measure(name, args.tokens, k, n, args.reps)
            except Exception as error:
                print(f"{shape} {name}: {error!r:.300}")
                why_not[shape, name] = results.reason(error)
                continue
            reference = (graph, plain) if name == "bf16" else reference
            rows.append(
                {
                    "in×out": shape,
                    "contender": name,
                    "graph ms": round(graph, 3),
                    "× bf16": results.speedup(reference[0], graph),
                    "plain ms": round(plain, 3),
                    "× bf16 (plain)": results.speedup(reference[1], plain),
                    "TFLOP/s": round(operations / graph / 1e9),
                    "saved MiB": round(saved, 1),
                }
            )
            print(rows[-1], flush=True)
            save(args, title, rows, why_not)
    if rows:
        save(args, title, rows, why_not)  # the last ones may have failed
        chart.draw(args.name, args.folder)


def save(args: argparse.Namespace, title: str, rows: list[dict], why_not: dict) -> None:
    options = {"panels": ["in×out"], "expected": DEFAULT, "why_not": why_not}
    results.write(args.name, title, rows, "", args.folder, quiet=True, **options)


if __name__ == "__main__":
    main()
