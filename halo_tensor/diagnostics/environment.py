"""``environment``: what a bug report should say about the machine. No paths, names of users or hosts, and no secrets."""

import json
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

from halo_tensor.fences.fast_paths import FAST_PATHS, INDUCTOR, JOINT_GRAPH, PRODUCERS
from halo_tensor.kernels.device import is_hopper, runs, runs_kernels
from halo_tensor.recipe import FORMATS

PACKAGES = ("torch", "torchao", "triton", "transformers", "peft", "accelerate")


class Environment(dict):
    """A dictionary that JSON can hold; ``str`` lists it, a line per entry."""

    def facts(self) -> dict[str, str]:
        """Date, device and the versions that matter, to be kept beside a figure."""
        cpu, *gpus = self["devices"]
        device = gpus[0]["name"] if gpus else f"CPU ({platform.machine()}, {cpu['threads']} threads)"
        packages = ["halo_tensor", "torch", *(["triton"] if gpus else []), "torchao"]
        return {"date": str(date.today()), "device": device} | {name: self[name] for name in packages}

    def line(self) -> str:
        """The same in one line, to be printed."""
        day, device, *versions = self.facts().items()
        return ", ".join([day[1], device[1], *(f"{name} {version}" for name, version in versions)])

    def __str__(self) -> str:
        lines = []
        for key, value in self.items():
            if key not in ("devices", "fast paths"):
                lines.append(f"{key}: {value}")
        lines += [f"fast path {name}: {state}" for name, state in self["fast paths"].items()]
        for device in self["devices"]:
            details = "; ".join(
                f"{key} {value}" for key, value in device.items() if key not in ("device", "formats", "cannot run")
            )
            lines.append(f"{device['device']}: {details}")
            lines.append(f"  formats: {', '.join(device['formats']) or 'none'}")
            if device["cannot run"]:
                lines.append(f"  cannot run: {', '.join(device['cannot run'])}")
        return "\n".join(lines)


def environment() -> Environment:
    """Versions; which fast paths are on, and why the others are off (see :mod:`halo_tensor.fences.fast_paths`); devices, the
    formats that each can run, and what runs the products there: kernels or the reference."""
    from halo_tensor.version import __version__

    found = Environment({"halo_tensor": __version__, "python": platform.python_version()})
    found["platform"] = f"{platform.system()} {platform.machine()}"
    for name in PACKAGES:
        found[name] = _version(name)
    found["torch"] = str(torch.__version__)  # its metadata may not say for which CUDA it was built
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.version.hip is not None:
        found["ROCm of torch"] = torch.version.hip
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    found["fast paths"] = _fast_paths(devices)
    found["devices"] = [_device(device) for device in devices]
    return found


def _fast_paths(devices: list[torch.device]) -> dict[str, str]:
    """The state of each fast path: "on", or "off: " and the reason."""
    reasons: dict[str, str] = {}
    if not any(device.type == "cuda" for device in devices):
        reasons |= dict.fromkeys(("precompiled", "launcher"), "no CUDA device")
    if not any(map(is_hopper, devices)):
        reasons |= dict.fromkeys(("gluon", "cublas"), "no GPU of compute capability 9.0")
    if not any(map(runs_kernels, devices)):
        reasons |= dict.fromkeys(("inductor", "producers"), "no device that runs kernels")
    for path in (INDUCTOR, PRODUCERS, JOINT_GRAPH):
        if path.name not in reasons:
            path.load(f"halo_tensor.compiler.{path.name}")  # what cannot be imported says so
    states = {name: path.state() for name, path in FAST_PATHS.items()}
    return {name: f"off: {reasons[name]}" if name in reasons and state == "on" else state for name, state in states.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device(device: torch.device) -> dict:
    able = [name for name, format in FORMATS.items() if runs((format,), device)]
    described = {"device": str(device), **(_gpu(device) if device.type == "cuda" else _cpu())}
    return described | {"formats": able, "cannot run": [name for name in FORMATS if name not in able]}


def _cpu() -> dict:
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "products by": "the reference in plain PyTorch (accuracy, not speed)",
    }


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    triton = _version("triton")
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "products by": "Triton kernels" if triton != "not installed" else "nothing: triton is not installed",
    }


def source_commit() -> str | None:
    """The commit that this package was installed from, or that its checkout is at; None if neither is known."""
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
