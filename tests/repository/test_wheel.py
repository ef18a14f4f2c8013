"""The wheel: what is in it, and that it works where nothing of the checkout can be imported."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from halo_tensor.version import __version__

pytest.importorskip("pip")
ROOT = Path(__file__).parents[2]
IMPORTS = """
import importlib.metadata, pathlib, sys
folder, dependencies = sys.argv[1:]
sys.path = [folder, *sys.path, dependencies]
import torch, halo_tensor
assert pathlib.Path(halo_tensor.__file__).is_relative_to(folder), halo_tensor.__file__
assert importlib.metadata.version("halo_tensor") == halo_tensor.__version__
model = torch.nn.Sequential(torch.nn.Linear(128, 128))
halo_tensor.quantize_(model, halo_tensor.halo_config())
model(torch.randn(4, 128)).sum().backward()
"""

#: Hides every installed package that neither torch nor torchao requires, then does the same. Triton is optional.
ALONE = """
import importlib.machinery, importlib.metadata, re, sys
sys.path.append(sys.argv[2])
def closure(name, found):
    try:
        required = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    if name in found:
        return
    found.add(name)
    for line in required:
        if "extra ==" not in line:
            closure(re.match(r"[\\w.-]+", line)[0].lower().replace("_", "-"), found)
allowed = set()
for name in ("torch", "torchao"):
    closure(name, allowed)
assert allowed >= {"torch", "torchao", "sympy"} and not allowed & {"transformers", "accelerate"}, allowed
modules = importlib.metadata.packages_distributions()
class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        owners = {owner.lower().replace("_", "-") for owner in modules.get(name, [])} - {"halo-tensor"}
        if name == "triton" or owners and not owners & allowed:
            return None
        return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Only
"""


def pip(*arguments: str | Path) -> None:
    """Without a network: what builds the wheel is installed."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools would write into the checkout, and take what an earlier build left there."""
    source, built = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("built")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site", "outputs", "results")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip("wheel", source, "--no-build-isolation", "--wheel-dir", built)
    (found,) = built.glob("*.whl")
    return found


def test_a_wheel_has_the_package_and_nothing_else(wheel):
    assert wheel.name == f"halo_tensor-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if ".dist-info/" not in name}
        metadata = file.read(f"halo_tensor-{__version__}.dist-info/METADATA").decode()
    package = ROOT / "halo_tensor"
    assert inside == {f"{path.relative_to(ROOT)}" for path in package.rglob("*") if path.suffix in (".py", ".typed")}
    assert "halo_tensor/py.typed" in inside and "halo_tensor/kernels/matmul/__init__.py" in inside
    assert "\nRequires-Dist: torch>=" in metadata and "\nLicense-File: LICENSE\n" in metadata


def test_an_installed_wheel_trains(wheel, tmp_path):
    """Isolated, and without .pth files, which bring the checkout where it is installed for development."""
    pip("install", wheel, "--target", tmp_path / "site")
    command = [sys.executable, "-I", "-S", "-c", IMPORTS, tmp_path / "site", sysconfig.get_path("purelib")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_needs_nothing_but_torch_and_torchao(wheel, tmp_path):
    """No host, no NumPy and no Triton: with those hidden, the package imports, trains and prints its environment."""
    pip("install", wheel, "--target", tmp_path / "site")
    more = "\nhalo_tensor.balance_(model, torch.randn(4, 128))\nprint(halo_tensor.environment())\n"
    script = ALONE + IMPORTS + more + "assert not {'transformers', 'numpy', 'triton'} & sys.modules.keys()\n"
    command = [sys.executable, "-I", "-S", "-c", script, tmp_path / "site", sysconfig.get_path("purelib")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
