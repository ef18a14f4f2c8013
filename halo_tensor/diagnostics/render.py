"""A report as text: a summary, Markdown tables, a page of HTML."""

from __future__ import annotations

import re
from html import escape
from statistics import median
from typing import TYPE_CHECKING

from halo_tensor.config import LinearConfig
from halo_tensor.convert import LEAST_SHARE, percent
from halo_tensor.recipe import PRODUCTS

if TYPE_CHECKING:
    from halo_tensor.diagnostics.result import LayerReport, Report

OPERANDS = ("X", "W", "E")


def _change(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:+.4f}"


def summary(report: Report) -> str:
    """The recommendation, the candidates, and the layers by kind, as Markdown."""
    shown = report.recommended or max(report.candidates, key=lambda c: c.cosine).name
    parts = [headline(report), *_left_alone(report), f"**{sentence(report.verdict)}**", *_exceptions(report)]
    parts += [f"`{call}`" for call in _call(report)] + [_table(*candidate_rows(report))]
    parts += [f"Layers by kind: the median, and in brackets the worst, under {shown}.", _table(*kind_rows(report, shown))]
    return "\n\n".join([*parts, notes(report)])


def markdown(report: Report) -> str:
    """The summary, and a table of all layers."""
    return "\n\n".join([f"# {report.model}", summary(report), "## Every layer", _table(*layer_rows(report))])


def headline(report: Report) -> str:
    return (
        f"{report.model}: {len(report.layers)} linear layers with {percent(report.share)} of the linear layers' parameters, "
        f"{report.tokens} tokens, loss {report.loss:.4f}; measured in {report.seconds:.0f} s"
    )


def _left_alone(report: Report) -> list[str]:
    """A paragraph that names the layers which no candidate converts, if they are most of the model; else nothing."""
    if report.share >= LEAST_SHARE:
        return []
    lines = [line.strip().removeprefix("left alone: ") for line in report.left_alone.splitlines()]
    intro = "Most of the linear layers' parameters stay in high precision, and gain nothing:"
    return [intro + "\n\n" + "\n".join(f"- {line}" for line in lines)]


def notes(report: Report) -> str:
    """How the numbers came about."""
    return (
        f"Gradient cosine: of {report.gradient_of}, with all layers converted, against the model as it is. SQNR: of each "
        f"product of a layer alone, from {report.sampled} of its tokens, in dB (20 dB: an error of 10 %). Kurtosis: 3 for a "
        "Gaussian; rotated: X and W along in_features, E along tokens. Speed is a model, not a measurement: these layers "
        f"only, {report.step_tokens} tokens a step, launches free, at the rates of {report.ceilings.a_name} "
        f"({report.ceilings.source})." + "".join(f" {note}" for note in report.ceilings.notes)
    )


def candidate_rows(report: Report) -> tuple[list[str], list[list[str]]]:
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
        rows.append([f"{mark}{c.name}{mark}", cosine, _change(c.loss_change), worst, str(below), f"{c.speed:.2f}×"])
    if report.result is not None and report.exceptions:
        c = report.result
        rows.append([c.name, f"{c.cosine:.4f}", _change(c.loss_change), "", "0", f"{c.speed:.2f}×"])
    return header, rows


def kind_rows(report: Report, candidate: str) -> tuple[list[str], list[list[str]]]:
    header = [
        "layers",
        "in→out",
        *(f"kurtosis of {o}: as is → rotated" for o in OPERANDS),
        *(f"{p}, dB" for p in PRODUCTS),
        "speed",
    ]
    kinds: dict[tuple, list[LayerReport]] = {}
    for layer in report.layers:
        kinds.setdefault((kind_of(layer.name), layer.in_features, layer.out_features), []).append(layer)
    rows = []
    for (kind, n_in, n_out), layers in kinds.items():
        row = [f"{kind} ({len(layers)})", f"{n_in}→{n_out}"]
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


def kind_of(name: str) -> str:
    """A layer's name without its numbers: layers.3.mlp.up -> layers.*.mlp.up."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "the model"


def layer_rows(report: Report) -> tuple[list[str], list[list[str]]]:
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
        row = [layer.name or "the model", f"{layer.in_features}→{layer.out_features}"]
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


def _spread(values: list[float], worst) -> str:
    return f"{median(values):.3g} ({worst(values):.3g})"


def sentence(verdict: str) -> str:
    return f"Recommended: {verdict}." if not verdict.startswith("none") else f"{verdict[0].upper()}{verdict[1:]}."


def _call(report: Report) -> list[str]:
    """How to follow the recommendation, if there is one."""
    if report.config is None:
        return []
    if isinstance(report.config, LinearConfig):
        calls = [f"quantize_(model, {report.config!r})"]
    else:
        calls = [f"quantize_(model, report.config)  # {len(report.config.fqn_to_config)} layers by name"]
    return calls + ["balance_(model, **batch)  # some thousand tokens; before FSDP"] * report.balanced


def _exceptions(report: Report) -> list[str]:
    if not report.exceptions:
        return []
    lines = [f"- `{layer.name}`: {layer.recommended} ({reason(layer, report)})" for layer in report.exceptions]
    return ["Except:\n\n" + "\n".join(lines)]


def reason(layer: LayerReport, report: Report) -> str:
    assert report.recommended is not None
    sqnr, product = layer.worst(report.recommended)
    return f"{product} has {sqnr:.1f} dB under {report.recommended}" if product else f"{report.recommended} leaves it alone"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#212529;max-width:1440px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:0}h2{font-size:1.15em;margin-top:2em}p.verdict{font-size:1.1em;background:#e3f2f5;
border-left:4px solid #0b7285;padding:.7em 1em}p.none{background:#fff4e6;border-color:#e8590c}
.notes{color:#6c757d;font-size:.9em}
table{border-collapse:collapse;font-size:.87em;font-variant-numeric:tabular-nums}th{text-align:left;font-weight:600;
border-bottom:2px solid #adb5bd;position:sticky;top:0;background:#fff;vertical-align:bottom}td,th{padding:.25em .6em}
td{border-bottom:1px solid #e9ecef;white-space:nowrap}tr.chosen td{font-weight:600;color:#0b7285}td.n{text-align:right}
.scroll{overflow:auto;max-height:80vh;border:1px solid #dee2e6}pre{background:#f8f9fa;padding:.7em 1em;overflow:auto}
"""


def html(report: Report) -> str:
    """A self-contained page: the verdict, the candidates, kinds of layers, and every layer's SQNRs in colour."""
    shown = report.recommended or max(report.candidates, key=lambda c: c.cosine).name
    code = "".join(f"<pre>{escape(call)}</pre>" for call in _call(report))
    exceptions = "".join(
        f"<li><code>{escape(x.name)}</code>: {escape(x.recommended)} ({escape(reason(x, report))})</li>"
        for x in report.exceptions
    )
    left_alone = "".join(f"<pre>{escape(part)}</pre>" for part in _left_alone(report))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>halo_tensor report: {escape(report.model)}</title>
<style>{_STYLE}</style></head><body>
<h1>halo_tensor report</h1><p>{escape(headline(report))}</p>{left_alone}
<p class="verdict{"" if report.recommended else " none"}">{escape(sentence(report.verdict))}</p>
{f"<p>Except:</p><ul>{exceptions}</ul>" if exceptions else ""}{code}
<h2>Candidates</h2>{_html_table(*candidate_rows(report), chosen=report.recommended)}
<h2>Layers by kind: the median, and in brackets the worst, under {escape(shown)}</h2>{_html_table(*kind_rows(report, shown))}
<h2>Every layer: SQNR of its products in dB</h2><div class="scroll">{_heatmap(report)}</div>
<p class="notes">{escape(notes(report))}</p></body></html>"""


def _html_table(header: list[str], rows: list[list[str]], chosen: str | None = None) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell.replace('**', ''))}</td>" for cell in row)
        lines.append(f"<tr{' class=chosen' if chosen is not None and row[0].strip('*') == chosen else ''}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _heatmap(report: Report) -> str:
    names = [c.name for c in report.candidates]
    top = "".join(f"<th colspan=3>{escape(name)}</th>" for name in names)
    head = f"<tr><th rowspan=2>layer</th>{top}<th colspan=3>kurtosis, as is → rotated</th><th rowspan=2>recommended</th></tr>"
    head += f"<tr>{'<th>Y</th><th>E_X</th><th>G</th>' * len(names)}<th>X</th><th>W</th><th>E</th></tr>"
    lines = []
    for layer in report.layers:
        cells = []
        for name in names:
            for product in PRODUCTS:
                f = layer.fidelity.get(name, {}).get(product)
                cells.append(
                    "<td></td>" if f is None else f'<td class=n style="background:{_colour(f.sqnr)}">{f.sqnr:.1f}</td>'
                )
        for operand in OPERANDS:
            pair = layer.outliers.get(operand)
            cells.append("<td>–</td>" if pair is None else f"<td>{pair[0].kurtosis:.3g} → {pair[1].kurtosis:.3g}</td>")
        lines.append(f"<tr><td>{escape(layer.name)}</td>{''.join(cells)}<td>{escape(layer.recommended)}</td></tr>")
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def _colour(sqnr: float) -> str:
    """From red at 10 dB over yellow to green at 45."""
    return f"hsl({120 * min(max((sqnr - 10) / 35, 0), 1):.0f} 65% 78%)"
