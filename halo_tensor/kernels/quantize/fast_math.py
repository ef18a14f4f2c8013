"""exp and 1 / x by the GPU's own instructions, a fifth of the work of the exact ones; and tanh, which Triton's interpreter
lacks.

Relative errors are below 2⁻²⁰ (of exp: |x| · 2⁻²³ or so), where bfloat16 rounds by up to 2⁻⁹. NaN and Inf stay what they are;
what would be smaller than 2⁻¹²⁶ is 0.
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
