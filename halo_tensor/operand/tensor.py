"""HadamardQuantTensor: a rotated, quantised matrix that can be multiplied.

It is an operand, not a parameter. It lives from its quantisation to its product, or from forward to backward if backward needs
it. The ops that take one are in :mod:`halo_tensor.operand.copies` and :mod:`halo_tensor.operand.matmul`.
"""

from collections.abc import Callable
from typing import Any, Self, cast

import torch

from halo_tensor import ops
from halo_tensor.fences.pytorch import TorchAOBaseTensor, is_symbolic
from halo_tensor.kernels.device import check_scales
from halo_tensor.operand.checks import check_gains, check_matrix
from halo_tensor.operand.gains import Gains, moved
from halo_tensor.operand.old_names import accepts_old_names, old_attribute, present_state
from halo_tensor.ops.quantizers import draw_seed, lies_flat, unflattened
from halo_tensor.recipe import COLUMN, ROW, UNIT, Format, Rotation, Scales
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import code_dtype
from halo_tensor.reference.packing import can_pack, pack_rows, unpack_columns, unpack_rows


class HadamardQuantTensor(TorchAOBaseTensor):
    """A matrix [r, c] that is held as Rᵀ_rows · matrix · R_columns ≈ codes · scale. Make one with :meth:`from_hp`.

    r' and c' are r and c padded to whole blocks of a rotation, or the part of those that its rank keeps.

    Attributes:
        codes: [r', c'], in the format's code dtype; None if only the transpose is held. Or uint8 [r', c'·3/4], packed fp6
            codes, which every product unpacks.
        codes_t: the transpose of the codes, [c', r'], or None. 8-bit tensor cores read both operands of a product contiguous
            along the contraction: a left operand from ``codes``, a right one from ``codes_t``.
        scale: float32 [granularity.shape(r', c')]; None for 1 (a bare cast, or a scale folded into the other operand).
        granularity: the layout of the scales; UNIT if there are none.
        row_rotation, column_rotation: the rotations of its rows and of its columns, or None.
        format: the number format of the codes; None for a rotated matrix in high precision.
        gain, undo_gain: float32 [c] that its columns were multiplied with before they were rotated, and the inverse; or None.
            Products undo it.
        gain_axis: "columns"; "rows" of a transpose, whose rows [r] carry the gain; None without one.
        flat: "columns" if ``codes_t`` is the memory of the matrix, a vector, "rows" if ``codes`` is (of a transpose): see
            :func:`halo_tensor.ops.quantizers.lies_flat`; None in eager code, and if sizes are constant.
        dtype: of the matrix that it stands for, and of its products.

    Example:
        >>> import torch
        >>> from halo_tensor import HadamardQuantTensor
        >>> from halo_tensor.recipe import INT8, Rotation
        >>> x, w = torch.randn(8, 64), torch.randn(16, 64)
        >>> a = HadamardQuantTensor.from_hp(x, INT8, column_rotation=Rotation(64))
        >>> b = HadamardQuantTensor.from_hp(w, INT8, column_rotation=Rotation(64))
        >>> y = torch.mm(a, b.t())  # ≈ x @ w.t()
        >>> y.shape
        torch.Size([8, 16])
    """

    _parts: tuple[str, ...] = ("codes", "codes_t", "scale")  # its own; gains are constants that others hold too
    _tensors: tuple[str, ...] = (*_parts, "gain", "undo_gain")
    _attributes: tuple[str, ...] = ("granularity", "row_rotation", "column_rotation", "format", "gain_axis", "flat")

    codes: torch.Tensor | None
    codes_t: torch.Tensor | None
    scale: torch.Tensor | None
    granularity: Scales
    row_rotation: Rotation | None
    column_rotation: Rotation | None
    format: Format | None
    gain: torch.Tensor | None = None
    undo_gain: torch.Tensor | None = None
    gain_axis: str | None = None
    flat: str | None = None

    @staticmethod
    def __new__(
        cls: type[Self], size: torch.Size, dtype: torch.dtype, tensors: dict[str, torch.Tensor | None], attributes: dict
    ) -> Self:
        """Make a wrapper of this size and dtype, without memory of its own."""
        anchor = cast(torch.Tensor, tensors["codes"] if tensors["codes"] is not None else tensors["codes_t"])
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=anchor.device)

    def __init__(
        self, size: torch.Size, dtype: torch.dtype, tensors: dict[str, torch.Tensor | None], attributes: dict[str, Any]
    ) -> None:
        for name in self._tensors:
            setattr(self, name, tensors.get(name))
        for name in self._attributes:
            setattr(self, name, attributes.get(name))

    @classmethod
    @accepts_old_names
    def from_hp(
        cls,
        x: torch.Tensor,
        format: Format | None,
        granularity: Scales | str = ROW,
        *,
        row_rotation: Rotation | None = None,
        column_rotation: Rotation | None = None,
        fold_rows: torch.Tensor | None = None,
        fold_columns: torch.Tensor | None = None,
        rows: bool = True,
        columns: bool = False,
        rounding: str = "nearest",
        gains: Gains | None = None,
    ) -> "HadamardQuantTensor":
        """Rotate and quantise a matrix.

        Args:
            x: [r, c], floating, any strides.
            format: the number format, or None to rotate only.
            granularity: the layout of the scales, or its name: "row", "column", "tensor", "32x32" or "unit" (no scales: a
                bare cast that saturates). See :class:`~halo_tensor.recipe.Scales`.
            row_rotation: the rotation of the rows, with a definite block. Rows of zeros are added up to whole blocks.
            column_rotation: the rotation of the columns, likewise.
            fold_rows: float32 [r'], a factor for each row of the rotated matrix, by which it is multiplied before it is
                quantised: the scale of another operand, which lies along the dimension that is contracted with this one.
            fold_columns: float32 [c'], a factor for each column, likewise.
            rows: whether to hold ``codes``.
            columns: whether to hold ``codes_t``.
            rounding: "nearest" or "stochastic".
            gains: float32 [c] that multiply the columns first, and their inverse.

        Returns:
            The operand, of x's shape, dtype and device.

        Raises:
            TypeError: ``x`` is not floating.
            ValueError: ``x`` is not a matrix, a rotation has no definite block with a Hadamard matrix, no layout is asked
                for, the granularity is unknown, or gains do not fit, are on another device or are given without a format.
            RuntimeError: x is on a CUDA device and no kernel computes with such scales.
        """
        granularity = UNIT if format is None else Scales.of(granularity)
        check_matrix(x, rows or columns, row_rotation, column_rotation)
        check_gains(gains, x, format)
        if format is None:
            rotated = ops.rotate(x, row_rotation, column_rotation)
            codes, codes_t, scale = rotated if rows else None, rotated.t().contiguous() if columns else None, None
            flat = False
        else:
            check_scales((granularity,), x.device)
            flat = columns and not granularity.is_blocked and lies_flat(x)
            codes, codes_t, scale = ops.rotate_quantize(
                x, row_rotation, column_rotation, format, granularity, fold_rows=fold_rows, fold_columns=fold_columns,
                rows=rows, columns=columns, rounding=rounding, gain=None if gains is None else gains[0], flat=flat,
            )  # fmt: skip
        scale = None if granularity == UNIT else scale
        made = cls._of(x, format, granularity, codes, codes_t, scale, row_rotation, column_rotation, flat)
        made.gains = gains
        return made

    @classmethod
    @accepts_old_names
    def pair_from_hp(
        cls,
        x: torch.Tensor,
        format: Format,
        row_rotation: Rotation | None = None,
        fold_columns: torch.Tensor | None = None,
        fold_rows: torch.Tensor | None = None,
    ) -> "tuple[HadamardQuantTensor, HadamardQuantTensor]":
        """Return two operands of one matrix, with fewer reads of it than two calls of :meth:`from_hp` need.

        They are ``from_hp(x, format, ROW, row_rotation=row_rotation, fold_columns=fold_columns)`` and ``from_hp(x, format,
        COLUMN, fold_rows=fold_rows, rows=False, columns=True)``.
        """
        flat = lies_flat(x)
        codes, codes_t, *scales = ops.quantize_pair(x, row_rotation, format, fold_columns, fold_rows, flat)
        return (
            cls._of(x, format, ROW, codes, None, scales[0], row_rotation),
            cls._of(x, format, COLUMN, None, codes_t, scales[1], flat=flat),
        )

    @classmethod
    def both_from_hp(
        cls,
        x: torch.Tensor,
        formats: tuple[Format, Format],
        granularities: tuple[Scales, Scales],
        *,
        column_rotation: Rotation | None = None,
        row_rotation: Rotation | None = None,
        rounding: str = "nearest",
    ) -> "tuple[HadamardQuantTensor, HadamardQuantTensor]":
        """Return two operands of one matrix, of which the first rotates columns and the second rows, with fewer reads of it
        than two calls of :meth:`from_hp` need.

        They are ``from_hp(x, formats[0], granularities[0], column_rotation=column_rotation, rounding=rounding)`` with ROW or
        TENSOR, and ``from_hp(x, formats[1], granularities[1], row_rotation=row_rotation, rows=False, columns=True)`` with
        COLUMN or TENSOR.
        """
        flat = lies_flat(x)
        seed = draw_seed(x.device) if rounding == "stochastic" else None
        codes, codes_t, *scales = ops.quantize_both(
            x, column_rotation, formats[0], granularities[0], row_rotation, formats[1], granularities[1], seed, flat
        )
        return (
            cls._of(x, formats[0], granularities[0], codes, None, scales[0], None, column_rotation),
            cls._of(x, formats[1], granularities[1], None, codes_t, scales[1], row_rotation, flat=flat),
        )

    @classmethod
    def plain(cls, x: torch.Tensor) -> "HadamardQuantTensor":
        """Return a matrix as an operand in high precision, to be multiplied with one that is rotated and not quantised."""
        return cls._of(x, None, UNIT, x, None, None)

    @classmethod
    def _of(
        cls,
        x: torch.Tensor,
        format: Format | None,
        granularity: Scales,
        codes: torch.Tensor | None,
        codes_t: torch.Tensor | None,
        scale: torch.Tensor | None,
        row_rotation: Rotation | None = None,
        column_rotation: Rotation | None = None,
        flat: bool = False,
    ) -> "HadamardQuantTensor":
        """Return the operand that stands for x and holds these codes and scales."""
        tensors = {"codes": codes, "codes_t": codes_t, "scale": scale}
        attributes = {
            "granularity": granularity, "row_rotation": row_rotation, "column_rotation": column_rotation, "format": format,
            "flat": "columns" if flat else None,
        }  # fmt: skip
        return cls(x.shape, x.dtype, tensors, attributes)

    left, right = old_attribute("left", "row_rotation"), old_attribute("right", "column_rotation")
    scale_along = old_attribute("scale_along", "granularity")

    @property
    def parts(self) -> list[torch.Tensor]:
        """The tensors that no other operand holds: codes and scales."""
        return [part for part in self.all_parts if part is not None]

    @property
    def all_parts(self) -> list[torch.Tensor | None]:
        """The same, with None for each that this operand does not hold."""
        return [getattr(self, name) for name in self._parts]

    @property
    def gains(self) -> Gains | None:
        """The gain and its inverse."""
        return None if self.gain is None or self.undo_gain is None else (self.gain, self.undo_gain)

    @gains.setter
    def gains(self, gains: Gains | None) -> None:
        """Set the gain that the codes were made with. It does not change them."""
        self.gain, self.undo_gain = gains or (None, None)
        self.gain_axis = None if gains is None else "columns"

    def requantize_(self, x: torch.Tensor) -> None:
        """Quantise another matrix like the one that this operand was made of, in place.

        The operand must hold one layout, and have been made without folds.
        """
        assert (self.codes is None) != (self.codes_t is None)
        rotations, x = (self.row_rotation, self.column_rotation), self.as_matrix(x)
        if self.codes is None:
            self._requantize_columns(x)
        elif self.format is None:
            self.codes.copy_(ops.rotate(x, *rotations))
        else:
            scale = self.codes.new_empty((), dtype=torch.float32) if self.scale is None else self.scale
            codes, packed = (self._room_to_unpack(), self.codes) if self.is_packed else (self.codes, None)
            ops.rotate_quantize_(x, *rotations, self.format, self.granularity, codes, scale, self.gain)
            if packed is not None:
                ops.pack_rows_(codes, self.format, packed)
        self.after_requantize()
        torch.autograd.graph.increment_version(self.parts)

    def _requantize_columns(self, x: torch.Tensor) -> None:
        codes_t, rotations = cast(torch.Tensor, self.codes_t), (self.row_rotation, self.column_rotation)
        if self.format is None:
            codes_t.copy_(ops.rotate(x, *rotations).t())
            return
        scale = codes_t.new_empty((), dtype=torch.float32) if self.scale is None else self.scale
        ops.rotate_quantize_(x, *rotations, self.format, self.granularity, codes_t, scale, self.gain, transposed=True)

    def as_matrix(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of this operand's shape as the matrix that its codes were made of."""
        return x

    def after_requantize(self) -> None:
        """Bring what was computed from the codes up to date."""

    def _with(
        self, *, size: torch.Size | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> "HadamardQuantTensor":
        tensors = {name: changes.get(name, getattr(self, name)) for name in self._tensors}
        attributes = {name: changes.get(name, getattr(self, name)) for name in self._attributes}
        return type(self)(self.shape if size is None else size, dtype or self.dtype, tensors, attributes)

    @property
    def is_packed(self) -> bool:
        """Whether it holds fp6 codes in ¾ of a byte each."""
        return self.codes is not None and self.codes.dtype is torch.uint8

    def packed(self) -> "HadamardQuantTensor":
        """Return the operand in its smallest storage: with packed codes if it holds fp6 codes in rows, else itself."""
        if self.codes is None or self.codes_t is not None or self.is_packed or not can_pack(self.codes, self.format):
            return self
        assert self.format is not None
        return self._with(codes=pack_rows(self.codes, self.format))

    def unpacked(self) -> "HadamardQuantTensor":
        """Return the operand with codes that a matrix unit reads."""
        return self._with(codes=self.any_codes()) if self.is_packed else self

    @property
    def _packed(self) -> tuple[torch.Tensor, Format]:
        return cast(torch.Tensor, self.codes), cast(Format, self.format)

    def _room_to_unpack(self) -> torch.Tensor:
        packed, format = self._packed
        return packed.new_empty((packed.shape[0], packed.shape[1] // 3 * 4), dtype=code_dtype(format))

    def only(self, layout: str) -> "HadamardQuantTensor":
        """Return the operand with one layout, "rows" or "columns", so that the other can be freed."""
        return self._with(codes_t=None) if layout == "rows" else self._with(codes=None)

    def without_scale(self) -> "HadamardQuantTensor":
        """Return the operand without its scale, for a product whose other operand has the scale folded in."""
        return self._with(scale=None, granularity=UNIT)

    def any_codes(self) -> torch.Tensor:
        """Return the codes [r', c'] from the layout that is held."""
        if self.is_packed:
            return (unpack_rows if is_symbolic() else ops.unpack_rows)(*self._packed)
        if self.codes is None:
            return self.any_codes_t().t()
        return (
            unflattened(self.codes, reference.rotated(self.shape[0], self.row_rotation)) if self.flat == "rows" else self.codes
        )

    def any_codes_t(self) -> torch.Tensor:
        """Return the transposed codes [c', r'] from the layout that is held."""
        if self.is_packed:
            return unpack_columns(*self._packed) if is_symbolic() else self.any_codes().t()
        if self.codes_t is None:
            return self.any_codes().t()
        if self.flat == "columns":
            return unflattened(self.codes_t, reference.rotated(self.shape[1], self.column_rotation))
        return self.codes_t

    def element_scales(self) -> torch.Tensor | None:
        """Return the scales as products take them: with one for each element, [r', c'], if they vary along both dimensions."""
        if self.scale is None or not self.granularity.is_blocked:
            return self.scale
        return self.granularity.spread(self.scale, *self.any_codes().shape)

    def dequantize(self) -> torch.Tensor:
        """Return the matrix [r, c] that the codes stand for, in high precision and not rotated.

        The part that a rank has dropped is zero.
        """
        along_columns = not self.granularity.is_blocked and not self.granularity.is_per("rows")
        if self.codes is None and self.column_rotation is None and self.gain is None and along_columns:
            return ops.dequantize_t(self.any_codes_t(), self.scale, self.row_rotation, self.shape, self.dtype)
        y = reference.dequantize(self.any_codes(), self.scale, self.granularity)
        y = ops.unrotate(y, self.row_rotation, self.column_rotation, self.shape)
        if self.undo_gain is not None:
            undo = self.undo_gain.to(y.device)  # the gain of a meta tensor stays where its values are
            y = y * (undo if self.gain_axis == "columns" else undo.unsqueeze(1))
        return y.to(self.dtype)

    def __repr__(self) -> str:
        rows = "packed rows" if self.is_packed else "rows"
        layouts = "+".join(n for n, c in ((rows, self.codes), ("columns", self.codes_t)) if c is not None)
        scale = "none" if self.scale is None else f"per {self.granularity}"
        gain = "" if self.gain is None else f"a gain of its {self.gain_axis}, "
        return (
            f"{type(self).__name__}({list(self.shape)}, {self.format or 'high precision'}, scale {scale}, row_rotation "
            f"{self.row_rotation}, column_rotation {self.column_rotation}, {gain}{layouts}, dtype={self.dtype}, "
            f"device='{self.device}')"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle of this version, or of 0.1.0, whose attributes had other names."""
        state = present_state(state)
        self.__dict__.update({name: state.get(name) for name in (*self._tensors, *self._attributes)})

    # TorchAOBaseTensor's own methods know no optional inner tensors, and no dtype other than theirs.
    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        names = [name for name in self._tensors if getattr(self, name) is not None]
        return names, {"dtype": self.dtype} | {name: getattr(self, name) for name in self._attributes}

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: dict[str, torch.Tensor], attributes: dict[str, Any], size: torch.Size, stride: tuple[int, ...]
    ) -> "HadamardQuantTensor":
        cls = attributes.get("class", cls)
        return cls(size, attributes["dtype"], {name: tensors.get(name) for name in cls._tensors}, attributes)

    def _apply_fn_to_data(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "HadamardQuantTensor":
        changed: dict[str, Any] = {name: fn(part) for name in self._parts if (part := getattr(self, name)) is not None}
        new = self._with(**changed)
        if self.gain is not None:
            new.gain, new.undo_gain = moved(self.gains, new.device) or (None, None)
            new.gain_axis = None if new.gain is None else self.gain_axis
        return new
