"""LoRA on a frozen base, compiled: two Llama-3-8B blocks, PEFT rank 16 on every linear layer, forward + backward.

    python bench/lora.py
    python bench/lora.py --contenders bf16 halo1-int8 halo1-int8-A      # -A: the adapters' A matrices in 8 bits as well

Random weights and data. The contenders take turns in one process; each compiles everything anew, from empty caches.
"""

import argparse
import importlib.util
import re
import sys
import time

import chart
import results
import torch
from block import DEVICE, SHAPES, Llama, forget
from contenders import torchao_float8
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache
from torch.distributed._tools.common_utils import get_untyped_storages
from triton.testing import do_bench, do_bench_cudagraph

from halo_tensor import halo_config, quantize_

DEFAULT = [
    "bf16",
    "torchao-tensorwise",
    "torchao-rowwise",
    "bitsandbytes-nf4",
    "halo0-fp8",
    "halo1-fp8",
    "halo1-int8",
    "halo1-fp6",
]
NOTES = (
    "torch.compile with fullgraph, from empty caches (bitsandbytes: with graph breaks); attention is SDPA's causal kernel; "
    "adapters in bf16; every layer makes its grad_input; no optimiser. ms: median of plain calls; graph ms: of replays of a "
    "CUDA graph. Weights: of both blocks, adapters included. Saved: what the forward leaves allocated besides its result. "
    "Peak: in one step, weights included. Converting: of bf16 weights on the device. -A: A matrices follow the recipe too."
)


def is_base(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.endswith("base_layer")


def convert(llama: nn.Module, name: str) -> None:
    """Give ``llama``, which has its adapters (but for bitsandbytes), the base that ``name`` asks for."""
    if name == "bf16":
        return
    if name.startswith("torchao-"):
        return torchao_float8(name.removeprefix("torchao-"), llama, is_base)
    halo = re.fullmatch(r"halo(\d)-(\w+?)(-A)?", name)
    if halo is None:
        sys.exit(f"bench/lora.py: there is no contender {name!r}; there are {', '.join(DEFAULT)} and haloLEVEL-DTYPE[-A]")

    def chosen(module: nn.Module, name: str) -> bool:
        return is_base(module, name) or bool(halo[3] and isinstance(module, nn.Linear) and ".lora_A." in name)

    quantize_(llama, halo_config(int(halo[1]), halo[2]), filter_fn=chosen)


def to_bitsandbytes(llama: nn.Module) -> None:
    """QLoRA's base: linear layers in NF4, before the adapters are put on them."""
    import bitsandbytes as bnb

    for module in list(llama.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(module, name, new.to(DEVICE))
    llama.is_loaded_in_4bit = True  # PEFT looks for this


def make(name: str) -> tuple[Llama, float]:
    """The model with its adapters, and the seconds that converting its base took."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    with torch.device(DEVICE):
        model = Llama(SHAPES["8b-blocks"])
        torch.cuda.synchronize()
        start = time.perf_counter()
        if name.startswith("bitsandbytes"):
            to_bitsandbytes(model.llama)
            seconds = time.perf_counter() - start
        get_peft_model(model.llama, lora, autocast_adapter_dtype=False)  # changes model.llama in place
        if not name.startswith("bitsandbytes"):
            start = time.perf_counter()
            convert(model.llama, name)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    adapters = {parameter.dtype for key, parameter in model.named_parameters() if "lora_" in key}
    assert adapters == {torch.bfloat16}, f"the adapters are in {adapters}"
    return model, seconds


def weight_bytes(model: Llama) -> int:
    storages = {s.data_ptr(): s for p in model.llama.model.layers.parameters() for s in get_untyped_storages(p)}
    return sum(s.nbytes() for s in storages.values())


def measure(name: str, args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    others = torch.cuda.memory_allocated()
    model, converting = make(name)
    size = (args.batch, args.length, SHAPES["8b-blocks"]["hidden_size"])
    x = torch.randn(size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    model.compile(fullgraph=not name.startswith("bitsandbytes"))

    def step() -> None:
        x.grad = None
        model.zero_grad()
        model(x).backward(e)

    start = time.perf_counter()
    for _ in range(2):
        step()
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing and x.grad is not None, f"no gradient for {missing}"
    before = torch.cuda.memory_allocated()
    y = model(x)
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    del y
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - others
    plain, graph = do_bench(step, warmup=200, rep=args.reps, return_mode="median"), None
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph = do_bench_cudagraph(step, rep=args.reps, return_mode="median")
    except Exception as error:
        print(f"{name} as a CUDA graph: {error!r:.300}")
    sizes = {"weights": weight_bytes(model) / 2**30, "saved": saved / 2**30, "peak": peak / 2**30}
    return sizes | {"plain": plain, "graph": graph, "first": first, "converting": converting}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, metavar="NAME", help="also haloLEVEL-DTYPE[-A]")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--reps", type=int, default=1000, help="milliseconds of repetitions")
    parser.add_argument("--name", default="lora", help="of the result files")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/lora.py needs a CUDA device")
    # What the first compilation of a process pays once is no contender's.
    torch.compile(nn.Linear(64, 64, device=DEVICE))(torch.ones(64, 64, device=DEVICE)).sum().backward()
    AsyncCompile.wait_pool_ready()
    rows, reference = [], None
    for name in args.contenders:
        if name.startswith("bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
            print(f"{name}: bitsandbytes is not installed")
            continue
        with fresh_cache():
            try:
                m = measure(name, args)
            except Exception as error:
                print(f"{name}: {error!r:.300}")
                continue
            finally:
                forget()
        reference = m if name == "bf16" else reference
        graphs = reference and reference["graph"] and m["graph"]
        row = {
            "model": "8b-blocks",
            "contender": name,
            "ms": round(m["plain"], 2),
            "× bf16": f"{reference['plain'] / m['plain']:.2f}" if reference else None,
            "graph ms": m["graph"] and round(m["graph"], 2),
            "× bf16 (graph)": f"{reference['graph'] / m['graph']:.2f}" if graphs else None,
            "tokens/s": round(1e3 * args.batch * args.length / m["plain"]),
            "weights GiB": f"{m['weights']:.3f}",
            "saved GiB": f"{m['saved']:.2f}",
            "peak GiB": f"{m['peak']:.2f}",
            "first two steps s": round(m["first"], 1),
            "converting s": round(m["converting"], 2),
        }
        rows.append(row)
        print(row, flush=True)
    if not rows:
        sys.exit("bench/lora.py: no contender ran")
    title = f"Two Llama-3-8B blocks, LoRA of rank 16 on all linears, forward + backward, {args.batch}×{args.length} tokens"
    results.write(args.name, title, rows, NOTES)
    chart.draw(args.name)


if __name__ == "__main__":
    main()
