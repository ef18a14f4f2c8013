"""The roles of converted weights under FSDP2."""

from enum import Enum


class ShardRole(Enum):
    """The role of a :class:`~halo_tensor.weight.tensor.HaloWeight` under FSDP2; the class draws how one becomes another."""

    WHOLE = "whole"
    """A whole weight that is not sharded."""
    CHUNK = "chunk"
    """Some rows or columns of a whole weight, from which a shard is copied."""
    PADDED = "padded"
    """The rows of one rank, followed by rows of zeros, so that all ranks have the same number of rows."""
    SHARD = "shard"
    """The rows of one rank: the parameter that an optimiser updates."""
    GATHERED = "gathered"
    """A whole weight made of the codes of all ranks. It has no master, since the shards have it, and it is trained."""

    @property
    def is_part(self) -> bool:
        """Whether the weight is only a part of a layer's matrix."""
        return self in (ShardRole.CHUNK, ShardRole.PADDED, ShardRole.SHARD)
