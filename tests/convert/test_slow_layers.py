"""``min_gain``: layers that are predicted to gain too little stay in high precision."""

import warnings

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

from halo_tensor import HaloWeight, LayerConfigs, halo_config, quantize_, recipe_config
from tests.helpers.moe_models import mixture

INT8 = halo_config(1, "int8")
GAIN = {"gpu": "H200", "min_gain": 1.0}


def model(device: str = "meta") -> nn.Module:
    with torch.device(device):
        return nn.ModuleDict({"small": nn.Linear(768, 768), "large": nn.Linear(4096, 4096), "other": nn.Linear(4096, 4096)})


def is_plain(module: nn.Module) -> bool:
    return type(module.weight) is nn.Parameter


def test_layers_that_lose_stay_plain_and_the_report_says_why():
    m = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conversion = quantize_(m, INT8, **GAIN)
    assert conversion.converted == ["large", "other"] and is_plain(m["small"])
    reason = conversion.skipped["small"]
    assert reason.startswith("predicted at 0.5") and reason.endswith(
        "× bf16's speed on an H200 with 8192 tokens, below min_gain=1"
    )
    assert f"left alone: small: {reason}" in str(conversion) and set(conversion.predicted.gains) == {"large", "other"}
    assert quantize_(model(), INT8, gpu="H200", min_gain=0.5).converted == ["small", "large", "other"]
    assert quantize_(model(), INT8, **GAIN, filter_fn=lambda m, name: name != "other").converted == ["large"]


def test_the_limit_is_exact():
    m = model()
    with pytest.warns(UserWarning, match="1 of 3"):
        gain = quantize_(m, INT8, gpu="H200").predicted.gains["small"]
    assert "small" in quantize_(model(), INT8, gpu="H200", min_gain=gain).converted
    assert "small" not in quantize_(model(), INT8, gpu="H200", min_gain=gain + 1e-9).converted


def test_a_converted_layer_becomes_plain_again():
    """As a user calls quantize_ again, after the warning."""
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(768, 768), nn.Linear(256, 1024))
    before = m[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="slower than in bf16"):
        quantize_(m, INT8, gpu="H200")
    assert isinstance(m[0].weight, HaloWeight)
    with pytest.warns(
        UserWarning, match="no layer of this Sequential reaches min_gain=1 on an H200 .*stays in high precision: "
    ):
        conversion = quantize_(m, INT8, **GAIN)
    assert conversion.converted == [] and is_plain(m[0]) and torch.equal(m[0].weight, before)


def test_nothing_reaches_it():
    m = nn.Sequential(*(nn.Linear(768, 768) for _ in range(3)))
    with pytest.warns(UserWarning, match="no layer") as caught:
        conversion = quantize_(m, INT8, **GAIN)
    (warning,) = caught
    assert str(warning.message).endswith("stays in high precision: * (3 layers)") and warning.filename == __file__
    assert not conversion.converted and all(is_plain(layer) for layer in m)


@pytest.mark.parametrize(
    "configs",
    [
        {"small": INT8, "large": halo_config(0, "fp8"), "other": INT8},
        {"small.weight": INT8, "re:large|other": INT8},
        {r"re:\w+": INT8},
        {r"re:\w+\.weight": INT8},
    ],
    ids=["names", "a weight", "a pattern", "a pattern of weights"],
)
def test_configs_by_name(configs):
    m = model()
    assert sorted(quantize_(m, FqnToConfig(configs), **GAIN).converted) == ["large", "other"] and is_plain(m["small"])
    assert len(configs) == len(FqnToConfig(configs).fqn_to_config), "the caller's config is not changed"


def test_each_layer_is_judged_by_its_own_config():
    configs = LayerConfigs({"large": INT8, "other": recipe_config("jetfire")}, {})
    conversion = quantize_(model(), configs, **GAIN)
    assert conversion.converted == ["large"] and conversion.skipped["other"].startswith("predicted at 0.")
    assert conversion.skipped["small"] == "filter_fn or the config says so"


def test_a_machine_without_a_gpu_wants_a_name(machine):
    with pytest.raises(
        ValueError, match=r"min_gain=1 needs a prediction. This machine has no NVIDIA GPU: name the GPU .*H200"
    ):
        quantize_(model(), INT8, min_gain=1.0)
    assert quantize_(model(), INT8, min_gain=0).converted == ["small", "large", "other"], (
        "nothing is left out, so nothing asked"
    )
    machine("NVIDIA GeForce RTX 4070", (8, 9))
    with pytest.raises(ValueError, match="The rates of NVIDIA GeForce RTX 4070 are not known: name the GPU"):
        quantize_(model(), INT8, min_gain=1.0)
    machine("NVIDIA H200", (9, 0))
    assert quantize_(model(), INT8, min_gain=1.0).converted == ["large", "other"]


def test_what_cannot_be_judged():
    with pytest.raises(ValueError, match="needs a prediction. an A100 cannot multiply fp8"):
        quantize_(model(), halo_config(0, "fp8"), gpu="A100", min_gain=1.0)
    with pytest.raises(ValueError, match="min_gain needs a config of this library"):
        quantize_(model(), Int8WeightOnlyConfig(), **GAIN)
    for wrong in (-1, "1.0", True, float("nan")):
        with pytest.raises(ValueError, match="min_gain must be a speed, × bf16, as 1.0; got"):
            quantize_(model(), INT8, gpu="H200", min_gain=wrong)
    m = model()
    m["small"].weight = nn.Parameter(torch.zeros(768, 768, dtype=torch.int8), requires_grad=False)
    assert quantize_(m, INT8, **GAIN).converted == ["large", "other"]


def test_layers_that_share_an_input_are_judged_again_if_one_is_left_out():
    """The third of quantising X that k and v leave to q makes q slower."""

    def attention():
        with torch.device("meta"):
            return nn.ModuleDict(
                {"q_proj": nn.Linear(1600, 1600), "k_proj": nn.Linear(1600, 400), "v_proj": nn.Linear(1600, 400)}
            )

    with pytest.warns(UserWarning, match="slower than in bf16"):
        together = quantize_(attention(), INT8, gpu="H200").predicted.gains
    with pytest.warns(UserWarning, match="2 of 2|slower than in bf16|left alone"):
        alone = quantize_(nn.Sequential(attention()["q_proj"]), INT8, gpu="H200", filter_fn=lambda *_: True).predicted.gains[
            "0"
        ]
    assert together["k_proj"] == together["v_proj"] < alone < together["q_proj"]
    between = (alone + together["q_proj"]) / 2
    with pytest.warns(UserWarning, match="no layer of this ModuleDict reaches"):
        skipped = quantize_(attention(), INT8, gpu="H200", min_gain=between).skipped
    assert f"{alone:.2f}×" in skipped["q_proj"]
    kept = quantize_(attention(), INT8, gpu="H200", min_gain=alone)
    assert kept.converted == ["q_proj"] and kept.predicted.gains["q_proj"] == alone


@pytest.mark.parametrize("by_name", [False, True])
def test_experts_that_lose_stay_plain(by_name):
    """Between the speeds of both precisions the limit decides, by one config and by configs of names."""
    name = "model.layers.0.mlp.experts"

    def mixed():
        with torch.device("meta"):
            return mixture("Qwen3Moe", hidden_size=1024, moe_intermediate_size=512)

    config = FqnToConfig({name: INT8, "re:.*_proj": INT8}) if by_name else INT8
    gain = quantize_(mixed(), config, gpu="H200", min_gain=0).predicted.gains[name]
    assert 0.5 < gain < 2
    m = mixed()
    kept = quantize_(m, config, gpu="H200", min_gain=gain)
    assert name in kept.converted and isinstance(m.get_submodule(name).down_proj, HaloWeight)
    left = quantize_(m, config, gpu="H200", min_gain=gain + 1e-9)  # which makes them plain again
    assert name not in left.converted and type(m.get_submodule(name).down_proj) is nn.Parameter
    assert left.skipped[name].startswith(f"predicted at {gain:.2f}× bf16's speed on an H200 with 8192 tokens, below min_gain=")


def test_a_filter_is_asked_once_about_each_layer():
    m, asked = model("cpu"), []
    m["again"] = m["small"]
    quantize_(m, INT8, filter_fn=lambda module, name: asked.append(name) or True)
    assert asked == ["small", "large", "other"]
