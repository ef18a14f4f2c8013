"""A report as a page of HTML that needs no other file."""

from html import escape

from halo_tensor.diagnostics.reports import text
from halo_tensor.diagnostics.reports.data import ReportData
from halo_tensor.recipe import PRODUCTS

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


def page(report: ReportData) -> str:
    """Return a page with the verdict, the candidates, the kinds of layers, and the SQNRs of every layer in colour."""
    shown = text.shown_candidate(report)
    code = "".join(f"<pre>{escape(call)}</pre>" for call in text.calls(report))
    exceptions = "".join(
        f"<li><code>{escape(x.name)}</code>: {escape(x.recommended)} ({escape(text.reason(x, report))})</li>"
        for x in report.exceptions
    )
    kinds = _html_table(*text.kind_rows(report, shown))
    left_alone = "".join(f"<pre>{escape(part)}</pre>" for part in text.left_alone(report))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>halo_tensor report: {escape(report.model)}</title>
<style>{_STYLE}</style></head><body>
<h1>halo_tensor report</h1><p>{escape(text.headline(report))}</p>{left_alone}
<p class="verdict{"" if report.recommended else " none"}">{escape(text.sentence(report.verdict))}</p>
{f"<p>Except:</p><ul>{exceptions}</ul>" if exceptions else ""}{code}
<h2>Candidates</h2>{_html_table(*text.candidate_rows(report), chosen=report.recommended)}
<h2>Layers by kind: the median, and in brackets the worst, under {escape(shown)}</h2>{kinds}
<h2>Every layer: SQNR of its products in dB</h2><div class="scroll">{_heatmap(report)}</div>
<p class="notes">{escape(text.notes(report))}</p></body></html>"""


def _html_table(header: list[str], rows: list[list[str]], chosen: str | None = None) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell.replace('**', ''))}</td>" for cell in row)
        lines.append(f"<tr{' class=chosen' if chosen is not None and row[0].strip('*') == chosen else ''}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _heatmap(report: ReportData) -> str:
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
        for operand in text.OPERANDS:
            pair = layer.outliers.get(operand)
            cells.append("<td>–</td>" if pair is None else f"<td>{pair[0].kurtosis:.3g} → {pair[1].kurtosis:.3g}</td>")
        lines.append(f"<tr><td>{escape(layer.name)}</td>{''.join(cells)}<td>{escape(layer.recommended)}</td></tr>")
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def _colour(sqnr: float) -> str:
    """Return a colour that goes from red at 10 dB through yellow to green at 45 dB."""
    return f"hsl({120 * min(max((sqnr - 10) / 35, 0), 1):.0f} 65% 78%)"
