"""Approximate exp and 1 / x by the GPU's own instructions, and tanh, which Triton's interpreter lacks.

The approximations take a fifth of the work of the exact functions. Their relative errors are below 2⁻²⁰ (about |x| · 2⁻²³ for
exp), and bfloat16 rounds by up to 2⁻⁹. NaN and Inf give what the exact functions give; results below 2⁻¹²⁶ are 0.
"""

import triton
import triton.language as tl

from halo_tensor.kernels.device import INTERPRETED

if INTERPRETED:
    from triton.language import math as libdevice

    @triton.jit
    def fast_exp(x):
        return tl.exp(x)

    @triton.jit
    def reciprocal(x):
        return 1.0 / x

    @triton.jit
    def tanh(x):
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0

else:
    from triton.language.extra import libdevice

    @triton.jit
    def fast_exp(x):
        return libdevice.fast_expf(x)

    @triton.jit
    def reciprocal(x):
        return libdevice.fast_dividef(1.0, x)

    @triton.jit
    def tanh(x):
        return libdevice.tanh(x)
