"""Which GPU is at hand, and its rates for the model of time in :mod:`halo_tensor.analysis.roofline`.

Only an H100 was measured. The rates of other GPUs are what NVIDIA publishes, dense, times the parts of them that kernels reach
on an H100. Nothing here was measured on those GPUs.
"""

import re
from dataclasses import dataclass, replace

import torch

from halo_tensor.analysis.roofline import H100, Ceilings
from halo_tensor.kernels.device import INTEGERS_ON_SM100

#: of a published rate: a large product on an H100 reaches 66 % (fp8) to 72 % (bf16)
PRODUCTS_REACH = 0.7
#: bytes/s that NVIDIA publishes for the H100 that was measured
H100_BANDWIDTH = 3.35e12


@dataclass(frozen=True)
class Published:
    """The rates that NVIDIA publishes for a GPU, without sparsity.

    Attributes:
        capability: compute capability.
        bf16, int8, fp8: TFLOP/s of products, accumulated in float32 and int32; None: the GPU has no such product.
        bandwidth: of memory, TB/s.
        sheet: where the rates are published.
        halves: whether float32 accumulation halves the rate of bf16 and fp8, as on GeForce cards. The rates here are the half.
        remark: a sentence on what others measured, where it contradicts.
    """

    capability: tuple[int, int]
    bf16: float
    int8: float
    fp8: float | None
    bandwidth: float
    sheet: str
    halves: bool = False
    remark: str = ""


_BLACKWELL = "NVIDIA's Blackwell technical brief, as cloud vendors quote it"
_FP8_ON_5090 = "Others measured 208 to 216 TFLOP/s in fp8 on an RTX 5090, half of what is published and modelled."
#: By the words that a device's name has. Of several with one compute capability the first stands in for GPUs not listed.
GPUS = {
    "A100": Published((8, 0), 312, 624, None, 2.039, "A100 80GB SXM data sheet"),
    "A100 40GB": Published((8, 0), 312, 624, None, 1.555, "A100 40GB data sheet"),
    "A100 PCIe": Published((8, 0), 312, 624, None, 1.935, "A100 80GB PCIe data sheet"),
    "A100 PCIe 40GB": Published((8, 0), 312, 624, None, 1.555, "A100 40GB data sheet"),
    "RTX 3090": Published((8, 6), 71, 284, None, 0.936, "Ampere GA102 whitepaper", True),
    "RTX 4090": Published((8, 9), 165.2, 660.6, 330.3, 1.008, "Ada whitepaper", True),
    "L40S": Published((8, 9), 362, 733, 733, 0.864, "L40S data sheet"),
    "H100": Published((9, 0), 989, 1979, 1979, 3.35, "H100 SXM data sheet"),
    "H200": Published((9, 0), 989, 1979, 1979, 4.8, "H200 SXM data sheet"),
    "B200": Published((10, 0), 2250, 4500, 4500, 7.7, _BLACKWELL),
    "B300": Published((10, 3), 2250, 150, 4500, 8.0, _BLACKWELL),
    "RTX 5090": Published((12, 0), 209.5, 838, 419, 1.792, "RTX Blackwell whitepaper", True, _FP8_ON_5090),
}
#: words of a device's name that do not make it another GPU, as "Ti", "Laptop", "PCIe", "NVL" or "MIG" do
_NEUTRAL = re.compile(r"NVIDIA|GEFORCE|AC|SXM\d*|HBM\d\w*|\d+GB", re.IGNORECASE)


def modelled(gpu: str | None, device: torch.device) -> Ceilings:
    """Those of the GPU that is named; of ``device`` if none is; of this machine's GPU if that is a CPU.

    Raises ValueError if rates of the named GPU are not known.
    """
    if gpu is not None:
        name = _listed(gpu)
        if name is None:
            raise ValueError(f"gpu={gpu!r} is not known; known are {', '.join(GPUS)}. Pass ceilings=Ceilings(...) for another")
        return ceilings_of(name)
    if device.type != "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda" or torch.version.hip is not None:
        return _standing_in(
            "H100", "This machine has no NVIDIA GPU, so an H100 is modelled; gpu='RTX 4090' would model that card."
        )
    own = torch.cuda.get_device_name(device)
    if name := _listed(own):
        return ceilings_of(name)
    capability = torch.cuda.get_device_capability(device)
    like = next((name for name, published in GPUS.items() if published.capability == capability), None)
    if like is None:
        return _standing_in("H100", f"The rates of {own} are not known, and an H100, of another generation, is modelled.")
    return _standing_in(like, f"The rates of {own} are not known, and {like}, of the same generation, is modelled.")


def ceilings_of(name: str) -> Ceilings:
    """Those of one of GPUS."""
    published = GPUS[name]
    if name == "H100":
        return H100
    memory = published.bandwidth * 1e12 / H100_BANDWIDTH
    passes = {key: getattr(H100, key) * memory for key in ("copy", "quantize", "rotate", "rotate_wide")}
    if name == "H200":  # the same chip with other memory
        source = f"products as measured on an H100; memory as published ({published.sheet}), used as an H100 uses its own"
        return replace(H100, name=name, **passes, source=source)
    rates = {unit: getattr(published, unit) for unit in ("bf16", "int8", "fp8") if getattr(published, unit) is not None}
    notes = []
    if published.halves:
        notes.append(f"On {name} bf16 and fp8 accumulated in float32 run at half rate, and the half is what counts here.")
    if published.remark:
        notes.append(published.remark)
    if lacks_integer_products(published.capability):
        rates["int8"] = rates["bf16"] / 2
        notes.append(
            f"Before Triton 3.8 integers are multiplied by mma.sync on {name}, not by its own tensor-core instruction: int8 "
            "is taken to run at half of bf16's rate, an assumption, so that recipes in int8 are no default candidates."
        )
    elif rates["int8"] <= rates["bf16"]:
        notes.append(
            f"{name} has nearly no int8 ({rates['int8']:g} TFLOP/s where bf16 has {rates['bf16']:g}), so that recipes in int8 "
            "are no default candidates."
        )
    return Ceilings(
        name=name,
        products={unit: rate * 1e12 * PRODUCTS_REACH for unit, rate in rates.items()},
        undo=H100.undo,
        **passes,
        source=f"published rates ({published.sheet}), times the parts of them that kernels reach on an H100; not measured",
        notes=tuple(notes),
    )


def lacks_integer_products(capability: tuple[int, int]) -> bool:
    """Whether such a GPU multiplies integers fast, and the Triton that is installed does not know how."""
    if capability != (10, 0):
        return False
    try:
        import triton
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) < INTEGERS_ON_SM100


def _standing_in(name: str, why: str) -> Ceilings:
    ceilings = ceilings_of(name)
    return replace(ceilings, notes=(why, *ceilings.notes))


def _listed(device: str) -> str | None:
    """Which of GPUS a device's name means, if any."""
    words = set(re.split(r"[ -]+", device.upper()))
    for name in sorted(GPUS, key=lambda name: -len(name.split())):
        own = set(name.upper().split())
        if own <= words and all(_NEUTRAL.fullmatch(word) for word in words - own):
            return name
    return None
