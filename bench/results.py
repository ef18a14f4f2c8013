"""Write the results of benchmarks as a Markdown table and as JSON. Every row records how it was made."""

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

sys.path.insert(1, str(Path(__file__).parent.parent / "examples"))  # some benchmarks import from there

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"
COMMIT = "HALO_TENSOR_COMMIT"  #: environment variable that names the commit of a copied tree
#: Fields of a row's "made". Records older than the field "commit" have "recorded in": the commit that added the row.
FIELDS = ("date", "device", "halo_tensor", "commit", "recorded in", "torch", "triton", "torchao")
NOT_ASKED = "not among the contenders of the command"
ENDED = "the run was ended before it"


def parser_of(doc: str, name: str) -> argparse.ArgumentParser:
    """Return a parser for a script with this docstring, whose first line describes it, and with result files of this name."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add_arguments(parser, name)
    return parser


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--name", default=name, help="name of the result files")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the result files")


@cache
def commit() -> str | None:
    """Return the commit that the environment variable names, or that of this checkout; None if it is unknown.

    "-dirty" follows if tracked files other than results differ from the commit.
    """
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
    """Return how a row that is measured now is made: date, device, versions, commit and command."""
    return environment().facts() | {"commit": commit(), "command": command(sys.argv)}


def line(made: dict) -> str:
    """Return how a row was made in one line, without the command."""
    source = f"commit {made['commit']}" if made.get("commit") else "commit unknown"
    source = f"recorded in commit {made['recorded in']}" if "recorded in" in made else source
    versions = [f"halo_tensor {made['halo_tensor']} ({source})"]
    versions += [f"{package} {made[package]}" for package in ("torch", "triton", "torchao") if made.get(package)]
    return ", ".join([made["date"], made["device"], *versions])


#: The separator between several values of a field. The name of a device may contain a comma.
_BETWEEN = {"date": " to ", "command": "\n", "device": " and "}


def together(many: Iterable[dict]) -> dict:
    """Merge the "made" of several rows. Every field lists its values, and the date has the first and the last."""
    values: dict[str, dict[str, None]] = {}
    for made in many:
        for field, value in made.items():
            if value is not None:
                values.setdefault(field, {}).update(dict.fromkeys(value.split(_BETWEEN.get(field, ", "))))
    if len(values["date"]) > 1:
        values["date"] = dict.fromkeys((min(values["date"]), max(values["date"])))
    return {field: _BETWEEN.get(field, ", ").join(found) for field, found in values.items()}


def comparable(one: dict, other: dict) -> bool:
    """Whether two rows may be in one table: they come from the same kind of device and the same versions."""
    return all(one.get(field) == other.get(field) for field in ("device", "halo_tensor", "torch", "triton", "torchao"))


def earlier(name: str, folder: Path = FOLDER) -> list[dict]:
    """Return the rows of ``folder``/name.json if they may be in one table with the rows of this call, or else none."""
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
        name: of the files.
        title: of the table.
        rows: all have the same keys, which are the columns. A row without "made" gets that of this call.
        notes: text below the table.
        folder: of the files.
        quiet: print nothing.
        panels: columns whose values say which rows are compared with each other.
        expected: contenders of which each panel should have a row. A note names the missing ones, with reasons.
        why_not: (value of each column of ``panels``, contender) -> why this contender, which was asked for, has no row.
        **more: further entries of the JSON file.
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
    """Return contender -> why it has no row. If it has rows in some panels, the others are named after it."""
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
    """Write ``path``.md and ``path``.json. In the JSON file every row is on one line."""
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
    """Return the record as Markdown. If rows were made differently, extra columns say how each was made."""
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
    """Return the command as a user would type it, without --folder."""
    script, options = Path(argv[0]).resolve(), [option for option in argv[1:] if not option.startswith("--folder=")]
    if "--folder" in options:
        del options[(at := options.index("--folder")) : at + 2]
    run = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run = ["torchrun", "--standalone", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*run, f"{script.parent.name}/{script.name}", *options])


def speedup(reference: float | None, ms: float | None) -> str | None:
    """Return how many times faster than ``reference`` a contender is that takes ``ms``."""
    return f"{reference / ms:.2f}" if reference and ms else None


def reason(error: Exception) -> str:
    """Return a line that says why a contender has no row."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:200]


def _cell(value) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
