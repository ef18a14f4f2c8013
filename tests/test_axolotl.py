"""HaloPlugin with Axolotl's own PluginManager, its validation of configs and its trainer."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.recording import OpLog

pytest.importorskip("transformers")
pytest.importorskip("axolotl", reason="axolotl is not installed")
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault

from halo_tensor.axolotl import NAME
from tests.helpers.served import assert_servable
from tests.helpers.trainers import Rows, arguments, losses, save_chat_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "hosts" / "with_axolotl.yaml"


@pytest.fixture
def manager():
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    manager.register(NAME)
    yield manager
    manager.plugins.clear()


def config(**changes) -> dict:
    return yaml.safe_load(EXAMPLE.read_text()) | changes


def test_the_example_is_a_valid_config(manager):
    _, model = merge_input_args()
    assert model(**config()).halo == {"level": 1, "dtype": "int8", "balance": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"halo": "int9"}, "halo must be a dtype .*got 'int9'"),
        ({"halo": {"dtype": "int8", "lvel": 1}}, "halo has no key 'lvel'; its keys are"),
        ({"halo": None}, "trains in what halo says: add halo: int8"),
        ({"halo_level": 2}, "there is no key 'halo_level': options stand under halo"),
        ({"load_in_4bit": True, "adapter": "qlora"}, "load_in_4bit quantises the base weights in its own way"),
    ],
)
def test_what_is_not_known_is_one_error(manager, changes, message):
    _, model = merge_input_args()
    with pytest.raises(ValueError, match=message):
        model(**config(**changes))


def test_its_trainer_trains_in_low_precision(manager, tmp_path):
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from transformers import AutoModelForCausalLM

    folder = save_chat_model(tmp_path / "model")
    rows = pytest.importorskip("datasets").Dataset.from_list(list(Rows(16))).with_format("torch")

    def trained(resume: str | None = None) -> AxolotlTrainer:
        model = AutoModelForCausalLM.from_pretrained(folder)
        callbacks = manager.add_callbacks_pre_trainer(DictDefault(config()), model)
        args = AxolotlTrainingArguments(**arguments(tmp_path, max_steps=2, save_steps=1))
        trainer = AxolotlTrainer(model, args, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    with OpLog() as log:
        whole = trained()
    assert log.products().count(torch.int8) == 14 * (2 * 3 + 1) and losses(whole)[-1] < losses(whole)[0]
    assert losses(trained(f"{tmp_path}/checkpoint-1")) == losses(whole)
    assert_servable(whole.model, tmp_path / "served")
