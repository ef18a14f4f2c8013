"""How ops are declared: one signature each, from which schema and conversions follow."""

import inspect

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from halo_tensor import ops
from halo_tensor.ops import register
from halo_tensor.recipe import FP6_E2M3, INT8, Rotation

NAMES = [
    "rotate_quantize",
    "rotate_quantize_",
    "requantize_",
    "quantize_pair",
    "quantize_pairs",
    "quantize_both",
    "scaled_mm",
    "rotate",
    "unrotate",
    "dequantize_t",
    "pack_rows_",
    "unpack_rows",
    "pack_nibbles",
    "unpack_nibbles",
    "combine",
    "gather_codes",
    "gather_tokens",
    "group_tiles",
    "grouped_grad",
    "grouped_mm",
    "quantize_gated",
    "quantize_gated_grad",
    "quantize_groups",
    "quantize_groups_t",
    "turn_codes",
    "turn_stack",
    "turn_stack_",
    "compress",
    "decompress",
    "pack_mask",
    "unpack_mask",
    "linear_cross_entropy",
    "scale_",
]


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.halo, name).default


def test_schemas():
    """Graphs that others saved or cached call the ops by these."""
    schemas = "\n".join(str(overload(name)._schema) for name in NAMES)
    assert_expected_inline(
        schemas,
        """\
halo::rotate_quantize(Tensor x, int[] row_rotation, int[] column_rotation, str format, str granularity, Tensor? fold_rows, Tensor? fold_columns, bool rows, bool columns, Tensor? seed, Tensor? gain, bool flat) -> (Tensor, Tensor, Tensor)
halo::rotate_quantize_(Tensor x, int[] row_rotation, int[] column_rotation, str format, str granularity, Tensor(a!) codes, Tensor(b!) scales, Tensor? gain, bool transposed) -> ()
halo::requantize_(Tensor[] xs, int[] row_rotation, int[] column_rotation, str format, str granularity, Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor[] gains, bool transposed) -> ()
halo::quantize_pair(Tensor x, int[] row_rotation, str format, Tensor? fold_columns, Tensor? fold_rows, bool flat) -> (Tensor, Tensor, Tensor, Tensor)
halo::quantize_pairs(Tensor a, Tensor b, str format, Tensor columns_a, Tensor rows_a, Tensor columns_b, Tensor rows_b, bool flat) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)
halo::quantize_both(Tensor x, int[] column_rotation, str format, str granularity, int[] row_rotation, str format_t, str granularity_t, Tensor? seed, bool flat) -> (Tensor, Tensor, Tensor, Tensor)
halo::scaled_mm(Tensor a, Tensor b_t, Tensor? a_scale, Tensor? b_scale, Tensor? bias, int[] row_rotation, int[] column_rotation, SymInt[] shape, ScalarType dtype, Tensor? gain, bool flat) -> Tensor
halo::rotate(Tensor x, int[] row_rotation, int[] column_rotation) -> Tensor
halo::unrotate(Tensor x, int[] row_rotation, int[] column_rotation, SymInt[] shape) -> Tensor
halo::dequantize_t(Tensor codes_t, Tensor? scale, int[] row_rotation, SymInt[] shape, ScalarType dtype) -> Tensor
halo::pack_rows_(Tensor codes, str format, Tensor(a!) packed) -> ()
halo::unpack_rows(Tensor packed, str format) -> Tensor
halo::pack_nibbles(Tensor codes) -> Tensor
halo::unpack_nibbles(Tensor packed, SymInt columns) -> Tensor
halo::combine(Tensor y, Tensor position, ScalarType dtype) -> Tensor
halo::gather_codes(Tensor codes, Tensor scales, Tensor index) -> (Tensor, Tensor)
halo::gather_tokens(Tensor x, SymInt dim, str name, SymInt size) -> Tensor
halo::group_tiles(Tensor offs, SymInt rows) -> (Tensor, Tensor)
halo::grouped_grad(Tensor a_t, Tensor b_t, Tensor starts, Tensor a_scale, int[] column_rotation, ScalarType dtype, Tensor? gain) -> Tensor
halo::grouped_mm(Tensor a, Tensor b, Tensor tiles, Tensor starts, Tensor a_scale, Tensor? b_scale, Tensor? bias, Tensor? weight, int[] column_rotation, ScalarType dtype, Tensor? gain) -> Tensor
halo::quantize_gated(Tensor h, str gate, int[] column_rotation, str format, Tensor? gain) -> (Tensor, Tensor)
halo::quantize_gated_grad(Tensor h, Tensor grad, Tensor? weight, str gate, Tensor fold, Tensor tiles, bool kept, str format) -> (Tensor, Tensor, Tensor, Tensor)
halo::quantize_groups(Tensor x, Tensor? index, Tensor fold, Tensor tiles, str format) -> (Tensor, Tensor)
halo::quantize_groups_t(Tensor x, Tensor? index, Tensor? weight, Tensor fold, Tensor tiles, Tensor starts, bool summed, str format) -> (Tensor, Tensor, Tensor)
halo::turn_codes(Tensor codes, Tensor? index, Tensor tiles) -> Tensor
halo::turn_stack(Tensor codes) -> Tensor
halo::turn_stack_(Tensor codes, Tensor(a!) turned) -> ()
halo::compress(Tensor x, SymInt bits) -> (Tensor, Tensor)
halo::decompress(Tensor codes, Tensor scales, SymInt[] shape, ScalarType dtype) -> Tensor
halo::pack_mask(Tensor x) -> Tensor
halo::unpack_mask(Tensor bits, SymInt[] shape, ScalarType dtype) -> Tensor
halo::linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? codes, Tensor? scales, Tensor? undo_gain, Tensor? bias, Tensor targets, Tensor weights, int[] rotation, str forward, str backward, ScalarType dtype, float[] objective, SymInt ignore_index, SymInt chunk, SymInt scratch, bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor)
halo::scale_(Tensor(a!) x, Tensor factor) -> ()""",
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_op_has_strides_as_traced_and_one_implementation_for_all_devices(name):
    assert overload(name).tags == [torch.Tag.needs_exact_strides]
    assert overload(name).has_kernel_for_dispatch_key(torch.DispatchKey.CompositeExplicitAutograd)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"halo::{name}", "Meta")
    assert set(register._OPS) >= set(NAMES) and set(ops.__all__) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_function_of_an_op_has_its_parameters(name):
    parameters = [p for p in inspect.signature(getattr(ops, name)).parameters if p not in ("rounding", "seed")]
    declared = [argument.name for argument in overload(name)._schema.arguments if argument.name != "seed"]
    assert parameters == declared


@pytest.mark.parametrize("rotation", [None, Rotation(64), Rotation(32, seed=None), Rotation(16, seed=None, rank=8)])
def test_a_rotation_crosses_the_dispatcher(rotation):
    assert register.decode(register.encode(rotation)) == rotation


def test_a_rotation_of_unknown_width_does_not():
    with pytest.raises(ValueError, match="width that is not known yet"):
        register.encode(Rotation(None))


def test_defaults_are_filled_in():
    a = torch.randint(-9, 9, (4, 16), dtype=torch.int8)
    arguments = a, a, None, None, None, None, None, (4, 4), torch.float32
    gain = torch.tensor([1.0, 2.0, 4.0, 8.0])
    plain = ops.scaled_mm(*arguments)
    assert torch.equal(plain, a.float() @ a.float().t())
    assert torch.equal(ops.scaled_mm(*arguments, None), plain)
    assert torch.equal(ops.scaled_mm(*arguments, gain=gain), plain * gain)
    assert torch.equal(ops.scaled_mm(*arguments[:-1], dtype=torch.float64), plain.double())
    with pytest.raises(RuntimeError, match="missing value for argument 'dtype'"):
        ops.scaled_mm(*arguments[:-1])
    with pytest.raises(RuntimeError, match="expected at most 11 argument"):
        ops.scaled_mm(*arguments, gains=gain)


def test_ops_write_only_to_what_they_declare():
    x, right = torch.randn(8, 32), Rotation(32)
    codes, _, scales = ops.rotate_quantize(x, None, right, INT8, "row")
    versions = [t._version for t in (x, codes, scales)]
    ops.rotate_quantize_(x * 2, None, right, INT8, "row", codes, scales)
    assert [t._version for t in (x, codes, scales)] == [versions[0], versions[1] + 1, versions[2] + 1]
    assert torch.equal(scales, ops.rotate_quantize(x * 2, None, right, INT8, "row")[2])
    for name in NAMES:
        written = [a.name for a in overload(name)._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert bool(written) == name.endswith("_")


def test_an_op_calls_who_prepares_the_compiler_when_traced(monkeypatch):
    devices: list[torch.device] = []
    monkeypatch.setattr(register, "WHEN_TRACED", [devices.append])
    x = torch.randn(8, 32)
    codes, _, scales = ops.rotate_quantize(x, None, None, INT8, "row")
    fp6, _, _ = ops.rotate_quantize(x, None, None, FP6_E2M3, "row")
    assert not devices, "eager calls prepare nothing"
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor
        ops.rotate_quantize(fake(x), None, None, INT8, "row")
        ops.requantize_([fake(x)], None, None, INT8, "row", [fake(codes)], [fake(scales)], [])
        ops.pack_rows_(fake(fp6), FP6_E2M3, torch.empty(8, 24, dtype=torch.uint8))
    assert devices == [torch.device("cpu")] * 3


def test_types_that_no_schema_has_are_refused():
    def of_a_number(x: Tensor, factor: complex) -> Tensor:
        return x * factor

    with pytest.raises(KeyError, match="complex"):
        register.op("of_a_number")(of_a_number)
    assert not hasattr(torch.ops.halo, "of_a_number")


def test_a_fake_names_parameters_of_the_op():
    with pytest.raises(ValueError, match="tuple"):
        register.fake("rotate")(lambda x, width: x)
