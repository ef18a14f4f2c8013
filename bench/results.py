"""How every benchmark here reports: a Markdown table and the same as JSON. Every row says how it was made."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from halo_tensor import environment

sys.path.insert(1, str(Path(__file__).parent.parent / "examples"))  # of whose modules some benchmarks are made

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"
COMMIT = "HALO_TENSOR_COMMIT"  #: environment variable that names the commit of a copied tree
#: Fields of a row's "made". "recorded in" is of records older than "commit": the commit that added the row.
FIELDS = ("date", "device", "halo_tensor", "commit", "recorded in", "torch", "triton", "torchao")
NOT_ASKED = "not among the contenders of the command"
ENDED = "the run was ended before it"


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--name", default=name, help="of the result files")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the result files")


@cache
def commit() -> str | None:
    """The commit that the environment names, or that of this checkout, with "-dirty" after it if tracked files but results
    differ from it; None if unknown."""
    if named := os.environ.get(COMMIT):
        return named
    try:
        if Path(_git("rev-parse", "--show-toplevel")) != ROOT.resolve():
            raise OSError("another project's repository")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return _git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def made() -> dict:
    """How a row that is measured now is made: date, device, versions, commit and command."""
    return environment().facts() | {"commit": commit(), "command": command(sys.argv)}


def line(made: dict) -> str:
    """The same for a reader, without the command."""
    source = f"commit {made['commit']}" if made.get("commit") else "commit unknown"
    source = f"recorded in commit {made['recorded in']}" if "recorded in" in made else source
    versions = [f"halo_tensor {made['halo_tensor']} ({source})"]
    versions += [f"{package} {made[package]}" for package in ("torch", "triton", "torchao") if made.get(package)]
    return ", ".join([made["date"], made["device"], *versions])


#: What stands between several values of a field; a device's name may hold a comma.
_BETWEEN = {"date": " to ", "command": "\n", "device": " and "}


def together(many: Iterable[dict]) -> dict:
    """One "made" of rows that were not all made alike: every field lists its values, a date the first and the last."""
    values: dict[str, dict[str, None]] = {}
    for made in many:
        for field, value in made.items():
            if value is not None:
                values.setdefault(field, {}).update(dict.fromkeys(value.split(_BETWEEN.get(field, ", "))))
    if len(values["date"]) > 1:
        values["date"] = dict.fromkeys((min(values["date"]), max(values["date"])))
    return {field: _BETWEEN.get(field, ", ").join(found) for field, found in values.items()}


def comparable(one: dict, other: dict) -> bool:
    """Whether rows made so may stand in one table: on the same kind of device, with the same versions."""
    return all(one.get(field) == other.get(field) for field in ("device", "halo_tensor", "torch", "triton", "torchao"))


def earlier(name: str, folder: Path = FOLDER) -> list[dict]:
    """The rows that ``folder``/name.json holds, if they may stand in one table with those of this call; else none."""
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    record, now = json.loads(path.read_text()), made()
    if all(comparable(row["made"], now) for row in record["rows"]):
        return record["rows"]
    print(f"{path} is replaced: it comes from {record['environment']}")
    return []


def write(
    name: str,
    title: str,
    rows: list[dict],
    notes: str = "",
    folder: Path = FOLDER,
    quiet: bool = False,
    panels: Sequence[str] = (),
    expected: Iterable[str] = (),
    why_not: dict[tuple[str, ...], str] | None = None,
    **more,
) -> None:
    """Print a table unless ``quiet``, and write it to ``folder``/name.md and .json.

    Args:
        rows: each with the same keys, the table's columns. A row without "made" is given that of this call.
        panels: columns that rows have in common which are compared with each other.
        expected: contenders of which each panel should have a row, by default. A note names those that it lacks, and why.
        why_not: (value of each column of ``panels``, contender) -> why it has no row, if it has none: of what was asked for.
        more: goes into the .json.
    """
    for row in rows:
        row.setdefault("made", made())
    record = {
        "title": title,
        "command": together([*(row["made"] for row in rows), made()])["command"],
        "environment": line(together(row["made"] for row in rows)),
        "panels": list(panels),
        "rows": rows,
        "missing": missing(rows, panels, expected, why_not or {}),
        "notes": notes,
    }
    save(folder / name, record | more)
    if not quiet:
        print(markdown(record))


def missing(rows: list[dict], panels: Sequence[str], expected: Iterable[str], why_not: dict) -> dict[str, str]:
    """Which contender has no row, with the panels if it has one in others, and why."""
    have = {(*(row[column] for column in panels), row["contender"]) for row in rows if "contender" in row}
    groups = sorted({at[:-1] for at in have | set(why_not)})
    absent: dict[str, str] = {}
    for name in dict.fromkeys([*expected, *(at[-1] for at in why_not)]):
        lacking: dict[str, list[str]] = {}  # reason -> panels
        for group in groups:
            if (*group, name) not in have and (name in expected or (*group, name) in why_not):
                lacking.setdefault(why_not.get((*group, name), NOT_ASKED), []).append(", ".join(group))
        for reason, where in lacking.items():
            absent[name if len(where) == len(groups) else f"{name} [{' / '.join(where)}]"] = reason
    return absent


def save(path: Path, record: dict) -> None:
    """Write ``path``.md and ``path``.json, in the latter every row on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.md").write_text(markdown(record))
    path.with_name(f"{path.name}.json").write_text(dumps(record))


def dumps(record: dict) -> str:
    def value(field) -> str:
        if isinstance(field, list) and field and isinstance(field[0], dict):
            return "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in field) + "\n ]"
        return json.dumps(field, indent=1, ensure_ascii=False).replace("\n", "\n ")

    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {value(field)}" for key, field in record.items()) + "\n}\n"


def markdown(record: dict) -> str:
    """Rows that were not all made alike say how each was, in columns of their own."""
    rows = record["rows"]
    differ = [field for field in FIELDS if _differs(field, rows)]
    columns = [column for column in rows[0] if column != "made"]
    commands = "  \n".join(f"`{command}`" for command in record["command"].splitlines())
    lines = [f"# {record['title']}", "", commands, "", record["environment"], ""]
    lines += ["| " + " | ".join([*columns, *differ]) + " |", "|" + "---|" * len(columns + differ)]
    for row in rows:
        cells = [row[column] for column in columns] + [row["made"].get(field) for field in differ]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += ["", record["notes"]] if record["notes"] else []
    reasons: dict[str, list[str]] = {}
    for name, reason in record.get("missing", {}).items():
        reasons.setdefault(reason, []).append(name)
    if reasons:
        absent = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        lines += ["", f"Without a row: {absent}."]
    return "\n".join(lines) + "\n"


def _differs(field: str, rows: list[dict]) -> bool:
    values = {row["made"].get(field) for row in rows}
    known = values - {None}
    return len(known) > 1 or (field in ("commit", "recorded in") and 0 < len(known) < len(values))


def command(argv: list[str]) -> str:
    """As it is to be typed, apart from --folder: where results went is nobody's business."""
    script, options = Path(argv[0]).resolve(), [option for option in argv[1:] if not option.startswith("--folder=")]
    if "--folder" in options:
        del options[(at := options.index("--folder")) : at + 2]
    run = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run = ["torchrun", "--standalone", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*run, f"{script.parent.name}/{script.name}", *options])


def speedup(reference: float | None, ms: float | None) -> str | None:
    """How many times as fast as ``reference`` a contender is that takes ``ms``; more is faster."""
    return f"{reference / ms:.2f}" if reference and ms else None


def reason(error: Exception) -> str:
    """Why a contender has no row."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:200]


def _cell(value) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
