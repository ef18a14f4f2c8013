"""What a user may write to switch the library on; every host reads it so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor import HaloWeight, LayerConfigs, halo_config, recipe_config
from halo_tensor.config.halo import DTYPES, LEVELS
from halo_tensor.switch import Switch, converted_weights
from tests.helpers.training import make


def test_a_value_and_keys():
    assert Switch.of() == Switch(halo_config())
    assert Switch.of("fp8").config == halo_config(0, "fp8") and Switch.of("fp6").config == halo_config(1, "fp6")
    assert Switch.of("hot_llm", balance=1) == Switch(recipe_config("hot_llm"), balance=1)
    assert Switch.of(halo_config(2), report=True) == Switch(halo_config(2), report=True)
    assert Switch.of({"recipe": "switchback", "skip": "x"}).config == recipe_config("switchback", skip="x")
    assert Switch.of(Switch.of("int8")) == Switch.of("int8")


@given(st.sampled_from(sorted(DTYPES)), st.sampled_from(LEVELS), st.booleans(), st.integers(0, 9))
def test_a_mapping_is_the_config_with_its_fields(dtype, level, keep_codes, balance):
    keys = {"dtype": dtype, "level": level, "keep_codes": keep_codes}
    expected = Switch(halo_config(level, dtype, keep_codes=keep_codes), balance)
    assert Switch.of({**keys, "balance": balance}) == Switch.of(**keys, balance=balance) == expected


def test_a_file_of_layer_configs(tmp_path):
    chosen = LayerConfigs({"0.up": halo_config(0, "fp8")})
    chosen.save(tmp_path / "layers.json")
    switch = Switch.of(str(tmp_path / "layers.json"))
    assert switch.config == chosen
    model = make(converted=False)
    assert switch.convert(model).converted == ["0.up"] and converted_weights(model) == 1
    with pytest.raises(ValueError, match="a file of LayerConfigs is complete; got 'level' too"):
        Switch.of(str(tmp_path / "layers.json"), level=1)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("int9", {}, r"halo must be a dtype \(int8, .*a recipe .*got 'int9'"),
        (8, {}, "got 8"),
        (None, {"lvel": 1}, "halo has no key 'lvel'; its keys are .*level"),
        ("int8", {"dtype": "fp8"}, "'dtype' is given twice: 'int8' and 'fp8'"),
        ({"recipe": "hot", "layers": "x.json"}, {}, "'recipe' and 'layers' both choose a method"),
        ({"recipe": "hot"}, {"level": 1}, "halo has no key 'level'"),
        ("int8", {"balance": True}, "balance is a number of batches"),
        ("int8", {"report": 1}, "report must be True or False"),
        (halo_config(), {"level": 2}, "a config is complete; got 'level' too"),
    ],
)
def test_what_is_not_known_is_one_error(value, options, message):
    with pytest.raises(ValueError, match=message):
        Switch.of(value, **options)


def test_an_optimizer_that_is_older_is_refused():
    model = make(converted=False)
    other = torch.optim.SGD(make(converted=False).parameters(), lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="an SGD holds the old ones"):
        Switch.of("int8").convert(model)
    assert not any(isinstance(p, HaloWeight) for p in model.parameters()), "nothing was converted"
    del optimizer
    assert len(Switch.of("int8").convert(model).converted) == 4 and other is not None
