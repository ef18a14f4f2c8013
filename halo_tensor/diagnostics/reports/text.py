"""A report as text and Markdown tables."""

from collections.abc import Callable
from statistics import median

from halo_tensor.config import LinearConfig
from halo_tensor.convert import LEAST_SHARE, kind_of, percent, together
from halo_tensor.diagnostics.reports.data import LayerReport, ReportData
from halo_tensor.recipe import PRODUCTS

OPERANDS = ("X", "W", "E")
Table = tuple[list[str], list[list[str]]]  # header, rows


def _change(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:+.4f}"


def shown_candidate(report: ReportData) -> str:
    """Return the candidate whose layers are shown: the recommended one, or the one with the highest cosine."""
    return report.recommended or max(report.candidates, key=lambda c: c.cosine).name


def summary(report: ReportData) -> str:
    """Return the recommendation, the candidates, and the layers by kind, as Markdown."""
    shown = shown_candidate(report)
    parts = [headline(report), *left_alone(report), f"**{sentence(report.verdict)}**", *_exceptions(report)]
    parts += [f"`{call}`" for call in calls(report)] + [_table(*candidate_rows(report))]
    parts += [f"Layers by kind: the median, and in brackets the worst, under {shown}.", _table(*kind_rows(report, shown))]
    return "\n\n".join([*parts, notes(report)])


def markdown(report: ReportData) -> str:
    """Return the summary and a table of all layers."""
    return "\n\n".join([f"# {report.model}", summary(report), "## Every layer", _table(*layer_rows(report))])


def headline(report: ReportData) -> str:
    """Return a line that says what was measured."""
    mixtures = sum(layer.experts > 0 for layer in report.layers)
    measured = f"{len(report.layers) - mixtures} linear layers" + (f" and the experts of {mixtures}" if mixtures else "")
    return (
        f"{report.model}: {measured} with {percent(report.share)} of the linear layers' "
        f"parameters, {report.tokens} tokens, loss {report.loss:.4f}; measured in {report.seconds:.0f} s"
    )


def left_alone(report: ReportData) -> list[str]:
    """Return a paragraph that names the layers that no candidate converts, if they are most of the model; else nothing."""
    if report.share >= LEAST_SHARE:
        return []
    lines = [line.strip().removeprefix("left alone: ") for line in report.left_alone.splitlines()]
    intro = "Most of the linear layers' parameters stay in high precision, and gain nothing:"
    return [intro + "\n\n" + "\n".join(f"- {line}" for line in lines)]


def notes(report: ReportData) -> str:
    """Explain how the numbers were obtained."""
    return (
        f"Gradient cosine: of {report.gradient_of}, with all layers converted, against the model as it is. SQNR: of each "
        f"product of a layer alone, from {report.sampled} of its tokens, in dB (20 dB: an error of 10 %). Kurtosis: 3 for a "
        "Gaussian; rotated: X and W along in_features, E along tokens. Speed is a model, not a measurement: these layers "
        f"only, {report.step_tokens} tokens a step, launches free, at the rates of {report.ceilings.a_name} "
        f"({report.ceilings.source})." + "".join(f" {note}" for note in report.ceilings.notes)
    )


def candidate_rows(report: ReportData) -> Table:
    """Return a table with a row for each candidate, and one for the recommended mixture."""
    header = ["recipe", "gradient cosine", "change of the loss", "worst product", f"layers < {report.min_sqnr:g} dB", "speed"]
    rows = []
    for c in report.candidates:
        layers = [layer for layer in report.layers if c.name in layer.fidelity]
        below = sum(layer.worst(c.name)[0] < report.min_sqnr for layer in layers)
        mark = "**" if c.name == report.recommended else ""
        worst = "–"
        if layers:
            (sqnr, product), name = min((layer.worst(c.name), layer.name) for layer in layers)
            worst = f"{sqnr:.1f} dB, {product} of {name or 'the model'}"
        cosine = f"{mark}{c.cosine:.4f}{mark}"
        speed = f"{c.speed:.2f}×" if c.has_kernels else "no kernel"
        rows.append([f"{mark}{c.name}{mark}", cosine, _change(c.loss_change), worst, str(below), speed])
    if report.result is not None and report.exceptions:
        c = report.result
        rows.append([c.name, f"{c.cosine:.4f}", _change(c.loss_change), "", "0", f"{c.speed:.2f}×"])
    return header, rows


def kind_rows(report: ReportData, candidate: str) -> Table:
    """Return a table with a row for each kind of layer: the median, and the worst in brackets, under a candidate."""
    header = [
        "layers",
        "in→out",
        *(f"kurtosis of {o}: as is → rotated" for o in OPERANDS),
        *(f"{p}, dB" for p in PRODUCTS),
        "speed",
    ]
    kinds: dict[tuple, list[LayerReport]] = {}
    for layer in report.layers:
        kinds.setdefault((kind_of(layer.name), layer.sides), []).append(layer)
    rows = []
    for (kind, sides), layers in kinds.items():
        row = [f"{kind} ({len(layers)})", sides]
        for operand in OPERANDS:
            pairs = [layer.outliers[operand] for layer in layers if operand in layer.outliers]
            row.append(" → ".join(_spread([pair[i].kurtosis for pair in pairs], max) for i in (0, 1)) if pairs else "–")
        for product in PRODUCTS:
            found = [
                layer.fidelity[candidate][product].sqnr for layer in layers if product in layer.fidelity.get(candidate, {})
            ]
            row.append(_spread(found, min) if found else "–")
        speeds = [layer.speed(candidate) for layer in layers]
        rows.append([*row, f"{median(speeds):.2f}×"])
    return header, rows


def layer_rows(report: ReportData) -> Table:
    """Return a table with a row for each layer."""
    names = [c.name for c in report.candidates]
    header = [
        "layer",
        "in→out",
        *(f"{o}: kurtosis, max/rms" for o in OPERANDS),
        *(f"{n}: Y / E_X / G, dB" for n in names),
        "recommended",
    ]
    rows = []
    for layer in report.layers:
        row = [layer.name or "the model", layer.sides]
        row += [_before_after(layer, operand) for operand in OPERANDS]
        for name in names:
            found = layer.fidelity.get(name, {})
            row.append(" / ".join(f"{found[p].sqnr:.1f}" if p in found else "–" for p in PRODUCTS))
        rows.append([*row, layer.recommended])
    return header, rows


def _before_after(layer: LayerReport, operand: str) -> str:
    if operand not in layer.outliers:
        return "–"
    return " → ".join(f"{o.kurtosis:.3g}, {o.peak:.3g}" for o in layer.outliers[operand])


def _spread(values: list[float], worst: Callable[[list[float]], float]) -> str:
    return f"{median(values):.3g} ({worst(values):.3g})"


def sentence(verdict: str) -> str:
    """Return the verdict as a sentence."""
    return f"Recommended: {verdict}." if not verdict.startswith("none") else f"{verdict[0].upper()}{verdict[1:]}."


def calls(report: ReportData) -> list[str]:
    """Return the calls that follow the recommendation, if there is one."""
    if report.config is None:
        return []
    if isinstance(report.config, LinearConfig):
        lines = [f"quantize_(model, {report.config!r})"]
    else:
        lines = [f"quantize_(model, report.config)  # {len(report.config.fqn_to_config)} layers by name"]
    return lines + ["balance_(model, **batch)  # some thousand tokens; before FSDP"] * report.balanced


def _exceptions(report: ReportData) -> list[str]:
    if not report.exceptions:
        return []
    alike: dict[tuple[str, str], list[str]] = {}
    for layer in report.exceptions:
        alike.setdefault((layer.recommended, reason(layer, report)), []).append(layer.name)
    lines = [f"- {together(names)}: {recommended} ({why})" for (recommended, why), names in alike.items()]
    return ["Except:\n\n" + "\n".join(lines)]


def reason(layer: LayerReport, report: ReportData) -> str:
    """Say why a layer does not follow the recommended candidate."""
    assert report.recommended is not None
    sqnr, product = layer.worst(report.recommended)
    if product and sqnr >= report.min_sqnr:
        return f"{report.recommended} is modelled at {layer.speed(report.recommended):.2f}× bf16's speed there"
    return f"{product} has {sqnr:.1f} dB under {report.recommended}" if product else f"{report.recommended} leaves it alone"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
