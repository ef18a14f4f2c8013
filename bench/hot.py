"""Time training steps with HOT's backward against bf16 and HALO's recipes, on layers and whole models.

    python bench/hot.py                             # a GPU
    python bench/hot.py --tiny --name hot_dry_run   # small shapes, on a CPU too

INT4 values are multiplied as INT8, which is exact: no GPU since Hopper multiplies INT4. So INT4 is no faster than INT8 here.
"""

import argparse
import itertools
import time

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
    "here. Weights of HALO's recipes are quantised once in every step, as an optimiser's write would."
)
CONTENDERS = {
    "bf16": None,
    "hot": hot_config(),
    "hot per token": hot_config(grad_output_granularity="row"),
    "hot nearest": hot_config(rounding="nearest"),
    "hot_llm": recipe_config("hot_llm", min_features=64),
    "lbp_wht": recipe_config("lbp_wht", min_features=64),
    "luq": recipe_config("luq", min_features=64),
    "halo0-fp8": halo_config(0, "fp8", min_features=64),
    "halo1-int8": halo_config(1, "int8", min_features=64),
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


def measure_layer(config, tokens: int, k: int, n: int, args: argparse.Namespace) -> float:
    layer = nn.Sequential(nn.Linear(k, n, device=DEVICE, dtype=torch.bfloat16))
    if config is not None:
        quantize_(layer, config)
    x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(tokens, n, device=DEVICE, dtype=torch.bfloat16)
    f = torch.compile(layer, fullgraph=True) if args.compile else layer

    def step():
        x.grad = None
        layer.zero_grad()
        requantize(layer)
        f(x).backward(e)

    return milliseconds(step, args.reps)


def measure_model(config, name: str, args: argparse.Namespace) -> float:
    make, inputs_of, _ = memory.MODELS[name]
    model = make(args.tiny).to(DEVICE, torch.bfloat16).train()
    if config is not None:
        quantize_(model, config)
    inputs = {key: value.to(DEVICE) for key, value in inputs_of(model, args.batch).items()}
    f = torch.compile(model) if args.compile else model

    def step():
        model.zero_grad()
        requantize(model)
        f(**inputs).logits.float().square().mean().backward()

    return milliseconds(step, args.reps)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "hot")
    parser.add_argument("--models", nargs="*", default=list(memory.MODELS), choices=list(memory.MODELS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=64, help="of the models: images, or sequences of 512 tokens")
    parser.add_argument("--reps", type=int, default=300, help="milliseconds of repetitions")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=CUDA)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run")
    args = parser.parse_args(argv)
    if args.tiny:
        args.batch = min(args.batch, 2)
    return args


def main() -> None:
    args = parse_args()
    layers = TINY_LAYERS if args.tiny else LAYERS
    jobs = [(title, lambda config, shape=shape: measure_layer(config, *shape, args)) for title, shape in layers.items()]
    for name in args.models:
        title = name if args.tiny else memory.MODELS[name][2]
        jobs.append((title, lambda config, name=name: measure_model(config, name, args)))
    rows, why_not = [], {(title, name): results.ENDED for title, _ in jobs for name in args.contenders}
    heading = TITLE.format(args.batch) + ", small shapes" * args.tiny
    options = {"panels": ["what"], "expected": list(CONTENDERS), "why_not": why_not}
    for (title, job), name in itertools.product(jobs, args.contenders):
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            ms = job(CONTENDERS[name])
        except Exception as error:
            print(f"{title}, {name}: {error!r:.300}")
            why_not[title, name] = results.reason(error)
        else:
            bf16 = next((row["ms"] for row in rows if (row["what"], row["contender"]) == (title, "bf16")), None)
            speed = results.speedup(ms if name == "bf16" else bf16, ms)
            rows.append({"what": title, "contender": name, "ms": ms, "× bf16": speed})
            print(rows[-1], flush=True)
        if rows:
            results.write(args.name, heading, rows, NOTES, args.folder, quiet=True, **options)


if __name__ == "__main__":
    main()
