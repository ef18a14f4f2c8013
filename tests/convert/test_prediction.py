"""The predicted speed of converted layers: what ``quantize_`` returns, prints and warns of."""

import doctest
import re
import sys
import time
import warnings

import pytest
import torch
from torch import nn

from halo_tensor import halo_config, hot_config, quantize_, recipe_config
from halo_tensor.analysis import expert_roofline, roofline
from halo_tensor.analysis.ceilings import H200
from halo_tensor.convert.prediction import Prediction, Predictor, shape_of
from halo_tensor.recipe import RECIPES, Recipe
from tests.helpers.moe_models import experts_of, mixture

CPU = torch.device("cpu")
QWEN3_30B_A3B = {"hidden_size": 2048, "moe_intermediate_size": 768, "experts": 128, "num_experts_per_tok": 8}
INT8 = halo_config(1, "int8")


def stack(*widths: tuple[int, int], layers: int = 2) -> nn.Module:
    """Layers without memory: what is predicted depends on widths alone."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Sequential(*(nn.Linear(k, n, bias=False) for k, n in widths)) for _ in range(layers)))


def on_meta(family: str, **sizes):
    with torch.device("meta"):
        return mixture(family, **{"layers": 2, **sizes})


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_(*args, **kwargs)


def test_the_conversion_shows_the_gain_of_each_layer():
    conversion = quietly(stack((768, 3072), (4096, 4096)), INT8, gpu="NVIDIA H200")
    predicted = conversion.predicted
    assert list(predicted.gains) == conversion.converted == ["0.0", "0.1", "1.0", "1.1"]
    sizes = {"tokens": 8192, "in_features": 768, "out_features": 3072}
    both = tuple(roofline.seconds(recipe, sizes, ceilings=H200) for recipe in (Recipe(), INT8.recipe))
    assert predicted.seconds["0.0"] == predicted.seconds["1.0"] == both and predicted.gains["0.0"] == both[0] / both[1]
    high, low = (sum(seconds[i] for seconds in predicted.seconds.values()) for i in (0, 1))
    assert predicted.gain == high / low and predicted.gains["0.0"] < 1 < predicted.gain < predicted.gains["0.1"]
    assert predicted.slower == ["0.0", "1.0"]
    head, *lines = str(predicted).splitlines()
    assert head == f"predicted speed of these layers, compiled, on an H200 with 8192 tokens: {predicted.gain:.2f}× bf16"
    assert lines == [
        f"  {predicted.gains['0.0']:.2f}× 768→3072: *.* (2 layers)",
        f"  {predicted.gains['0.1']:.2f}× 4096→4096: *.* (2 layers)",
    ]
    assert str(conversion).endswith(str(predicted))


def test_the_example_runs():
    module = sys.modules[Prediction.__module__]
    (test,) = doctest.DocTestFinder().find(Prediction, "Prediction", module)[:1]
    assert len(test.examples) == 5 and not doctest.DocTestRunner().run(test).failed


def test_more_tokens_gain_more_and_a_frozen_layer_has_two_products():
    few, many = (quietly(stack((2048, 2048)), INT8, gpu="H200", tokens=n).predicted for n in (1024, 16384))
    assert few.gain < 1 < many.gain and "with 16384 tokens" in many.where
    model = stack((2048, 2048))
    model[0].requires_grad_(False)
    seconds = quietly(model, INT8, gpu="H200").predicted.seconds
    sizes = {"tokens": 8192, "in_features": 2048, "out_features": 2048}
    options = {"products": ("output", "grad_input"), "trained": False, "ceilings": H200}
    assert seconds["0.0"] == tuple(roofline.seconds(r, sizes, **options) for r in (Recipe(), INT8.recipe))
    assert seconds["1.0"] == tuple(roofline.seconds(r, sizes, ceilings=H200) for r in (Recipe(), INT8.recipe))


def test_one_warning_names_the_layers_that_lose_and_the_option():
    with pytest.warns(UserWarning, match="slower") as caught:
        quantize_(stack((768, 768), (4096, 4096), layers=12), INT8, gpu="H200")
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(
        "12 of 24 converted layers are predicted to be slower than in bf16 on an H200 with 8192 tokens:\n  0."
    )
    assert "768→768: *.* (12 layers)" in text and "4096" not in text and "min_gain=1.0" in text and "tokens=" in text
    assert warning.filename == __file__


def test_layers_that_gain_or_that_the_caller_has_decided_on_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantize_(stack((4096, 4096)), INT8, gpu="H200").predicted.slower == []
        assert quantize_(stack((768, 768)), INT8, gpu="H200", min_gain=0).predicted.slower == ["0.0", "1.0"]
        assert set(quantize_(stack((768, 768)), halo_config(dtype="bf16"), gpu="H200").predicted.gains.values()) <= {1.0}


def test_without_a_gpu_nothing_is_predicted_and_the_text_says_so(machine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conversion = quantize_(stack((768, 768)), INT8)
        assert conversion.predicted.gains == {} and conversion.predicted.gain is None
        assert str(conversion).endswith(
            "no speed is predicted: This machine has no NVIDIA GPU. gpu='H200', for example, names a GPU"
        )
        machine("NVIDIA H100 PCIe", (9, 0))
        unknown = quantize_(stack((768, 768)), INT8)
        assert "The rates of NVIDIA H100 PCIe are not known" in str(unknown) and not unknown.predicted.gains
    with pytest.raises(ValueError, match=r"gpu='H300' is not known; known are A100, .*RTX 5090"):
        quantize_(stack((768, 768)), INT8, gpu="H300")


def test_the_gpu_at_hand_is_predicted_for_a_model_on_the_cpu_and_changes_nothing(machine):
    torch.manual_seed(0)
    weight = torch.randn(768, 768)
    codes = []
    for name in (None, "NVIDIA H200"):
        if name:
            machine(name, (9, 0))
        model = nn.Sequential(nn.Linear(768, 768, bias=False))
        model[0].weight.data.copy_(weight)
        conversion = quietly(model, INT8)
        assert conversion.converted == ["0"] and bool(conversion.predicted.slower) == bool(name)
        codes.append(model[0].weight.operand.codes)
    assert torch.equal(*codes)


def test_what_a_gpu_cannot_run_is_not_predicted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp8 = quantize_(stack((768, 768)), halo_config(0, "fp8"), gpu="A100")
        blocks = quantize_(stack((768, 768)), recipe_config("mxfp8"), gpu="B200")
    assert "no speed is predicted: an A100 cannot multiply fp8" in str(fp8) and not fp8.predicted.gains
    assert "No kernel computes with scales of its blocks" in str(blocks)
    published = quietly(stack((768, 768)), INT8, gpu="A100")
    assert "on an A100 with 8192 tokens (by published rates; not measured there)" in str(published)


@pytest.mark.parametrize("name", [n for n in RECIPES if "fp8" not in n and "fp4" not in n])
def test_every_recipe_that_runs_on_a_gpu_is_predicted(name):
    model = stack((2048, 2048), layers=1)
    predicted = quietly(model, recipe_config(name), gpu="H200", filter_fn=lambda *_: True).predicted
    assert 0.1 < predicted.gains["0.0"] < 2


def test_convolutions_and_their_widths():
    model = nn.Sequential(nn.Conv2d(64, 128, 3, stride=2), nn.Conv2d(128, 64, 1), nn.Conv2d(256, 256, 1, groups=2))
    predicted = quietly(model, hot_config(), gpu="H200").predicted
    assert predicted.sides == {"0": "64→128, 3×3", "1": "128→64, 1×1", "2": "128→128, 1×1"}
    assert 0.3 < predicted.gains["1"] < predicted.gains["0"] < 1, "they compute in high precision"
    quantised = quietly(model, hot_config(quantized_convolutions="all"), gpu="H200").predicted
    assert quantised.gains["0"] < quantised.gains["1"] < 0.2, "the windows of the larger one are written and read"
    pointwise = quietly(model, hot_config(quantized_convolutions="pointwise"), gpu="H200").predicted
    assert pointwise.gains == predicted.gains | {name: quantised.gains[name] for name in ("1", "2")}
    shape = shape_of(model[0], 1000)
    assert (shape.tokens, shape.in_features, shape.out_features, shape.saved) == (1000, 576, 128, (4000, 64))
    one = shape_of(model[1], 1000)
    assert (one.in_features, one.saved, shape_of(model[2], 1000).groups) == (128, (1000, 128), 2)


@pytest.mark.parametrize(("tokens", "gains"), [(512, False), (8192, True)])
def test_experts_are_judged_as_other_layers(tokens, gains):
    """They gain with many tokens, and the one warning names them with few."""
    model = on_meta("Qwen3Moe", **QWEN3_30B_A3B)
    if gains:
        model.small = stack((768, 768))
    with pytest.warns(UserWarning, match="predicted to be slower") as caught:
        predicted = quantize_(model, INT8, gpu="H200", tokens=tokens).predicted
    (warning,) = caught
    name, shape = "model.layers.0.mlp.experts", expert_roofline.ExpertShape(tokens, 8, 128, 2048, 1536, 768)
    both = tuple(expert_roofline.seconds(r, shape, ceilings=H200) for r in (Recipe(), INT8.recipe))
    assert predicted.seconds[name] == predicted.seconds["model.layers.1.mlp.experts"] == both
    assert (predicted.gains[name] > 1) is gains and (name in predicted.slower) is not gains
    line = f"{both[0] / both[1]:.2f}× 128 experts, top 8, of 2048→1536, 768→2048: model.layers.*.mlp.experts (2 layers)"
    assert line in str(predicted) and (line in str(warning.message)) is not gains
    model = on_meta("Qwen3Moe", **QWEN3_30B_A3B).requires_grad_(False)
    frozen = quietly(model, INT8, gpu="H200", tokens=tokens).predicted.seconds[name]
    options = {"products": ("output", "grad_input"), "trained": False, "ceilings": H200}
    assert frozen == tuple(expert_roofline.seconds(r, shape, **options) for r in (Recipe(), INT8.recipe))


def test_experts_of_a_top_k_that_nothing_tells():
    model = on_meta("GptOss", hidden_size=2880, intermediate_size=2880, experts=32, layers=1)
    (name,) = experts_of(model)
    module = experts_of(model)[name]
    known = quietly(model, INT8, gpu="H200").predicted
    assert "32 experts, top 2, of 2880→5760, 2880→2880" in str(known) and shape_of(module, 8192).in_features_first
    for attribute in ("num_experts_per_tok", "experts_per_token"):
        setattr(model.config, attribute, 0)
    unknown = quietly(model, INT8, gpu="H200").predicted
    assert "32 experts, top 1 (assumed), of" in str(unknown) and unknown.gains[name] < known.gains[name]


def test_a_large_model_is_predicted_and_printed_in_no_time():
    """All layers of a Llama-3.2-1B."""
    widths = [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048), (2048, 8192), (2048, 8192), (8192, 2048)]
    model = stack(*widths, layers=16)
    names = quietly(model, INT8).converted
    assert len(names) == 112
    times = []
    for _ in range(5):
        start = time.perf_counter()
        text = str(Predictor("H200", CPU, 8192).of(model, names))
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05 and re.search(r"2048→512: \*\.\* \(32 layers\)", text)


def test_a_text_lists_few_widths():
    text = str(quietly(stack(*((128 * i, 128) for i in range(1, 12)), layers=1), INT8, gpu="H200").predicted)
    assert len(text.splitlines()) == 10 and text.endswith("  and 3 more widths, which are faster")


@pytest.mark.parametrize("tokens", [0, -1, 2.0, True, None])
def test_tokens_are_a_number(tokens):
    with pytest.raises(ValueError, match="tokens must be a positive integer, the tokens of a training step; got"):
        quantize_(stack((768, 768)), INT8, tokens=tokens)
