"""The codes of the weights of all experts of a layer."""

import copy
import io

import pytest
import torch

from halo_tensor import HadamardQuantTensor, HaloWeight
from halo_tensor.operand.experts import ExpertsOperand
from halo_tensor.recipe import FP6_E2M3, INT8, ROW, Rotation, halo
from halo_tensor.weight.requantize import requantize_all
from tests.helpers.errors import relative_error


def stack(in_features_first=False):
    torch.manual_seed(0)
    w = torch.randn(3, 32, 64)
    return w.transpose(1, 2).contiguous() if in_features_first else w


@pytest.mark.parametrize("in_features_first", [False, True])
def test_it_holds_what_each_matrix_alone_would(in_features_first):
    w = stack(in_features_first)
    operand = ExpertsOperand.from_stack(w, INT8, Rotation(64), in_features_first=in_features_first, turned=True)
    assert operand.shape == w.shape and operand.features == (32, 64) and operand.experts == 3
    for expert in range(3):
        matrix = w[expert].t() if in_features_first else w[expert]
        alone = HadamardQuantTensor.from_hp(matrix, INT8, ROW, column_rotation=Rotation(64))
        assert torch.equal(operand.stacked_codes()[expert], alone.codes)
        assert torch.equal(operand.stacked_scales()[expert], alone.scale)
        assert torch.equal(operand.turned_stack[expert], alone.codes.t())
        value = operand.dequantize()[expert]
        assert torch.equal(value.t() if in_features_first else value, alone.dequantize())


@pytest.mark.parametrize("many", [False, True])
def test_it_is_brought_up_to_date(many):
    """Its turned codes too, alone or together with others."""
    w = stack()
    operands = [ExpertsOperand.from_stack(w, INT8, Rotation(64), turned=True) for _ in range(2)]
    versions = [part._version for part in operands[0].parts]
    if many:
        weights = [HaloWeight(w, operand, halo(1, INT8)) for operand in operands]
        requantize_all([(weights[0], w * 2), (weights[1], w * -3)])
    else:
        for operand, x in zip(operands, (w * 2, w * -3), strict=True):
            operand.requantize_(x)
    for operand, x in zip(operands, (w * 2, w * -3), strict=True):
        expected = ExpertsOperand.from_stack(x, INT8, Rotation(64), turned=True)
        assert all(map(torch.equal, operand.parts, expected.parts))
    assert all(part._version > version for part, version in zip(operands[0].parts, versions, strict=True))


def test_it_is_copied_flattened_and_pickled():
    operand = ExpertsOperand.from_stack(stack(True), INT8, None, in_features_first=True, turned=True)
    names, attributes = operand.__tensor_flatten__()
    tensors = {name: getattr(operand, name) for name in names}
    again = HadamardQuantTensor.__tensor_unflatten__(tensors, attributes, operand.shape, operand.stride())
    file = io.BytesIO()
    torch.save(operand, file)
    file.seek(0)
    for made in (again, operand.detach(), operand.clone(), copy.deepcopy(operand), torch.load(file, weights_only=False)):
        assert type(made) is ExpertsOperand and made.in_features_first and made.shape == operand.shape
        assert all(map(torch.equal, made.parts, operand.parts))


def test_frozen_fp6_is_packed():
    w = stack()
    operand = ExpertsOperand.from_stack(w, FP6_E2M3, Rotation(64)).packed()
    assert operand.codes.dtype == torch.uint8 and operand.codes.numel() == w.numel() * 3 // 4 and operand.turned_stack is None
    assert 0.01 < relative_error(operand.dequantize(), w) < 0.05
    assert torch.equal(operand.turned_codes().float(), operand.stacked_codes().float().transpose(1, 2))
