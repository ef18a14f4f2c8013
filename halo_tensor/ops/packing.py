"""Store fp6 codes in six bits each: ``pack_rows_`` and ``unpack_rows``; INT4 codes in four: ``pack_nibbles`` and
``unpack_nibbles``.

The ops of fp6 are for code that is not compiled. In a graph, :mod:`halo_tensor.reference.packing` does the same by pointwise
ops, which a compiler can fuse, and repeat instead of saving their results. Those of INT4 become launches in a graph.
"""

import torch
from torch import Tensor

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.register import fake, op
from halo_tensor.recipe import Format
from halo_tensor.reference import nibbles
from halo_tensor.reference import packing as reference
from halo_tensor.reference.codes import aligned


@op("pack_rows_", mutates=("packed",))
def pack_rows_(codes: Tensor, format: Format, packed: Tensor) -> None:
    """Write :func:`halo_tensor.reference.packing.pack_rows` of ``codes`` to ``packed``."""
    if runs_kernels(codes.device):
        from halo_tensor.kernels.quantize import packing

        packing.pack_rows_(codes, format, packed)
        return
    packed.copy_(reference.pack_rows(codes, format))


@op("unpack_rows")
def unpack_rows(packed: Tensor, format: Format) -> Tensor:
    """Return :func:`halo_tensor.reference.packing.unpack_rows` of ``packed``."""
    if runs_kernels(packed.device):
        from halo_tensor.kernels.quantize import packing

        return packing.unpack_rows(packed, format)
    return reference.unpack_rows(packed, format)


@fake("unpack_rows")
def _(packed: Tensor) -> Tensor:
    return packed.new_empty([packed.shape[0], packed.shape[1] // 3 * 4], dtype=torch.float8_e4m3fn)


@op("pack_nibbles")
def pack_nibbles(codes: Tensor) -> Tensor:
    """Return :func:`halo_tensor.reference.nibbles.pack_nibbles` of ``codes``."""
    if runs_kernels(codes.device):
        from halo_tensor.kernels.quantize import nibbles as kernels

        return kernels.pack_nibbles(codes)
    return nibbles.pack_nibbles(codes)


@fake("pack_nibbles")
def _(codes: Tensor) -> Tensor:
    return codes.new_empty([codes.shape[0], (codes.shape[1] + 1) // 2], dtype=torch.uint8)


@op("unpack_nibbles")
def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Return :func:`halo_tensor.reference.nibbles.unpack_nibbles` of ``packed``."""
    if runs_kernels(packed.device):
        from halo_tensor.kernels.quantize import nibbles as kernels

        return kernels.unpack_nibbles(packed, columns)
    return nibbles.unpack_nibbles(packed, columns)


@fake("unpack_nibbles")
def _(packed: Tensor, columns: int) -> Tensor:
    return packed.new_empty_strided([packed.shape[0], columns], [aligned(columns), 1], dtype=torch.int8)
