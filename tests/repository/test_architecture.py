"""The floors of the package: imports run downwards."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "halo_tensor"
#: From the top. A module imports from its own floor and from those below it.
FLOORS = [
    "__main__",
    "__init__",
    "fsdp",
    "tensor_parallel",
    "axolotl",
    "lightning",
    "torchtitan",
    "transformers",
    "switch",
    "diagnostics",
    "calibration",
    "convert",
    "analysis",
    "trainers",
    "config",
    "layers",
    "weight",
    "products",
    "operand",
    "checkpointing",
    "compiler",
    "activations",
    "ops",
    "kernels",
    "reference",
    "recipe",
    "fences",
    "version",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Of a module, without the package's: "weight.tensor"; of the package itself "__init__"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path) for path in MODULES}


def imported(path: Path) -> set[str]:
    """The modules of the package that a module imports, wherever the statement stands, and those that it names in strings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "halo_tensor":
            base = node.module.removeprefix("halo_tensor").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in NAMES else base or "__init__")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("halo_tensor."):
            inner = node.value.removeprefix("halo_tensor.")
            found |= {inner} & NAMES
    return found


def floor(name: str) -> int:
    return FLOORS.index(name.partition(".")[0])


def test_every_module_has_a_floor():
    assert {name.partition(".")[0] for name in NAMES} == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downwards(path):
    own = name_of(path)
    upwards = {name for name in imported(path) if floor(name) < floor(own)}
    assert not upwards


def test_no_circle():
    """Not inside of a floor either."""
    graph = {name_of(path): imported(path) - {name_of(path)} for path in MODULES}
    while leaves := [name for name, below in graph.items() if not below & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"modules that import each other: {sorted(graph)}"
