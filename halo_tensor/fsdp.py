"""For users of FSDP2; see docs/fsdp.md."""

from halo_tensor.weight.fsdp import precompute_scales

__all__ = ["precompute_scales"]
