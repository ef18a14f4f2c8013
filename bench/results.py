"""How every benchmark here reports: a Markdown table and the same as JSON, with date, device and versions."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from common import environment

FOLDER = Path(__file__).parent / "results"


def write(
    name: str, title: str, rows: list[dict], notes: str = "", folder: Path = FOLDER, quiet: bool = False, **more
) -> None:
    """Print ``rows`` (each with the same keys) as a table unless ``quiet``, and write it to ``folder``/name.md and .json;
    ``more`` goes into the latter."""
    command = "python " + " ".join([Path(sys.argv[0]).parent.name + "/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    columns = list(rows[0])
    lines = [f"# {title}", "", f"`{command}`", "", environment(), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    text = "\n".join(lines + (["", notes] if notes else [])) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    record = {"title": title, "command": command, "environment": environment(), "rows": rows, "notes": notes} | more
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if not quiet:
        print(text)


def _cell(value) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
