"""Layouts of scales: which elements of a matrix share a scale, and in which number format scales are kept.

A quantised matrix is codes · scales. A :class:`Scales` describes the scales. The recipe language, the reference, tensors,
sharding and analysis ask it for shapes, cuts and bytes; none of them distinguishes layouts by name.
"""

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from math import prod

import torch

from halo_tensor.recipe.formats import E8M0, FLOAT32, FP8_E4M3, Constant, Format

#: The names of a matrix's two dimensions. A recipe has names of its own (``language.DIMENSIONS``), see :meth:`Scales.on`.
AXES = ("rows", "columns")
_NAMED_DIMENSIONS = ("tokens", "in_features", "out_features")
#: The formats in which a scale can be kept.
_DTYPES = {format.name: format for format in (FLOAT32, E8M0, FP8_E4M3)}
#: The name of the scale that a scale of each row (column) has.
_SINGULAR = {"rows": "row", "columns": "column"}


@dataclass(frozen=True, repr=False)
class Scales(Constant):
    """The layout of a matrix's scales.

    Make one with :meth:`per`, or by name with :meth:`of`:

    ==================================================  =======================  =================================
    layout                                              name                     one scale for
    ==================================================  =======================  =================================
    ``Scales.per()``                                    tensor                   the whole matrix
    ``Scales.per(rows=1)``                              row                      each row
    ``Scales.per(columns=1)``                           column                   each column
    ``Scales.per(rows=32, columns=32)``                 32x32                    each block of 32×32
    ``Scales.per(rows=1, columns=32, dtype=E8M0)``      1x32/e8m0                32 neighbours of a row (MXFP8)
    ``Scales.per(rows=1, columns=16, dtype=FP8_E4M3,    1x16/fp8_e4m3/float32    16 neighbours of a row, and one
    two_levels=True)``                                                           more for the matrix (NVFP4)
    ``UNIT``                                            unit                     nothing: a bare cast
    ==================================================  =======================  =================================

    In a recipe the dimensions have names: ``Scales.per(tokens=1)`` is one scale per token.

    Attributes:
        block: the block of elements that share a scale, as pairs (dimension, number of its indices). A block spans the whole
            of a dimension that is not listed.
        dtype: the number format of a scale: FLOAT32, E8M0 or FP8_E4M3; None if there are no scales.
        two_levels: whether each scale is multiplied with one float32 for the whole matrix.
    """

    block: tuple[tuple[str, int], ...] = ()
    dtype: Format | None = FLOAT32
    two_levels: bool = False

    def __post_init__(self) -> None:
        names = [name for name, _ in self.block]
        if len(names) > 2 or not (set(names) <= set(AXES) or set(names) <= set(_NAMED_DIMENSIONS)):
            raise ValueError(
                f"a block of scales lies along at most two of {', '.join(AXES)}, or of {', '.join(_NAMED_DIMENSIONS)}; got "
                f"{', '.join(names)}"
            )
        if any(type(length) is not int or length < 1 for _, length in self.block):
            raise ValueError(f"the lengths of a block of scales must be integers of at least 1; got {dict(self.block)}")
        if self.dtype is not None and self.dtype not in _DTYPES.values():
            raise ValueError(f"scales are kept in {', '.join(_DTYPES)}; got {self.dtype}")
        if (self.dtype is None and self.block) or (self.two_levels and not self.block):
            raise ValueError("a layout without scales has no block, and two levels of scales need blocks on the first")

    @staticmethod
    def per(dtype: Format = FLOAT32, two_levels: bool = False, **block: int) -> "Scales":
        """Return the layout with one scale for each block.

        Args:
            dtype: the number format of a scale.
            two_levels: multiply each scale with one float32 for the whole matrix.
            block: how many indices of each dimension share a scale, by the dimension's name: ``rows`` and ``columns``, or
                two of ``tokens``, ``in_features`` and ``out_features``. A block spans the whole of any other dimension.

        Raises:
            ValueError: unknown dimensions, lengths that are no positive integers, or another dtype.
        """
        return _interned(Scales(tuple(sorted(block.items())), dtype, two_levels))

    @staticmethod
    def of(layout: "Scales | str") -> "Scales":
        """Return the layout with a name, as in the table above; a layout is returned as it is.

        Raises:
            ValueError: there is no layout of that name.
        """
        return layout if isinstance(layout, Scales) else _parse(layout)

    def on(self, dims: tuple[str, str]) -> "Scales":
        """Return the same layout for a matrix over ``dims``, with ``rows`` and ``columns`` in their place.

        Raises:
            ValueError: the layout names another dimension.
        """
        return _on(self, dims)

    @cached_property
    def name(self) -> str:
        """The layout's name. :meth:`of` reads it if the dimensions are rows and columns."""
        block = dict(self.block)
        if self.dtype is None:
            return "unit"
        if not block:
            return "tensor"
        if self.is_vector:
            (axis,) = block
            name = _SINGULAR.get(axis, axis)
        elif set(block) == set(AXES):
            name = f"{block['rows']}x{block['columns']}"
        else:
            name = ",".join(f"{axis}={length}" for axis, length in self.block)
        return name + (f"/{self.dtype}" if self.dtype != FLOAT32 else "") + ("/float32" if self.two_levels else "")

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Scales({self.name})"

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without cached properties

    # The block.

    def length(self, axis: str) -> int | None:
        """Return how many indices of a dimension share a scale; None for all of them."""
        return dict(self.block).get(axis)

    def is_per(self, axis: str) -> bool:
        """Whether there is one scale for each index of a dimension, and no more than that."""
        return self.block == ((axis, 1),)

    @cached_property
    def is_vector(self) -> bool:
        """Whether there is one scale for each index of one dimension."""
        return len(self.block) == 1 and self.block[0][1] == 1

    @cached_property
    def is_blocked(self) -> bool:
        """Whether scales vary along a contracted dimension, so that they cannot be applied to a product's result."""
        return bool(self.block) and not self.is_vector

    @cached_property
    def is_square(self) -> bool:
        """Whether a block has no orientation: a matrix and its transpose have the same layout, over any two dimensions."""
        return not self.block or self.length("rows") == self.length("columns") is not None

    @cached_property
    def transposed(self) -> "Scales":
        """The layout of the transposed matrix."""
        return self if self.is_square else self.on(("columns", "rows"))

    # The tensor of scales.

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the scales of a matrix [rows, columns]: a dimension that a block spans has no dimension here."""
        lengths = zip(map(self.length, AXES), (rows, columns), strict=True)
        return tuple(-(-size // length) for length, size in lengths if length is not None)

    def bytes(self, rows: int, columns: int) -> int:
        """Return how many bytes the scales of a matrix [rows, columns] take in their number format."""
        if self.dtype is None:
            return 0
        return prod(self.shape(rows, columns)) * self.dtype.bits // 8 + (4 if self.two_levels else 0)

    def spread(self, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return the scales of a matrix [rows, columns] in a shape that broadcasts over it.

        Args:
            scale: [:meth:`shape`].

        Returns:
            [rows, columns] for blocks; [rows, 1], [1, columns] or [] where no block is longer than 1.
        """
        if not self.block:
            return scale
        for dim, (axis, size) in enumerate(zip(AXES, (rows, columns), strict=True)):
            length = self.length(axis)
            if length is None:
                scale = scale.unsqueeze(dim)
            elif length > 1:
                # Not repeat_interleave and narrow: Inductor's C++ (torch 2.13) leaves out the last block's part of the slice.
                scale = scale.index_select(dim, torch.arange(size, device=scale.device) // length)
        return scale

    def cut(self, scale: torch.Tensor, axis: str, start: int, stop: int) -> torch.Tensor:
        """Return the scales of a part of a matrix: of the indices from ``start`` to ``stop`` of a dimension.

        Args:
            scale: the scales of the whole matrix, [:meth:`shape`].
            axis: "rows" or "columns".

        Raises:
            ValueError: ``start`` lies inside of a block.
        """
        length = self.length(axis)
        if length is None:
            return scale
        if start % length:
            raise ValueError(f"{axis} from {start} on begin inside of a block of {length}, which has one scale")
        dim = 0 if axis == "rows" or self.length("rows") is None else 1
        first = start // length
        return scale.narrow(dim, first, max(-(-stop // length) - first, 0))


@lru_cache(maxsize=256)
def _interned(layout: Scales) -> Scales:
    """Return one object for all equal layouts: compiled code compares layouts in every call, and identity is found first."""
    return layout


@lru_cache(maxsize=256)
def _on(layout: Scales, dims: tuple[str, str]) -> Scales:
    if layout.is_square:
        return layout
    names = dict(zip(dims, AXES, strict=True))
    if unknown := [axis for axis, _ in layout.block if axis not in names]:
        raise ValueError(f"a matrix over {dims[0]} and {dims[1]} has no scales along {unknown[0]}")
    return _interned(replace(layout, block=tuple(sorted((names[axis], length) for axis, length in layout.block))))


@lru_cache(maxsize=256)
def _parse(name: str) -> Scales:
    if name in _NAMED:
        return _NAMED[name]
    match = re.fullmatch(r"(\d+)x(\d+)(?:/(\w+?))??(/float32)?", str(name))
    if match is None or (match[3] or "float32") not in _DTYPES:
        raise ValueError(
            f"a layout of scales is one of {', '.join(_NAMED)}, or a block such as 32x32, 1x32/e8m0 or "
            f"1x16/fp8_e4m3/float32; got {name!r}"
        )
    return Scales.per(_DTYPES[match[3] or "float32"], match[4] is not None, rows=int(match[1]), columns=int(match[2]))


TENSOR = Scales.per()
ROW = Scales.per(rows=1)
COLUMN = Scales.per(columns=1)
#: No scales: all are 1.
UNIT = _interned(Scales(dtype=None))
_NAMED = {"tensor": TENSOR, "row": ROW, "column": COLUMN, "unit": UNIT} | {
    dimension: _interned(Scales(((dimension, 1),))) for dimension in _NAMED_DIMENSIONS
}
