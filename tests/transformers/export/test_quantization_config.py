"""quantization_config: compressed-tensors validates it, and its matrices are the rotations of the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor import HadamardQuantTensor
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers.errors import relative_error

pytest.importorskip("transformers")
from halo_tensor.transformers.export.quantization_config import (
    is_sylvester,
    matrices,
    precision,
    quantization_config,
    scheme_name,
)
from tests.helpers.served import WHY


def codes(width: int, rotation: Rotation | None, format=INT8) -> HadamardQuantTensor:
    return HadamardQuantTensor.from_hp(torch.randn(32, width), format, column_rotation=rotation)


@given(st.sampled_from([16, 32, 64, 128, 256, 384]), st.none() | st.integers(0, 2**31 - 1), st.integers(1, 3))
def test_a_matrix_rotates_as_the_reference(block, seed, blocks):
    """Each block of columns, times the matrix, over √block."""
    rotation = Rotation(block, seed)
    x = torch.randn(4, block * blocks)
    ((name, matrix),) = matrices({"a.b": codes(block, rotation)}, torch.bfloat16).items()
    assert name == f"a.b.{scheme_name(rotation)}_input.weight" and matrix.dtype == torch.bfloat16
    rotated = (x.view(4, blocks, block) @ matrix.float()).view(4, -1) / block**0.5
    assert relative_error(rotated, reference.rotate(x, None, rotation)) < 1e-6


@pytest.mark.parametrize("block", [16, 128, 512])
def test_sylvesters_matrix_is_that_of_the_package(block):
    utils = pytest.importorskip("compressed_tensors.transform.utils.hadamard", reason=WHY)
    assert (
        is_sylvester(Rotation(block, None)) and not is_sylvester(Rotation(block, 0)) and not is_sylvester(Rotation(384, None))
    )
    (matrix,) = matrices({"a": codes(block, Rotation(block, None))}, torch.float32).values()
    assert torch.equal(matrix, utils.deterministic_hadamard_matrix(block, torch.float32))


def test_a_wide_matrix_is_written_once():
    wide, narrow = Rotation(512, 0), Rotation(256, 0)
    made = matrices(
        {"a": codes(512, wide), "b": codes(512, wide), "c": codes(512, narrow), "d": codes(512, narrow)}, torch.float32
    )
    assert list(made) == [f"{layer}_seed0_input.weight" for layer in ("a.H512", "c.H256", "d.H256")]


def test_one_scheme_targets_all_linear_layers_but_those_in_ignore():
    config = quantization_config({"a": codes(128, Rotation()), "b": codes(72, None)}, ["z", "head"], torch.bfloat16)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"] and config["ignore"] == ["head", "z"]
    (scheme,) = config["transform_config"]["config_groups"].values()
    at_input, at_weight = scheme["apply"]
    assert at_input == {"targets": ["Linear"], "location": "input", "inverse": False, "ignore": ["head", "z", "b"]}
    assert at_weight == at_input | {"location": "weight_input", "inverse": True}


def test_the_package_validates_several_schemes():
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=WHY)
    transform = pytest.importorskip("compressed_tensors.transform")
    layers = {"a": codes(128, Rotation()), "b": codes(64, Rotation(64)), "c": codes(64, None, FP8_E4M3)}
    config = quantization_config(layers, ["head"], torch.float32)
    read = quantization.QuantizationConfig.model_validate(config)
    assert {group.targets[0]: group.weights.type for group in read.config_groups.values()} == {"a": "int", "c": "float"}
    assert all(group.input_activations.strategy == "token" for group in read.config_groups.values())
    schemes = transform.TransformConfig.model_validate(config["transform_config"]).config_groups
    assert {scheme.head_dim: scheme.apply[0].targets for scheme in schemes.values()} == {128: ["a"], 64: ["b"]}
    assert all(scheme.precision == torch.float32 for scheme in schemes.values())
    assert quantization_config({"c": layers["c"]}, [], torch.float32)["transform_config"] == {}


def test_float16_is_rotated_in_float32():
    assert [precision(d) for d in (torch.bfloat16, torch.float16, torch.float32)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
