"""The parameter of a converted layer: its life, writes to it, and its shards."""

from halo_tensor.weight.tensor import HaloWeight

__all__ = ["HaloWeight"]
