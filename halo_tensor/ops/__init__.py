"""The ops, ``torch.ops.halo.*``, as typed functions: ``from halo_tensor import ops; ops.scaled_mm(…)``.

A compiler sees each as one node. Kernels run on a GPU (:mod:`halo_tensor.kernels`), and the reference on every other device
(:mod:`halo_tensor.reference`), as each op's body says. Each family of ops is a file; :mod:`halo_tensor.ops.register` has the
mechanism.
"""

from halo_tensor.ops.blocks import compress, decompress, pack_mask, unpack_mask
from halo_tensor.ops.collectives import gather_tokens
from halo_tensor.ops.experts import (
    combine,
    gather_codes,
    group_tiles,
    grouped_grad,
    grouped_mm,
    quantize_gated,
    quantize_gated_grad,
    quantize_groups,
    quantize_groups_t,
    turn_codes,
    turn_stack,
    turn_stack_,
)
from halo_tensor.ops.gradients import quantize_both, quantize_pair, quantize_pairs
from halo_tensor.ops.loss import linear_cross_entropy, scale_
from halo_tensor.ops.packing import pack_nibbles, pack_rows_, unpack_nibbles, unpack_rows
from halo_tensor.ops.products import scaled_mm
from halo_tensor.ops.quantizers import requantize_, rotate_quantize, rotate_quantize_
from halo_tensor.ops.rotations import dequantize_t, rotate, unrotate

__all__ = [
    "combine",
    "compress",
    "decompress",
    "dequantize_t",
    "gather_codes",
    "gather_tokens",
    "group_tiles",
    "grouped_grad",
    "grouped_mm",
    "linear_cross_entropy",
    "pack_mask",
    "pack_nibbles",
    "pack_rows_",
    "quantize_both",
    "quantize_gated",
    "quantize_gated_grad",
    "quantize_groups",
    "quantize_groups_t",
    "quantize_pair",
    "quantize_pairs",
    "requantize_",
    "rotate",
    "rotate_quantize",
    "rotate_quantize_",
    "scale_",
    "scaled_mm",
    "turn_codes",
    "turn_stack",
    "turn_stack_",
    "unpack_mask",
    "unpack_nibbles",
    "unpack_rows",
    "unrotate",
]
