"""Time products of quantised matrices: this library's scaled_mm against the vendor's kernels.

    python bench/gemm.py
    python bench/gemm.py --shapes 8192x4096x4096 8192x4096x14336

All contenders of a shape run in one process on the same random data. Times are medians of replays of a CUDA graph.
"""

import argparse
import sys
from collections.abc import Callable

import results
import torch
from triton.testing import do_bench_cudagraph

from halo_tensor.ops import rotate_quantize, scaled_mm
from halo_tensor.recipe import FP8_E4M3, Rotation

DEVICE = "cuda"
SHAPES = ["8192x4096x4096", "8192x14336x4096", "8192x4096x14336", "4096x14336x8192", "14336x4096x8192", "8192x6144x4096"]
#: Dense TFLOP/s of an H100 or H200 (SXM), from the data sheet.
PEAK = {"bf16": 989, "fp8": 1979, "int8": 1979}
#: Number format -> the vendor's product that ours are compared with.
VENDOR = {"fp8": "fp8 _scaled_mm, row-wise", "int8": "int8 _int_mm"}
NOTES = (
    "Results are bf16, those of `_int_mm` unscaled int32. `_scaled_mm` accumulates fast (`use_fast_accum`). "
    '"Un-rotated": Rotation(128) undone on the right of the result, with row scales only, as in the backward of HALO-1; our '
    "others have row and column scales. × vendor: speed over that of `_scaled_mm`, row-wise, and of `_int_mm`. Data: normal "
    "numbers, quantised for fp8; uniformly random codes for int8. The ceiling is the data sheet's dense peak of an H100 SXM: "
    "989 TFLOP/s in bf16, 1979 in fp8 and int8. Products follow each other, so operands that fit into L2 may be found there."
)


def products(m: int, n: int, k: int) -> list[tuple[str, str, Callable[[], torch.Tensor]]]:
    """Return (contender, number format, function that computes the product [m, k] × [k, n]) for each contender."""
    x, w = (torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16) for rows in (m, n))
    a, _, a_scale = rotate_quantize(x, None, None, FP8_E4M3, "row")
    b_t, _, b_scale = rotate_quantize(w, None, None, FP8_E4M3, "row")
    a_int8, b_t_int8 = (torch.randint(-127, 128, (rows, k), device=DEVICE, dtype=torch.int8) for rows in (m, n))
    number = torch.full((), 1e-3, device=DEVICE)

    def vendor(a_scale, b_scale):
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch._scaled_mm(a, b_t.t(), scale_a=a_scale, scale_b=b_scale, **options)

    def ours(a, b_t, undo=None):
        return lambda: scaled_mm(a, b_t, a_scale, None if undo else b_scale, None, None, undo, (m, n), torch.bfloat16)

    return [
        ("bf16 torch.mm", "bf16", lambda: torch.mm(x, w.t())),
        (VENDOR["fp8"], "fp8", vendor(a_scale.unsqueeze(1), b_scale.unsqueeze(0))),
        ("fp8 _scaled_mm, tensor-wise", "fp8", vendor(number, number)),
        ("fp8 ours", "fp8", ours(a, b_t)),
        ("fp8 ours, un-rotated", "fp8", ours(a, b_t, Rotation(128))),
        (VENDOR["int8"], "int8", lambda: torch._int_mm(a_int8, b_t_int8.t())),
        ("int8 ours", "int8", ours(a_int8, b_t_int8)),
        ("int8 ours, un-rotated", "int8", ours(a_int8, b_t_int8, Rotation(128))),
    ]


def has_peak(device: str) -> bool:
    return any(name in device for name in ("H100", "H200")) and not any(name in device for name in ("PCIe", "NVL"))


def measure(shape: str, reps: int, why_not: dict) -> list[dict]:
    """Return a row for each product that runs, and add the reason to ``why_not`` for each one that does not."""
    m, n, k = map(int, shape.split("x"))
    contenders = products(m, n, k)
    torch.cuda.synchronize()  # another stream reads the data
    peaks = PEAK if has_peak(torch.cuda.get_device_name()) else {}
    rows, times = [], {}
    for name, format, product in contenders:
        try:
            times[name] = ms = do_bench_cudagraph(product, rep=reps, return_mode="median")
        except Exception as error:
            print(f"{shape} {name}: {error!r:.300}")
            why_not[shape.replace("x", "×"), name] = results.reason(error)
            continue
        vendor, rate = times.get(VENDOR.get(format, "")), 2 * m * n * k / ms / 1e9
        rows.append(
            {
                "M×N×K": shape.replace("x", "×"),
                "contender": name,
                "µs": round(ms * 1e3, 1),
                "TFLOP/s": round(rate),
                "× vendor": results.speedup(vendor, ms),
                "% of ceiling": round(100 * rate / peaks[format]) if peaks else None,
            }
        )
        print(rows[-1], flush=True)
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "gemm")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="MxNxK")
    parser.add_argument("--reps", type=int, default=100, help="milliseconds of repetitions in a graph")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gemm.py needs a CUDA device")
    torch.manual_seed(0)
    rows: list[dict] = []
    why_not: dict[tuple[str, ...], str] = {}
    for shape in args.shapes:
        rows += measure(shape, args.reps, why_not)
        options = {"quiet": shape != args.shapes[-1], "panels": ["M×N×K"], "why_not": why_not}
        results.write(args.name, "Matrix products", rows, NOTES, args.folder, **options)


if __name__ == "__main__":
    main()
