"""Number formats: the table that the whole library reads. Add a format here."""

from dataclasses import dataclass
from typing import Self


class Constant:
    """The base of values that ``copy.deepcopy`` does not copy.

    Compiled code compares a weight's recipe with the one that it was compiled for, in every call. The comparison is fastest if
    both are the same object.
    """

    def __deepcopy__(self, memo: dict) -> Self:
        return self


@dataclass(frozen=True)
class Format(Constant):
    """A number format.

    Attributes:
        name: unique among all formats.
        bits: per element.
        max: the largest finite value.
        uniform: whether the format is an integer. Integer units multiply those, fp8 units all others.
        mantissa_bits, min_exponent: the grid of a floating format; ``min_exponent`` is that of the smallest normal number.
            Both are 0 for an integer.
    """

    name: str
    bits: int
    max: float
    uniform: bool = False
    mantissa_bits: int = 0
    min_exponent: int = 0

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)  # every call of a layer looks operands up by their formats


INT8 = Format("int8", 8, 127.0, uniform=True)
INT4 = Format("int4", 4, 7.0, uniform=True)
FP8_E4M3 = Format("fp8_e4m3", 8, 448.0, mantissa_bits=3, min_exponent=-6)
FP8_E5M2 = Format("fp8_e5m2", 8, 57344.0, mantissa_bits=2, min_exponent=-14)
FP6_E2M3 = Format("fp6_e2m3", 6, 7.5, mantissa_bits=3, min_exponent=0)
FP6_E3M2 = Format("fp6_e3m2", 6, 28.0, mantissa_bits=2, min_exponent=-2)
#: LUQ's gradients: zero and the powers of two from 1 to 64.
FP4_E3M0 = Format("fp4_e3m0", 4, 64.0, mantissa_bits=0, min_exponent=0)
#: The integers −7…7, as INT4, for products with a floating format.
FP4_E1M2 = Format("fp4_e1m2", 4, 7.0, mantissa_bits=2, min_exponent=2)
#: NVFP4's and MXFP4's elements (OCP Microscaling Formats 1.0): 0, ½, 1, 1½, 2, 3, 4, 6.
FP4_E2M1 = Format("fp4_e2m1", 4, 6.0, mantissa_bits=1, min_exponent=0)
#: The formats of codes, by name.
FORMATS = {f.name: f for f in (INT8, INT4, FP8_E4M3, FP8_E5M2, FP6_E2M3, FP6_E3M2, FP4_E3M0, FP4_E1M2, FP4_E2M1)}
#: Formats of scales only: IEEE float32, and the powers of two from 2⁻¹²⁷ to 2¹²⁷ (OCP Microscaling Formats 1.0, 5.4.1).
FLOAT32 = Format("float32", 32, 3.4028234663852886e38, mantissa_bits=23, min_exponent=-126)
E8M0 = Format("e8m0", 8, 2.0**127, mantissa_bits=0, min_exponent=-127)
