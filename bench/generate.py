"""Time the step that generates one token for each sequence of a batch: Llama with a static cache, eager and as a CUDA graph.

    python bench/generate.py
    python bench/generate.py --shapes 8b --batches 1 16 --contenders bf16 halo1-int8

A step with so few tokens reads all weights and computes little. In eager code the CPU limits it; a CUDA graph (as
``torch.compile(mode="reduce-overhead")`` makes it) leaves the GPU's own time.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter

import llama
import results
import torch
from contenders import convert
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

DEVICE = "cuda"
#: Tokens in the cache before the step, and those that it has room for.
KEPT, ROOM = 128, 256
NOTES = (
    f"One token for each sequence, with {KEPT} tokens in a static cache for {ROOM}. The model is Hugging Face's in bf16, with "
    "random weights and sdpa; lm_head stays in bf16. Eager: the median of 20 steps after 5, each until the GPU is done. "
    "Graph: the median of 50 replays of one CUDA graph of the step. × bf16: bf16's time divided by the contender's; more is "
    "better."
)


def model_of(shape: str) -> nn.Module:
    """Return a plain model of Llama's ``shape`` with random weights in bfloat16."""
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(LlamaConfig(**llama.SHAPES[shape]), dtype=torch.bfloat16).eval()


def step_of(model: nn.Module, batch: int) -> Callable[[], torch.Tensor]:
    """Return a function that computes the logits [batch, 1, vocabulary] of one more token. Each call is the same step."""
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    ids = torch.randint(0, model.config.vocab_size, (batch, KEPT), device=DEVICE)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    token, position = ids[:, :1].clone(), torch.full((1, 1), KEPT, device=DEVICE)
    # A mask that is given is not made anew, which would take the CPU longer and stop a capture.
    seen = (torch.arange(ROOM, device=DEVICE) <= KEPT).expand(batch, 1, 1, ROOM)

    @torch.no_grad()
    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(KEPT)
        options = {"past_key_values": cache, "attention_mask": seen, "position_ids": position}
        return model(input_ids=token, **options).logits

    return step


def eager_ms(step: Callable[[], object], calls: int = 25, warm: int = 5) -> float:
    """Return the median of the milliseconds until a call is done."""
    found = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = perf_counter()
        step()
        torch.cuda.synchronize()
        found.append((perf_counter() - start) * 1e3)
    return median(found[warm:])


def graph_ms(step: Callable[[], object], replays: int = 50) -> float:
    """Return the median of the milliseconds of a replay of the step's CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "generate")
    parser.add_argument("--contenders", nargs="+", default=["bf16", "halo1-int8", "halo0-fp8"])
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], choices=[*llama.SHAPES])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("bench/generate.py needs a CUDA device")
    rows: list[dict] = []
    why_not: dict[tuple[str, ...], str] = {}
    bf16: dict[tuple, float] = {}
    for shape in args.shapes:
        for name in args.contenders:
            model = model_of(shape)
            convert(model, name)
            for batch in args.batches:
                case = f"{shape}, {batch} sequences"
                try:
                    step = step_of(model, batch)
                    times = {"eager": eager_ms(step), "graph": graph_ms(step)}
                except Exception as error:
                    print(f"{case} {name}: {error!r:.300}", flush=True)
                    why_not[case, name] = results.reason(error)
                    continue
                row = {"case": case, "contender": name}
                for how, ms in times.items():
                    if name == "bf16":
                        bf16[case, how] = ms
                    row |= {f"{how}, ms": round(ms, 3), f"{how}, × bf16": results.speedup(bf16.get((case, how)), ms)}
                rows.append(row)
                print(row, flush=True)
            del model
            torch.cuda.empty_cache()
    cases = [*dict.fromkeys(row["case"] for row in rows)]
    rows.sort(key=lambda row: cases.index(row["case"]))
    results.write(args.name, "A step of generation", rows, NOTES, args.folder, panels=["case"], why_not=why_not)


if __name__ == "__main__":
    main()
