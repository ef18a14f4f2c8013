"""Convert small random models of transformers' architectures, train them for three steps, and export them.

The models and what is expected of them are in ``tests/helpers/architectures.py``. Nothing is downloaded, and it takes a minute
on a CPU.
"""

import argparse
import sys
import warnings
from pathlib import Path

import results

sys.path.insert(2, str(Path(__file__).parent.parent))

import torch
import transformers

from tests.helpers.architectures import CASES
from tests.helpers.zoo import CONFIG, STEPS, Case, Outcome, examine

NOTES = (
    "Random weights, 64 wide, 2 layers where the architecture allows; {config}. share converted: of the parameters that "
    "multiply activations, embeddings and heads aside, how many run in int8; widths this small make convolutions and "
    "routers weigh more than they do in real models. A conversion below half is a warning that says what is printed here, "
    "and one of nothing an error. loss: the largest difference from the high-precision twin in {steps} steps of AdamW, "
    "relative to the first loss. gradient cosine: of all parameters, in the first step. Layers that stay in high "
    "precision by choice (output embeddings, tied weights) are not listed. held: each converted layer multiplied in int8 "
    "whenever it was called, in forward and backward, and a plain model with the state dict gives the dequantised model's "
    "numbers, bit for bit. xLSTM is left out: its plain PyTorch kernel cannot be trained."
)


def row(case: Case, found: Outcome) -> dict:
    report, outcome = found.report, "held" if found.held else "does not hold"
    if report is not None and found.warned:
        outcome += ", with a warning"
    return {
        "architecture": case.model,
        "kind": case.kind,
        "outcome": "refused" if report is None else outcome,
        "share converted": "0.0 %" if report is None else f"{100 * report.share:.1f} %",
        "left alone": left_alone(found),
        "loss": None if report is None else f"{found.difference:.1e}",
        "gradient cosine": None if report is None else f"{found.cosine:.5f}",
    }


def left_alone(found: Outcome) -> str | None:
    """Return which layers stay in high precision, and why; or what the error says."""
    if found.report is None:
        lines = [line.strip() for line in found.refused.splitlines() if "left alone:" in line]
        return "; ".join(line.removeprefix("left alone: ") for line in lines)
    counts: dict[str, int] = {}
    for name, reason in found.report.skipped.items():
        if name in found.report.sizes:
            counts[reason] = counts.get(reason, 0) + 1
    return "; ".join(f"{n}× {reason}" for reason, n in counts.items()) or None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "zoo")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="classes of transformers, such as LlamaForCausalLM")
    args = parser.parse_args(argv)
    if unknown := set(args.only or ()) - {case.model for case in CASES}:
        parser.error(f"not in the zoo: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # with layers this small two threads are slower than one
    rows = [row(case, examine(case)) for case in CASES if not args.only or case.model in args.only]
    held, refused = sum("held" in r["outcome"] for r in rows), sum(r["outcome"] == "refused" for r in rows)
    title = f"{len(rows)} architectures of transformers {transformers.__version__}: {held} held, {refused} refused"
    results.write(args.name, title, rows, NOTES.format(config=CONFIG, steps=STEPS), folder=args.folder)


if __name__ == "__main__":
    main()
