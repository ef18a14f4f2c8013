"""Files of configs: what was written by every version, and errors."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from halo_tensor import (
    LayerConfigs,
    halo_config,
    hot_config,
    recipe_config,
)
from halo_tensor.recipe import TENSOR, Scales

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_the_file_of_0_1_0_means_what_it_meant():
    loaded = LayerConfigs.load(FIXTURES / "0.1.0" / "layers.json")
    assert loaded.layers == {
        "model.layers.0.self_attn.q_proj": halo_config(1, "fp8"),  # the default then
        "model.layers.0.mlp.up_proj": halo_config(
            2, "int8", granularity="tensor", block_size=None, seed=None, skip="", min_features=1, frozen=True
        ),
        "model.layers.0.mlp.gate_proj": halo_config(1, "fp6", keep_codes=False),
        "conv": hot_config(),
        "head": hot_config(
            None, block_size=32, grad_input_bits=8, grad_output_granularity="row", granularity="row", rounding="nearest",
            seed=3, adapters=True,
        ),
        "gate": recipe_config("jetfire", skip="gate", frozen=False),
    }  # fmt: skip
    assert loaded.measured == {
        "conv": {"error with scale=tensor": 0.25, "error with scale=tokens": 0.125},
        "model.layers.0.mlp.up_proj": {"cosine of candidate 0": 0.99},
    }
    assert loaded.layers["head"].recipe.grad_input.left.granularity == Scales.per(tokens=1)
    assert loaded.layers["conv"].recipe.grad_input.left.granularity == TENSOR


def test_files_have_every_field_so_that_defaults_may_change(tmp_path):
    everything = LayerConfigs({"a": halo_config(), "b": hot_config(), "c": recipe_config("jetfire")}, {"a": {"x": 1.0}})
    everything.save(tmp_path / "layers.json")
    assert LayerConfigs.load(tmp_path / "layers.json") == everything
    record = json.loads((tmp_path / "layers.json").read_text())
    for config in everything.layers.values():
        written = next(r["_data"] for r in record["layers"].values() if r["_type"] == type(config).__name__)
        assert written.keys() == {f.name for f in fields(config)}


#: As 0.1.0 wrote it.
WRITTEN_BY_0_1_0 = {
    "layers": {"a": json.loads((FIXTURES / "0.1.0" / "layers.json").read_text())["layers"]["model.layers.0.self_attn.q_proj"]}
}


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
            r"layer 'a': unknown field 'blocks'; this halo_tensor knows activations, adapters, block_size",
        ),
        (["layers", "a", "_data", "dtype"], None, r"layer 'a': the field 'dtype' is missing"),
        (["layers", "a", "_data", "dtype"], "int3", r"layer 'a': dtype must be one of 'int8'"),
        (["layers", "a"], {"_type": "RecipeConfig", "_data": {}}, r"layer 'a': the field 'name' is missing"),
        (["layers", "a"], {"_type": "HotConfig", "_data": {"scale": "x"}}, r"grad_output_granularity must be .*; got 'x'"),
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
