"""The product in plain PyTorch, for what no kernel serves because ``HALO_DISABLE`` names the kernels.

It is :func:`halo_tensor.reference.ops.scaled_mm`, which multiplies int8 codes by ``torch._int_mm`` and others in float32. It
takes several times longer than a kernel, and memory for float32 results.
"""

from typing import Any

from halo_tensor.kernels.launch import Variant
from halo_tensor.kernels.matmul.request import Request
from halo_tensor.reference import ops as reference


class PyTorchProduct:
    """The product, called like a :class:`~halo_tensor.kernels.launch.Launch`. It needs no sizes beside those of tensors."""

    def __init__(self, request: Request):
        self.request = request

    def sizes(self) -> tuple[()]:
        return ()

    def __call__(self, sizes: tuple[()], a: Any, b_t: Any, out: Any, a_scale: Any, b_scale: Any, gain: Any, bias: Any) -> None:
        asked = self.request
        scales = a_scale if asked.a_scale else None, b_scale if asked.b_scale else None
        bias, gain = bias if asked.bias is not None else None, gain if asked.gain else None
        # A stand-in for a tensor, in a graph that is being compiled, refuses what follows, and the graph calls the op.
        y = reference.scaled_mm(a, b_t, *scales, bias, asked.left, asked.right, (*out.shape,), out.dtype, gain)
        out.copy_(y)


def why_not(request: Request) -> str | None:
    """Return None: it serves every product."""
    return None


def plan(request: Request) -> Variant:
    return Variant(PyTorchProduct(request), lambda *numbers: ())
