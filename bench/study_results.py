"""The results of bench/study.py: the table, the drawing, and merging the records of several processes."""

import json
import math
import re
import statistics
from pathlib import Path

import results
from common import fail
from contenders import BALANCED, DRAWN

from halo_tensor import environment

MODELS = ("as shipped", "with outliers")
EAGER = "bf16-eager"
MAIN = (
    "bf16",
    EAGER,
    "halo1-int8",
    "halo1-int8" + BALANCED,
    "halo2-int8",
    "halo2-int8" + BALANCED,
    "halo0-fp8",
    "halo0-fp8" + DRAWN,
    "halo0-fp8" + BALANCED,
)
OTHERS = (
    "torchao-tensorwise",
    "torchao-rowwise",
    "torchao-tensorwise" + DRAWN,
    "halo0-int8",
    "halo1-fp8",
    "halo2-fp8",
    "halo0-fp6",
    "halo1-fp6",
    "halo2-fp6",
    "halo1-int8" + BALANCED + "-head",
    "halo1-int8-8-bit-activations" + BALANCED,
)
RECIPES = ("untrained", *MAIN, *OTHERS)
NOTES = (
    "{steps} steps of {batch}×{length} packed tokens ({examples} conversations; answers only are learnt), AdamW, learning "
    "rate {lr:g} with warm-up and linear decay; weights and activations in {dtype}, with float32 copies of the weights in "
    "the optimiser, for every recipe. A seed is an order of the data, and of HALO-1 and -2 also a draw of the rotation's "
    "signs; ± is the standard deviation over seeds, but of change the standard error of the mean. Gradient cosine: of all "
    "linears but lm_head, before training, with the gradient in float32; the mean over seeds. Validation loss and exact "
    "match (greedy answers to {evaluated}, as normalised strings): of the trained weights, exported and run "
    "in {dtype}; change: against bf16 with the same seed. " + EAGER + " is bf16 with its blocks not compiled, that is with "
    "other roundings: its change shows what this study can resolve. balanced: by balance_, on one batch of "
    "training data, before training. drawn: with other roundings for every seed, by random powers of two that X and W share. "
    "head: the head and its loss by linear_cross_entropy, int8 forward and fp8 backward. 8-bit-activations: "
    "activations='int8'. "
    "By recipe: the loss of the same weights run by the recipe. tokens/s: of the median "
    "step, optimiser included{compiled}, over runs that had the device to themselves; a model this small is bound by "
    "launching, so this is no measure of speed. A command with --part 0/N stands for those of all N parts."
)


def key(run: dict) -> tuple[str, str, int]:
    return run["model"], run["recipe"], run["seed"]


def load(path: Path, settings: dict) -> dict:
    """Return the record in ``path``. It must have been made with the same settings."""
    record = json.loads(path.read_text())
    if record["settings"] != settings:
        fail(f"{path} has other settings, {record['settings']}, than {settings}: remove it, or pass another --name")
    return record


def spread(values: list[float], format: str, of_mean: bool = False) -> str:
    """Return the mean ± the standard deviation, or ± the standard error of the mean if ``of_mean``."""
    mean = format.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    deviation = statistics.stdev(values) / (math.sqrt(len(values)) if of_mean else 1)
    return f"{mean} ± {format.format(deviation).lstrip('+')}"


def table(runs: list[dict]) -> list[dict]:
    rows = []
    reference = {(run["model"], run["seed"]): run for run in runs if run["recipe"] == "bf16"}
    for which in MODELS:
        for recipe in RECIPES:
            group = [run for run in runs if (run["model"], run["recipe"]) == (which, recipe)]
            if not group:
                continue
            pairs = [(run, reference[which, run["seed"]]) for run in group if (which, run["seed"]) in reference]
            trained = recipe != "untrained"
            changes = [run["validation"] / other["validation"] - 1 for run, other in pairs]
            tokens = [run["tokens/s"] for run in group if run.get("tokens/s")]
            speeds = [a["tokens/s"] / b["tokens/s"] for a, b in pairs if a.get("tokens/s") and b["tokens/s"]]
            rows.append(
                {
                    "made": results.together(run["made"] for run in group),
                    "model": which,
                    "contender": recipe,
                    "seeds": len(group),
                    "gradient cosine": f"{statistics.mean(run['cosine'] for run in group):.4f}" if trained else None,
                    "validation loss": spread([run["validation"] for run in group], "{:.4f}"),
                    "change": spread(changes, "{:+.2%}", of_mean=True) if changes and trained and recipe != "bf16" else None,
                    "by recipe": spread([run["by recipe"] for run in group], "{:.4f}") if trained else None,
                    "exact match": spread([run["exact"] for run in group], "{:.1%}"),
                    "tokens/s": round(statistics.median(tokens)) if tokens else None,
                    "× bf16": f"{statistics.median(speeds):.2f}" if speeds else None,
                }
            )
    return rows


def write(name: str, title: str, runs: list[dict], notes: str, folder: Path, **about) -> None:
    """Write the table. ``about`` has the "settings", and the "parts" of the data."""
    options = {"panels": ["model"], "expected": [*MAIN, *OTHERS], **about, "runs": runs}
    results.write(name, title, table(runs), notes, folder, quiet=True, **options)


def draw(name: str, runs: list[dict], folder: Path) -> None:
    """Draw one row of panels for each model. A dot is a seed, a line is the mean, and the dashed line is the mean of bf16."""
    try:
        import matplotlib
    except ImportError:
        print(f"{name}.png is not drawn: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    recipes = [recipe for recipe in (*MAIN, *OTHERS) if any(run["recipe"] == recipe for run in runs)]
    panels = {
        "cosine": "1 − cosine of the gradient with the exact one",
        "validation": "validation loss",
        "exact": "exact match",
    }
    figure, grid = plt.subplots(
        2, 3, figsize=(13, 2.4 + 0.45 * len(recipes)), sharey=True, squeeze=False, layout="constrained"
    )
    for line, which in zip(grid, MODELS, strict=True):
        for axes, (key, label) in zip(line, panels.items(), strict=True):
            for y, recipe in enumerate(recipes):
                values = [run[key] for run in runs if (run["model"], run["recipe"]) == (which, recipe)]
                values = [max(1 - value, 1e-6) for value in values] if key == "cosine" else values
                if not values:
                    continue
                color = "#0b7285" if recipe.startswith("halo") else "#868e96"
                mean = statistics.mean(values)
                axes.plot(values, [y] * len(values), "o", color=color, alpha=0.55, markersize=6)
                axes.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2)
                if recipe == "bf16":
                    axes.axvline(mean, color="#343a40", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            if key == "cosine":
                axes.set_xscale("log")
            axes.set_yticks(range(len(recipes)), recipes, fontsize=9)
            axes.set_title(f"{which}: {label}", fontsize=10)
            axes.grid(axis="x", alpha=0.25)
            axes.spines[["top", "right", "left"]].set_visible(False)
    grid[0, 0].invert_yaxis()
    figure.supxlabel(f"a dot is a seed, the dashed line bf16\n{environment().line()}", fontsize=8)
    figure.savefig(folder / f"{name}.png", dpi=150)
    plt.close(figure)


def join(name: str, folder: Path) -> None:
    """Merge the files that processes with --part wrote into the record, the table and the drawing, and delete them."""
    parts = sorted(path for path in folder.glob(f"{name}_part*.json") if re.fullmatch(r"\d+", path.stem[len(name) + 5 :]))
    if not parts:
        fail(f"there is no {folder / name}_part*.json to join: run with --part first")
    paths = [path for path in (folder / f"{name}.json", *parts) if path.exists()]
    settings = json.loads(paths[0].read_text())["settings"]
    records = [load(path, settings) for path in paths]
    last = records[-1]
    merged = {key(run): run for record in records for run in record["runs"]}
    order = [(which, recipe) for recipe in RECIPES for which in MODELS]
    runs = sorted(merged.values(), key=lambda run: (order.index(key(run)[:2]), run["seed"]))
    about = {field: last[field] for field in ("settings", "parts") if field in last}
    write(name, last["title"], runs, last["notes"], folder, **about)
    draw(name, runs, folder)
    for path in parts:
        path.unlink()
    print((folder / f"{name}.md").read_text())
