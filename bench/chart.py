"""Draw the table of a benchmark: "× bf16" of every contender, one panel per shape.

python bench/chart.py linear block      # bench/results/linear.json -> linear.png, and so on
"""

import argparse
import json
from pathlib import Path

import results

OURS, PEER, LINE = "#0b7285", "#b4b9bf", "#343a40"
PER_ROW = 4  # panels side by side


def draw(name: str, folder: Path = results.FOLDER) -> None:
    """Draw ``folder``/name.json as name.png. The values of the columns in "panels" distinguish the panels."""
    try:
        import matplotlib
    except ImportError:
        print(f"{name}.png is not drawn: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = json.loads((folder / f"{name}.json").read_text())
    rows = [row for row in record["rows"] if row.get("× bf16")]
    if not rows:
        print(f'{name}.png is not drawn: the table has no "× bf16"')
        return
    group = record["panels"]
    panels = list(dict.fromkeys(_panel(row, group) for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    position = {contender: i for i, contender in enumerate(contenders)}
    widest = max(float(row["× bf16"]) for row in rows)

    across = min(len(panels), PER_ROW)
    down = -(-len(panels) // across)
    size = (max(1.6 + 2.4 * across, 6.4), 1.2 + down * (0.5 + 0.27 * len(contenders)))
    figure, grid = plt.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for row in (row for row in rows if _panel(row, group) == panel):
            y, value = position[row["contender"]], float(row["× bf16"])
            ours = row["contender"].startswith("halo")
            axes.barh(y, value, height=0.72, color=OURS if ours else PEER)
            axes.text(0.03 * widest, y, f"{value:.2f}", va="center", fontsize=8, color="white" if ours else LINE)
        axes.axvline(1.0, color=LINE, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_title(panel if len(panels) > 1 else "", fontsize=10, color=LINE)
        axes.set_yticks(range(len(contenders)), contenders, fontsize=9)
        axes.tick_params(length=0, labelsize=9, colors=LINE)
        axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    grid[0, 0].set_xlim(0, widest * 1.03)
    grid[0, 0].invert_yaxis()
    figure.suptitle(record["title"], fontsize=12, color=LINE)
    caption = f"speed, × bf16 (the dashed line); this library in colour\n{record['environment']}"
    figure.supxlabel(caption, fontsize=8, color=LINE)
    figure.savefig(folder / f"{name}.png", dpi=160)
    plt.close(figure)
    print(f"{folder / f'{name}.png'} drawn")


def _panel(row: dict, columns: list[str]) -> str:
    return ", ".join(row[column] for column in columns)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["linear", "block"], metavar="NAME", help="names of the result files")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="folder of the result files")
    args = parser.parse_args(argv)
    for name in args.names:
        if not (args.folder / f"{name}.json").is_file():
            parser.error(f"there is no {args.folder / name}.json")
    return args


def main() -> None:
    args = parse_args()
    for name in args.names:
        draw(name, args.folder)


if __name__ == "__main__":
    main()
