"""A step of AdamW: what bringing the codes of converted weights up to date adds to it.

    python bench/optimizer_step.py
    python bench/optimizer_step.py --shapes 1b --contenders bf16 halo1-int8 --tiny

A model is only its parameters, with random gradients: no layer is called. Contenders run one after the other in one process,
and each figure is compared with that of bf16 with the same optimiser.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import llama
import results
import torch
from contenders import convert
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZERS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "default": {}}
NOTES = (
    "AdamW of bf16 parameters. GPU: milliseconds that a step keeps the GPU busy, by events, with the step issued while the "
    "GPU waits, so that the CPU is not part of it. CPU: milliseconds until step() returns, from an idle GPU. Both: until the "
    "GPU is idle again. Medians. Extra: above bf16 with the same optimiser. 1b: the parameters of Llama-3.2-1B. "
    "8b_blocks: those of four blocks of Llama-3-8B. default: what AdamW chooses by itself."
)


def parameters_of(shape: str, tiny: bool) -> nn.Module:
    """Return a model on DEVICE in bf16."""
    with torch.device(DEVICE):
        if shape == "1b":
            config = LlamaConfig(**llama.SHAPES["tiny" if tiny else "1b"])
            return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        sizes = (128, 256) if tiny else (4096, 14336)
        config = LlamaConfig(
            hidden_size=sizes[0], intermediate_size=sizes[1], num_attention_heads=sizes[0] // 128,
            num_key_value_heads=max(sizes[0] // 512, 1), num_hidden_layers=4,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        return nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(4)).bfloat16()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def gpu_ms(step: Callable[[], object]) -> float:
    """Return the milliseconds that a step keeps the GPU busy; 0 without one."""
    if DEVICE != "cuda":
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(100_000_000)  # some 50 ms, in which the step is issued
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def issue_ms(step: Callable[[], object]) -> tuple[float, float]:
    """Return the milliseconds until a step returns, and until it has been done."""
    synchronize()
    start = time.perf_counter()
    step()
    issued = time.perf_counter()
    synchronize()
    return 1e3 * (issued - start), 1e3 * (time.perf_counter() - start)


def measure(name: str, shape: str, options: dict, count: int, tiny: bool) -> dict[str, float]:
    """Return the medians of ``count`` steps."""
    torch.manual_seed(0)
    model = parameters_of(shape, tiny)
    convert(model, name)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **options)
    for _ in range(4):
        optimizer.step()
    gpu = statistics.median(gpu_ms(optimizer.step) for _ in range(count))
    issued, done = zip(*(issue_ms(optimizer.step) for _ in range(count)), strict=True)
    return {"GPU": gpu, "CPU": statistics.median(issued), "both": statistics.median(done)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "optimizer_step")
    parser.add_argument("--contenders", nargs="+", default=["bf16", "halo1-int8", "halo0-fp8", "halo1-fp6"])
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b_blocks"], choices=["1b", "8b_blocks"])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a dry run on a CPU too")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if DEVICE != "cuda" and not args.tiny:
        sys.exit("bench/optimizer_step.py needs a CUDA device")
    rows: list[dict] = []
    why_not: dict[tuple[str, ...], str] = {}
    for shape in args.shapes:
        for kind in args.optimizers:
            reference: dict[str, float] | None = None
            for name in args.contenders:
                try:
                    found = measure(name, shape, OPTIMIZERS[kind], args.steps, args.tiny)
                except Exception as error:
                    print(f"{shape} {kind} {name}: {error!r:.300}", flush=True)
                    why_not[shape, kind, name] = results.reason(error)
                    continue
                reference = reference or found
                extra = {f"{what}, extra": round(ms - reference[what], 2) for what, ms in found.items()}
                times = {f"{what} ms": round(ms, 2) for what, ms in found.items()}
                rows.append({"shape": shape, "optimizer": kind, "contender": name, **times, **extra})
                print(rows[-1], flush=True)
                if DEVICE == "cuda":
                    torch.cuda.empty_cache()
    title = "The codes of weights in an optimiser's step"
    results.write(args.name, title, rows, NOTES, args.folder, panels=["shape", "optimizer"], why_not=why_not)


if __name__ == "__main__":
    main()
