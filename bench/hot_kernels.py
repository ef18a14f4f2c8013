"""Time the kernels that quantise E, X and W for HOT's backward, alone, against two separate quantisations of E.

python bench/hot_kernels.py             # a GPU
python bench/hot_kernels.py --sweep     # tiles of both passes too; takes minutes
"""

from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import results
import torch
from triton.testing import do_bench

from halo_tensor.kernels.quantize import plan, two_operands
from halo_tensor.kernels.quantize.tiles import plan_tiles
from halo_tensor.kernels.quantize.two_operands import Side, Tiles
from halo_tensor.recipe import INT4, INT8, Rotation

TITLE = "HOT's quantisers alone"
NOTES = (
    "GB/s counts one read of the matrix and one write of the codes in each pass that does so: a pass that measures reads, a "
    "pass that casts reads and writes. Caches are flushed before each repetition."
)
BLOCK, LOW, SIGNED = Rotation(16, None), Rotation(16, None, 8), Rotation(128, 0)
HOT = Side(BLOCK, INT4, False, True), Side(LOW, INT8, False)
PER_TOKEN = Side(BLOCK, INT4, True, True), Side(LOW, INT8, False)
LLM = Side(SIGNED, INT8, True), Side(SIGNED, INT8, True)
#: title -> (rows, columns, the first operand or None, the second)
CASES = {
    "ViT-B fc1, E, 256 images": (256 * 197, 3072, *HOT),
    "ViT-B fc1, E, 256 images, per token": (256 * 197, 3072, *PER_TOKEN),
    "ViT-B q, E, 256 images": (256 * 197, 768, *HOT),
    "ViT-B q, X, 256 images": (256 * 197, 768, None, LOW),
    "ViT-B fc2, X, 256 images": (256 * 197, 3072, None, LOW),
    "ViT-B fc2, W": (768, 3072, None, Side(BLOCK, INT4, False)),
    "Llama-3-8B down, E, 8192 tokens": (8192, 4096, *HOT),
    "Llama-3-8B down, X, 8192 tokens": (8192, 14336, None, LOW),
    "Llama-3-8B down, W": (4096, 14336, None, Side(BLOCK, INT4, False)),
    "Llama-3-8B down, E, hot_llm": (8192, 4096, *LLM),
    "Llama-3-8B down, X, hot_llm": (8192, 14336, None, LLM[1]),
    "Llama-3-8B down, W, hot_llm": (4096, 14336, None, LLM[1]),
}
PASSES, ALONE = "one launch for each pass", "each operand alone"
SWEPT = ("ViT-B fc1, E, 256 images", "ViT-B q, X, 256 images", "Llama-3-8B down, E, hot_llm")
TRIED = [
    (128, 128, 8, 2, 4), (128, 128, 4, 3, 8), (128, 128, 2, 2, 8), (128, 128, 1, 1, 8), (128, 128, 1, 1, 4),
    (64, 128, 4, 3, 4), (64, 128, 1, 1, 4), (128, 64, 8, 3, 4), (128, 64, 4, 4, 8), (128, 64, 1, 1, 4),
    (64, 64, 8, 3, 4), (64, 64, 1, 1, 4),
]  # fmt: skip


def side_of(second) -> Side:
    return second if isinstance(second, Side) else Side(second, INT8, False)


def matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, columns, device="cuda").bfloat16(), torch.randint(2**63 - 1, (1,), device="cuda")


def separately(x, seed, first, second):
    """Quantise by the launches that serve one operand each."""
    if first is not None:
        by = "row" if first.per_index else "tensor"
        noise = seed if first.noisy else None
        plan.rotate_quantize(x, None, first.rotation, first.format, by, None, None, True, False, seed=noise)
    by = "column" if second.per_index else "tensor"
    plan.rotate_quantize(x, second.rotation, None, second.format, by, None, None, False, True)


def moved(rows: int, columns: int, first, second) -> float:
    """Return the bytes of both passes."""
    rank = second.rotation.rank or second.rotation.edge
    codes = (first is not None) + rank / second.rotation.edge
    return rows * columns * (2 + 2 + codes)


def sweep(title: str, reps: int) -> list[dict]:
    rows, columns, first, second = CASES[title]
    second = side_of(second)
    (x, seed), device = matrix(rows, columns), torch.device("cuda", torch.cuda.current_device())
    edge = max(side.rotation.edge for side in (first, second) if side)
    tried = [Tiles(*tiles) for tiles in TRIED if min(tiles[:2]) >= edge]

    def passes(tiles):
        with patch.object(two_operands, "tiles_of", lambda *args: tiles):
            return two_operands.plan_operands.__wrapped__(x.dtype, device, first, second)

    made = two_operands.operands_quantizer(x.dtype, device, first, second)(x, seed)
    amax = [torch.zeros(n, dtype=torch.int32, device=device) for n in (rows, columns)]
    numbers = rows, columns, *x.stride()
    planned, found = {tiles: passes(tiles) for tiles in tried}, []

    def run(tiles):
        try:
            measure, cast = planned[tiles]
            with patch.object(two_operands, "tiles_of", lambda *args: tiles):
                measure(numbers, x, *amax)
                cast(numbers, x, *amax, seed, *made)
        except Exception as error:
            return repr(error)[:80]
        return None

    with ThreadPoolExecutor(12) as pool:
        errors = dict(zip(tried, pool.map(run, tried), strict=True))
    for tiles in tried:
        if errors[tiles]:
            found.append({"what": title, "tiles": str(tuple(tiles)), "error": errors[tiles]})
            continue
        measure, cast = planned[tiles]
        times = [
            1e3 * do_bench(call, warmup=5, rep=reps, return_mode="median")
            for call in (lambda m=measure: m(numbers, x, *amax), lambda c=cast: c(numbers, x, *amax, seed, *made))
        ]
        found.append({"what": title, "tiles": str(tuple(tiles)), "maxima µs": times[0], "codes µs": times[1]})
        print(found[-1], flush=True)
    return found


def contenders_of(title: str) -> dict:
    """Return name -> (a call that quantises a matrix of this case, the bytes that it moves or None)."""
    m, k, first, second = CASES[title]
    second = side_of(second)
    x, seed = matrix(m, k)
    quantize = two_operands.operands_quantizer(x.dtype, x.device, first, second)
    return {
        PASSES: (lambda: quantize(x, seed), moved(m, k, first, second)),
        ALONE: (lambda: separately(x, seed, first, second), None),
    }


def error_of(call) -> str | None:
    try:
        call()
    except Exception as error:
        return repr(error)[:200]
    return None


def main() -> None:
    parser = results.parser_of(__doc__, "hot_kernels")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, and print them only")
    parser.add_argument("--reps", type=int, default=100, help="milliseconds of repetitions")
    args = parser.parse_args()
    rows = []
    with ThreadPoolExecutor(12) as pool:  # which compiles, to Triton's cache on disk
        list(pool.map(error_of, [call for title in CASES for call, _ in contenders_of(title).values()]))
    for plans in (two_operands.plan_operands, plan_tiles):
        plans.cache_clear()
    for title, name, call, moved in [(t, name, *job) for t in CASES for name, job in contenders_of(t).items()]:
        if error := error_of(call):
            print(f"{title}, {name}: {error}", flush=True)
            continue
        us = 1e3 * do_bench(call, warmup=20, rep=args.reps, return_mode="median")
        rows.append({"what": title, "contender": name, "µs": us, "GB/s": moved and moved / us / 1e3})
        print(rows[-1], flush=True)
    results.write(
        args.name,
        TITLE,
        rows,
        NOTES,
        args.folder,
        panels=["what"],
        expected=[PASSES, ALONE],
    )
    if args.sweep:
        for title in SWEPT:
            sweep(title, 20)


if __name__ == "__main__":
    main()
