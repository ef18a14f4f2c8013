"""A quantised, rotated operand of a product, and the ops that take one."""

from halo_tensor.operand import copies, matmul  # noqa: F401  define ops of an operand
from halo_tensor.operand.tensor import HadamardQuantTensor

__all__ = ["HadamardQuantTensor"]
