"""The parameter of a converted layer.

This package imports its modules, since most of them add their part to :class:`HaloWeight`: what an op does with weights, or a
hook that FSDP2 calls.
"""

from halo_tensor.fences.fast_paths import DERIVED
from halo_tensor.fences.pytorch import is_compiled
from halo_tensor.weight import (
    copies,
    derived,
    exports,
    fsdp_hooks,
    low_rank,
    pickling,
    product_warnings,
    shard_ops,
    write_through,
)
from halo_tensor.weight.roles import ShardRole
from halo_tensor.weight.tensor import HaloWeight

__all__ = [
    "HaloWeight",
    "ShardRole",
    "copies",
    "derived",
    "exports",
    "fsdp_hooks",
    "low_rank",
    "pickling",
    "shard_ops",
    "write_through",
]


def _search_graph() -> None:
    """Have the graph that Dynamo makes searched; this needs Dynamo, which takes long to import."""
    if DERIVED.attempt(is_compiled) and (search := DERIVED.load("halo_tensor.weight.derived_graph")):
        DERIVED.attempt(search.install)


product_warnings.WHEN_TRACED.append(_search_graph)
