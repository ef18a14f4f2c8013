"""HadamardQuantTensor: a rotated, quantised matrix that knows how to be multiplied.

It is an operand, not a parameter: it lives from its quantisation to its product (or, for what backward needs, from forward
to backward). What ``torch.mm`` makes of two of them is in :mod:`halo_tensor.operand.matmul`.
"""

from typing import cast

import torch

from halo_tensor import ops
from halo_tensor.fences.pytorch import TorchAOBaseTensor, is_symbolic, return_and_correct_aliasing
from halo_tensor.operand.gains import Gains, moved
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import code_dtype
from halo_tensor.reference.hadamard import factors
from halo_tensor.reference.packing import can_pack, pack_rows, unpack_columns, unpack_rows

aten = torch.ops.aten
_SWAPPED = {"row": "column", "column": "row"}


class HadamardQuantTensor(TorchAOBaseTensor):
    """A matrix [r, c] held as Rᵀ_left · matrix · R_right ≈ codes · scale.

    Attributes:
        codes: [r', c'], in the format's code dtype; None if only the transpose is held. Or uint8 [r', c'·3/4], packed fp6
            codes, which every product unpacks anew.
        codes_t: the transpose of the codes, [c', r'], or None. 8-bit tensor cores want both operands of a product contiguous
            along the contraction: a left operand is read from ``codes``, a right one from ``codes_t``.
        scale: float32, or None for 1 (a bare cast, or a scale that was folded into the other operand).
        scale_along: "row" (scale [r']), "column" ([c']), "tensor" ([]) or "block" ([⌈r'/32⌉, ⌈c'/32⌉]).
        left, right: the rotation of its rows and of its columns, or None.
        format: the number format of the codes; None for a rotated matrix left in high precision.
        gain, undo_gain: float32 [c], and its inverse: what its columns were multiplied with before they were rotated; or None.
            Products undo it.
        gain_along: "column"; "row" of a transpose, whose rows [r] the gain is of; None without one.
        dtype: what it stands in for, and what its products return.

    r' and c' are r and c padded to whole blocks of a rotation, or what its rank keeps of them. Make one with :meth:`from_hp`.
    """

    _parts = ("codes", "codes_t", "scale")  # its own; gains are constants that others hold too
    _tensors = (*_parts, "gain", "undo_gain")
    _attributes = ("scale_along", "left", "right", "format", "gain_along")

    codes: torch.Tensor | None
    codes_t: torch.Tensor | None
    scale: torch.Tensor | None
    scale_along: str
    left: Rotation | None
    right: Rotation | None
    format: Format | None
    gain: torch.Tensor | None = None
    undo_gain: torch.Tensor | None = None
    gain_along: str | None = None

    @staticmethod
    def __new__(cls, size, dtype, tensors, attributes):
        anchor = tensors["codes"] if tensors["codes"] is not None else tensors["codes_t"]
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=anchor.device)

    def __init__(self, size, dtype, tensors, attributes):
        for name in self._tensors:
            setattr(self, name, tensors.get(name))
        for name in self._attributes:
            setattr(self, name, attributes.get(name))

    @classmethod
    def from_hp(
        cls,
        x: torch.Tensor,
        format: Format | None,
        scale: str = "row",
        *,
        left: Rotation | None = None,
        right: Rotation | None = None,
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
            scale: "row", "column", "tensor", "block" or "unit" (no scale: a bare cast that saturates).
            left, right: rotations with a definite block. A dimension is padded with zeros to whole blocks.
            fold_rows, fold_columns: float32 [r'], [c'], multiplied into the rotated matrix before it is quantised: the scale
                of another operand that lies along the dimension contracted with this one.
            rows, columns: which layouts to hold, ``codes`` and ``codes_t``.
            rounding: "nearest" or "stochastic".
            gains: float32 [c] to multiply the columns with first, and its inverse.

        Raises:
            TypeError: ``x`` is not floating. ValueError: it is not a matrix, a rotation has no definite block that can be
                built, no layout is asked for, or gains do not fit, are on another device or are given without a format.
        """
        if not x.is_floating_point():
            raise TypeError(f"only floating tensors can be quantised; got {x.dtype}")
        if x.ndim != 2:
            raise ValueError(f"an operand is a matrix; got shape {list(x.shape)}. Flatten the leading dimensions first")
        if not (rows or columns):
            raise ValueError("ask for rows, columns or both: an operand with no codes is none")
        for side, rotation in (("left", left), ("right", right)):
            if rotation is not None and (rotation.block is None or factors(rotation.block) is None):
                raise ValueError(
                    f"the {side} rotation {rotation} has no Hadamard matrix of its block; take hadamard.fit(rotation, width)"
                )
        if gains is not None and (format is None or gains[0].shape != x.shape[1:]):
            raise ValueError(f"gains {list(gains[0].shape)} do not fit the columns of {list(x.shape)}, or there is no format")
        if gains is not None and not x.is_meta and gains[0].device != x.device:
            raise ValueError(f"gains on {gains[0].device} for a matrix on {x.device}: take gains.moved(gains, x.device)")
        if format is None:
            rotated = ops.rotate(x, left, right)
            codes, codes_t, scales = rotated if rows else None, rotated.t().contiguous() if columns else None, None
        else:
            codes, codes_t, scales = ops.rotate_quantize(
                x, left, right, format, scale, fold_rows=fold_rows, fold_columns=fold_columns, rows=rows, columns=columns,
                rounding=rounding, gain=None if gains is None else gains[0],
            )  # fmt: skip
        if scale == "unit":
            scale, scales = "tensor", None
        tensors = {"codes": codes, "codes_t": codes_t, "scale": scales}
        attributes = {"scale_along": scale, "left": left, "right": right, "format": format}
        made = cls(x.shape, x.dtype, tensors, attributes)
        made.gains = gains
        return made

    @classmethod
    def pair_from_hp(
        cls,
        x: torch.Tensor,
        format: Format,
        left: Rotation | None = None,
        fold_columns: torch.Tensor | None = None,
        fold_rows: torch.Tensor | None = None,
    ) -> "tuple[HadamardQuantTensor, HadamardQuantTensor]":
        """``from_hp(x, format, "row", left=left, fold_columns=fold_columns)`` and ``from_hp(x, format, "column",
        fold_rows=fold_rows, rows=False, columns=True)``, from fewer reads of x."""
        codes, codes_t, row_scales, column_scales = ops.quantize_pair(x, left, format, fold_columns, fold_rows)
        rows = {"codes": codes, "codes_t": None, "scale": row_scales}
        columns = {"codes": None, "codes_t": codes_t, "scale": column_scales}
        return (
            cls(x.shape, x.dtype, rows, {"scale_along": "row", "left": left, "right": None, "format": format}),
            cls(x.shape, x.dtype, columns, {"scale_along": "column", "left": None, "right": None, "format": format}),
        )

    @classmethod
    def plain(cls, x: torch.Tensor) -> "HadamardQuantTensor":
        """A matrix as it is, as the partner of one that is rotated and not quantised."""
        tensors = {"codes": x, "codes_t": None, "scale": None}
        return cls(x.shape, x.dtype, tensors, {"scale_along": "tensor", "left": None, "right": None, "format": None})

    @property
    def parts(self) -> list[torch.Tensor]:
        """The tensors that it holds as its own: codes and scales."""
        return [part for part in (getattr(self, name) for name in self._parts) if part is not None]

    @property
    def gains(self) -> Gains | None:
        return None if self.gain is None or self.undo_gain is None else (self.gain, self.undo_gain)

    @gains.setter
    def gains(self, gains: Gains | None) -> None:
        """Of an operand as it was made; its codes are not changed."""
        self.gain, self.undo_gain = gains or (None, None)
        self.gain_along = None if gains is None else "column"

    def requantize_(self, x: torch.Tensor) -> None:
        """Make this the operand of another matrix like the one it was made from (in rows, nothing folded in), in place."""
        assert self.codes is not None and self.codes_t is None
        if self.format is None:
            self.codes.copy_(ops.rotate(x, self.left, self.right))
        else:
            kind = "unit" if self.scale is None else self.scale_along
            scale = self.codes.new_empty((), dtype=torch.float32) if self.scale is None else self.scale
            codes, packed = (self._room_to_unpack(), self.codes) if self.is_packed else (self.codes, None)
            ops.rotate_quantize_(x, self.left, self.right, self.format, kind, codes, scale, self.gain)
            if packed is not None:
                ops.pack_rows_(codes, self.format, packed)
        torch.autograd.graph.increment_version(self.parts)

    @staticmethod
    def requantize_all_(operands: "list[HadamardQuantTensor]", matrices: list[torch.Tensor]) -> None:
        """:meth:`requantize_` of many, each of its matrix: one op for all that are quantised alike."""
        alike: dict[tuple, list[tuple[HadamardQuantTensor, torch.Tensor]]] = {}
        for operand, x in zip(operands, matrices, strict=True):
            how: tuple = (operand.left, operand.right, operand.format, operand.scale_along, x.device, operand.gain is None)
            traced = type(operand.codes) is not torch.Tensor  # or fake
            if operand.format is None or operand.scale is None or operand.is_packed or traced:
                how = (id(operand),)  # unlike any other
            alike.setdefault(how, []).append((operand, x))
        for group in alike.values():
            first, x = group[0]
            if len(group) == 1:
                first.requantize_(x)
                continue
            codes, scales, gains = ([getattr(o, name) for o, _ in group] for name in ("codes", "scale", "gain"))
            xs, gains = [x for _, x in group], [] if first.gain is None else gains
            ops.requantize_(xs, first.left, first.right, cast(Format, first.format), first.scale_along, codes, scales, gains)
            torch.autograd.graph.increment_version([*codes, *scales])

    def _with(self, *, size=None, dtype=None, **changes) -> "HadamardQuantTensor":
        tensors = {name: changes.get(name, getattr(self, name)) for name in self._tensors}
        attributes = {name: changes.get(name, getattr(self, name)) for name in self._attributes}
        return type(self)(self.shape if size is None else size, dtype or self.dtype, tensors, attributes)

    @property
    def is_packed(self) -> bool:
        return self.codes is not None and self.codes.dtype is torch.uint8

    def packed(self) -> "HadamardQuantTensor":
        """The same in its smallest storage: fp6 codes held in rows are packed, anything else is itself."""
        if self.codes is None or self.codes_t is not None or self.is_packed or not can_pack(self.codes, self.format):
            return self
        assert self.format is not None
        return self._with(codes=pack_rows(self.codes, self.format))

    def unpacked(self) -> "HadamardQuantTensor":
        """The same with codes that a matrix unit reads."""
        return self._with(codes=self.any_codes()) if self.is_packed else self

    @property
    def _packed(self) -> tuple[torch.Tensor, Format]:
        return cast(torch.Tensor, self.codes), cast(Format, self.format)

    def _room_to_unpack(self) -> torch.Tensor:
        packed, format = self._packed
        return packed.new_empty((packed.shape[0], packed.shape[1] // 3 * 4), dtype=code_dtype(format))

    def only(self, layout: str) -> "HadamardQuantTensor":
        """The same operand holding one layout, "rows" or "columns", so that the other can be freed."""
        return self._with(codes_t=None) if layout == "rows" else self._with(codes=None)

    def without_scale(self) -> "HadamardQuantTensor":
        """The bare codes, for a product whose other operand had this scale folded in."""
        return self._with(scale=None, scale_along="tensor")

    def any_codes(self) -> torch.Tensor:
        """The codes [r', c'] in whichever layout is held."""
        if self.is_packed:
            return (unpack_rows if is_symbolic() else ops.unpack_rows)(*self._packed)
        return self.codes if self.codes is not None else self.any_codes_t().t()

    def any_codes_t(self) -> torch.Tensor:
        """Their transpose [c', r'] in whichever layout is held."""
        if self.is_packed:
            return unpack_columns(*self._packed) if is_symbolic() else self.any_codes().t()
        return self.codes_t if self.codes_t is not None else self.any_codes().t()

    def dequantize(self) -> torch.Tensor:
        """The un-rotated high-precision matrix [r, c] that the codes stand for; what a rank has dropped is zero."""
        y = reference.dequantize(self.any_codes(), self.scale, self.scale_along)
        y = ops.unrotate(y, self.left, self.right, self.shape)
        if self.undo_gain is not None:
            undo = self.undo_gain.to(y.device)  # of a meta tensor it has stayed where its values are
            y = y * (undo if self.gain_along == "column" else undo.unsqueeze(1))
        return y.to(self.dtype)

    def __repr__(self):
        rows = "packed rows" if self.is_packed else "rows"
        layouts = "+".join(n for n, c in ((rows, self.codes), ("columns", self.codes_t)) if c is not None)
        scale = "none" if self.scale is None else f"per {self.scale_along}"
        gain = "" if self.gain is None else f"a gain per {self.gain_along}, "
        return (
            f"HadamardQuantTensor({list(self.shape)}, {self.format or 'high precision'}, scale {scale}, left {self.left}, "
            f"right {self.right}, {gain}{layouts}, dtype={self.dtype}, device='{self.device}')"
        )

    # TorchAOBaseTensor's plumbing, for optional inner tensors and a dtype that is not theirs.
    def __tensor_flatten__(self):
        names = [name for name in self._tensors if getattr(self, name) is not None]
        return names, {"dtype": self.dtype} | {name: getattr(self, name) for name in self._attributes}

    @classmethod
    def __tensor_unflatten__(cls, tensors, attributes, size, stride):
        return cls(size, attributes["dtype"], {name: tensors.get(name) for name in cls._tensors}, attributes)

    def _apply_fn_to_data(self, fn):
        new = self._with(**{name: fn(getattr(self, name)) for name in self._parts if getattr(self, name) is not None})
        if self.gain is not None:
            new.gain, new.undo_gain = moved(self.gains, new.device) or (None, None)
            new.gain_along = None if new.gain is None else self.gain_along
        return new


@HadamardQuantTensor.implements(
    [aten.detach.default, aten.clone.default, aten.alias.default, aten._pin_memory.default, aten.empty_like.default]
)
def _(func, types, args, kwargs):
    new = args[0]._apply_fn_to_data(lambda t: func(t, *args[1:], **kwargs))
    return return_and_correct_aliasing(func, args, kwargs, new)


@HadamardQuantTensor.implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    self = args[0]
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", None)  # of what it stands for; the codes keep theirs
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"a HadamardQuantTensor cannot stand for {dtype}; take dequantize().to({dtype})")
    return self._with(dtype=dtype)._apply_fn_to_data(lambda t: func(t, **kwargs))


@HadamardQuantTensor.implements([aten.t.default, aten.transpose.int])
def _(func, types, args, kwargs):
    self = args[0]
    if func is aten.transpose.int and args[1] % 2 == args[2] % 2:
        return aten.alias.default(self)
    return _transpose(func, types, args, kwargs)


# Above the dispatcher as well: an operand shared from outside of inference mode may then be transposed inside of it.
@HadamardQuantTensor.implements_torch_function([torch.Tensor.t, torch.t])
def _transpose(func, types, args, kwargs):
    self = args[0].unpacked()
    scale = self.scale.t().contiguous() if self.scale_along == "block" else self.scale
    return self._with(
        size=(self.shape[1], self.shape[0]),
        codes=self.codes_t,
        codes_t=self.codes,
        scale=scale,
        scale_along=_SWAPPED.get(self.scale_along, self.scale_along),
        left=self.right,
        right=self.left,
        gain_along=_SWAPPED.get(self.gain_along or ""),
    )
