"""What users run: plain Hugging Face models in eager mode, with short inputs, lengths that vary, and generation.

    python bench/users.py
    python bench/users.py --contenders bf16 halo1-int8 --cases linear short

The models have the shape of Llama-3.2-1B, or of Llama-3-8B for adapters, and random weights. A step is forward, loss, backward
and a fused AdamW. Contenders run one after the other in one process; the host's speed is part of what is measured.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import llama
import results
import torch
from contenders import convert
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from halo_tensor import hot_config, quantize_

DEVICE = "cuda"
NOTES = (
    "Eager code, no graphs. Linear: microseconds of the CPU for one linear, 2048×2048 or 768×768, with 256 tokens, until the "
    "call returns, with gradients set to None after each backward; the median of 7 runs of 300 calls. 1×1 convolution: the "
    "same of 256 channels and 8 images of 14×14, channels last. Steps: milliseconds, medians of 12 "
    "(2×512) and 8 (4×2048) after 5; lengths that vary: the mean of thirty steps after ten, 4 × 200 to 2048 tokens, the same "
    "lengths for all contenders. LoRA: PEFT's adapters of rank 16 on all linears of a frozen Llama-3-8B shape, whose layers "
    "are recomputed in the backward; the median of 7 steps after 4. Generate: 8 prompts of 64 tokens, 64 new ones, "
    "milliseconds of the second call. "
    "× bf16: bf16's time divided by the contender's; more is better."
)


def model_of(shape: str) -> nn.Module:
    """Return a plain Llama with random weights in bfloat16."""
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(LlamaConfig(**llama.SHAPES[shape]), dtype=torch.bfloat16)


def host_us(call: Callable[[], object], calls: int = 300) -> float:
    """Return the microseconds until a call returns."""
    for _ in range(30):
        call()
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
    return statistics.median(found)


def layer_us(model: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Return the microseconds of forward and backward, and of forward under no_grad, of a model of one layer."""
    x.requires_grad_()
    gradient = torch.randn_like(model(x))

    def both() -> None:
        model(x).backward(gradient)
        x.grad = model[0].weight.grad = None

    def evaluate() -> None:
        with torch.no_grad():
            model(x)

    return host_us(both), host_us(evaluate)


def linear(name: str, width: int = 2048) -> Iterator[tuple[str, float]]:
    model = nn.Sequential(nn.Linear(width, width, bias=False, device=DEVICE, dtype=torch.bfloat16))
    convert(model, name)
    both, evaluate = layer_us(model, torch.randn(256, width, device=DEVICE, dtype=torch.bfloat16))
    which = "linear" if width == 2048 else f"linear {width}×{width}"
    yield f"{which}, forward and backward, µs of the CPU", both
    yield f"{which}, no_grad, µs of the CPU", evaluate


def narrow(name: str) -> Iterator[tuple[str, float]]:
    yield from linear(name, 768)


def pointwise(name: str) -> Iterator[tuple[str, float]]:
    if name not in ("bf16", "hot"):  # the others leave convolutions alone
        return
    for stride in (1, 2):
        layer = nn.Conv2d(256, 256, 1, stride, bias=False, device=DEVICE, dtype=torch.bfloat16)
        x = torch.randn(8, 256, 14, 14, device=DEVICE, dtype=torch.bfloat16)
        model = nn.Sequential(layer.to(memory_format=torch.channels_last))
        if name == "hot":
            quantize_(model, hot_config(quantized_convolutions="pointwise"), min_gain=0)
        both, _ = layer_us(model, x.to(memory_format=torch.channels_last))
        yield f"1×1 convolution, stride {stride}, forward and backward, µs of the CPU", both


def steps(name: str, lengths: list[tuple[int, int]], adapted: bool = False) -> list[float]:
    """Return the milliseconds of training steps with batches of these (sequences, tokens).

    Args:
        adapted: train adapters of rank 16 on a frozen Llama-3-8B shape, whose layers are recomputed in the backward. Otherwise
            all weights of the Llama-3.2-1B shape are trained.
    """
    torch.manual_seed(0)
    model = model_of("8b" if adapted else "1b")
    if adapted:
        model.requires_grad_(False)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    convert(model, name)
    if adapted:
        model = get_peft_model(model.train(), LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    found = []
    for shape in lengths:
        ids = torch.randint(0, 128256, shape, device=DEVICE)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def short(name: str) -> Iterator[tuple[str, float]]:
    yield "1B step, 2×512", statistics.median(steps(name, [(2, 512)] * 17)[5:])


def full(name: str) -> Iterator[tuple[str, float]]:
    yield "1B step, 4×2048", statistics.median(steps(name, [(4, 2048)] * 13)[5:])


def varying(name: str) -> Iterator[tuple[str, float]]:
    draw = random.Random(0)
    found = steps(name, [(4, draw.randint(200, 2048)) for _ in range(40)])
    yield "1B step, 4 × 200 to 2048", statistics.mean(found[10:])


def lora(name: str) -> Iterator[tuple[str, float]]:
    yield "8B LoRA step, 4×1024", statistics.median(steps(name, [(4, 1024)] * 11, adapted=True)[4:])


def generate(name: str) -> Iterator[tuple[str, float]]:
    model = model_of("1b").eval()
    convert(model, name)
    ids = torch.randint(0, 128256, (8, 64), device=DEVICE)
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        last = time.perf_counter() - start
    yield "generate, 8 × 64", last * 1e3


CASES = {case.__name__: case for case in (linear, narrow, pointwise, short, full, varying, generate, lora)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "users")
    parser.add_argument("--contenders", nargs="+", default=["bf16", "torchao-tensorwise", "halo1-int8", "halo0-fp8"])
    default = [case for case in CASES if case not in ("narrow", "pointwise")]  # which are for HOT
    parser.add_argument("--cases", nargs="+", default=default, choices=list(CASES))
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/users.py needs a CUDA device")
    rows: list[dict] = []
    why_not: dict[tuple[str, ...], str] = {}
    for case in args.cases:
        reference: dict[str, float] = {}
        for name in args.contenders:
            try:
                for what, time_taken in CASES[case](name):
                    reference.setdefault(what, time_taken)
                    speedup = f"{reference[what] / time_taken:.2f}"
                    rows.append({"case": what, "contender": name, "time": round(time_taken, 1), "× bf16": speedup})
                    print(rows[-1], flush=True)
            except Exception as error:
                print(f"{case} {name}: {error!r:.300}", flush=True)
                why_not[case, name] = results.reason(error)
            torch.cuda.empty_cache()
            if rows:  # a run that is stopped keeps what it has measured
                title = "What users run, in eager mode"
                results.write(args.name, title, rows, NOTES, args.folder, True, panels=["case"], why_not=why_not)


if __name__ == "__main__":
    main()
