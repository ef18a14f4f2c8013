"""``environment``: what a bug report says about the machine."""

import io
import json
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch

import halo_tensor
from halo_tensor.diagnostics import machine

try:
    import triton
except ImportError:
    triton = None


def test_environment():
    found = halo_tensor.environment()
    assert found["torch"] == torch.__version__ and found["halo_tensor"] == halo_tensor.__version__
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu" and "int8" in cpu["formats"] and "reference" in cpu["products by"]
    text = json.dumps(found) + str(found)
    assert "/" not in text and "\\" not in text.replace("\\n", "")
    assert all(key in str(found) for key in ("torchao", "transformers", "peft", "triton", "python"))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "threads)"
    triton = f"triton {found['triton']}, " if torch.cuda.is_available() else ""
    assert f"{where}, halo_tensor {found['halo_tensor']}, torch {torch.__version__}, {triton}torchao " in found.line()


def test_product_backends_are_listed_with_their_reasons(monkeypatch):
    described = machine._device(torch.device("cpu"), {"sm80": None, "tma": "no GPU of compute capability 9.0"})
    assert described["product backends"] == {"sm80": "on", "tma": "off: no GPU of compute capability 9.0"}
    found = halo_tensor.environment()
    found["devices"] = [described]
    lines = str(found).splitlines()
    assert lines[-2:] == ["  product backend sm80: on", "  product backend tma: off: no GPU of compute capability 9.0"]


def test_environment_names_what_a_gpu_cannot_run(monkeypatch):
    properties = SimpleNamespace(name="Old GPU", major=8, minor=0, total_memory=40 * 2**30, multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    gpu = halo_tensor.environment()["devices"][1]
    assert gpu["formats"] == ["int8", "int4"] and "fp8_e4m3" in gpu["cannot run"]
    assert (gpu["compute capability"], gpu["memory"]) == ("8.0", "40 GiB")
    if triton is not None:
        backends = gpu["product backends"]
        assert backends["int8 by sm80"] == "on" and backends["int8 by tma"].startswith("off: ")
        assert not any(name.startswith("fp8") for name in backends), "an A100 does not multiply fp8"
    assert "cannot run: fp8_e4m3" in str(halo_tensor.environment())
    assert f", {gpu['name']}, halo_tensor " in halo_tensor.environment().line()


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_python_m_halo_tensor(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["halo_tensor", *arguments])
    out = io.StringIO()
    with redirect_stdout(out):
        runpy.run_module("halo_tensor", run_name="__main__")
    if arguments:
        assert json.loads(out.getvalue()) == halo_tensor.environment()
    else:
        assert out.getvalue() == f"{halo_tensor.environment()}\n"


def test_the_commit_of_an_installation(monkeypatch):
    class Installed:
        def __init__(self, text):
            self.read_text = lambda name: text

    monkeypatch.setattr(machine, "distribution", lambda name: Installed('{"vcs_info": {"commit_id": "0123456789abcdef"}}'))
    assert machine.source_commit() == "0123456789"
    monkeypatch.setattr(machine, "distribution", lambda name: Installed(None))
    run = ["git", "-C", machine.__file__.rsplit("/", 3)[0], "rev-parse", "HEAD"]
    head = subprocess.run(run, capture_output=True, text=True).stdout.strip()
    found = machine.source_commit()
    assert found is None if not head else head.startswith(found.removesuffix("-dirty"))
