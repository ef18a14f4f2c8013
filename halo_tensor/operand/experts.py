"""ExpertsOperand: the codes of the weights of all experts of a layer."""

from typing import Any

import torch

from halo_tensor import ops
from halo_tensor.fences.pytorch import is_symbolic
from halo_tensor.operand.gains import Gains
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import ROW, Format, Rotation
from halo_tensor.reference.packing import unpack_rows


class ExpertsOperand(HadamardQuantTensor):
    """A stack of matrices [experts, out, in], quantised as the matrix [experts · out, in] of all their rows.

    Its shape is that of the stack, or of the parameter [experts, in, out] that it was made of.

    Attributes:
        codes, scale: of the matrix of all rows, [experts · out, in'] and [experts · out].
        turned_stack: codes [experts, in', out], which grad_input reads; None if every backward makes them. They take as many
            bytes as the codes.
        in_features_first: whether the parameter is [experts, in, out], as gpt-oss stores it.
    """

    _parts: tuple[str, ...] = (*HadamardQuantTensor._parts, "turned_stack")
    _tensors: tuple[str, ...] = (*HadamardQuantTensor._tensors, "turned_stack")
    _attributes: tuple[str, ...] = (*HadamardQuantTensor._attributes, "in_features_first")

    turned_stack: torch.Tensor | None = None
    in_features_first: bool = False

    @classmethod
    def from_stack(
        cls,
        stack: torch.Tensor,
        format: Format,
        rotation: Rotation | None,
        gains: Gains | None = None,
        *,
        in_features_first: bool = False,
        turned: bool = False,
    ) -> "ExpertsOperand":
        """Quantise the weights of experts.

        Args:
            stack: [experts, out, in], or [experts, in, out] if ``in_features_first``.
            format: of the codes.
            rotation: of in_features.
            gains: of in_features, float32 [in] and the inverse.
            in_features_first: the order of the dimensions of ``stack``.
            turned: hold the codes in the order of grad_input too.
        """
        rows = all_rows(stack, in_features_first)
        matrix = HadamardQuantTensor.from_hp(rows, format, ROW, column_rotation=rotation, gains=gains)
        tensors = {name: getattr(matrix, name) for name in matrix._tensors}
        attributes = {name: getattr(matrix, name) for name in matrix._attributes}
        made = cls(stack.shape, stack.dtype, tensors, attributes | {"in_features_first": in_features_first})
        if turned:
            made.turned_stack = ops.turn_stack(made.stacked_codes())
        return made

    @property
    def experts(self) -> int:
        """How many matrices there are."""
        return self.shape[0]

    @property
    def features(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.shape[2], self.shape[1]) if self.in_features_first else (self.shape[1], self.shape[2])

    def stacked_codes(self) -> torch.Tensor:
        """Return codes [experts, out, in'] that a matrix unit reads."""
        return self.any_codes().unflatten(0, (self.experts, -1))

    def stacked_scales(self) -> torch.Tensor:
        """Return float32 scales [experts, out]."""
        assert self.scale is not None
        return self.scale.view(self.experts, -1)

    def turned_codes(self) -> torch.Tensor:
        """Return codes [experts, in', out], those that are held, or new ones."""
        return ops.turn_stack(self.stacked_codes()) if self.turned_stack is None else self.turned_stack

    def experts_of(self, start: int, stop: int) -> HadamardQuantTensor:
        """Return the operand of experts ``start`` to ``stop``, on the same memory."""
        out, turned = self.features[0], self.turned_stack
        assert self.codes is not None and self.scale is not None
        rows = slice(start * out, stop * out)
        return self._with(
            size=torch.Size((stop - start, *self.shape[1:])), codes=self.codes[rows], scale=self.scale[rows],
            turned_stack=None if turned is None else turned[start:stop],
        )  # fmt: skip

    def rows_of_each(self, start: int, stop: int) -> HadamardQuantTensor:
        """Return the operand of rows ``start`` to ``stop`` of each expert's matrix [out, in], in memory of its own."""
        assert self.codes is not None and self.scale is not None and not self.in_features_first
        parts = (part.unflatten(0, (self.experts, -1)) for part in (self.codes, self.scale))
        codes, scale = (part[:, start:stop].flatten(0, 1) for part in parts)
        size = torch.Size((self.experts, stop - start, self.shape[2]))
        return self._with(size=size, codes=codes, scale=scale, turned_stack=None)

    def as_matrix(self, x: torch.Tensor) -> torch.Tensor:
        return all_rows(x, self.in_features_first)

    def after_requantize(self) -> None:
        if self.turned_stack is not None:
            ops.turn_stack_(self.stacked_codes(), self.turned_stack)

    def dequantize(self) -> torch.Tensor:
        """Return the stack that the codes stand for, in high precision and not rotated."""
        experts, (out, width) = self.experts, self.features
        matrix = self._as_one_matrix(torch.Size([experts * out, width])).dequantize()
        stack = matrix.view(experts, out, width)
        return ops.turn_stack(stack) if self.in_features_first else stack

    def _as_one_matrix(self, size: torch.Size) -> HadamardQuantTensor:
        tensors = {name: getattr(self, name) for name in HadamardQuantTensor._tensors}
        attributes = {name: getattr(self, name) for name in HadamardQuantTensor._attributes}
        return HadamardQuantTensor(size, self.dtype, tensors, attributes)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        names, attributes = super().__tensor_flatten__()
        return names, attributes | {"class": type(self)}


def unpacked(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Return codes that a matrix unit reads, of those that an operand holds, which may be packed."""
    if codes.dtype is not torch.uint8:
        return codes
    return (unpack_rows if is_symbolic() else ops.unpack_rows)(codes, format)


def all_rows(stack: torch.Tensor, in_features_first: bool) -> torch.Tensor:
    """Return the rows of all matrices as one matrix [experts · out, in]."""
    # PyTorch's general copy of a transposed view takes several times as long (docs/notes/experts.md).
    return (ops.turn_stack(stack.contiguous()) if in_features_first else stack).flatten(0, 1)
