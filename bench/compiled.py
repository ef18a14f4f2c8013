"""A whole Hugging Face model under torch.compile: how long its first steps take, and what new lengths cost.

    python bench/compiled.py
    python bench/compiled.py --contenders bf16 halo1-int8 --layers 6
    HALO_ENABLE=ahead python bench/compiled.py --cases first --contenders bf16 halo1-int8

Each contender runs in a process of its own, with empty caches of Inductor and Triton.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from statistics import median

import llama
import results
import torch
from contenders import convert
from transformers import LlamaConfig, LlamaForCausalLM

NOTES = (
    "The 1B shape with --layers layers and random weights, torch.compile of the whole model, fused AdamW. First steps: "
    "seconds of the first two, of 4×2048 tokens, with cold caches and in a new process. Lengths: a new compilation of the "
    "model, 2 × 1000 tokens and then 2 × other numbers, odd ones and multiples of 16: milliseconds of the slowest first visit "
    "after the second length, the graphs that Dynamo made in all, and milliseconds of a step of 2×509 tokens by the dynamic "
    "graph, a median of 10. × bf16: bf16's time divided by the contender's; more is better."
)
#: The second one is compiled for any length.
LENGTHS = (1000, 777, 512, 1024, 333, 801, 640, 65, 950, 509)


class Trained:
    """A compiled model and its optimiser."""

    def __init__(self, name: str, layers: int, device: str, shape: str):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        with torch.device(device):
            config = LlamaConfig(**llama.SHAPES[shape] | {"num_hidden_layers": layers}, use_cache=False)
            self.model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        convert(self.model, name)
        self.compiled = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.device = device

    def step(self, sequences: int, tokens: int) -> float:
        """Return the seconds of a step."""
        ids = torch.randint(0, self.model.config.vocab_size, (sequences, tokens), device=self.device)
        self.synchronize()
        start = time.perf_counter()
        self.compiled(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()
        return time.perf_counter() - start


def first(name: str, layers: int, device: str, shape: str) -> Iterator[tuple[str, float]]:
    trained = Trained(name, layers, device, shape)
    yield "first two steps, s", sum(trained.step(4, 2048 if device == "cuda" else 32) for _ in range(2))


def lengths(name: str, layers: int, device: str, shape: str) -> Iterator[tuple[str, float]]:
    scale = 1 if device == "cuda" else 20
    trained = Trained(name, layers, device, shape)
    visits = [trained.step(2, n // scale) for n in LENGTHS]
    yield "a length's first visit, ms", max(visits[2:]) * 1e3
    yield "graphs for all lengths", torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield "a step of 2×509, ms", median(trained.step(2, 509 // scale) for _ in range(10)) * 1e3


CASES = {case.__name__: case for case in (first, lengths)}


def in_new_process(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Return what the cases yield for a contender."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, __file__, "--only", name, "--layers", str(args.layers), "--device", args.device]
        done = subprocess.run(
            [*command, "--shape", args.shape, "--cases", *args.cases],
            env=os.environ | caches,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "compiled")
    parser.add_argument("--contenders", nargs="+", default=["bf16", "torchao-tensorwise", "halo1-int8"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shape", default="1b", choices=list(llama.SHAPES))
    parser.add_argument("--device", default="cuda", help="cpu tries the script out, with shorter inputs")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--only", metavar="NAME", help="measure this contender in this process and print JSON")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.only:
        found = (CASES[case](args.only, args.layers, args.device, args.shape) for case in args.cases)
        print(json.dumps(dict(chain.from_iterable(found))), flush=True)
        return
    rows: list[dict] = []
    why_not: dict[tuple[str, ...], str] = {}
    reference: dict[str, float] = {}
    for name in args.contenders:
        try:
            for what, found in in_new_process(name, args).items():
                is_time = not what.startswith("graphs")
                ratio = f"{reference.setdefault(what, found) / found:.2f}" if is_time else ""
                rows.append({"case": what, "contender": name, "found": round(found, 1), "× bf16": ratio})
                print(rows[-1], flush=True)
        except subprocess.CalledProcessError as error:
            why_not[("all", name)] = results.reason(error)
    results.write(
        args.name, "A compiled model's first steps and lengths", rows, NOTES, args.folder, panels=["case"], why_not=why_not
    )


if __name__ == "__main__":
    main()
