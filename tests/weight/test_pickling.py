"""Pickles of converted weights: of this version, and of 0.1.0, whose modules had other names."""

import copy
import io
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor import HadamardQuantTensor, HaloWeight, balance_, halo_config, quantize_
from halo_tensor.weight import ShardRole

#: Written by 0.1.0 before its modules were moved: weights, an operand, a recipe, and the results of products with them.
OLD = Path(__file__).parents[1] / "data" / "weights_0_1_0.pt"
KINDS = ["trained", "frozen", "balanced"]


def globals_of(file: zipfile.ZipFile) -> set[str]:
    (data,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
    return {str(argument) for op, argument, _ in pickletools.genops(file.read(data)) if op.name == "GLOBAL"}


def test_the_file_has_the_old_names():
    names = {name for name in globals_of(zipfile.ZipFile(OLD)) if name.startswith("halo_tensor")}
    assert {"halo_tensor.weight HaloWeight", "halo_tensor.tensor HadamardQuantTensor", "halo_tensor.recipe Rotation"} <= names
    assert "halo_tensor.weight.tensor HaloWeight" not in names


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_0_1_0_are_read_and_multiply_as_they_did(kind):
    old = torch.load(OLD, weights_only=True)
    weight = old[kind]
    assert type(weight) is HaloWeight and isinstance(weight, nn.Parameter) and weight.shard_role is ShardRole.WHOLE
    assert (weight.master is None) == (kind == "frozen") and (weight.gain is not None) == (kind == "balanced")
    assert torch.equal(weight.dequantize(), old["values"][kind])
    assert torch.equal(F.linear(old["x"], weight), old["y"][kind])
    assert not torch.equal(F.linear(old["x"], weight.dequantize()), old["y"][kind]), "the product is quantised"


def test_weights_of_0_1_0_train():
    old = torch.load(OLD, weights_only=True)
    weight = old["trained"]
    F.linear(old["x"], weight).sum().backward()
    torch.optim.SGD([weight], lr=1.0).step()
    fresh = HaloWeight.from_hp(weight.dequantize().detach(), weight.recipe)
    assert torch.equal(weight.codes, fresh.codes) and not torch.equal(weight.dequantize(), old["values"]["trained"])


def test_operands_and_recipes_of_0_1_0_are_read():
    old = torch.load(OLD, weights_only=True)
    assert type(old["operand"]) is HadamardQuantTensor and torch.equal(old["operand"].dequantize(), old["dequantized"])
    layer = nn.Linear(128, 128)
    quantize_(layer, halo_config(1, "int8"))
    assert old["recipe"] == layer.weight.recipe


def test_old_files_are_read_where_only_the_weight_was_imported():
    code = f"import torch; from halo_tensor.weight.tensor import HaloWeight; print(torch.load({str(OLD)!r})['operand'].shape)"
    assert "[16, 32]" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_again(kind):
    layer = nn.Linear(128, 128, bias=False).requires_grad_(kind != "frozen")
    quantize_(layer, halo_config(1, "int8"))
    if kind == "balanced":
        balance_(layer, torch.randn(8, 128) * torch.arange(1, 129))
    x = torch.randn(4, 128)
    torch.save(layer.weight, file := io.BytesIO())
    assert not any("state" in name or "roles" in name for name in globals_of(zipfile.ZipFile(file)))
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(F.linear(x, loaded), layer(x)) and loaded.shard_role is ShardRole.WHOLE


@pytest.mark.parametrize("role", ShardRole)
def test_a_role_outlives_copies_and_pickles(role):
    weight = HaloWeight.from_hp(torch.randn(64, 64), torch.load(OLD)["recipe"])
    weight.shard_role = role
    torch.save(weight, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file).shard_role is copy.deepcopy(weight).shard_role is role


def test_a_copy_knows_nothing_of_writes_to_the_original():
    weight = HaloWeight.from_hp(torch.randn(64, 64), torch.load(OLD)["recipe"])
    copied = copy.deepcopy(weight)
    assert weight.detach().codes_state is weight.codes_state is not copied.codes_state
    codes = copied.codes.clone()
    weight.master.mul_(-1)
    assert torch.equal(copied.codes, codes) and torch.equal(weight.codes, -codes)
