"""Report on a model with outlier channels, as large models have them.

    python bench/outliers.py

6 output channels of every norm are multiplied by 32, and the columns of the layers that read them are divided by 32. The model
computes the same function, and bf16 weights lose nothing, because 32 is a power of two. bench/study.py trains this model.
"""

import argparse

import results
import torch
from common import load_model, load_tokens
from torch import nn

from halo_tensor import Balanced, halo_config, report
from halo_tensor.diagnostics import CANDIDATES
from halo_tensor.diagnostics.reports import text

OUTLIERS, FACTOR = 6, 32


@torch.no_grad()
def inject_outliers(model: nn.Module) -> None:
    """Scale channels that the norms of every block of a Llama return, and divide the columns that read them."""
    width = model.config.hidden_size
    channels = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:OUTLIERS].to(model.device)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in readers.items():
            norm.weight[channels] *= FACTOR
            for linear in linears:
                linear.weight[:, channels] /= FACTOR


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "outliers")
    parser.add_argument("--model", help="path (.gguf too) or hub name of a Llama (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", help=".txt or .jsonl (default: Python's documentation)")
    parser.add_argument("--tokens", type=int, default=512)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model, torch.float32, device)
    inject_outliers(model)
    ids = load_tokens(tokenizer, args.data, args.tokens)[None].to(device)
    candidates = CANDIDATES | {"int8 HALO-1, balanced": Balanced(halo_config(1, "int8"))}
    found = report(model, {"input_ids": ids, "labels": ids}, candidates=candidates)
    header, rows = text.candidate_rows(found)
    exceptions = {layer.name: f"{layer.recommended}: {text.reason(layer, found)}" for layer in found.exceptions}
    said = [text.sentence(found.verdict), *(f"Except {name}, {why}." for name, why in exceptions.items())]
    results.write(
        args.name,
        f"What report says of {args.model or 'SmolLM2-135M-Instruct'} with {OUTLIERS} channels × {FACTOR}, float32, "
        f"{found.tokens} tokens of {args.data or 'Python documentation'}",
        [dict(zip(header, (cell.strip("*") for cell in row), strict=True)) for row in rows],
        "  \n".join([*said, text.notes(found)]),
        args.folder,
        recommended=found.recommended,
        balanced=found.balanced,
        exceptions=exceptions,
    )


if __name__ == "__main__":
    main()
