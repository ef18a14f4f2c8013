"""Number formats: the table that all of the library asks. Add a format here."""

from dataclasses import dataclass


class Constant:
    """Not to be copied: compiled code looks at every call whether a weight's recipe is the one it was compiled for, and sees
    at once that an object is itself."""

    def __deepcopy__(self, memo):
        return self


@dataclass(frozen=True)
class Format(Constant):
    """A number format: ``bits`` per element, its largest finite value ``max``, and whether its grid is ``uniform``.

    Uniform grids run on integer units, the others on fp8 units. ``mantissa_bits`` and ``min_exponent`` (of the smallest
    normal number) define a floating grid; they are 0 for a uniform one.
    """

    name: str
    bits: int
    max: float
    uniform: bool = False
    mantissa_bits: int = 0
    min_exponent: int = 0

    def __str__(self) -> str:
        return self.name


INT8 = Format("int8", 8, 127.0, uniform=True)
INT4 = Format("int4", 4, 7.0, uniform=True)
FP8_E4M3 = Format("fp8_e4m3", 8, 448.0, mantissa_bits=3, min_exponent=-6)
FP8_E5M2 = Format("fp8_e5m2", 8, 57344.0, mantissa_bits=2, min_exponent=-14)
FP6_E2M3 = Format("fp6_e2m3", 6, 7.5, mantissa_bits=3, min_exponent=0)
FP6_E3M2 = Format("fp6_e3m2", 6, 28.0, mantissa_bits=2, min_exponent=-2)
#: Powers of two, 1 to 64, and zero: LUQ's logarithmic gradients.
FP4_E3M0 = Format("fp4_e3m0", 4, 64.0, mantissa_bits=0, min_exponent=0)
#: The integers −7…7, int4's, for products with a floating format.
FP4_E1M2 = Format("fp4_e1m2", 4, 7.0, mantissa_bits=2, min_exponent=2)
FORMATS = {f.name: f for f in (INT8, INT4, FP8_E4M3, FP8_E5M2, FP6_E2M3, FP6_E3M2, FP4_E3M0, FP4_E1M2)}
