"""What becomes of small random models of transformers' architectures: converted, trained three steps, exported.

The models and what is expected of them are in ``tests/zoo.py``; no downloads, a minute on a CPU.
"""

import argparse
import sys
import warnings
from pathlib import Path

import results

sys.path.insert(2, str(Path(__file__).parent.parent))

import torch
import transformers

from tests.zoo import CASES, CONFIG, STEPS, Case, Outcome, examine

NOTES = (
    "Random weights, 64 wide, 2 layers where the architecture allows; {config}. share converted: of the parameters that "
    "multiply activations, embeddings and heads aside, how many run in int8; widths this small make convolutions and routers "
    "weigh more than they do in real models. A conversion below half is a warning that says what is printed here, and one of "
    "nothing an error. loss: the largest difference from the high-precision twin in {steps} steps of AdamW, relative to the "
    "first loss. gradient cosine: of all parameters, in the first step. Layers that stay in high precision by choice (output "
    "embeddings, tied weights) are not listed. Each converted layer was seen to multiply in int8, and each export to be equal "
    "to the dequantised model. xLSTM is left out: its plain PyTorch kernel cannot be trained."
)


def row(case: Case, found: Outcome) -> dict:
    report = found.report
    served = report is not None
    return {
        "architecture": case.model,
        "kind": case.kind,
        "outcome": "refused" if not served else "held, with a warning" if found.warned else "held",
        "share converted": f"{report.share:.1%}" if served else "0.0%",
        "left alone": left_alone(found),
        "loss": f"{found.difference:.1e}" if served else None,
        "gradient cosine": f"{found.cosine:.5f}" if served else None,
    }


def left_alone(found: Outcome) -> str | None:
    """What stays in high precision and why, of what counts; or what the error says."""
    if found.report is None:
        lines = [line.strip() for line in found.refused.splitlines() if "left alone:" in line]
        return "; ".join(line.removeprefix("left alone: ") for line in lines)
    counts: dict[str, int] = {}
    for name, reason in found.report.skipped.items():
        if name in found.report.sizes:
            counts[reason] = counts.get(reason, 0) + 1
    return "; ".join(f"{n}× {reason}" for reason, n in counts.items()) or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="classes of transformers, such as LlamaForCausalLM")
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    if unknown := set(args.only or ()) - {case.model for case in CASES}:
        parser.error(f"not in the zoo: {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # at these sizes two wait for each other
    warnings.simplefilter("ignore")
    rows = [row(case, examine(case)) for case in CASES if not args.only or case.model in args.only]
    held, refused = sum("held" in r["outcome"] for r in rows), sum(r["outcome"] == "refused" for r in rows)
    title = f"{len(rows)} architectures of transformers {transformers.__version__}: {held} held, {refused} refused"
    results.write("zoo", title, rows, NOTES.format(config=CONFIG, steps=STEPS), folder=args.folder)


if __name__ == "__main__":
    main()
