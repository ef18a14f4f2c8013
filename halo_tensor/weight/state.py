"""The state of a converted weight's codes: whether they are up to date, lent, shared and sent."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products.eager import Ready

#: The identity of a master, its version, and the version of the DTensor of it that state dicts hold.
MasterVersion = tuple[int, int | None, int | None]


@dataclass(eq=False, slots=True)
class CodesState:
    """The state of the codes of a weight. A weight and its aliases (``detach()``, the parameter made of it) share one
    operand, and so one of these. Copies and pickles of a weight start with a new one.

    Attributes:
        version: of the master when the codes were made from it; None of a frozen weight.
        lent: whether a state dict has been given the master since then. Writes to it may change no version.
        lent_dtensor: the DTensor of a shard's master that state dicts hold.
        common_scale_version: the version of the codes when they got a scale that all ranks share.
        kind: the operand, and how it is quantised together with others: see :mod:`halo_tensor.weight.requantize`.
        ready: what the last ``F.linear`` in eager code found: see :mod:`halo_tensor.products.eager`.
        sent: what a shard sends before each gather: tensors that share the memory of the codes, and metadata.
        scales_in_rows: the scales in the rows that a shard sends, or that a gathered weight was made of, float32 [rows]: see
            :mod:`halo_tensor.weight.sent_rows`.
        sends_scales: whether a shard's scales have been copied there since they were last computed.
        has_sent_scales: whether the gathered weight has got them since then.
    """

    version: MasterVersion | None = None
    lent: bool = False
    lent_dtensor: DTensor | None = None
    common_scale_version: int | None = None
    kind: tuple[HadamardQuantTensor, Any] | None = None
    ready: Ready | None = None
    sent: tuple[tuple[torch.Tensor, ...], dict[str, Any]] | None = None
    scales_in_rows: torch.Tensor | None = None
    sends_scales: bool = False
    has_sent_scales: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "CodesState":
        return CodesState()

    def master_version(self, master: torch.Tensor | None) -> MasterVersion | None:
        """A value that changes when ``master`` is written to, or is another tensor."""
        if master is None:
            return None
        lent = self.lent_dtensor  # its version tells of ops on the DTensor, which its shard's version does not
        return id(master), None if master.is_inference() else master._version, None if lent is None else lent._version

    def is_of(self, master: torch.Tensor) -> bool:
        """Whether ``version`` is that of a master as it is now."""
        version = self.version
        if version is None or version[0] != id(master):
            return False
        if self.lent_dtensor is None and version[2] is None and version[1] is not None and not master.is_inference():
            return version[1] == master._version
        return version == self.master_version(master)

    def has_common_scale(self, operand: HadamardQuantTensor) -> bool:
        """Whether the codes of ``operand`` were made with a scale that all ranks share, and not written to since then."""
        return operand.codes is not None and self.common_scale_version == operand.codes._version

    def mark_common_scale(self, operand: HadamardQuantTensor) -> None:
        """Note that the codes of ``operand``, as they are now, have a scale that all ranks share."""
        assert operand.codes is not None
        self.common_scale_version = operand.codes._version
