"""``--halo int8`` through transformers' and TRL's parsers."""

import pytest

from halo_tensor import halo_config, recipe_config

transformers = pytest.importorskip("transformers")
from halo_tensor.transformers import HaloArguments  # noqa: E402


def parsed(*words: str) -> HaloArguments:
    return transformers.HfArgumentParser(HaloArguments).parse_args_into_dataclasses(list(words))[0]


@pytest.mark.parametrize(
    ("words", "config", "balance"),
    [
        (["--halo", "int8"], halo_config(1, "int8"), 0),
        (["--halo", "fp8"], halo_config(0, "fp8"), 0),
        (["--halo", "int8", "--halo_level", "2", "--halo_balance", "4"], halo_config(2, "int8"), 4),
        (["--halo", '{"dtype": "fp6", "skip": "gate", "balance": 1}'], halo_config(1, "fp6", skip="gate"), 1),
        (["--halo", "switchback"], recipe_config("switchback"), 0),
    ],
)
def test_arguments_become_a_callback(words, config, balance):
    (callback,) = parsed(*words).callbacks()
    assert (callback.switch.config, callback.switch.balance, callback.switch.report) == (config, balance, False)


def test_without_halo_there_is_no_callback():
    assert parsed().callbacks() == []
    with pytest.raises(ValueError, match="--halo_balance needs --halo, for example --halo int8"):
        parsed("--halo_balance", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--halo", "int9"], r"halo must be a dtype \(int8, fp8, .*\), a recipe \(.*hot_llm.*\), .*; got 'int9'"),
        (["--halo", '{"lvel": 1}'], "halo has no key 'lvel'; its keys are .*balance, .*level"),
        (["--halo", '{"level": 1'], "halo is no JSON object"),
        (["--halo", "int8", "--halo_level", "3"], "level must be one of 0, 1, 2; got 3"),
        (["--halo", '{"dtype": "int8", "level": 1}', "--halo_level", "2"], "'level' is given twice: 1 and 2"),
    ],
)
def test_what_is_not_known_is_one_error(words, message):
    with pytest.raises(ValueError, match=message):
        parsed(*words)


def test_trl_parses_it_too():
    trl = pytest.importorskip("trl")
    (arguments,) = trl.TrlParser(HaloArguments).parse_args_and_config(["--halo", "int8"])
    assert len(arguments.callbacks()) == 1
