"""The config of HALO."""

import pytest

from halo_tensor import (
    HaloConfig,
    halo_config,
)
from halo_tensor.recipe import FP6_E2M3, FP6_E3M2, FP8_E4M3, INT8, Recipe, Rotation


def test_the_default_is_int8_at_level_1():
    assert halo_config() == HaloConfig() == halo_config(1, "int8") != halo_config(1, "fp8")


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
