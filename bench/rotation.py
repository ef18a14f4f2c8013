"""Time rotating and quantising a matrix: this library's kernels against what Inductor compiles from a plain quantisation.

    python bench/rotation.py
    python bench/rotation.py --shapes 8192x4096 --formats int8

All contenders of a shape run in one process on the same random data. Times are medians of replays of a CUDA graph.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import results
import torch
from triton.testing import do_bench_cudagraph

from halo_tensor.ops import quantize_pair, rotate_quantize
from halo_tensor.recipe import FP8_E4M3, INT8, Format, Rotation
from halo_tensor.reference.codes import code_dtype
from halo_tensor.reference.hadamard import fit

DEVICE = "cuda"
FORMATS = {"fp8": FP8_E4M3, "int8": INT8}
TURNS = 4  # matrices used in turn, so that none stays in L2
INDUCTOR = "Inductor, not rotated"
NOTES = (
    "bf16 in, codes and a float32 scale a row out. × Inductor's: the contender's time divided by that of Inductor's compiled "
    "quantisation of one layout, without a rotation; less is better. GB/s: the matrix read once, in bf16, and all that is "
    "written, however often a kernel really reads. % of copy: of the GB/s of `x.clone()` in the same run. "
    '"Both layouts": the codes and their transpose. "Pair": what backward makes of E, row-scaled codes of E diag(s_w) and '
    "column-scaled transposed codes of diag(s_x) E; at level 2 the tokens of the former are rotated by 128. "
    f"Each graph takes {TURNS} matrices in turn, so that none is found in L2."
)


def inductor(format: Format) -> Callable:
    """Return quantisation as one would write it in PyTorch, compiled."""

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (x.abs().amax(1).to(torch.float32) * (1.0 / format.max)).clamp_min(1e-30)
        y = x.to(torch.float32) * (1.0 / scale).unsqueeze(1)
        return (y.round() if format.uniform else y).to(code_dtype(format)), scale

    return torch.compile(quantize, fullgraph=True, dynamic=False)


def contenders(format: Format, m: int, k: int) -> dict[str, Callable]:
    """Return name -> function of the matrix. It returns everything that it writes."""
    block, full = Rotation(128), fit(Rotation(None), k)
    folds = torch.rand(k, device=DEVICE) + 0.5, torch.rand(m, device=DEVICE) + 0.5

    def ours(right: Rotation | None, both: bool = False) -> Callable:
        return lambda x: rotate_quantize(x, None, right, format, "row", columns=both)

    return {
        INDUCTOR: inductor(format),
        "not rotated": ours(None),
        "rotated by 128": ours(block),
        "rotated in full width": ours(full),
        "not rotated, both layouts": ours(None, both=True),
        "rotated by 128, both layouts": ours(block, both=True),
        "rotated in full width, both layouts": ours(full, both=True),
        "pair": lambda x: quantize_pair(x, None, format, *folds),
        "pair of level 2": lambda x: quantize_pair(x, block, format, *folds),
    }


def size(*tensors: torch.Tensor | None) -> int:
    """Return the size in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def in_turn(f: Callable, xs: list[torch.Tensor]) -> None:
    for x in xs:
        f(x)


def measure(shape: str, formats: list[str], reps: int, why_not: dict) -> list[dict]:
    """Return a row for each contender that runs, and add the reason to ``why_not`` for each one that does not."""
    m, k = map(int, shape.split("x"))
    xs = [torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(TURNS)]
    candidates: dict[tuple[str, str], Callable] = {("bf16", "copy"): lambda x: (x.clone(),)}  # (format, name) -> function
    for format in formats:
        candidates |= {(format, name): f for name, f in contenders(FORMATS[format], m, k).items()}
    torch.cuda.synchronize()  # another stream reads the data
    rows, times, ceiling = [], {}, None
    for (format, name), f in candidates.items():
        try:
            written = size(*f(xs[0]))
            times[format, name] = ms = do_bench_cudagraph(partial(in_turn, f, xs), rep=reps, return_mode="median") / TURNS
        except Exception as error:
            print(f"{shape} {format} {name}: {error!r:.300}")
            why_not[shape.replace("x", "×"), f"{format} {name}"] = results.reason(error)
            continue
        rate = (size(xs[0]) + written) / ms / 1e6
        ceiling = rate if name == "copy" else ceiling
        reference = times.get((format, INDUCTOR))
        rows.append(
            {
                "shape": shape.replace("x", "×"),
                "contender": f"{format} {name}",
                "µs": round(ms * 1e3, 1),
                "× Inductor's": f"{ms / reference:.2f}" if reference else None,
                "GB/s": round(rate),
                "% of copy": round(100 * rate / ceiling) if ceiling else None,
            }
        )
        print(rows[-1], flush=True)
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "rotation")
    parser.add_argument("--shapes", nargs="+", default=["8192x4096", "8192x14336", "8192x6144"], help="ROWSxCOLUMNS")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--reps", type=int, default=100, help="milliseconds of repetitions in a graph")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/rotation.py needs a CUDA device")
    torch.manual_seed(0)
    why_not: dict[tuple[str, ...], str] = {}
    rows = [row for shape in args.shapes for row in measure(shape, args.formats, args.reps, why_not)]
    results.write(args.name, "Rotating and quantising", rows, NOTES, args.folder, panels=["shape"], why_not=why_not)


if __name__ == "__main__":
    main()
