"""Which layers of a model are converted, and what is said of the others, on small models of transformers and PEFT."""

import copy
import warnings

import pytest
import torch
import torchao.quantization
from torch import nn

from halo_tensor import dequantize_, halo_config, hot_config, quantize_, report
from tests.helpers.small_models import IDS, gpt2, llama, mixtral

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from transformers.pytorch_utils import Conv1D  # noqa: E402

INT8 = halo_config(1, "int8", skip="")


def test_mixtures_are_said_to_be_left_alone():
    model = mixtral()
    with pytest.warns(UserWarning, match="only") as caught:
        found = quantize_(model, halo_config(1, "int8", granularity="tensor"))  # which experts cannot follow
    (message,) = [str(w.message) for w in caught]
    stacks = sum(p.numel() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3)
    attention = sum(model.get_submodule(n).weight.numel() for n in found.converted)
    assert found.share == attention / (attention + stacks) < 0.2 and len(found.converted) == 8
    assert f"only {100 * found.share:.0f} % of the parameters in the linear layers of this MixtralForCausalLM" in message
    assert "model.layers.0.mlp.experts, model.layers.1.mlp.experts: experts cannot follow this recipe: X needs" in message
    assert f"(granularity='row') ({100 * (1 - found.share):.0f} % of the parameters)" in message
    assert f"with {100 * found.share:.0f} % of the linear layers' parameters" in str(found)


def test_most_of_a_model_converted_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(llama(), halo_config(1, "int8"))
        skipped = quantize_(llama(), halo_config(1, "int8", skip="lm_head|mlp"))  # is what the caller wants
        chosen = quantize_(llama(), halo_config(1, "int8"), filter_fn=lambda m, name: name.endswith("q_proj"))
        quantize_(gpt2(), halo_config(1, "int8"))
    assert skipped.share < 0.5 and chosen.share == pytest.approx(0.1)
    with pytest.warns(UserWarning, match=r"(?s)only 39 % .*gate_proj, .* and 3 more: a width that .* 16 \(61 % of"):
        quantize_(llama(intermediate_size=264), halo_config(1, "int8"))


def test_the_loader_and_report_say_it_too(tmp_path):
    from halo_tensor.transformers import HaloQuantConfig

    model = mixtral()
    model.save_pretrained(tmp_path)
    per_tensor = HaloQuantConfig(granularity="tensor")
    with pytest.warns(UserWarning, match="only .* % of the parameters in the linear layers of this MixtralForCausalLM"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=per_tensor)
    only = {"int8": halo_config(1, "int8", granularity="tensor")}
    with pytest.warns(UserWarning, match="only .* % of the parameters in the linear layers of this MixtralForCausalLM"):
        found = report(model, {"input_ids": IDS, "labels": IDS}, candidates=only)
    assert found.share < 0.2 and found.to_dict()["share"] == found.share
    for text in (str(found), found.to_markdown(), found.to_html()):
        assert "gain nothing" in text and "mlp.experts: experts cannot follow this recipe" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report(llama(), {"input_ids": IDS, "labels": IDS}, candidates=only)
    assert found.share == 1 and "gain nothing" not in str(found) and "with 100 % of the linear layers'" in str(found)


def test_a_filter_may_take_containers():
    model = llama()
    found = quantize_(model, halo_config(1, "int8"), filter_fn=lambda module, name: ".mlp" in name)
    assert found.converted == [n for n in linears_in_order(model) if ".mlp" in n] and len(found.converted) == 6
    model = nn.Sequential(nn.Embedding(64, 128), nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128)), nn.ReLU())
    assert quantize_(model, halo_config(1, "int8"), filter_fn=lambda *_: True).converted == ["1.0"]
    with pytest.raises(
        ValueError, match="converts the weight of nn.Linear .* of Sequential: no layer of a kind that it knows"
    ):
        torchao.quantization.quantize_(model, halo_config(1, "int8"), filter_fn=lambda *_: True)
    with pytest.raises(ValueError, match="it has no nn.Linear, nn.Conv2d, Conv1D or experts"):
        quantize_(nn.Sequential(nn.Embedding(128, 128)), halo_config(1, "int8"), filter_fn=lambda *_: True)


def linears_in_order(model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "config", [INT8, halo_config(1, "fp6", frozen=True), halo_config(0, "fp8", keep_codes=False), hot_config()], ids=str
)
@pytest.mark.parametrize("sides", [(0, 128), (128, 0)])
def test_layers_without_features(config, sides):
    model = nn.ModuleDict({"empty": nn.Linear(*sides), "full": nn.Linear(128, 128)})
    plain = copy.deepcopy(model)
    found = quantize_(model, config, filter_fn=lambda *_: True)
    assert found.converted == ["full"] and "nothing to multiply" in found.skipped["empty"]
    results = []
    for either in (model, plain):
        x = torch.randn(4, sides[0], requires_grad=True)
        y = either["empty"](x)
        y.sum().backward()
        results.append((y, x.grad, either["empty"].weight.grad))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    assert quantize_(copy.deepcopy(plain), halo_config(1, "int8", min_features=0)).skipped.keys() == {"empty"}
    dequantize_(model)


@pytest.mark.parametrize("config", [INT8, halo_config(2, "int8", granularity="tensor"), hot_config()], ids=str)
@pytest.mark.parametrize("shape", [(0, 128), (3, 0, 128)])
def test_no_tokens(config, shape):
    layers = nn.ModuleDict({"linear": nn.Linear(128, 256), "conv1d": Conv1D(256, 128)})
    assert len(quantize_(layers, config).converted) == 2
    for layer in layers.values():
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (*shape[:-1], 256) and x.grad.shape == shape
        assert layer.weight.grad.shape == layer.weight.shape and not layer.weight.grad.any() and not layer.bias.grad.any()


def test_layers_that_are_nearly_linear():
    """Each is left alone for a reason that is its own, and its parameters are counted."""
    model = nn.ModuleDict(
        {
            "normed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(128, 128)),
            "spectral": torch.nn.utils.spectral_norm(nn.Linear(128, 128)),
            "lstm": nn.LSTM(128, 128),
            "bilinear": nn.Bilinear(128, 128, 128),
            "lazy": nn.LazyLinear(128),
            "plain": nn.Linear(128, 128),
        }
    )
    model.position_embeddings = nn.Parameter(torch.randn(256, 128))
    with pytest.warns(UserWarning, match="only 0.72 % of the parameters"):
        found = quantize_(model, halo_config(1, "int8"))
    assert found.converted == ["plain"] and found.skipped == {
        "normed": "its weight is computed from others in every forward",
        "spectral": "its weight is computed from others in every forward",
        "lazy": "its weight has no shape before the first batch",
        "lstm.weight_ih_l0": "a matrix of a LSTM, which is no layer",
        "lstm.weight_hh_l0": "a matrix of a LSTM, which is no layer",
        "bilinear.weight": "a stack of matrices, as of experts, which is not called through F.linear",
    }
    assert found.sizes["spectral"] == found.sizes["plain"] == 128 * 128 and "lazy" not in found.sizes


def test_a_layer_of_two_parents_is_converted_once():
    layer = nn.Linear(128, 128).requires_grad_(False)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    expected = nn.Sequential(copy.deepcopy(layer))
    quantize_(expected, halo_config(1, "fp6"))
    found = quantize_(model, halo_config(1, "fp6"))
    assert found.converted == ["a.0"] and model["a"][0] is model["b"][0]
    assert torch.equal(model["b"][0].weight.dequantize(), expected[0].weight.dequantize()), "frozen codes are rounded once"
