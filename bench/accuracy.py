"""Measure how faithful recipes are: the gradient of a real language model under each of them against high precision.

All linear layers except lm_head are converted.

    python bench/accuracy.py                                           # Python's documentation
    python bench/accuracy.py --data chats.jsonl --tokens 4096 --name accuracy_sql
    python bench/accuracy.py --outliers --recipes "int8 HALO-1" "int8 HALO-1, balanced" --name accuracy_outliers
"""

import argparse

import results
import torch
from common import fail, load_model, load_tokens, saved_for_backward
from outliers import inject_outliers
from tqdm import tqdm

from halo_tensor import Balanced, balance_, dequantize_, halo_config, hot_config, quantize_, recipe_config

#: Recipes without kernels: they run on a CPU, and a default run on a GPU leaves them out.
NO_KERNEL = ("mxfp8", "mxfp8_halo1", "nvfp4", "nvfp4_plain")
CONFIGS = {
    **{f"int8 HALO-{level}, tensor": halo_config(level, "int8", granularity="tensor") for level in (0, 1, 2)},
    **{f"int8 HALO-{level}": halo_config(level, "int8") for level in (0, 1, 2)},
    **{f"int8 HALO-{level}, balanced": Balanced(halo_config(level, "int8")) for level in (1, 2)},
    "int8 HALO-1, 8-bit activations": halo_config(1, "int8", activations="int8"),
    "int8 HALO-1, 6-bit activations": halo_config(1, "int8", activations="int6"),
    "fp8 HALO-0, tensor": halo_config(0, "fp8", granularity="tensor"),
    "fp8 HALO-0": halo_config(0, "fp8"),
    "fp8 HALO-1": halo_config(1, "fp8"),
    "fp6_e2m3 HALO-1": halo_config(1, "fp6_e2m3"),
    "fp6_e3m2 HALO-0": halo_config(0, "fp6_e3m2"),
    "switchback": recipe_config("switchback"),
    "jetfire": recipe_config("jetfire"),
    "hot": hot_config(),
    "hot, E per token": hot_config(grad_output_granularity="row"),
    "hot, whole rank, E per token": hot_config(None, grad_output_granularity="row"),
    "hot, int8": hot_config(grad_input_bits=8, grad_output_granularity="row", rounding="nearest"),
    "hot_llm": recipe_config("hot_llm"),
    **{name: recipe_config(name) for name in NO_KERNEL},
}


def gradient(model, rows: torch.Tensor, batch: int) -> tuple[float, torch.Tensor, int]:
    """Return the mean loss, the gradient of the converted weights, and the bytes saved for the backward of one batch.

    The gradient is one float64 vector. Only bytes that the converted layers save are counted.
    """
    total = 0.0
    model.zero_grad()
    for ids in rows.split(batch):
        with saved_for_backward(model) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        (loss * len(ids) / len(rows)).backward()
        total += loss.item() * len(ids) / len(rows)
    grads = [p.grad.flatten() for name, p in model.named_parameters() if "_proj" in name]
    return total, torch.cat(grads).double(), saved[0]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "accuracy")
    parser.add_argument("--model", help="path or hub name of a Llama-family model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", help=".txt or .jsonl (default: Python's documentation)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    able = [name for name in CONFIGS if name not in NO_KERNEL or not torch.cuda.is_available()]
    parser.add_argument("--recipes", nargs="+", default=able, choices=list(CONFIGS), metavar="RECIPE")
    parser.add_argument("--outliers", action="store_true", help="add outlier channels to the model, as bench/outliers.py does")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model, torch.float32, device)
    if args.outliers:
        inject_outliers(model)
    shares = 1 + any(isinstance(CONFIGS[name], Balanced) for name in args.recipes)
    tokens = load_tokens(tokenizer, args.data, shares * args.tokens)
    if len(tokens) < shares * args.tokens:
        fail(
            f"the data have {len(tokens)} tokens; {args.tokens} are to be measured, and as many others to balance on, if asked"
        )
    rows, *others = tokens.view(shares, -1, args.length).to(device)
    exact_loss, exact, exact_saved = gradient(model, rows, args.batch)
    table = []
    for name in tqdm(args.recipes):
        config = CONFIGS[name]
        if isinstance(config, Balanced):
            quantize_(model, config.config)
            balance_(model, *others)
        else:
            quantize_(model, config)
        loss, grads, saved = gradient(model, rows, args.batch)
        dequantize_(model)
        cosine = (grads @ exact / (grads.norm() * exact.norm())).item()
        table.append(
            {
                "recipe": name,
                "gradient cosine": f"{cosine:.4f}",
                "gradient error": f"{((grads - exact).norm() / exact.norm()).item():.3f}",
                "change of the loss": f"{loss - exact_loss:+.4f}",
                "saved for backward": f"{saved / exact_saved * 2:.3f}× bf16's",
            }
        )
    no_kernel = any(name in NO_KERNEL for name in args.recipes)
    results.write(
        args.name,
        f"Gradient fidelity on SmolLM2-135M-Instruct{' with outliers' if args.outliers else ''}, {args.tokens} tokens",
        table,
        f"High precision is float32, with a loss of {exact_loss:.4f}. Scales are per row (folded) unless 'tensor' is said. "
        "Balanced: on as many other tokens. "
        "What the converted layers save is counted with hooks, each storage once, parameters left out; bf16's is half of "
        "what float32 saves."
        + (" MXFP8 and NVFP4 have no kernel: the reference saves a byte for a code, and float32 scales." if no_kernel else ""),
        args.folder,
    )


if __name__ == "__main__":
    main()
