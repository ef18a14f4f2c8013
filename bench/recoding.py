"""Measure what re-coding a checkpoint that was released in 8 bits loses.

    python bench/recoding.py                   # a matrix of a normal distribution
    python bench/recoding.py --model MODEL     # the linear layers of a Llama

Each weight is coded as such checkpoints are, in fp8 with a scale per block of 128×128 or in int8 with a scale per row, read by
``halo_tensor.transformers.layouts``, and quantised again.
"""

import argparse

import results
import torch
from common import load_model

from halo_tensor import HaloWeight, halo_config, layer_filter
from halo_tensor.transformers.layouts import SCALE, WEIGHT, layout_of
from halo_tensor.transformers.recoding import cosine_of_codes

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
ROWS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
GROUPS = {"group_0": {"weights": ROWS}}
W8A8 = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": GROUPS}
RECIPES = {
    "int8, level 1": halo_config(1, "int8"), "fp8, level 0": halo_config(0, "fp8"), "fp8, level 1": halo_config(1, "fp8"),
    "fp6, level 1": halo_config(1, "fp6"),
}  # fmt: skip
NOTES = (
    "Re-coding: the cosine of the released values and of this library's codes, which model.halo_recoding gives. Release: of "
    "the original weights and the released values. Both: of the original weights and the codes. Mean and smallest of all "
    "layers."
)


def in_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 codes and the scale of each block of 128×128; the last blocks may be partial."""
    bands = [torch.stack([part.abs().max() for part in band.split(128, 1)]) for band in w.split(128)]
    scale = torch.stack(bands).clamp_min(1e-12) / 448
    wide = scale.repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1)[:, : w.shape[1]]
    return (w / wide).to(torch.float8_e4m3fn), scale


def in_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes and the scale of each row."""
    scale = w.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (w / scale).round().to(torch.int8), scale


RELEASES = {"fp8, blocks": (FP8, in_blocks), "int8, rows": (W8A8, in_rows)}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the cosine of two matrices as vectors."""
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "recoding")
    parser.add_argument("--model", help="path (.gguf too) or hub name of a Llama")
    parser.add_argument("--width", type=int, default=1024, help="of the matrix of a normal distribution")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.model:
        model, _ = load_model(args.model, torch.float32, "cpu")
        accept = layer_filter(model, halo_config())
        matrices = [module.weight.detach() for name, module in model.named_modules() if accept(module, name)]
    else:
        matrices = [torch.randn(args.width, args.width, generator=torch.Generator().manual_seed(0)) / args.width**0.5]
    rows = []
    for release, (config, code) in RELEASES.items():
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in RECIPES}
        for w in matrices:
            codes, scale = code(w)
            values = layout_of(config).values({WEIGHT: codes, SCALE: scale}, torch.bfloat16)
            released = cosine(values, w)
            for name, recipe in RECIPES.items():
                weight = HaloWeight.from_hp(values, recipe.recipe, frozen=True)
                found[name].append((cosine_of_codes(weight, values), released, cosine_of_codes(weight, w)))
        for name, cosines in found.items():
            columns = zip(("re-coding", "release", "both"), zip(*cosines, strict=True), strict=True)
            shown = {column: f"{sum(values) / len(values):.5f} (least {min(values):.5f})" for column, values in columns}
            rows.append({"released in": release, "re-coded in": name} | shown)
    source = f"{len(matrices)} layers of {args.model}" if args.model else f"{args.width}×{args.width}, normal distribution"
    title = f"Cosines of re-coded weights: {source}"
    results.write(args.name, title, rows, NOTES, args.folder)


if __name__ == "__main__":
    main()
