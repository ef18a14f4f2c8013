"""Time training steps with HOT's backward against bf16 and HALO's recipes, on layers and whole models.

    python bench/hot.py                             # a GPU
    python bench/hot.py --tiny --name hot_dry_run   # small shapes, on a CPU too

INT4 values are multiplied as INT8, which is exact: no GPU since Hopper multiplies INT4. So INT4 is no faster than INT8 here.

HOT was published against float32 (arXiv 2503.21261: a backward 2.6 times as fast). Contenders with "fp32" in their name have
weights and activations in float32, and "TF32" lets plain products round their operands to it.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import memory
import results
import torch
from contenders import requantize
from torch import nn

from halo_tensor import halo_config, hot_config, quantize_, recipe_config

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TITLE = "Forward and backward with HOT, batch {}"
NOTES = (
    "INT4 values are multiplied as INT8, exactly: Hopper has no INT4 tensor-core instruction, so INT4 is no faster than INT8 "
    "here. Weights that hold codes are quantised once in every step, as an optimiser's write would. Backward: the time of a "
    "step, and of that write, without that of its forward. fp32: weights and activations in float32, plain products without "
    "TF32 unless the name says TF32; 'hot fp32' is HOT as published, on a float32 model. In whole models, blocks are compiled."
)


class Contender(NamedTuple):
    """What is timed.

    Attributes:
        config: of quantize_, or None.
        dtype: of weights and activations.
        tf32: whether products in float32 may use TF32.
    """

    config: Any = None
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False


CONTENDERS = {
    "bf16": Contender(),
    "fp32": Contender(None, torch.float32),
    "fp32 TF32": Contender(None, torch.float32, tf32=True),
    "hot": Contender(hot_config()),
    "hot per token": Contender(hot_config(grad_output_granularity="row")),
    "hot nearest": Contender(hot_config(rounding="nearest")),
    "hot fp32": Contender(hot_config(), torch.float32),
    "hot fp32 TF32": Contender(hot_config(), torch.float32, tf32=True),
    "hot_llm": Contender(recipe_config("hot_llm", min_features=64)),
    "lbp_wht": Contender(recipe_config("lbp_wht", min_features=64)),
    "luq": Contender(recipe_config("luq", min_features=64)),
    "halo0-fp8": Contender(halo_config(0, "fp8", min_features=64)),
    "halo1-int8": Contender(halo_config(1, "int8", min_features=64)),
}
#: title -> (tokens, in_features, out_features)
LAYERS = {
    "ViT-B fc1, 64 images": (64 * 197, 768, 3072),
    "ViT-B fc2, 64 images": (64 * 197, 3072, 768),
    "ViT-B q, 64 images": (64 * 197, 768, 768),
    "Llama-3-8B down, 8192 tokens": (8192, 14336, 4096),
}
TINY_LAYERS = {"197 tokens, 64 to 128": (197, 64, 128)}


def milliseconds(step, reps: int) -> float:
    """Return the median time of ``reps`` milliseconds of repetitions, after a warm-up."""
    if CUDA:
        from triton.testing import do_bench

        return do_bench(step, warmup=50, rep=reps, return_mode="median")
    step()
    times, end = [], time.perf_counter() + reps / 1e3
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def step_of(forward: Callable, backward: Callable, module: nn.Module, args: argparse.Namespace) -> Callable:
    """Return a function that writes the weights once, and goes forward and backward as often as the command says."""

    def step():
        module.zero_grad()
        requantize(module)
        for _ in range(args.accumulate):
            backward(forward())

    return step


def measure_layer(contender: Contender, tokens: int, k: int, n: int, args: argparse.Namespace) -> tuple[float, float]:
    layer = nn.Sequential(nn.Linear(k, n, device=DEVICE, dtype=contender.dtype))
    if contender.config is not None:
        quantize_(layer, contender.config)
    x = torch.randn(tokens, k, device=DEVICE, dtype=contender.dtype, requires_grad=True)
    e = torch.randn(tokens, n, device=DEVICE, dtype=contender.dtype)
    f = torch.compile(layer, fullgraph=True) if args.compile else layer

    def backward(y: torch.Tensor) -> None:
        x.grad = None
        y.backward(e)

    return times(step_of(lambda: f(x), backward, layer, args), lambda: f(x), args)


def measure_model(contender: Contender, name: str, args: argparse.Namespace) -> tuple[float, float]:
    make, inputs_of, _ = memory.MODELS[name]
    model = make(args.tiny).to(DEVICE, contender.dtype).train()
    if contender.config is not None:
        quantize_(model, contender.config)
    inputs = {key: value.to(DEVICE) for key, value in inputs_of(model, args.batch).items()}
    inputs = {key: v.to(contender.dtype) if v.is_floating_point() else v for key, v in inputs.items()}
    if args.compile:
        compile_blocks(model)

    def forward() -> torch.Tensor:
        return model(**inputs).logits.float().square().mean()

    return times(step_of(forward, torch.Tensor.backward, model, args), forward, args)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of a model in place."""
    for module in model.modules():
        if type(module).__name__ in ("ViTLayer", "ResNetBottleNeckLayer", "ResNetBasicLayer", "LlamaDecoderLayer"):
            module.compile(dynamic=False)


def times(step: Callable, forward: Callable, args: argparse.Namespace) -> tuple[float, float]:
    """Return the milliseconds of a step, and of all but its forward, for each forward."""
    ms = milliseconds(step, args.reps) / args.accumulate
    return ms, max(ms - milliseconds(forward, args.reps), 0.0)


def compare(rows: list[dict]) -> None:
    """Add to each row how its time compares with bf16's and with fp32's on the same layer or model."""
    for row in rows:
        same = {other["contender"]: other for other in rows if other["what"] == row["what"]}
        bf16, fp32 = (same.get(name, {}) for name in ("bf16", "fp32"))
        row["× bf16"] = results.speedup(bf16.get("ms"), row["ms"])
        row["× fp32"] = results.speedup(fp32.get("ms"), row["ms"])
        row["backward × bf16"] = results.speedup(bf16.get("backward ms"), row["backward ms"])
        row["backward × fp32"] = results.speedup(fp32.get("backward ms"), row["backward ms"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "hot")
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS), metavar="TITLE")
    parser.add_argument("--models", nargs="*", default=list(memory.MODELS), choices=list(memory.MODELS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=64, help="of the models: images, or sequences of 512 tokens")
    parser.add_argument("--reps", type=int, default=300, help="milliseconds of repetitions")
    parser.add_argument("--accumulate", type=int, default=1, help="forwards and backwards between two writes of the weights")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=CUDA)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run")
    args = parser.parse_args(argv)
    if args.tiny:
        args.batch = min(args.batch, 2)
    return args


def main() -> None:
    args = parse_args()
    layers = TINY_LAYERS if args.tiny else {title: LAYERS[title] for title in args.layers}
    jobs = [(title, lambda of, shape=shape: measure_layer(of, *shape, args)) for title, shape in layers.items()]
    for name in args.models:
        title = name if args.tiny else memory.MODELS[name][2]
        jobs.append((title, lambda of, name=name: measure_model(of, name, args)))
    rows, why_not = [], {(title, name): results.ENDED for title, _ in jobs for name in args.contenders}
    heading = TITLE.format(args.batch) + ", small shapes" * args.tiny
    heading += f", weights written once in {args.accumulate}" * (args.accumulate > 1)
    options = {"panels": ["what"], "expected": list(CONTENDERS), "why_not": why_not}
    for (title, job), name in itertools.product(jobs, args.contenders):
        torch._dynamo.reset()
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = CONTENDERS[name].tf32
        try:
            ms, backward = job(CONTENDERS[name])
        except Exception as error:
            print(f"{title}, {name}: {error!r:.300}")
            why_not[title, name] = results.reason(error)
        else:
            rows.append({"what": title, "contender": name, "ms": ms, "backward ms": backward})
            compare(rows)
            print(rows[-1], flush=True)
        if rows:
            results.write(args.name, heading, rows, NOTES, args.folder, quiet=True, **options)


if __name__ == "__main__":
    main()
