"""README, CONTRIBUTING and docs/: their links and paths lead somewhere, and what they say of the code is what the code says."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

import halo_tensor
from halo_tensor.analysis import gpus
from halo_tensor.fences import fast_paths as fences

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


hook = module("mkdocs_hook")
#: public names that are not imported with the package
OF_HOSTS = [
    "export_compressed_tensors",
    "Exported",
    "HaloArguments",
    "HaloCallback",
    "HaloColwiseParallel",
    "HaloPrecision",
    "HaloPrepareInput",
    "HaloQuantConfig",
    "HaloRowwiseParallel",
    "Recoding",
    "fuse_head_",
    "halo_experts",
    "halo_linear",
    "precompute_scales",
    "unfuse_head_",
]


def record(name: str) -> dict:
    return json.loads((hook.RESULTS / f"{name}.json").read_text())


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_in_the_repository(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in headings(target), f"{page.name}: {link}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_paths_that_are_named_exist(page):
    found = re.findall(r"`((?:halo_tensor|tests|bench|examples|docs)/[\w/.-]*\w)[`/]", page.read_text())
    assert not [path for path in found if not (ROOT / path).exists()]


def test_the_table_of_hosts_names_tests_that_exist():
    table = re.search(r"^\| host \| converts .+?\n\n", (DOCS / "hosts.md").read_text(), re.M | re.S)[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 10 and not [name for name in named if f"def {name}(" not in sources]


def test_the_readme_is_one_screen_of_lines():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert any("make demo" in line for line in lines) and any("make test" in line for line in lines)


def test_the_tree_of_contributing_has_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = set(re.search(r"```(.+?)```", text, re.S)[1].split())
    package = ROOT / "halo_tensor"
    files = {path.relative_to(package) for path in package.rglob("*.py") if "diagnostics" not in path.parts}
    modules = {path.name for path in files if path.name != "__init__.py"}
    folders = {f"{path.parent.name}/" for path in files if path.name == "__init__.py" and path.parent.name}
    assert modules | folders <= tree


def test_headline_figures_are_those_of_the_records():
    text = (ROOT / "README.md").read_text()
    speed = {row["contender"]: row["× bf16"] for name in ("block_fp8", "block") for row in record(name)["rows"]}
    study = {(row["model"], row["contender"]): row["change"] for row in record("study")["rows"]}
    rows = {
        "HALO-1 int8 (the default)": ("halo1-int8", "halo1-int8"),
        "HALO-1 int8, balanced": ("halo1-int8-balanced", "halo1-int8-balanced"),
        "HALO-2 int8, balanced": ("halo2-int8-balanced", "halo2-int8-balanced"),
        "HALO-0 fp8": ("halo0-fp8", "halo0-fp8-drawn"),
        "torchao float8, tensorwise": ("torchao-tensorwise", "torchao-tensorwise-drawn"),
    }
    for title, (fast, trained) in rows.items():
        cells = re.search(rf"^\| {re.escape(title)} \| (.+) \|$", text, re.M)[1].replace("*", "").split(" | ")
        assert cells[0] == f"{speed[fast]}×"
        for cell, model in zip(cells[1:], ("as shipped", "with outliers"), strict=True):
            mean, error = (float(part.strip(" %+")) for part in study[model, trained].split("±"))
            shown = [float(part.strip(" %+")) for part in cell.split("±")]
            assert shown == pytest.approx([mean, error], abs=0.051), (title, model)


def test_versions_and_fast_paths_are_those_of_the_code():
    text = (DOCS / "limitations.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(fences.FAST_PATHS)
    for page in (text, (ROOT / "README.md").read_text()):
        for name, package in (("PyTorch", "torch"), ("Triton", "triton")):
            first, last = fences.TESTED[package]
            assert f"| {name} | {first} to {last} |" in page
    assert f"one of {len(gpus.GPUS)} GPUs" in (DOCS / "choosing-a-recipe.md").read_text()


def test_the_api_page_has_every_public_name():
    documented = re.findall(r"^::: (halo_tensor\.[\w.]+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(name.rpartition(".")[2] for name in documented) == sorted([*halo_tensor.__all__, *OF_HOSTS])


def test_every_page_is_in_the_navigation():
    """mkdocs says so too, where it is installed."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page for page in DOCS.rglob("*.md") if f"{page.relative_to(DOCS)}" not in navigation]


def test_links_as_the_site_has_them():
    page = "[a](../bench/results/block.md) [b](lora.md#speed) [c](../CONTRIBUTING.md#rules) [d](https://x.org/../bench/results/y.md)"
    assert hook.linked(page, "") == (
        "[a](results/block.md) [b](lora.md#speed) [c](contributing.md#rules) [d](https://x.org/../bench/results/y.md)"
    )
    assert hook.linked("[a](../../bench/results/block.md) ![b](../products.svg) [c](hot.md)", "notes") == (
        "[a](../results/block.md) ![b](../products.svg) [c](hot.md)"
    )
    readme = "[a](docs/notes/index.md) [b](bench/results/block.md) [c](CHANGELOG.md)"
    assert hook.linked(readme, "..") == "[a](notes/index.md) [b](results/block.md) [c](changelog.md)"


def test_tables_come_from_records_the_newest_first(tmp_path, monkeypatch):
    def row(contender, ms, shape, date):
        return {"shape": shape, "contender": contender, "ms": ms, "made": {"date": date}}

    old = [
        row("bf16", 2, "s", "2026-01-01"),
        row("ours", 1, "s", "2026-01-01"),
        row("bf16", 4, "t", "2025-01-01 to 2026-01-02"),
    ]
    for name, rows in (("old", old), ("new", [row("bf16", None, "s", "2026-02-01")])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"title": name.upper(), "environment": "a GPU", "rows": rows}))
    monkeypatch.setattr(hook, "RESULTS", tmp_path)
    assert hook.linked("<!-- records: old new; only: contender | ms -->", "notes") == (
        "**NEW.** a GPU. [Record, with commands and notes](../results/new.md)\n\n"
        "| contender | ms |\n| --- | --- |\n| bf16 | – |\n\n"
        "**OLD.** a GPU. [Record, with commands and notes](../results/old.md)\n\n"
        "| contender | ms |\n| --- | --- |\n| bf16 | 2 |\n| ours | 1 |\n| bf16 | 4 |\n"
    )
    assert hook.linked("<!-- records: old; pivot: shape | contender | ms -->", "").endswith(
        "| shape | bf16 | ours |\n| --- | --- | --- |\n| s | 2 | 1 |\n| t | 4 | – |\n"
    )
    assert "| shape | contender | ms |" in hook.linked("<!-- records: old -->", "")


def test_the_tables_of_performance_have_rows():
    shown = hook.linked((DOCS / "performance.md").read_text(), "")
    assert "<!-- records" not in shown and shown.count("| halo1-int8 |") > 5


def test_roles_become_code():
    pytest.importorskip("griffe")
    roles = module("rst_roles")
    assert roles.plain("see :func:`~halo_tensor.report` and :class:`LinearConfig`.") == "see `report` and `LinearConfig`."
    assert roles.example("Add.\n\nExample:\n    >>> 1") == "Add.\n\nExamples:\n    >>> 1"


def test_templates_ask_for_the_environment():
    folder = ROOT / ".github"
    for name in ("ISSUE_TEMPLATE/bug.yml", "ISSUE_TEMPLATE/speed.yml", "pull_request_template.md"):
        assert "Output of `python -m halo_tensor`" in (folder / name).read_text()
    disabled = re.search(r"HALO_DISABLE=([\w,]+)", (folder / "ISSUE_TEMPLATE/bug.yml").read_text())[1]
    assert set(disabled.split(",")) <= fences.FAST_PATHS.keys()


def test_no_file_that_an_editor_or_a_merge_left_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    run = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    assert not re.findall(r"^.*\.(?:bak|orig|rej)$", run.stdout, re.M)
    assert "halo_tensor/py.typed" in run.stdout.split() and "halo_tensor" in (ROOT / "pyproject.toml").read_text()
