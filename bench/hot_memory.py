"""Measure time and memory of training steps by HOT with its activations compressed, and the largest batch in a given memory.

    python bench/hot_memory.py                              # ViT-B/16 and ResNet-50, 256 images, on a GPU
    python bench/hot_memory.py --models vit --batch 64 --contenders bf16 "hot, all"
    python bench/hot_memory.py --tiny --name dry_run        # small models, on a CPU too

The peak is what the allocator of a GPU reports for a forward and backward, with weights and their gradients. On a CPU, the
bytes that forward saves for backward are all that is measured. The largest batch is extrapolated from the peaks of two
batches: two steps with that batch must run while the allocator may take no more than ``--limit`` GiB. If they do not, up to
20 % fewer are tried, since free memory may lie in pieces that are too small.
"""

import argparse
import gc

import memory
import results
import torch
from hot import compile_blocks, milliseconds
from torch import nn

from halo_tensor import hot_config, quantize_
from halo_tensor.analysis import measure_saved
from halo_tensor.recipe import CONVOLUTIONS

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GIB = 2**30
#: name -> options of the config; None: high precision.
CONTENDERS: dict[str, dict | None] = {
    "bf16": None,
    "hot": {},
    "hot, int8": {"activations": "int8"},
    "hot, all": {"activations": "all"},
    "hot, all-int4": {"activations": "all-int4"},
    "hot, X in int4": {"rank": None, "saved_bits": 4},
    "hot, X in int4, all": {"rank": None, "saved_bits": 4, "activations": "all"},
}
NOTES = (
    "hot: one scale per token for E in grad_input. int8, all, all-int4: activations= of its config. X in int4: with "
    "hot_config(None, saved_bits=4). Peak: of a forward and backward, with weights and gradients, no optimiser. Batch in so "
    "many GiB: the largest that ran while the allocator could take no more. INT4 values are multiplied as INT8, exactly."
)


def build(name: str, contender: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = memory.MODELS[name][0](args.tiny).to(DEVICE, torch.bfloat16).train()
    if name == "resnet":
        model = model.to(memory_format=torch.channels_last)
    if (options := CONTENDERS[contender]) is not None:
        quantize_(model, hot_config(grad_output_granularity="row", quantized_convolutions=args.convolutions, **options))
    return model


def compiled(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Return the model, compiled as the command says: in whole, or each block."""
    if args.compile == "model":
        return torch.compile(model, dynamic=False)
    if args.compile == "blocks":
        compile_blocks(model)
    return model


def step_of(model: nn.Module, name: str, batch: int, args: argparse.Namespace):
    """Return a function that runs a step."""
    inputs = {key: value.to(DEVICE) for key, value in memory.MODELS[name][1](model, batch).items()}
    if name == "resnet":
        inputs = {key: value.contiguous(memory_format=torch.channels_last) for key, value in inputs.items()}
    f = model.__dict__.setdefault("compiled by the benchmark", compiled(model, args))

    def step():
        model.zero_grad()
        f(**inputs).logits.float().square().mean().backward()

    return step, inputs


def peak(step) -> float:
    """Return the peak of a step in GiB."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB


def fits(name: str, contender: str, batch: int, args: argparse.Namespace) -> bool:
    """Whether a step with this batch runs in ``--limit`` GiB."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.limit * GIB / total))
    try:
        model = build(name, contender, args)
        step, _ = step_of(model, name, batch, args)
        step()
        step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch._dynamo.reset()
    return True


def measure(name: str, contender: str, args: argparse.Namespace) -> dict:
    model = build(name, contender, args)
    title = name if args.tiny else memory.MODELS[name][2]
    row: dict = {"model": title, "contender": contender}
    if not CUDA:
        _, inputs = step_of(model, name, args.batch, args)
        with measure_saved(model) as saved:
            model(**inputs)
        return row | {"saved MiB": saved.total / 2**20}
    step, _ = step_of(model, name, args.batch, args)
    step()  # compiles
    row["ms"] = milliseconds(step, args.reps)
    peaks = [peak(step)]
    row["peak GiB"] = peaks[0]
    if args.largest:
        torch._dynamo.reset()
        model.__dict__.pop("compiled by the benchmark")
        half, _ = step_of(model, name, args.batch // 2, args)
        half()
        peaks.append(peak(half))
        an_image = (peaks[0] - peaks[1]) / (args.batch - args.batch // 2)
        row["GiB an image"] = an_image
        # The allocator splits its memory, and libraries take some: two hundredths are left to them.
        batch = int((0.98 * args.limit - (peaks[0] - args.batch * an_image)) / an_image) // 8 * 8
        del model, step, half
        gc.collect()
        torch._dynamo.reset()
        tries = (int(batch * (1 - lost)) // 8 * 8 for lost in (0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2))
        row[f"batch in {args.limit:g} GiB"] = next((n for n in tries if fits(name, contender, n, args)), None)
    return row


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "hot_memory")
    parser.add_argument("--models", nargs="+", default=["vit", "resnet"], choices=list(memory.MODELS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=256, help="images, or sequences of 512 tokens")
    parser.add_argument("--reps", type=int, default=600, help="milliseconds of repetitions")
    parser.add_argument("--compile", default="blocks" if CUDA else "no", choices=["model", "blocks", "no"])
    parser.add_argument("--convolutions", default="none", choices=CONVOLUTIONS, help="which multiply in few bits")
    parser.add_argument("--largest", action=argparse.BooleanOptionalAction, default=CUDA, help="find the largest batch")
    parser.add_argument("--limit", type=int, default=40, help="GiB that the largest batch may take")
    parser.add_argument("--tiny", action="store_true", help="small models, for a dry run")
    args = parser.parse_args(argv)
    if args.tiny:
        args.batch = min(args.batch, 4)
    return args


def main() -> None:
    args = parse_args()
    torch._dynamo.config.recompile_limit = 64  # the blocks of a ResNet share their code and differ in shapes
    names = [name if args.tiny else memory.MODELS[name][2] for name in args.models]
    rows, why_not = [], {(name, contender): results.ENDED for name in names for contender in args.contenders}
    heading = f"Training steps by HOT, batch {args.batch}, compiled: {args.compile}" + ", small models" * args.tiny
    measured = "ms" if CUDA else "saved MiB"
    for name, title in zip(args.models, names, strict=True):
        for contender in args.contenders:
            torch._dynamo.reset()
            gc.collect()
            try:
                row = measure(name, contender, args)
            except Exception as error:
                print(f"{title}, {contender}: {error!r:.500}", flush=True)
                why_not[title, contender] = results.reason(error)
                continue
            base = next((r for r in rows if (r["model"], r["contender"]) == (title, "bf16")), row)
            for key in [measured] if not CUDA else ["ms", "peak GiB"]:
                row[f"{key}, × bf16"] = f"{row[key] / base[key]:.3f}"
            rows.append(row)
            print(row, flush=True)
            results.write(
                args.name,
                heading,
                rows,
                NOTES,
                args.folder,
                quiet=True,
                panels=["model"],
                expected=CONTENDERS,
                why_not=why_not,
            )


if __name__ == "__main__":
    main()
