"""Compare the predicted speed of one linear layer with the measured one, for the widths of small and large models.

    python bench/gain.py                                     # 8192 tokens
    python bench/gain.py --shapes 768x3072 --contenders bf16 halo1-int8

Measured is the median of replays of a CUDA graph of the compiled forward and backward, as in bench/linear.py; predicted is
what quantize_ returns for the same layer. "-frozen": the weight needs no gradient.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import linear
import results
import torch
from contenders import FROZEN, HALO, RECIPES
from torch import nn

from halo_tensor import quantize_

TITLE = "Predicted and measured speed of one linear layer, forward + backward, {} tokens"
NOTES = (
    "Measured: bf16's time divided by the contender's, of CUDA graphs. Predicted: the same by the model of time, for this GPU "
    "(halo_tensor/analysis/roofline.py). error: predicted over measured, less 1."
)
WIDTHS = [(768, 768), (768, 3072), (3072, 768), (1280, 5120), (2048, 512), (2048, 2048), (2048, 8192), (8192, 2048)]
SHAPES = [f"{k}x{n}" for k, n in [*WIDTHS, (4096, 4096), (4096, 14336)]]
DEFAULT = ["bf16", "halo1-int8", "halo0-fp8", "hot"]


def predicted(name: str, tokens: int, k: int, n: int) -> float:
    """Return the predicted speed of a contender on this GPU, × bf16."""
    frozen = name.endswith(FROZEN)
    layer = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(not frozen)
    config = (HALO | RECIPES)[name.removesuffix(FROZEN)]
    (gain,) = quantize_(layer, config, filter_fn=lambda *_: True, tokens=tokens, min_gain=0).predicted.gains.values()
    return gain


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "gain")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="INxOUT")
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, metavar="NAME", help="names of bench/contenders.py")
    parser.add_argument("--reps", type=int, default=20, help="milliseconds of repetitions")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after this time")
    return parser.parse_args(argv)


def rows_of(args: argparse.Namespace, why_not: dict) -> Iterator[list[dict]]:
    """Measure and predict the layers. Yield all rows after each new one. Layers without one get a reason in ``why_not``."""
    start, rows = time.perf_counter(), []
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        times: dict[str, float] = {}
        for name in args.contenders:
            if time.perf_counter() - start > args.seconds:
                return
            try:
                graph, *_ = linear.measure(name, args.tokens, k, n, args.reps, plain=False)
                times[name] = graph
                bf16 = times.get("bf16" + FROZEN if name.endswith(FROZEN) else "bf16")
                measured = None if bf16 is None else bf16 / graph
                gain = 1.0 if name.removesuffix(FROZEN) == "bf16" else predicted(name, args.tokens, k, n)
            except Exception as error:
                print(f"{shape} {name}: {error!r:.300}")
                why_not[shape, name] = results.reason(error)
            else:
                rows.append(row(shape, name, graph, measured, gain))
                print(rows[-1], flush=True)
            if rows:
                yield rows


def row(shape: str, name: str, ms: float, measured: float | None, gain: float) -> dict:
    """Return a row of the table. ``measured`` is None if bf16 has no row."""
    return {
        "in×out": shape,
        "contender": name,
        "µs": round(1e3 * ms, 1),
        "× bf16": measured and f"{measured:.2f}",
        "predicted": f"{gain:.2f}",
        "error": measured and f"{100 * (gain / measured - 1):+.0f} %",
    }


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gain.py needs a CUDA device")
    why_not = {(shape, name): results.ENDED for shape in args.shapes for name in args.contenders}
    options = {"panels": ["in×out"], "expected": DEFAULT, "why_not": why_not}
    for rows in rows_of(args, why_not):
        results.write(args.name, TITLE.format(args.tokens), rows, NOTES, args.folder, quiet=True, **options)


if __name__ == "__main__":
    main()
