"""A report as a picture, drawn with matplotlib."""

import textwrap
from pathlib import Path
from typing import Any

from halo_tensor.diagnostics.reports.data import LayerReport, ReportData
from halo_tensor.diagnostics.reports.text import kind_of, sentence

OURS, OTHER, LINE, PALE = "#0b7285", "#868e96", "#343a40", "#ced4da"


def draw(report: ReportData, path: str | Path) -> None:
    """Draw the candidates, each layer's worst SQNR under each of them, and kurtosis before and after rotation.

    Layers are sorted by kind.

    Args:
        report: what to draw.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("to_png draws with matplotlib: pip install matplotlib, or use to_html") from error

    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        kinds.setdefault(kind_of(layer.name), []).append(layer)
    figure = Figure(figsize=(12, 2.6 + 0.42 * len(report.candidates) + 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 6, height_ratios=(0.9 + 0.42 * len(report.candidates), 3.2))
    first: Any = figure.add_subplot(grid[0, :2])
    _candidates(first, report)
    _layers(figure, figure.add_subplot(grid[0, 2:], sharey=first), report, kinds)
    first = None
    for i, (operand, along) in enumerate((("X", "in_features"), ("W", "in_features"), ("E", "tokens"))):
        first = axes = figure.add_subplot(grid[1, 2 * i : 2 * i + 2], sharey=first)
        _kurtosis(axes, operand, along, kinds)
    figure.suptitle("\n".join(textwrap.wrap(f"{report.model}. {sentence(report.verdict)}", 125)), fontsize=11, color=LINE)
    caption = (
        f"{len(report.layers)} linear layers, {report.tokens} tokens; products from {report.sampled} of them. Speed is a "
        f"model of {report.ceilings.a_name} at {report.step_tokens} tokens a step, not a measurement; these layers only."
    )
    figure.supxlabel(caption, fontsize=8, color=LINE)
    figure.savefig(path, dpi=130)


def _candidates(axes: Any, report: ReportData) -> None:
    smallest = 1e-7
    errors = [max(1 - c.cosine, smallest) for c in report.candidates]
    for y, (c, x) in enumerate(zip(report.candidates, errors, strict=True)):
        colour = OURS if c.name == report.recommended else OTHER
        axes.scatter(x, y, s=60, color=colour, zorder=3)
        text = f"cosine {c.cosine:.4f}, {c.speed:.2f}×"
        axes.annotate(
            text, (x, y), xytext=(0, -14), textcoords="offset points", fontsize=8, color=colour, ha="center",
            bbox={"color": "white", "pad": 0.5},
        )  # fmt: skip
    axes.set_yticks(range(len(errors)), [c.name for c in report.candidates], fontsize=9)
    faithful = max(1 - report.min_cosine, smallest)
    axes.axvline(faithful, color=LINE, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_xlim(max([*errors, faithful]) * 4, min([*errors, faithful]) / 4)
    axes.set_xlabel(f"1 − cosine of the gradient (dashed: {report.min_cosine:g} wanted; right is better)", fontsize=9)
    axes.set_title("Whole gradient, and modelled speed × bf16", fontsize=10, color=LINE)
    _plain(axes)


def _layers(figure: Any, axes: Any, report: ReportData, kinds: dict[str, list[LayerReport]]) -> None:
    layers = [layer for group in kinds.values() for layer in group]
    names = [c.name for c in report.candidates]
    worst = [[layer.worst(name)[0] if name in layer.fidelity else float("nan") for layer in layers] for name in names]
    image = axes.imshow(worst, aspect="auto", cmap="RdYlGn", vmin=10, vmax=45, interpolation="nearest")
    axes.tick_params(labelleft=False)
    axes.set_title("Worst product of each layer", fontsize=10, color=LINE)
    bar = figure.colorbar(image, ax=axes, pad=0.01, extend="both")
    bar.set_label("SQNR, dB", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _separate(axes, kinds, "white", rotation=0 if len(kinds) < 10 else 90)
    _plain(axes)


def _kurtosis(axes: Any, operand: str, along: str, kinds: dict[str, list[LayerReport]]) -> None:
    layers = enumerate(layer for group in kinds.values() for layer in group)
    pairs = [(i, layer.outliers[operand]) for i, layer in layers if operand in layer.outliers]
    for when, label, colour in ((0, "as it is", OTHER), (1, f"rotated along {along}", OURS)):
        x, y = [i for i, _ in pairs], [pair[when].kurtosis for _, pair in pairs]
        axes.plot(x, y, ".", markersize=4, color=colour, label=label)
    axes.axhline(3, color=LINE, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.set_title(f"Kurtosis of {operand} (dashed: a Gaussian's)", fontsize=10, color=LINE)
    axes.legend(fontsize=8, edgecolor="none", markerscale=2, loc="upper left")
    _separate(axes, kinds, PALE, rotation=45 if len(kinds) < 10 else 90)
    _plain(axes)


def _separate(axes: Any, kinds: dict[str, list[LayerReport]], colour: str, rotation: int) -> None:
    """Name the kinds on the x axis and draw lines between them."""
    end, centres = 0, []
    for group in kinds.values():
        centres.append(end + (len(group) - 1) / 2)
        end += len(group)
        if len(centres) < len(kinds):
            axes.axvline(end - 0.5, color=colour, linewidth=1)
    axes.set_xticks(centres, [kind.rpartition(".")[2] for kind in kinds], rotation=rotation)


def _plain(axes: Any) -> None:
    axes.tick_params(which="both", length=0, labelsize=8, colors=LINE)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
