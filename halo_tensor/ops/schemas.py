"""The schemas of ``torch.ops.halo.*``, how a rotation crosses the dispatcher, and which kind of mode listens there."""

import torch

from halo_tensor.recipe import Rotation

library = torch.library.Library("halo", "DEF")
for _schema in (
    "rotate_quantize(Tensor x, int[] left, int[] right, str format, str scale, Tensor? fold_rows, Tensor? fold_columns, "
    "bool rows, bool columns, Tensor? seed, Tensor? gain) -> (Tensor codes, Tensor codes_t, Tensor scales)",
    "rotate_quantize_(Tensor x, int[] left, int[] right, str format, str scale, Tensor(a!) codes, Tensor(b!) scales, "
    "Tensor? gain) -> ()",
    "requantize_(Tensor[] xs, int[] left, int[] right, str format, str scale, Tensor(a!)[] codes, Tensor(b!)[] scales, "
    "Tensor[] gains) -> ()",
    "quantize_pair(Tensor x, int[] left, str format, Tensor? fold_columns, Tensor? fold_rows) "
    "-> (Tensor codes, Tensor codes_t, Tensor row_scales, Tensor column_scales)",
    "quantize_pairs(Tensor a, Tensor b, str format, Tensor columns_a, Tensor rows_a, Tensor columns_b, Tensor rows_b) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "scaled_mm(Tensor a, Tensor b_t, Tensor? a_scale, Tensor? b_scale, Tensor? bias, int[] left, int[] right, "
    "SymInt[] shape, ScalarType dtype, Tensor? gain) -> Tensor",
    "rotate(Tensor x, int[] left, int[] right) -> Tensor",
    "unrotate(Tensor x, int[] left, int[] right, SymInt[] shape) -> Tensor",
    "pack_rows_(Tensor codes, str format, Tensor(a!) packed) -> ()",
    "unpack_rows(Tensor packed, str format) -> Tensor",
):
    library.define(_schema, tags=(torch.Tag.needs_exact_strides,))


def encode(rotation: Rotation | None) -> list[int]:
    """Empty for none, else [block, seed], with seed −1 for no signs, or [block, seed, rank]."""
    if rotation is None:
        return []
    code = [rotation.edge, -1 if rotation.seed is None else rotation.seed]
    return code if rotation.rank is None else [*code, rotation.rank]


def decode(code: list[int]) -> Rotation | None:
    return Rotation(code[0], None if code[1] < 0 else code[1], *code[2:]) if code else None
