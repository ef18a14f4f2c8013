"""The product in plain PyTorch. It serves what no kernel serves because ``HALO_DISABLE`` switches the kernels off.

It calls :func:`halo_tensor.reference.ops.scaled_mm`, which multiplies int8 codes by ``torch._int_mm`` and other codes in
float32. That takes several times longer than a kernel, and memory for float32 results.
"""

from typing import Any

from halo_tensor.kernels.launch import Variant
from halo_tensor.kernels.matmul.request import Request
from halo_tensor.reference import ops as reference


class PyTorchProduct:
    """The product, called like a :class:`~halo_tensor.kernels.launch.Launch`. It reads all sizes from its tensors."""

    def __init__(self, request: Request):
        self.request = request

    def sizes(self) -> tuple[()]:
        """Return what a call takes instead of a launch's sizes: nothing."""
        return ()

    def __call__(self, sizes: tuple[()], a: Any, b_t: Any, out: Any, a_scale: Any, b_scale: Any, gain: Any, bias: Any) -> None:
        asked = self.request
        scales = a_scale if asked.a_scale else None, b_scale if asked.b_scale else None
        bias, gain = bias if asked.bias is not None else None, gain if asked.gain else None
        rotations = asked.row_rotation, asked.column_rotation
        # In a graph that is being compiled, stand-ins for tensors refuse these operations, and the graph calls the op instead.
        y = reference.scaled_mm(a, b_t, *scales, bias, *rotations, (*out.shape,), out.dtype, gain)
        out.copy_(y)


def why_not(request: Request) -> str | None:
    """Return None, because it serves every product."""
    return None


def plan(request: Request) -> Variant:
    """Return the launch of a product."""
    return Variant(PyTorchProduct(request), lambda *numbers: ())
