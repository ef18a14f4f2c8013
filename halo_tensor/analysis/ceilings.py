"""The rates that GPUs reach, and the time of a kernel that is bound by memory.

They were measured for an H100 and an H200. :mod:`halo_tensor.analysis.gpus` derives others from published rates.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Ceilings:
    """The rates that one GPU reaches.

    Attributes:
        name: the GPU.
        products: matrix unit ("bf16", "int8" or "fp8") -> operations/s of a large product; a multiply-accumulate is two
            operations. Units that the GPU lacks are absent.
        undo: matrix unit -> the fraction of that rate that is left when the product also undoes one rotation of its result.
        copy: bytes/s of a copy, read and written bytes together.
        quantize: bytes/s of a kernel that holds whole rows and quantises them.
        rotate: bytes/s of a kernel that holds whole rows, rotates them in blocks of at most 256 and quantises them.
        rotate_wide: bytes/s of such a kernel with larger blocks.
        tiles: bytes/s of a kernel over tiles. One finds the largest magnitudes, and a second one quantises.
        rotate_pair: bytes/s of such kernels that quantise E for both of its products and rotate it for one.
        rotate_rows: bytes/s of kernels over tiles that rotate rows and quantise them for one product, as X and W of HOT.
        rotate_rows_wide: bytes/s of such kernels with blocks larger than 64.
        rotate_both: bytes/s of such kernels that quantise E for both of its products with a rotation for each.
        rotate_both_wide: bytes/s of these with blocks larger than 64.
        noisy: bytes/s of kernels over tiles that round stochastically.
        source: where the numbers come from.
        launch: seconds that a kernel takes beside its work: its start, its end, and the gap after it.
        multiprocessors: their number. A product uses those that have a tile.
        measured: whether predictions were compared with times measured on this GPU.
        notes: sentences that a reader of a prediction should know.
    """

    name: str
    products: dict[str, float]
    undo: dict[str, float]
    copy: float
    quantize: float
    rotate: float
    rotate_wide: float
    tiles: float
    rotate_pair: float
    rotate_rows: float
    rotate_rows_wide: float
    rotate_both: float
    rotate_both_wide: float
    noisy: float
    source: str
    launch: float = 0.0
    multiprocessors: int = 1
    measured: bool = False
    notes: tuple[str, ...] = ()

    @property
    def a_name(self) -> str:
        """The name with "a" or "an" before it."""
        return f"{'an' if self.name[:1] in tuple('AEFHILMNORSX8') else 'a'} {self.name}"


#: Means over bench/results/gemm.json and medians over rotation.json, less the launches and exposed writes that the model adds.
#: A test recomputes them. The rates of HOT's kernels are the H200's, but at most ``tiles``: an H100 ran older kernels.
H100 = Ceilings(
    name="H100 80GB HBM3",
    products={"bf16": 718e12, "int8": 1560e12, "fp8": 1407e12},
    undo={"bf16": 1.0, "int8": 0.98, "fp8": 0.95},
    copy=3.09e12,
    quantize=3.14e12,
    rotate=2.79e12,
    rotate_wide=0.66e12,
    tiles=2.86e12,
    rotate_pair=1.99e12,
    rotate_rows=2.86e12,
    rotate_rows_wide=2.8e12,
    rotate_both=2.86e12,
    rotate_both_wide=1.95e12,
    noisy=2.2e12,
    source="means of bench/gemm.py and medians of bench/rotation.py, 2026-11-22 and 23, torch 2.11.0+cu130, Triton 3.6.0",
    launch=3e-6,
    multiprocessors=132,
    measured=True,
)
#: From the kernels in profiles of small and large layers, adjusted to bench/results/gain.json and linear_now.json, with which
#: a test compares it. Kernels that rotate are as fast as on an H100, whose memory is slower: they are bound by computing.
H200 = replace(
    H100,
    name="H200",
    products={"bf16": 710e12, "int8": 1650e12, "fp8": 1460e12},
    copy=4.2e12,
    quantize=4.3e12,
    rotate=2.65e12,
    tiles=3.4e12,
    rotate_pair=1.9e12,
    rotate_rows=4.1e12,
    rotate_rows_wide=3.2e12,
    rotate_both=3.4e12,
    rotate_both_wide=2.25e12,
    noisy=3.6e12,
    source="bench/gain.py, linear.py, hot_kernels.py and profiles of layers, 2026-11-30, torch 2.11.0+cu130, Triton 3.6.0",
)


class Pass(NamedTuple):
    """A kernel that is bound by memory.

    Attributes:
        bytes: what it reads and writes.
        rate: the field of Ceilings that says how fast.
    """

    bytes: float
    rate: str


def time_of(passes: Iterable[Pass], ceilings: Ceilings) -> float:
    """Return the seconds that kernels take, one after another."""
    return sum(once.bytes / getattr(ceilings, once.rate) + ceilings.launch for once in passes)
