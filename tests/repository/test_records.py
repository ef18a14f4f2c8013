"""bench/results: what the records say, that their commands can be typed as printed, and the code that writes them."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT / "examples"), str(ROOT / "bench")]
import chart  # noqa: E402
import results  # noqa: E402
import steps  # noqa: E402

import halo_tensor  # noqa: E402

RECORDS = sorted(path.stem for path in results.FOLDER.glob("*.json"))
MADE = {"date": "2026-01-02", "device": "a GPU", "halo_tensor": "0.1.0", "commit": "abc", "torch": "2", "torchao": "1"}


def script(path: str):
    """The module of bench/NAME.py or examples/NAME.py, of which some have the same name."""
    name = path.removesuffix(".py").replace("/", "_script_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


class Parsed(Exception):
    """The arguments were understood."""


def parse(line: str, monkeypatch) -> None:
    """Let the script of a printed command parse its arguments; SystemExit if it does not understand them."""
    words = shlex.split(line, comments=True)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    launcher = words[:at]
    monkeypatch.setattr(results, "commit", lambda: "a commit")
    assert launcher == ["python"] or (launcher[0] == "torchrun" and launcher[-2] == "--nproc-per-node"), line
    module, arguments = script(words[at]), words[at + 1 :]
    if hasattr(module, "parse_args") and module.parse_args.__code__.co_argcount:
        module.parse_args(arguments)
        return
    understand = results.argparse.ArgumentParser.parse_args

    def stop(parser, *args):
        understand(parser, *args)
        raise Parsed

    monkeypatch.setattr(results.argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [words[at], *arguments])
    with pytest.raises(Parsed):
        module.main()
    monkeypatch.undo()


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_says_how_it_was_made(name, monkeypatch):
    text = (results.FOLDER / f"{name}.json").read_text()
    record = json.loads(text)
    assert results.dumps(record) == text and results.markdown(record) == (results.FOLDER / f"{name}.md").read_text()
    for row in record["rows"] + record.get("runs", []):
        made = row["made"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d( to \d{4}-\d\d-\d\d)?", made["date"])
        assert made["device"] and made["torch"] and made["torchao"] and re.fullmatch(r"\d+\.\d+\.\d+", made["halo_tensor"])
        assert made["halo_tensor"] != "0.0.0" and (made.get("commit") or made["recorded in"])
        assert set(made.get("command", "").splitlines()) <= set(record["command"].splitlines())
    for line in record["command"].splitlines():
        parse(line, monkeypatch)


def test_every_table_is_a_record():
    assert sorted(path.stem for path in results.FOLDER.glob("*.md")) == RECORDS and len(RECORDS) > 20


def expected_of(line: str) -> list[str]:
    """The contenders that the script of a command has by default."""
    path = next(word for word in shlex.split(line) if word.endswith(".py"))
    module = script(path)
    if path == "bench/block.py":
        return module.PEERS + module.OURS
    if path == "bench/study.py":
        return [*module.MAIN, *module.OTHERS]
    return list(getattr(module, "DEFAULT", getattr(module, "CONTENDERS", [])))


@pytest.mark.parametrize("name", RECORDS)
def test_a_contender_has_a_row_or_a_note(name):
    record = json.loads((results.FOLDER / f"{name}.json").read_text())
    rows, table = record["rows"], (results.FOLDER / f"{name}.md").read_text()
    groups = {tuple(row[column] for column in record["panels"]) for row in rows}
    noted = table.rpartition("Without a row: ")[2] if record["missing"] else ""
    for contender in expected_of(record["command"].splitlines()[0]):
        with_row = {tuple(row[c] for c in record["panels"]) for row in rows if row["contender"] == contender}
        for group in groups - with_row:
            notes = [key for key in record["missing"] if key == contender or key.startswith(f"{contender} [")]
            assert any(note == contender or ", ".join(group) in note for note in notes), (contender, group)
            assert all(note in noted for note in notes)


def document_commands() -> list[str]:
    """Those of README, CONTRIBUTING and docs/, in backticks and as lines of their own."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    text = "".join(page.read_text() for page in sorted(pages))
    found = re.findall(r"(?:`|^)((?:python|torchrun)[^`\n]* (?:bench|examples)/\w+\.py[^`\n]*)(?:`|$)", text, re.M)
    return [line for line in dict.fromkeys(found) if "…" not in line]


@pytest.mark.parametrize("line", document_commands())
def test_commands_of_the_documents_parse(line, monkeypatch):
    parse(line, monkeypatch)


def docstring_commands() -> list[str]:
    found = []
    for path in sorted((ROOT / "bench").glob("*.py")):
        lines = re.findall(r"^ *((?:python|torchrun) .*bench/.*?)(?:  +#.*)?$", path.read_text().split('"""')[1], re.M)
        found += [line.strip() for line in lines]
    return found


@pytest.mark.parametrize("line", docstring_commands())
def test_commands_of_docstrings_parse(line, monkeypatch):
    parse(line, monkeypatch)


def row(contender: str, **columns) -> dict:
    return {"contender": contender, **columns}


def test_rows_that_were_not_made_alike_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench/train.py"), "--contenders", "a b", "--folder", "/elsewhere"])
    monkeypatch.setattr(results, "commit", lambda: "123")
    old = row("bf16", ms=2.0) | {"made": MADE | {"command": "python bench/train.py"}}
    new = row("halo", ms=1.0)
    results.write("t", "T", [old, new], "N.", tmp_path, quiet=True)
    assert new["made"]["commit"] == "123" and new["made"]["command"] == "python bench/train.py --contenders 'a b'"
    record, table = json.loads((tmp_path / "t.json").read_text()), (tmp_path / "t.md").read_text()
    assert record["rows"] == [old, new] and record["command"] == f"{old['made']['command']}\n{new['made']['command']}"
    assert "| contender | ms | date | device | commit | torch | torchao |" in table
    assert "| bf16 | 2 | 2026-01-02 | a GPU | abc | 2 | 1 |" in table
    assert f"`python bench/train.py`  \n`{new['made']['command']}`" in table
    assert f"halo_tensor {halo_tensor.__version__} (commit abc, 123)" in record["environment"]

    same = row("halo", ms=1.0) | {"made": old["made"]}
    results.write("t", "T", [old, same], "N.", tmp_path, quiet=True)
    table = (tmp_path / "t.md").read_text()
    assert "| contender | ms |\n" in table and "2026-01-02, a GPU, halo_tensor 0.1.0 (commit abc), torch 2, torchao 1" in table


def test_several_dates_are_a_span():
    days = [MADE | {"date": day, "recorded in": "x, y"} for day in ("2026-11-29", "2026-11-22 to 2026-11-28", "2026-11-25")]
    both = results.together([*days, days[0] | {"recorded in": "y, z", "commit": None}])
    assert both["date"] == "2026-11-22 to 2026-11-29" and both["recorded in"] == "x, y, z" and both["commit"] == "abc"
    assert "recorded in commit x, y, z" in results.line(both) and "commit unknown" in results.line(MADE | {"commit": None})


@pytest.mark.parametrize("other", ["device", "halo_tensor", "torch", "triton", "torchao"])
def test_rows_of_another_device_or_version_are_not_continued(tmp_path, monkeypatch, capsys, other):
    now = MADE | {"triton": "3", "command": "c"}
    monkeypatch.setattr(results, "made", lambda: now)
    rows = [row("bf16", ms=1.0) | {"made": now | {"date": "2026-01-01", "commit": "older"}}]
    results.write("t", "T", deepcopy(rows), folder=tmp_path, quiet=True)
    assert results.earlier("t", tmp_path) == rows and results.earlier("u", tmp_path) == []
    rows[0]["made"][other] = "other"
    results.write("t", "T", rows, folder=tmp_path, quiet=True)
    assert results.earlier("t", tmp_path) == [] and "t.json is replaced: it comes from" in capsys.readouterr().out


def test_what_has_no_row_is_noted_with_the_reason():
    rows = [row("bf16", shape="s"), row("a", shape="s"), row("bf16", shape="t")]
    why_not = {("s", "a"): "", ("t", "a"): "Error: x", ("t", "b"): results.ENDED, ("s", "b"): results.ENDED}
    found = results.missing(rows, ["shape"], ["bf16", "a", "c"], why_not)
    assert found == {"a [t]": "Error: x", "c": results.NOT_ASKED, "b": results.ENDED}
    record = {"title": "T", "command": "c", "environment": "e", "notes": "", "missing": found}
    table = results.markdown(record | {"rows": [r | {"made": MADE} for r in rows]})
    assert f"Without a row: a [t] (Error: x); c ({results.NOT_ASKED}); b ({results.ENDED})." in table
    assert results.missing(rows, [], ["bf16", "a"], {("a",): ""}) == {}


def test_the_commit_of_a_source_tree(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True)

    results.commit.cache_clear()
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.delenv(results.COMMIT, raising=False)
    find = results.commit.__wrapped__
    assert find() is None
    monkeypatch.setenv(results.COMMIT, "told")
    assert find() == "told", "a copy, whose .git may be of another commit"
    monkeypatch.delenv(results.COMMIT)
    git("init", "-q")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "code").write_text("a")
    (tmp_path / "bench" / "results" / "t.md").write_text("a")
    git("add", "-A")
    git("commit", "-qm", "c")
    head = find()
    assert re.fullmatch(r"[0-9a-f]{10}", head)
    (tmp_path / "bench" / "results" / "t.md").write_text("b")
    assert find() == head, "results that have just been written are no change of the code"
    (tmp_path / "code").write_text("b")
    assert find() == f"{head}-dirty"
    (tmp_path / "below").mkdir()
    monkeypatch.setattr(results, "ROOT", tmp_path / "below")  # a copy in another project's repository
    assert find() is None


def test_a_command_is_printed_as_it_is_typed(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    argv = ["train.py", "--recipes", "int8 HALO-1, balanced", "hot", "--folder", "x", "--folder=y", "--reps", "3"]
    monkeypatch.chdir(ROOT / "bench")
    printed = results.command(argv)
    assert printed == "python bench/train.py --recipes 'int8 HALO-1, balanced' hot --reps 3"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert results.command(["fsdp.py"]) == "torchrun --standalone --nproc-per-node 4 bench/fsdp.py"


def test_the_version_is_that_of_the_source_tree():
    assert re.fullmatch(r"\d+\.\d+\.\d+", halo_tensor.__version__) and halo_tensor.__version__ != "0.0.0"
    assert results.made()["halo_tensor"] == halo_tensor.__version__


def test_help_of_every_script(monkeypatch, capsys):
    for path in sorted((ROOT / "bench").glob("*.py")):
        module = script(f"bench/{path.name}")
        if hasattr(module, "parse_args"):
            with pytest.raises(SystemExit) as end:
                module.parse_args(["--help"])
            assert end.value.code == 0 and "--folder" in capsys.readouterr().out, path.name
    with pytest.raises(SystemExit):
        chart.parse_args(["no_such_record"])
    assert "no_such_record.json" in capsys.readouterr().err


def test_more_is_faster_everywhere():
    """Half of bf16's time is twice its speed, in every table that has speeds."""
    assert results.speedup(3.0, 1.5) == "2.00" and results.speedup(None, 1.0) is results.speedup(1.0, None) is None
    bf16, ours = steps.Measured(4.0, 2.0, 2.0, 3.0, 1.0), steps.Measured(2.0, 0.5, 1.0, 2.0, 1.0)
    columns = ours.columns(bf16, 10)
    assert (columns["× bf16"], columns["× bf16 (graph)"], columns["tokens/s"]) == ("2.00", "4.00", 5000)
    assert ours.columns(None, 10)["× bf16"] is None
    train, fsdp = script("bench/train.py"), script("bench/fsdp.py")
    panel = dict.fromkeys(train.PANEL, "p")
    rows = {(*panel.values(), n): train.row_of(panel, n, m, 10) for n, m in (("halo", ours), ("bf16", bf16))}
    rows |= {("q",) * 4 + ("bf16",): train.row_of(dict.fromkeys(train.PANEL, "q"), "bf16", ours, 10)}
    found = {(row["model"], row["contender"]): (row["× bf16"], row["tokens/s"]) for row in train.compared(rows)}
    assert found == {("p", "halo"): ("2.00", 5000), ("p", "bf16"): ("1.00", 2500), ("q", "bf16"): ("1.00", 5000)}
    first = fsdp.row_of("bf16", 4.0, 2.0, 1.0, 2.0, [], 10)
    second = fsdp.row_of("halo", 2.0, 2.0, 1.0, 1.0, [first], 10)
    assert (first["× bf16"], second["× bf16"], second["gathered, × bf16"]) == ("1.00", "2.00", "0.500")
    assert second["tokens/s"] == 5000 and fsdp.row_of("halo", 2.0, 2.0, None, 1.0, [], 10)["× bf16"] is None
