"""A report as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halo_tensor.diagnostics.result import Report

OURS, OTHER, LINE = "#0b7285", "#868e96", "#343a40"


def png(report: Report, path: str | Path) -> None:
    """Speed against fidelity of the candidates; each layer's worst SQNR under each; kurtosis before and after rotation.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("to_png draws with matplotlib: pip install matplotlib, or use to_html") from error

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 6, height_ratios=(1.15, 1))
    _candidates(figure.add_subplot(grid[0, :3]), report)
    _layers(figure, figure.add_subplot(grid[0, 3:]), report)
    first = None
    for i, (operand, along) in enumerate((("X", "in_features"), ("W", "in_features"), ("E", "tokens"))):
        first = axes = figure.add_subplot(grid[1, 2 * i : 2 * i + 2], sharey=first)
        _kurtosis(axes, report, operand, along)
    figure.suptitle(f"{report.model}: {_wrapped(report.verdict)}", fontsize=11, color=LINE)
    caption = (
        f"{len(report.layers)} linear layers, {report.tokens} tokens; products from {report.sampled} of them. Speed is a "
        f"model of an {report.ceilings.name} at {report.step_tokens} tokens a step, not a measurement; these layers only."
    )
    figure.supxlabel(caption, fontsize=8, color=LINE)
    figure.savefig(path, dpi=130)


def _candidates(axes, report: Report) -> None:
    floor = 1e-6
    for c in report.candidates:
        y, chosen = max(1 - c.cosine, floor), c.name == report.recommended
        axes.scatter(c.speed, y, s=70, color=OURS if chosen else OTHER, zorder=3)
        axes.annotate(
            c.name, (c.speed, y), xytext=(7, 5), textcoords="offset points", fontsize=9, color=OURS if chosen else LINE
        )
    axes.axhline(max(1 - report.min_cosine, floor), color=LINE, linewidth=1, linestyle=(0, (4, 3)))
    label = f"faithful: gradient cosine ≥ {report.min_cosine:g}"
    axes.annotate(
        label, (0.01, 1 - report.min_cosine), xycoords=("axes fraction", "data"),
        xytext=(0, -11), textcoords="offset points", fontsize=8, color=LINE,
    )  # fmt: skip
    axes.axvline(1.0, color=OTHER, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel("modelled speed, × bf16", fontsize=9)
    axes.set_ylabel("1 − cosine of the whole gradient", fontsize=9)
    axes.set_title("Candidates: up and to the right is better", fontsize=10, color=LINE)
    _plain(axes)


def _layers(figure, axes, report: Report) -> None:
    names = [c.name for c in report.candidates]
    worst = [[layer.worst(name)[0] if name in layer.fidelity else float("nan") for layer in report.layers] for name in names]
    image = axes.imshow(worst, aspect="auto", cmap="RdYlGn", vmin=10, vmax=45, interpolation="nearest")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_xlabel("layer, in the order of the model", fontsize=9)
    axes.set_title("Worst product of each layer", fontsize=10, color=LINE)
    figure.colorbar(image, ax=axes, pad=0.01, extend="both").set_label("SQNR, dB", fontsize=9)
    _plain(axes)


def _kurtosis(axes, report: Report, operand: str, along: str) -> None:
    pairs = [(i, layer.outliers[operand]) for i, layer in enumerate(report.layers) if operand in layer.outliers]
    for when, label, colour in ((0, "as it is", OTHER), (1, f"rotated along {along}", OURS)):
        axes.plot([i for i, _ in pairs], [p[when].kurtosis for _, p in pairs], ".", markersize=4, color=colour, label=label)
    axes.axhline(3, color=LINE, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.set_xlabel("layer", fontsize=9)
    axes.set_title(f"Kurtosis of {operand} (dashed: a Gaussian's)", fontsize=10, color=LINE)
    axes.legend(fontsize=8, frameon=False, markerscale=2)
    _plain(axes)


def _plain(axes) -> None:
    axes.tick_params(length=0, labelsize=8, colors=LINE)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)


def _wrapped(text: str, width: int = 120) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
