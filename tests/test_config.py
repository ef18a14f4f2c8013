import pickle

import pytest
import torch
from torchao.core.config import config_from_dict, config_to_dict

from halo_tensor import halo_config, hot_config, recipe_config
from halo_tensor.ops import device
from halo_tensor.recipe import FP6_E2M3, FP6_E3M2, FP8_E4M3, INT8, RECIPES, Recipe, Rotation

CONFIGS = [
    halo_config(),
    halo_config(0, "fp8", granularity="tensor"),
    halo_config(2, "int8", block_size=None, seed=None, skip="", min_features=1),
    recipe_config("jetfire", skip="gate"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_round_trip_through_torchao(config):
    assert config_from_dict(config_to_dict(config)) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert {config: 1}[config_from_dict(config_to_dict(config))] == 1


def test_dtypes_choose_formats():
    def formats(*args):
        return halo_config(*args).recipe.formats

    assert formats(1, "int8") == (INT8,)
    assert formats(1, "fp8") == (FP8_E4M3,)
    assert formats(0, "fp6") == (FP6_E3M2,)
    assert formats(1, "fp6") == formats(2, "fp6") == (FP6_E2M3,)
    assert formats(1, "fp6_e3m2") == (FP6_E3M2,)
    assert halo_config(2, "bf16").recipe == Recipe()


def test_equal_configs_share_one_recipe():
    assert halo_config(1, "int8").recipe is halo_config(1, "int8", skip="x").recipe
    assert halo_config(1, "int8", seed=3).recipe.output.left.in_features == Rotation(128, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 3}, r"level must be one of 0, 1, 2; got 3"),
        ({"level": True}, r"level must be one of"),
        ({"dtype": "int3"}, r"dtype must be one of 'int8', 'fp8', .*; got 'int3'"),
        ({"granularity": "channel"}, r"granularity must be one of 'row', 'tensor'"),
        ({"block_size": 100}, r"power of two of at least 16"),
        ({"block_size": 8}, r"power of two of at least 16"),
        ({"seed": -1}, r"seed must be"),
        ({"seed": 1.5}, r"seed must be an integer or None; got 1.5"),
        ({"skip": "*.head"}, r"skip='\*.head' is no regular expression \(nothing to repeat"),
        ({"skip": ["head"]}, r"skip must be a regular expression, as a string; got \['head'\]"),
        ({"min_features": "64"}, r"min_features must be an integer; got '64'"),
        ({"frozen": "no"}, r"frozen must be one of True, False, None; got 'no'"),
        ({"keep_codes": 1}, r"keep_codes must be one of"),
    ],
)
def test_unknown_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        halo_config(**arguments)


@pytest.mark.parametrize("arguments", [{"rank": 4.0}, {"rank": True}, {"seed": 1.0, "rank": None}, {"block_size": 16.0}])
def test_numbers_that_are_no_integers(arguments):
    """4.0 would share a cached recipe with 4."""
    with pytest.raises(ValueError, match=r"must be (an integer|a power of two|one of)"):
        hot_config(**arguments)


def test_unknown_recipes_are_named():
    with pytest.raises(ValueError, match="recipe must be one of " + ", ".join(map(repr, RECIPES))):
        recipe_config("mine")


@pytest.mark.parametrize(
    ("capability", "formats", "message"),
    [
        ((8, 0), (FP8_E4M3,), r"Tesla X has compute capability 8.0 .*fp8_e4m3.*halo_config\(level=1, dtype='int8'\)"),
        ((7, 5), (INT8,), "int8.*bf16 or fp16 only"),
    ],
)
def test_devices_that_cannot_run_a_format(monkeypatch, capability, formats, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla X")
    with pytest.raises(RuntimeError, match=message):
        device.check_device(formats, torch.device("cuda"))
    device.check_device((), torch.device("cuda"))
    device.check_device(formats, torch.device("cpu"))
