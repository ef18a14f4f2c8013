"""``environment``: what a bug report should say about the machine. It has no paths, names of users or hosts, or secrets."""

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

from halo_tensor.fences.fast_paths import FAST_PATHS, INDUCTOR, JOINT_GRAPH, PRODUCERS
from halo_tensor.kernels.device import is_hopper, runs, runs_kernels
from halo_tensor.recipe import FORMATS
from halo_tensor.version import __version__

#: Packages whose versions are listed.
PACKAGES = ("torch", "torchao", "triton", "transformers", "peft", "accelerate")


class Environment(dict):
    """The result of :func:`environment`: a dictionary that JSON can hold. ``str`` lists it, one line for each entry."""

    def facts(self) -> dict[str, str]:
        """Return what is recorded beside a benchmark figure: date, device and versions."""
        cpu, *gpus = self["devices"]
        device = gpus[0]["name"] if gpus else f"CPU ({platform.machine()}, {cpu['threads']} threads)"
        packages = ["halo_tensor", "torch", *(["triton"] if gpus else []), "torchao"]
        return {"date": str(date.today()), "device": device} | {name: self[name] for name in packages}

    def line(self) -> str:
        """Return the same in one line, for printing."""
        day, device, *versions = self.facts().items()
        return ", ".join([day[1], device[1], *(f"{name} {version}" for name, version in versions)])

    def __str__(self) -> str:
        lines = [f"{key}: {value}" for key, value in self.items() if key not in ("devices", "fast paths")]
        lines += [f"fast path {name}: {state}" for name, state in self["fast paths"].items()]
        for device in self["devices"]:
            lines += _device_lines(device)
        return "\n".join(lines)


def _device_lines(device: dict[str, Any]) -> list[str]:
    nested = ("device", "formats", "cannot run", "product backends")
    details = "; ".join(f"{key} {value}" for key, value in device.items() if key not in nested)
    lines = [f"{device['device']}: {details}", f"  formats: {', '.join(device['formats']) or 'none'}"]
    if device["cannot run"]:
        lines.append(f"  cannot run: {', '.join(device['cannot run'])}")
    return lines + [f"  product backend {name}: {state}" for name, state in device["product backends"].items()]


def environment() -> Environment:
    """Describe the machine for a bug report.

    Returns:
        a dictionary with versions; "fast paths", each with "on" or the reason why it is off (see
        :mod:`halo_tensor.fences.fast_paths`); and "devices", each with the formats that it can run and what computes its
        products. ``str()`` of it is text, and ``json.dumps`` accepts it.

    Example:
        >>> from halo_tensor import environment
        >>> found = environment()
        >>> found["devices"][0]["device"]
        'cpu'
    """
    found = Environment({"halo_tensor": __version__, "python": platform.python_version()})
    found["platform"] = f"{platform.system()} {platform.machine()}"
    for name in PACKAGES:
        found[name] = _version(name)
    found["torch"] = str(torch.__version__)  # the package metadata may not name the CUDA version
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.version.hip is not None:
        found["ROCm of torch"] = torch.version.hip
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    found["fast paths"] = _fast_paths(devices)
    found["devices"] = [_device(device, _backends(device)) for device in devices]
    return found


def _fast_paths(devices: list[torch.device]) -> dict[str, str]:
    """Return the state of each fast path: "on", or "off: " and the reason."""
    reasons: dict[str, str] = {}
    if not any(device.type == "cuda" for device in devices):
        reasons |= dict.fromkeys(("precompiled", "launcher"), "no CUDA device")
    if not any(map(is_hopper, devices)):
        reasons |= dict.fromkeys(("gluon", "cublas"), "no GPU of compute capability 9.0")
    if not any(map(runs_kernels, devices)):
        reasons |= dict.fromkeys(("inductor", "producers", "tma", "sm80"), "no device that runs kernels")
    for path in (INDUCTOR, PRODUCERS, JOINT_GRAPH):
        if path.name not in reasons:
            path.load(f"halo_tensor.compiler.{path.name}")  # its state then says whether it can be imported
    states = {name: path.state() for name, path in FAST_PATHS.items()}
    return {name: f"off: {reasons[name]}" if name in reasons and state == "on" else state for name, state in states.items()}


def _backends(device: torch.device) -> dict[str, str | None]:
    """Return what each product backend answers on a device, if kernels run there."""
    if not runs_kernels(device) or _version("triton") == "not installed":
        return {}
    from halo_tensor.kernels.matmul.backends import answers

    return answers(device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device(device: torch.device, backends: Mapping[str, str | None]) -> dict[str, Any]:
    """Describe a device. ``backends``: product backend -> why it cannot serve the device, or None if it can."""
    able = [name for name, format in FORMATS.items() if runs((format,), device)]
    described = {"device": str(device), **(_gpu(device) if device.type == "cuda" else _cpu())}
    described |= {"formats": able, "cannot run": [name for name in FORMATS if name not in able]}
    return described | {
        "product backends": {name: "on" if reason is None else f"off: {reason}" for name, reason in backends.items()}
    }


def _cpu() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "products by": "the reference in plain PyTorch (accuracy, not speed)",
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    triton = _version("triton")
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "products by": "Triton kernels" if triton != "not installed" else "nothing: triton is not installed",
    }


def source_commit() -> str | None:
    """Return the commit that this package was installed from, or that its checkout is at; None if neither is known."""
    try:
        origin = json.loads(distribution("halo_tensor").read_text("direct_url.json") or "{}")
        if commit := origin.get("vcs_info", {}).get("commit_id"):
            return commit[:10]
    except PackageNotFoundError:
        pass
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
