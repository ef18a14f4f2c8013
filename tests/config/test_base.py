"""What all configs have in common."""

import pickle
from dataclasses import fields, replace
from inspect import signature

import pytest
from torchao.core.config import config_from_dict, config_to_dict

from halo_tensor import (
    HaloConfig,
    HotConfig,
    LinearConfig,
    RecipeConfig,
    halo_config,
    hot_config,
    recipe_config,
)

CONFIGS = [
    halo_config(),
    halo_config(0, "fp8", granularity="tensor"),
    halo_config(2, "int8", block_size=None, seed=None, skip="", min_features=1),
    hot_config(None, seed=3, grad_output_granularity="row", frozen=False),
    recipe_config("jetfire", skip="gate"),
]
METHODS = {halo_config: "level", hot_config: "rank", recipe_config: "name"}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_round_trip_through_torchao(config):
    assert config_from_dict(config_to_dict(config)) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert {config: 1}[config_from_dict(config_to_dict(config))] == 1


@pytest.mark.parametrize(("method", "own"), METHODS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_fields_that_do_not_exist_are_named_beside_those_that_do(method, own):
    arguments = {"name": "jetfire"} if method is recipe_config else {}
    with pytest.raises(
        ValueError, match=f"{method.__name__} has no field 'blocks'; its fields are {own}, .*keep_codes"
    ) as error:
        method(**arguments, blocks=16)
    listed = str(error.value).partition("its fields are ")[2].split(", ")
    assert set(listed) == {f.name for f in fields(method)} and listed[0] == next(iter(signature(method).parameters))
    with pytest.raises(ValueError, match="has no field 'blocks'"):
        replace(method(**arguments), blocks=16)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_method_has_the_common_fields_and_checks_them(method):
    common = [f.name for f in fields(LinearConfig)]
    assert common == ["skip", "min_features", "frozen", "memory", "keep_codes", "activations", "adapters"]
    arguments = {"name": "jetfire"} if method is recipe_config else {}
    assert {f.name: f.default for f in fields(method) if f.name in common} == {
        f.name: 64 if method is hot_config and f.name == "min_features" else f.default for f in fields(LinearConfig)
    }
    for name in common:
        with pytest.raises(ValueError, match=f"{name} must be"):
            method(**arguments, **{name: 0.5})
    with pytest.raises(ValueError, match="frozen=True holds weights as codes only"):
        method(**arguments, frozen=True, keep_codes=False)


def test_what_has_no_recipe_cannot_be_made():
    with pytest.raises(TypeError, match="abstract class LinearConfig"):
        LinearConfig()
    with pytest.raises(TypeError, match="missing 1 required .*'name'"):
        recipe_config()


def test_functions_are_the_classes():
    assert (halo_config, hot_config, recipe_config) == (HaloConfig, HotConfig, RecipeConfig)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_repr_is_a_call_that_makes_the_config_again(config):
    assert eval(repr(config)) == config
    assert str(halo_config(0, "fp8")) == "HaloConfig(level=0, dtype='fp8', granularity='row', block_size=128, seed=0)"
    assert repr(recipe_config("jetfire", skip="x")) == "RecipeConfig(name='jetfire', skip='x')"
