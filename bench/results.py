"""How every benchmark here reports: a Markdown table and the same as JSON, with date, device and versions."""

import json
import shlex
import sys
from pathlib import Path

from halo_tensor import environment

sys.path.insert(1, str(Path(__file__).parent.parent / "examples"))  # of whose modules some benchmarks are made

FOLDER = Path(__file__).parent / "results"


def earlier(name: str, folder: Path = FOLDER) -> dict:
    """The record that ``folder``/name.json holds, if it was made in the very same environment; else an empty one."""
    path = folder / f"{name}.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["environment"] == environment().line():
            return record
        print(f"{path} is replaced: it comes from {record['environment']}")
    return {"rows": [], "command": ""}


def write(
    name: str,
    title: str,
    rows: list[dict],
    notes: str = "",
    folder: Path = FOLDER,
    quiet: bool = False,
    after: str = "",
    **more,
) -> None:
    """Print ``rows`` (each with the same keys) as a table unless ``quiet``, and write it to ``folder``/name.md and .json;
    ``after``: the commands that made some of the rows before this one. ``more`` goes into the latter file."""
    this = command(sys.argv)
    commands = list(dict.fromkeys([*after.splitlines(), this]))
    columns, made_in = list(rows[0]), environment().line()
    lines = [f"# {title}", "", "  \n".join(f"`{command}`" for command in commands), "", made_in, ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    text = "\n".join(lines + (["", notes] if notes else [])) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    record = {"title": title, "command": "\n".join(commands), "environment": made_in, "rows": rows, "notes": notes}
    (folder / f"{name}.json").write_text(json.dumps(record | more, indent=1, ensure_ascii=False) + "\n")
    if not quiet:
        print(text)


def command(argv: list[str]) -> str:
    """Apart from --folder: where results went is nobody's business."""
    script, options = Path(argv[0]), [*argv[1:]]
    if "--folder" in options:
        del options[(at := options.index("--folder")) : at + 2]
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *options])


def _cell(value) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
