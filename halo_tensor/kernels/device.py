"""The capabilities of a device: which kernels it runs, and which formats it multiplies."""

import os
from collections.abc import Iterable
from functools import lru_cache

import torch

from halo_tensor.fences.fast_paths import Refusal
from halo_tensor.recipe import FLOAT32, Format, Scales

#: Whether Triton's interpreter runs the kernels, which it does on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: How many tensors a kernel can read to compute the matrix that it quantises, see halo_tensor/compiler/producers.py.
PRODUCER_INPUTS = 3
#: The first Triton that multiplies integers by the tensor cores of SM 10.x. Earlier ones use mma.sync.
INTEGERS_ON_SM100 = (3, 8)


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels run on the device: on a GPU, and on a CPU by Triton's interpreter."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability. It is cached, because eager ops ask several times per call and PyTorch takes microseconds
    for each answer."""
    return torch.cuda.get_device_capability(device) if device.index is None else _remembered_capability(device)


@lru_cache
def _remembered_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_hopper(device: torch.device) -> bool:
    """Whether the device is of SM 9.0, and no AMD GPU that reports this capability."""
    return device.type == "cuda" and torch.version.hip is None and _capability(device) == (9, 0)


def has_tma(device: torch.device) -> bool:
    """Whether kernels can read tiles by descriptors: a GPU with TMA, or Triton's interpreter on a CPU."""
    return device.type != "cuda" or torch.version.hip is not None or _capability(device) >= (9, 0)


def rounds_to_fp8(device: torch.device) -> bool:
    """Whether Triton converts float32 to fp8 in one rounding.

    Before SM 9.0 it converts through float16 and rounds twice, and its interpreter truncates. There the kernels round to the
    format's grid first.
    """
    return device.type == "cuda" and _capability(device) >= (9, 0)


def has_wgmma(device: torch.device) -> bool:
    """Whether matrix units read operands from shared memory instead of registers, as those of SM 9.0 and 10.x do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return _capability(device)[0] in (9, 10)


def has_dependent_launches(device: torch.device) -> bool:
    """Whether a kernel can start while the kernel ahead of it ends (CUDA's programmatic dependent launch)."""
    return device.type == "cuda" and has_tma(device) and torch.version.hip is None


def check_device(formats: tuple[Format, ...], device: torch.device) -> None:
    """Raise Refusal, a RuntimeError, if ``device`` has no matrix unit for one of ``formats``. A CPU runs all of them."""
    if device.type != "cuda" or torch.version.hip is not None:
        return
    capability = torch.cuda.get_device_capability(device)
    needed = {f: (8, 0) if f.uniform else (8, 9) for f in formats}
    lacking = [f.name for f, minimum in needed.items() if capability < minimum]
    if lacking:
        advice = "use halo_config(level=1, dtype='int8')" if capability >= (8, 0) else "it can train in bf16 or fp16 only"
        raise Refusal(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]} and cannot multiply "
            f"{', '.join(lacking)} (integer formats need 8.0, fp8 and fp6 need 8.9): {advice}"
        )


def check_scales(granularities: Iterable[Scales], device: torch.device) -> None:
    """Raise Refusal, a RuntimeError, if ``device`` is a GPU and no kernel computes with scales of one of these layouts."""
    lacking = [str(g) for g in granularities if g.dtype not in (FLOAT32, None)]
    if lacking and device.type == "cuda":
        raise Refusal(
            f"no kernel computes with scales per {', '.join(lacking)}: MXFP8 and NVFP4 have none, and run on a CPU only, for "
            "accuracy studies. Move the model to the CPU, or use halo_config(level=1, dtype='int8')"
        )


def runs_scales(granularities: Iterable[Scales], device: torch.device) -> bool:
    """Whether :func:`check_scales` raises nothing."""
    try:
        check_scales(granularities, device)
    except RuntimeError:
        return False
    return True


def runs(formats: tuple[Format, ...], device: torch.device) -> bool:
    """Whether :func:`check_device` raises nothing."""
    try:
        check_device(formats, device)
    except RuntimeError:
        return False
    return True
