"""Tests lie where the module lies that they test, and import no other test."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

import halo_tensor

ROOT = Path(__file__).parents[2]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
#: Folders of tests that belong to no single module.
THEMES = ["integration", "repository"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_a_test_has_the_path_of_its_module(path):
    folder = path.parent.relative_to(ROOT / "tests")
    if folder.parts and folder.parts[0] in THEMES:
        return
    module = ROOT / "halo_tensor" / folder / path.stem.removeprefix("test_")
    assert module.is_dir() or module.with_suffix(".py").exists(), (
        f"tests/{folder} has tests of modules of halo_tensor/{folder}; other tests go to {' or '.join(THEMES)}"
    )


@pytest.mark.parametrize("path", [*TESTS, *(ROOT / "tests/helpers").glob("*.py"), *(ROOT / "bench").glob("*.py")], ids=name)
def test_no_test_is_imported(path):
    """What several tests need is in tests/helpers."""
    found = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in found if re.search(r"(^|\.)test_", module)]
    assert not [module for module in found if module.startswith("tests") and not module.startswith("tests.helpers")]


def test_docstrings_of_the_public_api_are_checked():
    """The list of files in pyproject.toml is that of the modules where public names are defined."""
    values = [getattr(halo_tensor, public) for public in halo_tensor.__all__]
    of_transformers = importlib.import_module("halo_tensor.transformers")
    values += [of_transformers.HaloQuantConfig, of_transformers.HaloCallback, of_transformers.HaloArguments]
    values += [of_transformers.fuse_head_, of_transformers.export_compressed_tensors, of_transformers.Recoding]
    values.append(importlib.import_module("halo_tensor.fsdp").precompute_scales)
    modules = {"halo_tensor"} | {value.__module__ for value in values if value.__module__.startswith("halo_tensor")}
    files = {importlib.import_module(module).__file__ for module in modules}
    of_hosts = ["axolotl", "lightning", "torchtitan"]  # importing them needs the host
    expected = sorted([*of_hosts, *(str(Path(file).relative_to(ROOT / "halo_tensor").with_suffix("")) for file in files)])
    ignored = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["per-file-ignores"]
    assert ignored.get("!halo_tensor/{" + ",".join(expected) + "}.py") == ["D"], f"the list is {','.join(expected)}"
