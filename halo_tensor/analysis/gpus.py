"""The rates of GPUs for the model of time in :mod:`halo_tensor.analysis.roofline`.

An H100 and an H200 were measured. For other GPUs the rates are the dense rates that NVIDIA publishes, times the fraction of
the published rate that kernels reach on an H100.
"""

import re
from dataclasses import dataclass, replace

import torch

from halo_tensor.analysis.ceilings import H100, H200, Ceilings
from halo_tensor.kernels.device import INTEGERS_ON_SM100

MEASURED = {"H100": H100, "H200": H200}
#: The fraction of a published rate that a large product reaches. On an H100 it is 71 % in fp8, 73 in bf16 and 79 in int8.
PRODUCTS_REACH = 0.73


@dataclass(frozen=True)
class Published:
    """The rates that NVIDIA publishes for a GPU, without sparsity.

    Attributes:
        capability: compute capability.
        bf16: TFLOP/s of products accumulated in float32.
        int8: Top/s of products accumulated in int32.
        fp8: TFLOP/s of products accumulated in float32; None if the GPU has no fp8 unit.
        bandwidth: of memory, TB/s.
        multiprocessors: their number.
        sheet: the document that publishes the rates.
        halves: True if accumulating in float32 halves the rate of bf16 and fp8, as on GeForce cards. ``bf16`` and ``fp8`` are
            the halved rates.
        remark: a sentence on measurements by others that contradict the published rates.
    """

    capability: tuple[int, int]
    bf16: float
    int8: float
    fp8: float | None
    bandwidth: float
    multiprocessors: int
    sheet: str
    halves: bool = False
    remark: str = ""


_BLACKWELL = "NVIDIA's Blackwell technical brief, as cloud vendors quote it"
_FP8_ON_5090 = "Others measured 208 to 216 TFLOP/s in fp8 on an RTX 5090, half of what is published and modelled."
#: Rates of Ceilings that computing limits, too.
COMPUTING = (
    "rotate", "rotate_wide", "rotate_pair", "rotate_rows", "rotate_rows_wide", "rotate_both", "rotate_both_wide", "noisy",
)  # fmt: skip
#: Words of a device's name -> its rates. If several GPUs have one compute capability, the first stands in for unlisted ones.
#: Checked on 2026-11-29. Most of NVIDIA's sheets list rates with sparsity, which are twice these.
GPUS = {
    # nvidia-a100-datasheet-us-nvidia-1758950: BF16 312, INT8 624; 1,555 GB/s with 40 GB; with 80 GB 2,039 (SXM), 1,935 (PCIe).
    "A100": Published((8, 0), 312, 624, None, 2.039, 108, "A100 80GB SXM data sheet"),
    "A100 40GB": Published((8, 0), 312, 624, None, 1.555, 108, "A100 40GB data sheet"),
    "A100 PCIe": Published((8, 0), 312, 624, None, 1.935, 108, "A100 80GB PCIe data sheet"),
    "A100 PCIe 40GB": Published((8, 0), 312, 624, None, 1.555, 108, "A100 40GB data sheet"),
    # nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2: 328 tensor cores × 1.695 GHz × 512 operations in INT8 = 284.7 Top/s;
    # BF16 with float32 accumulation is a quarter of that; 936 GB/s.
    "RTX 3090": Published((8, 6), 71, 284, None, 0.936, 82, "Ampere GA102 whitepaper", True),
    # nvidia-ada-gpu-architecture whitepaper: BF16 165.2, FP8 with float32 accumulation 330.3, INT8 660.6; 1,008 GB/s.
    "RTX 4090": Published((8, 9), 165.2, 660.6, 330.3, 1.008, 128, "Ada whitepaper", True),
    # NVIDIA L40S datasheet: BF16 362.05, FP8 733, INT8 733; 864 GB/s. Float32 accumulation runs at the full rate.
    "L40S": Published((8, 9), 362, 733, 733, 0.864, 142, "L40S data sheet"),
    # NVIDIA H100 datasheet, SXM, with sparsity: BF16 1,979, FP8 and INT8 3,958; 3.35 TB/s.
    "H100": Published((9, 0), 989, 1979, 1979, 3.35, 132, "H100 SXM data sheet"),
    # NVIDIA H200 datasheet, SXM, with sparsity: BF16 1,979, FP8 and INT8 3,958; 4.8 TB/s.
    "H200": Published((9, 0), 989, 1979, 1979, 4.8, 132, "H200 SXM data sheet"),
    # HGX B200, 8 GPUs, with sparsity: BF16 36 PFLOP/s, FP8 72, INT8 72 Pop/s; 7.7 TB/s per GPU, where DGX B200 has 8.
    "B200": Published((10, 0), 2250, 4500, 4500, 7.7, 148, _BLACKWELL),
    # HGX B300, 8 GPUs, with sparsity: BF16 36 PFLOP/s, FP8 72; INT8 2 Pop/s, rounded, which is 94 to 156 dense Top/s per GPU;
    # 8 TB/s per GPU.
    "B300": Published((10, 3), 2250, 150, 4500, 8.0, 148, _BLACKWELL),
    # nvidia-rtx-blackwell-gpu-architecture whitepaper: 680 tensor cores × 2.407 GHz × 512 operations in INT8 = 838 Top/s; with
    # float32 accumulation FP8 is half and BF16 a quarter of that; 1,792 GB/s.
    "RTX 5090": Published((12, 0), 209.5, 838, 419, 1.792, 170, "RTX Blackwell whitepaper", True, _FP8_ON_5090),
}
#: Words that a device's name may have besides. Others, such as "Ti", "Laptop", "PCIe", "NVL" or "MIG", make it another GPU.
_NEUTRAL = re.compile(r"NVIDIA|GEFORCE|AC|SXM\d*|HBM\d\w*|\d+GB", re.IGNORECASE)


def modelled(gpu: str | None, device: torch.device) -> Ceilings:
    """Return the ceilings of the GPU to model. If its rates are not known, another GPU stands in for it, with a note.

    Args:
        gpu: a name in GPUS, or None.
        device: what to model if ``gpu`` is None. If it is a CPU, this machine's GPU is modelled, or an H100 if there is none.

    Raises:
        ValueError: the rates of ``gpu`` are not known.
    """
    known, why_not = known_ceilings(gpu, device)
    if known is not None:
        return known
    if not (own := name_of(device)):
        return _standing_in("H100", f"{why_not}, so an H100 is modelled; gpu='RTX 4090' would model that card.")
    capability = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
    like = next((name for name, published in GPUS.items() if published.capability == capability), None)
    if like is None:
        return _standing_in("H100", f"The rates of {own} are not known, and an H100, of another generation, is modelled.")
    return _standing_in(like, f"The rates of {own} are not known, and {like}, of the same generation, is modelled.")


def known_ceilings(gpu: str | None, device: torch.device) -> tuple[Ceilings | None, str]:
    """Return the ceilings of one GPU, without another one in its place.

    Args:
        gpu: a name in GPUS or a device's name, as "NVIDIA H200"; or None.
        device: whose GPU is meant if ``gpu`` is None. For a CPU it is this machine's GPU.

    Returns:
        the ceilings, and ""; or None, and the reason as a clause.

    Raises:
        ValueError: the rates of ``gpu`` are not known.
    """
    if gpu is not None:
        if (name := _listed(gpu)) is None:
            raise ValueError(f"gpu={gpu!r} is not known; known are {', '.join(GPUS)}. Pass ceilings=Ceilings(...) for another")
        return ceilings_of(name), ""
    if not (own := name_of(device)):
        return None, "This machine has no NVIDIA GPU"
    name = _listed(own)
    return (None, f"The rates of {own} are not known") if name is None else (ceilings_of(name), "")


def name_of(device: torch.device) -> str:
    """Return the name of an NVIDIA GPU: ``device``, or this machine's current one if ``device`` is none; "" without one."""
    if torch.version.hip is not None or not (device.type == "cuda" or torch.cuda.is_available()):
        return ""
    return torch.cuda.get_device_name(device if device.type == "cuda" else torch.cuda.current_device())


def ceilings_of(name: str) -> Ceilings:
    """Return the ceilings of a GPU that is listed in GPUS."""
    published = GPUS[name]
    if name in MEASURED:
        return MEASURED[name]
    memory = published.bandwidth / GPUS["H100"].bandwidth
    computing = min(memory, published.bf16 / GPUS["H100"].bf16)  # rotations are products in bf16
    passes = {key: getattr(H100, key) * memory for key in ("copy", "quantize", "tiles")}
    passes |= {key: getattr(H100, key) * computing for key in COMPUTING}
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
        launch=H100.launch,
        multiprocessors=published.multiprocessors,
        notes=tuple(notes),
    )


def lacks_integer_products(capability: tuple[int, int]) -> bool:
    """Whether the installed Triton is too old to use the fast int8 products of a GPU of this compute capability."""
    if capability != (10, 0):
        return False
    try:
        import triton
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) < INTEGERS_ON_SM100


def _standing_in(name: str, why: str) -> Ceilings:
    """Return the ceilings of a listed GPU, with a note on why it stands in for another one."""
    ceilings = ceilings_of(name)
    return replace(ceilings, notes=(why, *ceilings.notes))


def _listed(device: str) -> str | None:
    """Return the name in GPUS that a device's name means, or None."""
    words = set(re.split(r"[ -]+", device.upper()))
    for name in sorted(GPUS, key=lambda name: -len(name.split())):
        own = set(name.upper().split())
        if own <= words and all(_NEUTRAL.fullmatch(word) for word in words - own):
            return name
    return None
