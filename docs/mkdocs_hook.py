"""What mkdocs does besides the pages of docs/: records as pages and as tables, and links that work in the repository as well.

A page says ``<!-- records: block fsdp -->`` where the tables of bench/results/block.json and fsdp.json belong, the newest run
first. ``<!-- records: block; only: contender | ms -->`` chooses columns. ``<!-- records: linear; pivot: in×out | contender |
ms -->`` makes a row for each value of the first column (or of several, joined by +), and a column for each contender.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
RECORDS = re.compile(r"<!-- records: ([\w ]+?)(?:; (only|pivot): (.+?))? -->")
#: pages from outside docs/: their address on the site
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(\]\()((?:\.\./)*)([^)#:]+)((?:#[^)]*)?\))")


def newest(record: dict[str, Any]) -> str:
    """The last day on which a row of a record was measured."""
    return max(row["made"]["date"].split()[-1] for row in record["rows"])


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """A Markdown table of some columns."""
    lines = [columns, ["---"] * len(columns)]
    lines += [["–" if row.get(c) is None else str(row[c]) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def pivot(rows: list[dict[str, Any]], index: str, across: str, value: str) -> str:
    """A Markdown table of the column ``value``: a row for each value of ``index``, a column for each of ``across``."""
    keys, found = index.split(" + "), {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row[across]] = row[value]
    columns = [*keys, *dict.fromkeys(row[across] for row in rows)]
    return table([dict(zip(keys, key, strict=True)) | values for key, values in found.items()], columns)


def tables(names: list[str], how: str | None, choice: list[str], up: str = "") -> str:
    """A section for each record, the newest first: title, device and versions, table, and a link to the whole record.

    Args:
        names: of records. how, choice: None for all columns; "only" and their names; "pivot" and what :func:`pivot` takes.
        up: the way from the page to the root of the site.
    """
    records = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}
    sections = []
    for name in sorted(records, key=lambda name: newest(records[name]), reverse=True):
        record = records[name]
        rows = record["rows"]
        if how == "pivot":
            body = pivot(rows, *choice)
        else:
            body = table(rows, [c for c in rows[0] if c != "made" and (how is None or c in choice)])
        whole = f"[Record, with commands and notes]({up}results/{name}.md)"
        sections.append(f"**{record['title']}.** {record['environment']}. {whole}\n\n{body}\n")
    return "\n".join(sections)


def linked(markdown: str, folder: str) -> str:
    """``markdown``, a page in a folder of docs/ ("" for docs/ itself, ".." for the root), with links as the site has them."""

    def moved(match: re.Match[str]) -> str:
        before, up, path, after = match.groups()
        if folder == "..":  # a page of the root, shown in docs/
            path = path.removeprefix("docs/")
        elif up.count("../") > folder.count("/") + bool(folder):
            up = up.removeprefix("../")
        path = OUTSIDE.get(path, path.removeprefix("bench/") if path.startswith("bench/results/") else path)
        return f"{before}{up}{path}{after}"

    up = "../" * (folder.count("/") + 1) if folder not in ("", "..") else ""
    markdown = _LINK.sub(moved, markdown)
    return RECORDS.sub(lambda m: tables(m[1].split(), m[2], m[3].split(" | ") if m[3] else [], up), markdown)


def on_files(files, config):
    """mkdocs asks for the pages: those of docs/, the records, and what lies in the root."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_text()))
    for name, address in OUTSIDE.items():
        files.append(File.generated(config, address, content=linked((ROOT / name).read_text(), "..")))
    return files


def on_page_markdown(markdown, page, **kwargs):
    """mkdocs is about to convert a page."""
    if page.file.generated_by:
        return markdown
    folder = page.file.src_uri.rpartition("/")[0]
    return linked(markdown, folder)
