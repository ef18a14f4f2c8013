"""Functions for users of FSDP2."""

from halo_tensor.weight.common_scales import precompute_scales

__all__ = ["precompute_scales"]
