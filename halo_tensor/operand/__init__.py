"""A quantised, rotated operand of a product, and ``torch.mm`` of two of them."""

from halo_tensor.operand.tensor import HadamardQuantTensor

__all__ = ["HadamardQuantTensor"]
