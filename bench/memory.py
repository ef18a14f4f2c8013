"""Measure the memory that HOT saves: what converted layers and the whole model save for backward, and the peak of a step.

    python bench/memory.py                        # ViT-B, ResNet-50 and a Llama-3-8B block in bf16, on a GPU if there is one
    python bench/memory.py --models vit --batch 2 --contenders bf16 hot
    python bench/memory.py --tiny --name dry_run  # small models

Hooks measure what autograd saves. The peak is the bytes of live tensors, or what the allocator of a GPU reports. The table
also has what halo_tensor.analysis.cost computes from shapes alone.
"""

import argparse
import gc

import results
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification, ViTConfig
from transformers import ViTForImageClassification as ViT

from halo_tensor import dequantize_, halo_config, hot_config, quantize_, recipe_config
from halo_tensor.analysis import bit_operations, measure_saved, saved_bytes, shapes
from halo_tensor.recipe import Recipe

CONTENDERS = {
    "bf16": None,
    "hot": hot_config(),
    "hot rank 4": hot_config(4),
    "hot_llm": recipe_config("hot_llm", min_features=64),
    "halo1-int8": halo_config(1, "int8", min_features=64),
}


def vit(tiny: bool) -> nn.Module:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256, "image_size": 64}
    return ViT(ViTConfig(**small if tiny else {}))


def resnet(tiny: bool) -> nn.Module:
    small = {"hidden_sizes": [64, 128], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**small if tiny else {}))


def llama(tiny: bool) -> nn.Module:
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    small = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=128, **small if tiny else large))


def images(model: nn.Module, batch: int) -> dict:
    return {"pixel_values": torch.randn(batch, 3, *[getattr(model.config, "image_size", 224)] * 2, dtype=torch.bfloat16)}


def text(model: nn.Module, batch: int) -> dict:
    return {"input_ids": torch.randint(128, (batch, 512))}


#: name -> (function that makes it, function that makes its inputs, title)
MODELS = {
    "vit": (vit, images, "ViT-B/16"),
    "resnet": (resnet, images, "ResNet-50"),
    "llama": (llama, text, "Llama-3-8B block, 512 tokens"),
}


class LiveBytes(TorchDispatchMode):
    """Record the peak of the bytes of live tensors made in the block. Memory that an op allocates internally is not seen."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not all(t is torch.Tensor or t is nn.Parameter for t in map(type, tree_leaves(out)) if issubclass(t, torch.Tensor)):
            return out  # a subclass, whose inner tensors were seen already
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def peak(model: nn.Module, inputs: dict) -> int:
    """Return the bytes of a forward and backward, including the gradients of weights but not the weights."""

    def step():
        model(**inputs).logits.float().square().mean().backward()

    model.zero_grad()
    if not torch.cuda.is_available():
        with LiveBytes() as live:
            step()
        return live.peak
    step()
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def title_of(name: str, args: argparse.Namespace) -> str:
    return name if args.tiny else MODELS[name][2]


def measure(name: str, contender: str, args: argparse.Namespace) -> dict:
    make, inputs_of, _ = MODELS[name]
    config, device = CONTENDERS[contender], "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = make(args.tiny).to(device, torch.bfloat16).train()
    inputs = {key: value.to(device) for key, value in inputs_of(model, args.batch).items()}
    # All contenders are measured on the layers that HOT converts.
    layers = quantize_(model, hot_config()).converted
    dequantize_(model)
    found = shapes(model, **inputs)
    if config is not None:
        layers = [layer for layer in quantize_(model, config).converted if layer in layers]
    recipe = Recipe() if config is None else config.recipe
    with measure_saved(model, layers) as saved:
        out = model(**inputs)
    del out
    return {
        "model": title_of(name, args),
        "contender": contender,
        "layers": len(layers),
        "saved by them, MiB": saved.layers / 2**20,
        "analytic, MiB": sum(saved_bytes(recipe, found[n]) for n in layers if found[n].first) / 2**20,
        "saved in all, MiB": saved.total / 2**20,
        "peak of a step, MiB": peak(model, inputs) / 2**20,
        "backward, Tera bit operations": sum(
            sum(count for product, count in bit_operations(recipe, found[n]).items() if product != "output") for n in layers
        )
        / 1e12,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "memory")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=4, help="images, or sequences of 512 tokens")
    parser.add_argument("--tiny", action="store_true", help="small models, for a dry run")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    rows, why_not = [], {}
    for model in args.models:
        base = None
        for contender in tqdm(args.contenders, desc=model):
            try:
                row = measure(model, contender, args)
            except ValueError as error:  # HALO's recipes do not convert convolutions
                print(f"{model} {contender}: {str(error).splitlines()[0]}")
                why_not[title_of(model, args), contender] = results.reason(error)
                continue
            if contender == "bf16":
                base = row["saved by them, MiB"]
            row["× bf16"] = f"{row['saved by them, MiB'] / base:.3f}" if base else None
            rows.append(row)
            print(row, flush=True)
            gc.collect()
    results.write(
        args.name,
        f"Memory for backward, batch {args.batch}, bf16",
        rows,
        "Saved by them: by the forward of converted layers, each storage once, parameters left out. Other ops may save the "
        "same tensor (a ReLU its result, which is a convolution's X), and HOT does not make them let go of it: 'in all' shows "
        "what is left. Analytic: from shapes, X of several linear layers counted once. Peak: of a forward and backward, "
        "gradients of weights included, weights not; on a CPU without what ops allocate for themselves. Bit operations count "
        "the method (halo_tensor/analysis/cost.py); Hopper multiplies INT4 values as INT8, exactly.",
        args.folder,
        panels=["model"],
        expected=CONTENDERS,
        why_not=why_not,
    )


if __name__ == "__main__":
    main()
