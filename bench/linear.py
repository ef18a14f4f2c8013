"""One linear layer, forward and backward, compiled: this library against bf16 and torchao's low-precision training.

    python bench/linear.py                                   # 8192 tokens, the shapes of Llama-3-8B
    python bench/linear.py --shapes 4096x4096 --contenders bf16 halo1-int8

All contenders run in one process on the same random data. Times are medians: of replays of a CUDA graph of the compiled
forward and backward ("graph"), and of plain calls ("plain"), where launching counts.
"""

import argparse
import sys

import chart
import results
import torch
from contenders import CONTENDERS, convert, requantize
from torch import nn
from triton.testing import do_bench, do_bench_cudagraph


def measure(name: str, tokens: int, k: int, n: int, reps: int) -> tuple[float, float, float]:
    """(ms as a CUDA graph, ms plain, MiB saved for backward)."""
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
    plain = do_bench(step, warmup=25, rep=reps, return_mode="median")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = do_bench_cudagraph(step, rep=reps, return_mode="median")
    return graph, plain, saved / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", default=["4096x14336", "14336x4096", "4096x6144", "4096x4096"], help="INxOUT")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--reps", type=int, default=200, help="milliseconds of repetitions")
    parser.add_argument("--name", default="linear")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/linear.py needs a CUDA device")
    rows = []
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        operations = 3 * 2 * args.tokens * k * n
        reference = None
        for name in args.contenders:
            try:
                graph, plain, saved = measure(name, args.tokens, k, n, args.reps)
            except Exception as error:
                print(f"{shape} {name}: {error!r:.300}")
                continue
            reference = (graph, plain) if name == "bf16" else reference
            rows.append(
                {
                    "in×out": shape,
                    "contender": name,
                    "graph ms": round(graph, 3),
                    "× bf16": f"{reference[0] / graph:.2f}" if reference else None,
                    "plain ms": round(plain, 3),
                    "× bf16 (plain)": f"{reference[1] / plain:.2f}" if reference else None,
                    "TFLOP/s": round(operations / graph / 1e9),
                    "saved MiB": round(saved, 1),
                }
            )
            print(rows[-1], flush=True)
            results.write(args.name, f"One linear layer, forward + backward, {args.tokens} tokens", rows, quiet=True)
    chart.draw(args.name)


if __name__ == "__main__":
    main()
