import json
import pickle

import pytest
import torch
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig

from halo_tensor import HaloConfig, LayerConfigs, halo_config, hot_config, quantize_, recipe_config
from halo_tensor.kernels import device
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


def test_the_default_is_int8_at_level_1():
    assert halo_config() == HaloConfig() == halo_config(1, "int8") != halo_config(1, "fp8")


#: As 0.1.0 wrote it, whose default dtype was fp8.
WRITTEN_BY_0_1_0 = {
    "layers": {
        "a": {
            "_type": "HaloConfig",
            "_version": 1,
            "_data": {
                "skip": "lm_head", "min_features": 128, "frozen": None, "keep_codes": True, "adapters": False, "level": 1,
                "dtype": "fp8", "granularity": "row", "block_size": 128, "seed": 0,
            },
        }
    },
    "measured": {"a": {"cosine of candidate 0": 0.99}},
}  # fmt: skip


def test_what_0_1_0_saved_means_what_it_meant(tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(WRITTEN_BY_0_1_0))
    loaded = LayerConfigs.load(path)
    assert loaded == LayerConfigs({"a": halo_config(1, "fp8")}, WRITTEN_BY_0_1_0["measured"])
    everything = LayerConfigs({"a": halo_config(), "b": hot_config(), "c": recipe_config("jetfire")})
    everything.save(path)
    assert LayerConfigs.load(path) == everything
    assert {"dtype", "level", "granularity"} <= json.loads(path.read_text())["layers"]["a"]["_data"].keys()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["version"], 2, r"layers.json is of version 2, and this halo_tensor reads version 1"),
        (["extra"], 1, r"layers.json: unknown field 'extra'"),
        (["layers"], None, r"layers.json: the field 'layers' is missing"),
        (["layers"], [], r"'layers' must be an object"),
        (["layers", "a"], 3, r"layer 'a': expected an object"),
        (
            ["layers", "a", "_type"],
            "Int4WeightOnlyConfig",
            r"layer 'a': _type must be one of HaloConfig, HotConfig, RecipeConfig",
        ),
        (["layers", "a", "_type"], None, r"layer 'a': the field '_type' is missing"),
        (["layers", "a", "_version"], 7, r"layer 'a': a HaloConfig of _version 7, and this halo_tensor reads _version 1"),
        (
            ["layers", "a", "_data", "blocks"],
            1,
            r"layer 'a': unknown field 'blocks'; this halo_tensor knows adapters, block_size",
        ),
        (["layers", "a", "_data", "dtype"], None, r"layer 'a': the field 'dtype' is missing"),
        (["layers", "a", "_data", "dtype"], "int3", r"dtype must be one of 'int8'"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, list) else None,
)
def test_files_that_cannot_be_read_say_which_field(tmp_path, where, value, message):
    record = json.loads(json.dumps(WRITTEN_BY_0_1_0))
    place = record
    for key in where[:-1]:
        place = place[key]
    if value is None:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        LayerConfigs.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"layers.json is no JSON"):
        LayerConfigs.load(path)


def test_configs_of_no_layer():
    with pytest.raises(ValueError, match="these LayerConfigs name no layer"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(128, 128)), LayerConfigs({}))
    with pytest.raises(ValueError, match="(?s)no layer of this Sequential was converted.*filter_fn or the config says so"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(128, 128)), FqnToConfig({"1": halo_config()}))


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
