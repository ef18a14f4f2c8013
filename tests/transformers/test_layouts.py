"""Layouts of 8-bit checkpoints: which values they mean, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from halo_tensor.transformers import layouts
from halo_tensor.transformers.layouts import SCALE, SCALE_INV, WEIGHT, ZERO_POINT, Layout, layout_of
from tests.helpers.released import coded, fp8_config, w8a8_config

E4M3 = torch.float8_e4m3fn
sides = st.integers(1, 40)


@given(st.tuples(sides, sides), st.tuples(st.none() | sides, st.none() | sides), st.sampled_from([torch.int8, E4M3]))
def test_values_are_codes_times_the_scale_of_their_block(shape, block, dtype):
    torch.manual_seed(sum(shape))
    codes, scale = coded(torch.randn(shape), block, dtype)
    rows, columns = (side or width for side, width in zip(block, shape, strict=True))
    layout = Layout("any", (dtype,), (block,))
    values = layout.values({WEIGHT: codes, SCALE: scale}, torch.float32)
    for i in range(shape[0]):
        expected = [codes[i, j].float() * scale[i // rows, j // columns] for j in range(shape[1])]
        assert torch.equal(values[i], torch.stack(expected))
    rounded = layout.values({WEIGHT: codes, SCALE: scale}, torch.bfloat16)
    assert torch.equal(rounded, values.bfloat16()), "rounded once"


@pytest.mark.parametrize("rows", [255, 256, 257, 600])
@pytest.mark.parametrize("block", [(128, 128), (1, None), (None, None), (100, 7)])
def test_pieces_of_rows_are_joined(rows, block):
    codes, scale = coded(torch.randn(rows, 20), block)
    sides = [side or width for side, width in zip(block, codes.shape, strict=True)]
    expected = codes.float() * scale.repeat_interleave(sides[0], 0)[:rows].repeat_interleave(sides[1], 1)[:, :20]
    assert torch.equal(Layout("any", (E4M3,), (block,)).values({WEIGHT: codes, SCALE: scale}, torch.float32), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_of_the_whole_weight_in_any_shape(shape):
    codes, scale = coded(torch.randn(48, 32), (None, None))
    for name, config in ((SCALE, w8a8_config("float", "tensor")), (SCALE_INV, fp8_config(None)), (SCALE, fp8_config())):
        values = layout_of(config).values({WEIGHT: codes, name: scale.view(shape)}, torch.float32)
        assert torch.equal(values, codes.float() * scale)


@pytest.mark.parametrize("shape", [(48,), (48, 1)])
def test_a_scale_per_row_in_both_shapes(shape):
    codes, scale = coded(torch.randn(48, 32), (1, None), torch.int8)
    values = layout_of(w8a8_config()).values({WEIGHT: codes, SCALE: scale.view(shape)}, torch.float32)
    assert torch.equal(values, codes.float() * scale)


def test_scales_of_other_dtypes():
    """DeepSeek's newer checkpoints have powers of two as scales, float32 or e8m0."""
    codes, scale = coded(torch.randn(64, 64), (32, 32))
    layout, scale = layout_of(fp8_config((32, 32), scale_fmt="ue8m0")), scale.log2().ceil().exp2()
    expected = layout.values({WEIGHT: codes, SCALE_INV: scale}, torch.float32)
    for dtype in (torch.bfloat16, torch.float8_e8m0fnu):
        assert torch.equal(layout.values({WEIGHT: codes, SCALE_INV: scale.to(dtype)}, torch.float32), expected)


def test_a_weight_in_high_precision_is_cast():
    weight = torch.randn(8, 8)
    assert torch.equal(layout_of(fp8_config()).values({WEIGHT: weight}, torch.bfloat16), weight.bfloat16())


CODES, GRID = coded(torch.randn(200, 130), (128, 128))
ROWS = coded(torch.randn(200, 130), (1, None), torch.int8)
NAN = torch.full((200, 130), float("nan")).to(E4M3)


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        (fp8_config(), {WEIGHT: CODES}, "its scale is missing"),
        (fp8_config(), {SCALE_INV: GRID}, "its codes are missing"),
        (fp8_config(), {WEIGHT: CODES, SCALE: GRID, SCALE_INV: GRID}, "a weight_scale and a weight_scale_inv"),
        (fp8_config(), {WEIGHT: CODES, SCALE_INV: GRID[:1]}, r"float32 \[1, 2\], which does not divide a weight \[200, 130\]"),
        (fp8_config((64, 64)), {WEIGHT: CODES, SCALE_INV: GRID}, "a block of 64×64 or the weight"),
        (fp8_config(), {WEIGHT: CODES, SCALE_INV: GRID.int()}, "scale is int32"),
        (fp8_config(), {WEIGHT: CODES.view(torch.int8), SCALE_INV: GRID}, "it is int8 .* config.json says fp8: float8_e4m3fn"),
        (fp8_config(), {WEIGHT: CODES.float(), SCALE_INV: GRID}, "it is float32"),
        (fp8_config(), {WEIGHT: CODES.view(torch.float8_e5m2), SCALE_INV: GRID}, "it is float8_e5m2"),
        (fp8_config(), {WEIGHT: CODES.view(2, 100, 130), SCALE_INV: GRID}, "only matrices"),
        (fp8_config(), {WEIGHT: NAN, SCALE_INV: GRID}, "not finite"),
        (fp8_config(), {WEIGHT: CODES, SCALE_INV: GRID * float("inf")}, "not finite"),
        (w8a8_config(), {WEIGHT: ROWS[0], SCALE: ROWS[1], ZERO_POINT: torch.ones(200, 1)}, "zero points that are not 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(config, parts, message):
    with pytest.raises(ValueError, match=message):
        layout_of(config).values(parts, torch.float32)


def grouped(**scheme):
    config = w8a8_config()
    config["config_groups"]["group_0"]["weights"] |= scheme
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "its quant_method is 'gptq'"),
        ({}, "its quant_method is None"),
        (fp8_config(fmt="e5m2"), "its fmt is 'e5m2'"),
        (fp8_config(expert_dtype="fp4"), "its expert_dtype is 'fp4'"),
        (fp8_config((128,)), r"its block size is \[128\]"),
        (fp8_config((0, 128)), r"its block size is \[0, 128\]"),
        (grouped(num_bits=4), "'group_0' are int of 4 bits"),
        (grouped(symmetric=False), "are not symmetric"),
        (grouped(strategy="block", block_structure=None), "its block size is None"),
        (grouped(strategy="group"), r"scaled by 'group' \(group_size None\)"),
        (grouped(actorder="group"), "actorder"),
        (w8a8_config() | {"format": "pack-quantized"}, "in the format 'pack-quantized'"),
        (w8a8_config() | {"transform_config": {"config_groups": {"u": {}}}}, "stored rotated"),
        (w8a8_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored sparse"),
        (w8a8_config() | {"config_groups": {}}, "name no quantised weights"),
    ],
)
def test_layouts_that_are_not_known_are_refused(config, message):
    with pytest.raises(ValueError, match=f"cannot be read: .*{message}.*These can: quant_method 'fp8'"):
        layout_of(config)


def test_groups_with_several_layouts():
    config = w8a8_config("float", "block", block_structure="128x128")
    config["config_groups"]["group_1"] = w8a8_config()["config_groups"]["group_0"] | {"format": "int-quantized"}
    config["config_groups"]["cache"] = {"targets": ["k_proj"], "weights": None}
    layout = layout_of(config)
    assert str(layout) == "compressed-tensors: float8_e4m3fn or int8 with a scale for a block of 128×128 or a row"
    for codes, scale in ((CODES, GRID), ROWS):
        assert layout.values({WEIGHT: codes, SCALE: scale}, torch.float32).isfinite().all()


def test_codes_are_told_by_their_dtypes(tmp_path):
    from safetensors.torch import save_file

    assert layouts.is_code(CODES) and layouts.is_code(ROWS[0]) and not layouts.is_code(GRID)
    save_file({"a.weight": GRID, "b.index": torch.zeros(3, dtype=torch.int8)}, tmp_path / "plain.safetensors")
    save_file({"c.weight": ROWS[0]}, tmp_path / "codes.safetensors")
    layouts.refuse_codes(None)
    layouts.refuse_codes([str(tmp_path / "plain.safetensors"), "pytorch_model.bin"])
    with pytest.raises(ValueError, match="c.weight is 8-bit, and config.json does not say how"):
        layouts.refuse_codes([str(tmp_path / "plain.safetensors"), str(tmp_path / "codes.safetensors")])
