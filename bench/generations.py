"""Time the code for GPUs before Hopper on this GPU: this library's products and linear layers against bf16.

    python bench/generations.py
    python bench/generations.py --targets 80 --layers 4096x4096

PTX for an older target runs on any newer NVIDIA GPU (tests/helpers/older_gpu.py). bf16 is a plain Triton product for the same
target (plain_product.py), with the fastest of several tiles. Times are medians of replays of a CUDA graph.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import plain_product
import results
import torch
from triton.testing import do_bench_cudagraph

sys.path.insert(1, str(Path(__file__).parent.parent))
from halo_tensor import halo_config
from halo_tensor.operand import gains
from halo_tensor.ops import rotate_quantize, scaled_mm
from halo_tensor.products.backward import multiply_backward
from halo_tensor.products.operands import quantize_operands, weight_operand
from halo_tensor.products.steps import reuses_operand
from halo_tensor.recipe import FP8_E4M3, INT8, Format, Recipe, Rotation, X
from halo_tensor.reference import ops as reference
from tests.helpers.older_gpu import SHARED, running_as

DEVICE = "cuda"
DTYPE = torch.bfloat16
TOKENS = 8192
SHAPES = ["8192x4096x4096", "8192x14336x4096", "8192x4096x14336"]
LAYERS = ["4096x14336", "4096x4096"]
RECIPES = {"int8 HALO-1": halo_config(1, "int8"), "int8 HALO-2": halo_config(2, "int8"), "fp8 HALO-0": halo_config(0, "fp8")}
BF16 = "bf16, plain Triton"
WHERE = "The GPU named above ran PTX that was compiled for the target; nothing here was measured on a GPU of that target."
NOT_TIMED = (
    "fp8 has no time where its `mma.sync`, which is what sm_89 has, is not an instruction of the GPU that runs it: Hopper "
    "emulates it. Its error is that of the code for sm_89."
)
PRODUCT_NOTES = (
    f"{WHERE} bf16: the fastest tile (M×N×K, warps, stages) of bench/plain_product.py for that target and shape. Un-rotated: "
    "Rotation(128) undone on the right of the result. Scales: one for each row, and for each column too where nothing is "
    "un-rotated. Error: relative (Frobenius), of the result, in bf16, against float64's product of the same normal numbers; "
    f"kernel's: against float64's product of the same codes and scales. {NOT_TIMED}"
)
LINEAR_NOTES = (
    f"{WHERE} Forward and backward of one layer in every step: X, E and W are quantised (E in one pass to two layouts), then "
    "multiplied three times, all by this library's eager functions. bf16: three products of bench/plain_product.py for that "
    "target, each with its fastest tile. Errors: relative (Frobenius), against float64's products of the same normal numbers. "
    f"{NOT_TIMED}"
)


class Contender(NamedTuple):
    """A product and what it computes.

    Attributes:
        multiply: computes the product.
        codes: the matrices [m, k] and [n, k] that its codes stand for.
        gain: the gain of the result's columns.
    """

    multiply: Callable[[], torch.Tensor]
    codes: tuple[torch.Tensor, torch.Tensor]
    gain: torch.Tensor | None = None


def formats(target: int) -> list[Format]:
    return [INT8, FP8_E4M3] if target >= 89 else [INT8]


def has_a_time(format: Format | None, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has the instruction that the code for older GPUs multiplies with."""
    return format is not FP8_E4M3 or capability[0] in (8, 12)


def product_contenders(x: torch.Tensor, w: torch.Tensor, format: Format) -> dict[str, Contender]:
    """Return the contenders for x [m, k] wᵀ in one format, with w [n, k]."""
    (m, _), n, block = x.shape, len(w), Rotation(128)
    a, _, a_scale = rotate_quantize(x, None, None, format, "row")
    plain, _, plain_scale = rotate_quantize(w, None, None, format, "row")
    rotated, _, number = rotate_quantize(w, block, None, format, "tensor")
    gain = gains.of_exponents(torch.arange(n, device=x.device) % 5 - 2)[0]
    x_codes = reference.dequantize(a, a_scale, "row")
    w_codes = reference.dequantize(plain, plain_scale, "row")
    undone = reference.unrotate(reference.dequantize(rotated, number, "tensor"), block, None, w.shape)

    def times(b_t, b_scale, right, gain) -> Callable:
        return lambda: scaled_mm(a, b_t, a_scale, b_scale, None, None, right, (m, n), DTYPE, gain)

    name = format.name.partition("_")[0]
    return {
        name: Contender(times(plain, plain_scale, None, None), (x_codes, w_codes)),
        f"{name}, un-rotated": Contender(times(rotated, number, block, None), (x_codes, undone)),
        f"{name}, un-rotated, with gain": Contender(times(rotated, number, block, gain), (x_codes, undone), gain),
    }


def exact(a: torch.Tensor, b_t: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
    y = a.double() @ b_t.double().t()
    return y if gain is None else y * gain.double()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a whole matrix."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def percent(fraction: float) -> float:
    return float(f"{100 * fraction:.3g}")


def linear_step(recipe: Recipe, x: torch.Tensor, w: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return Y, E_X and G of a layer whose weight has to be quantised again."""
    operand = weight_operand(w, recipe)
    assert operand is not None
    x_output, x_grad_weight = quantize_operands(x, X, recipe, ["output", "grad_weight"])
    y = torch.mm(x_output, operand.t())
    right = operand if reuses_operand(recipe) else w
    grad_x, grad_w = multiply_backward(recipe, e, x_grad_weight, right, x.dtype, w.dtype)
    return y, grad_x, grad_w


def operands_of_bf16(x: torch.Tensor, w: torch.Tensor, e: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the operands of Y, E_X and G."""
    return [(x, w.t()), (e, w), (e.t(), x)]


@cache
def product_data(shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    m, n, k = map(int, shape.split("x"))
    return normal(m, k), normal(n, k)


@cache
def layer_data(layer: str) -> tuple[torch.Tensor, ...]:
    """Return random X, W and E."""
    n_in, n_out = map(int, layer.split("x"))
    return normal(TOKENS, n_in), normal(n_out, n_in), normal(TOKENS, n_out)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def median(f: Callable, reps: int) -> float:
    return do_bench_cudagraph(f, rep=reps, return_mode="median")


def compile_all(target: int, shapes: list[str], layers: list[str]) -> None:
    """Compile all kernels in threads. Triton releases the interpreter's lock. Errors are raised again when the kernels run."""

    def products(format: Format, number: int) -> None:
        for shape in shapes:
            [*product_contenders(*product_data(shape), format).values()][number].multiply()

    def layer(recipe: Recipe, shape: str) -> None:
        linear_step(recipe, *layer_data(shape))

    pairs = [product for shape in layers[:1] for product in operands_of_bf16(*layer_data(shape))]
    if not pairs:
        pairs = [(x, w.t()) for x, w in map(product_data, shapes[:1])]
    jobs: list[Callable] = [
        partial(plain_product.shared_memory, *pair, tile) for pair in pairs for tile in plain_product.TILES
    ]
    jobs += [partial(products, format, number) for format in formats(target) for number in range(3)]
    jobs += [partial(layer, config.recipe, shape) for config in recipes(target).values() for shape in layers]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in [pool.submit(job) for job in jobs]:
            job.exception()


def recipes(target: int) -> dict:
    return {name: config for name, config in RECIPES.items() if set(config.recipe.formats) <= set(formats(target))}


def sweep(a: torch.Tensor, b: torch.Tensor, target: int, reps: int) -> plain_product.Tile:
    return plain_product.fastest(a, b, SHARED[target], reps)


def product_rows(target: int, shape: str, capability: tuple[int, int], reps: int, why_not: dict) -> list[dict]:
    x, w = product_data(shape)
    m, n, k = map(int, shape.split("x"))
    where, truth = (f"sm_{target}", shape.replace("x", "×")), exact(x, w)
    rows: list[dict] = []
    reference_ms: float | None = None

    def add(name: str, f: Callable, expected: torch.Tensor, own: torch.Tensor, timed=True, tile=None) -> float | None:
        y, ms = f(), median(f, reps) if timed else None
        rows.append(
            {
                "target": where[0],
                "M×N×K": where[1],
                "contender": name,
                "tile": tile,
                "µs": ms and round(1e3 * ms, 1),
                "TFLOP/s": ms and round(2 * m * n * k / ms / 1e9),
                "× bf16": results.speedup(reference_ms, ms),
                "error, %": percent(error(y, expected)),
                "kernel's, %": percent(error(y, own)),
            }
        )
        print(rows[-1], flush=True)
        return ms

    try:
        tile = sweep(x, w.t(), target, reps)
        f, shown = partial(plain_product.multiply, x, w.t(), tile), "×".join(map(str, tile[:3]))
        reference_ms = add(BF16, f, truth, truth, tile=f"{shown}, {tile.warps}, {tile.stages}")
        rows[-1]["× bf16"] = "1.00"
    except Exception as failure:
        print(f"{where} {BF16}: {failure!r:.300}")
        why_not[(*where, BF16)] = results.reason(failure)
    for format in formats(target):
        for name, (multiply, codes, gain) in product_contenders(x, w, format).items():
            try:
                expected = truth if gain is None else truth * gain.double()
                add(name, multiply, expected, exact(*codes, gain), has_a_time(format, capability))
            except Exception as failure:
                print(f"{where} {name}: {failure!r:.300}")
                why_not[(*where, name)] = results.reason(failure)
    return rows


def linear_rows(target: int, layer: str, capability: tuple[int, int], reps: int, why_not: dict) -> list[dict]:
    x, w, e = layer_data(layer)
    where, rows = (f"sm_{target}", layer), []
    truth = exact(x, w), exact(e, w.t()), exact(e.t(), x.t())
    operations = 3 * 2 * TOKENS * w.numel()
    reference_ms: float | None = None

    def bf16() -> Callable:
        tiles = [(a, b, sweep(a, b, target, reps)) for a, b in operands_of_bf16(x, w, e)]
        return lambda: [plain_product.multiply(*each) for each in tiles]

    steps: dict[str, tuple[Callable, bool]] = {BF16: (bf16, True)}
    for name, config in recipes(target).items():
        timed = all(has_a_time(format, capability) for format in config.recipe.formats)
        steps[name] = (lambda recipe=config.recipe: partial(linear_step, recipe, x, w, e)), timed
    for name, (make, timed) in steps.items():
        try:
            step = make()
            found = step()
            ms = median(step, reps) if timed else None
        except Exception as failure:
            print(f"{where} {name}: {failure!r:.300}")
            why_not[(*where, name)] = results.reason(failure)
            continue
        reference_ms = ms if name == BF16 else reference_ms
        errors = [percent(error(y, exact_y)) for y, exact_y in zip(found, truth, strict=True)]
        rows.append(
            {
                "target": where[0],
                "in×out": layer,
                "contender": name,
                "ms": ms and round(ms, 3),
                "TFLOP/s": ms and round(operations / ms / 1e9),
                "× bf16": results.speedup(reference_ms, ms),
                **dict(zip(("error of Y, %", "of E_X, %", "of G, %"), errors, strict=True)),
            }
        )
        print(rows[-1], flush=True)
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "generations")
    parser.add_argument("--targets", nargs="+", type=int, choices=list(SHARED), help="default: those that the GPU can run")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="of products, MxNxK, multiples of 256")
    parser.add_argument("--layers", nargs="*", default=LAYERS, help="INxOUT, multiples of 256")
    parser.add_argument("--reps", type=int, default=20, help="milliseconds of repetitions in a graph, which runs ten times")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/generations.py needs a CUDA device")
    torch.manual_seed(0)
    capability = torch.cuda.get_device_capability()
    products: list[dict] = []
    layers: list[dict] = []
    no_product: dict[tuple[str, ...], str] = {}
    no_layer: dict[tuple[str, ...], str] = {}
    for target in args.targets or [target for target in SHARED if divmod(target, 10) <= capability]:
        with running_as(target):
            compile_all(target, args.shapes, args.layers)
            torch.cuda.synchronize()  # another stream reads the data
            for shape in args.shapes:
                products += product_rows(target, shape, capability, args.reps, no_product)
            for layer in args.layers:
                layers += linear_rows(target, layer, capability, args.reps, no_layer)
        if products:
            options = {"panels": ["target", "M×N×K"], "why_not": no_product, "quiet": True}
            results.write(args.name, "Products, as compiled for older GPUs", products, PRODUCT_NOTES, args.folder, **options)
        if layers:
            title = f"One linear layer, as compiled for older GPUs, forward + backward, {TOKENS} tokens"
            options = {"panels": ["target", "in×out"], "why_not": no_layer, "quiet": True}
            results.write(f"{args.name}_linear", title, layers, LINEAR_NOTES, args.folder, **options)
    for name, rows in ((args.name, products), (f"{args.name}_linear", layers)):
        if rows:
            print((args.folder / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
