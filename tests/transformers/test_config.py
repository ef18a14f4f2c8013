"""HaloQuantConfig, and the quantization_config of checkpoints."""

import json
import shutil
from copy import deepcopy
from dataclasses import fields
from inspect import signature

import pytest
import torch

from halo_tensor import HaloConfig, halo_config

transformers = pytest.importorskip("transformers")

from halo_tensor.transformers import HaloQuantConfig  # noqa: E402
from halo_tensor.transformers.config import FIXED  # noqa: E402
from tests.helpers.checkpoints import CONFIGS, WEIGHT, copied, logits  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
AutoClassifier = transformers.AutoModelForSequenceClassification


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(plain, tmp_path):
    AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(1, "int8")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["quant_method"] == "halo"
    config["quantization_config"]["dtype"] = "fp8"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="(?s)cannot be used:.*down_proj.weight: its codes were written as .int8.*fp8_e4m3"):
        AutoModel.from_pretrained(tmp_path)


def test_a_config_with_a_field_that_is_not_known_is_refused(plain, tmp_path):
    AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["dtype"] == HaloQuantConfig().dtype == "int8", "what a default was is written"
    config["quantization_config"]["groups"] = 32
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"has a field 'groups' that this halo_tensor does not know \(it knows .*level, dtype"
    ):
        AutoModel.from_pretrained(tmp_path)


def test_fields_are_those_of_halo_config():
    names = list(vars(HaloQuantConfig()))
    assert set(names) == {f.name for f in fields(HaloConfig)} - FIXED.keys() | {"quant_method"}
    made = {"level": 2, "dtype": "fp6", "granularity": "tensor", "block_size": 64, "seed": 3, "skip": "x", "min_features": 16}
    config = HaloQuantConfig(**made)
    assert {name: getattr(config, name) for name in made} == made
    assert config.halo_config == halo_config(**made, frozen=True)
    shown = {name: p.default for name, p in signature(HaloQuantConfig).parameters.items()}
    defaults = {f.name: f.default for f in fields(HaloConfig) if f.name in made}
    assert shown == defaults | {"frozen": True}, "help shows the defaults"
    assert HaloQuantConfig.from_halo_config(halo_config(**made)) == config != HaloQuantConfig()
    trained = HaloQuantConfig.from_halo_config(halo_config(**made, frozen=False))
    assert trained == HaloQuantConfig(**made, frozen=False) == eval(repr(trained)) != config
    assert trained.halo_config == halo_config(**made, frozen=False)
    assert HaloQuantConfig.from_dict(config.to_dict()) == config == deepcopy(config)
    assert eval(repr(config)) == config and repr(HaloQuantConfig(0, "fp8")).startswith("HaloQuantConfig(level=0, dtype='fp8'")
    config.level = 1
    assert config.halo_config.level == 1, "attributes can be set, as those of other configs of transformers"


def test_fields_and_values_that_are_not_valid_are_named():
    with pytest.raises(ValueError, match="HaloQuantConfig has no field 'keep_codes'; its fields are .*level, dtype"):
        HaloQuantConfig(keep_codes=False)
    with pytest.raises(ValueError, match="frozen must be one of True, False"):
        HaloQuantConfig(frozen="yes")
    with pytest.raises(ValueError, match="dtype must be one of 'int8'"):
        HaloQuantConfig.from_dict({"dtype": "int3", "quant_method": "halo"})
    with pytest.raises(ValueError, match="quant_method of a HaloQuantConfig is 'halo'; got 'hot'"):
        HaloQuantConfig(quant_method="hot")
    with pytest.raises(ValueError, match="loaded quantised has keep_codes=True; got False"):
        HaloQuantConfig.from_halo_config(halo_config(keep_codes=False))


def test_fields_of_another_version_are_refused(quantised, tmp_path):
    with pytest.raises(
        ValueError, match="quantization_config of this checkpoint has a field 'colour' that this halo_tensor does not know"
    ):
        AutoModel.from_pretrained(copied(quantised["int8"], tmp_path, colour="blue"))


def test_codes_whose_config_is_lost_are_not_taken_for_weights(quantised, tmp_path):
    for dtype, folder in quantised.items():
        lost = shutil.copytree(folder, tmp_path / dtype)
        config = json.loads((lost / "config.json").read_text())
        del config["quantization_config"]
        (lost / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"(?s){WEIGHT}: .*config.json has lost the quantization_config"):
            AutoModel.from_pretrained(lost, quantization_config=CONFIGS[dtype], ignore_mismatched_sizes=True)


def test_the_config_of_the_checkpoint_is_the_one_that_counts(quantised):
    with pytest.warns(UserWarning, match="quantization_config. from the model will be used"):
        model = AutoModel.from_pretrained(quantised["int8"], quantization_config=HaloQuantConfig(0, "fp8", seed=7))
    assert model.config.quantization_config.dtype == "int8"
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(quantised["int8"])))
