"""quantize_ and dequantize_."""

import copy

import pytest
import torch
import torchao.quantization
from torch import nn
from torchao.quantization import FqnToConfig

from halo_tensor import HaloWeight, LayerConfigs, balance_, dequantize_, halo_config, layer_filter, quantize_, recipe_config
from tests.helpers.tied_model import BLOCKS, Model


def test_filter_fn_decides_alone_and_ties_hold():
    model = Model()
    report = quantize_(model, halo_config(1, "int8"), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name == "head")
    assert report.converted == ["head"]
    assert model.head.weight is model.embed.weight and isinstance(model.embed.weight, HaloWeight)
    model(torch.randint(0, 512, (2, 5))).sum().backward()
    assert type(model.embed.weight.grad) is torch.Tensor


def test_torchao_quantize_with_our_config():
    model = Model(tied=False)
    torchao.quantization.quantize_(model, halo_config(1, "int8"), filter_fn=layer_filter(model, halo_config()))
    assert all(isinstance(model.get_submodule(name).weight, HaloWeight) for name in BLOCKS)
    assert type(model.head.weight) is nn.Parameter


def test_fqn_to_config():
    model = Model(tied=False)
    configs = {
        "blocks.0.up": halo_config(0, "fp8"),
        r"re:blocks\.1\.(up|down)": halo_config(2, "int8"),
        "blocks.0.down.weight": recipe_config("switchback"),
    }
    report = quantize_(model, FqnToConfig(configs))
    assert sorted(report.converted) == sorted(BLOCKS)
    recipes = {name: model.get_submodule(name).weight.recipe for name in BLOCKS}
    assert recipes["blocks.0.up"] == halo_config(0, "fp8").recipe
    assert recipes["blocks.1.up"] == recipes["blocks.1.down"] == halo_config(2, "int8").recipe
    assert recipes["blocks.0.down"] == recipe_config("switchback").recipe


def test_a_root_linear_is_converted_in_place():
    model = nn.Linear(128, 256)
    assert quantize_(model, halo_config()).converted == [""]
    assert isinstance(model.weight, HaloWeight)


def test_converting_again_changes_the_recipe_and_keeps_the_weight():
    model = nn.Linear(128, 256)
    master = model.weight.detach().clone()
    quantize_(model, halo_config(1, "int8"))
    assert quantize_(model, halo_config(0, "fp8")).converted == [""]
    assert model.weight.recipe == halo_config(0, "fp8").recipe
    assert torch.equal(model.weight.master, master)


@pytest.mark.parametrize("tied", [True, False])
def test_dequantize_gives_back_plain_layers(tied):
    model = Model(tied)
    before = copy.deepcopy(model.state_dict())
    quantize_(model, halo_config(1, "int8"), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    model.blocks[0]["up"].weight.requires_grad_(False)
    dequantize_(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert not model.blocks[0]["up"].weight.requires_grad and model.blocks[0]["down"].weight.requires_grad
    assert (model.head.weight is model.embed.weight) == tied
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_model_with_nothing_to_convert_is_an_error():
    with pytest.raises(ValueError, match="(?s)no layer of this Sequential was converted:.*0: fewer than min_features=128"):
        quantize_(nn.Sequential(nn.Linear(64, 64)), halo_config())
    with pytest.raises(ValueError, match="no nn.Linear"):
        quantize_(nn.ReLU(), halo_config())
    with pytest.raises(ValueError, match="filter_fn or the config says so"):
        quantize_(nn.Linear(128, 128), halo_config(), filter_fn=lambda m, n: False)


def test_weights_that_are_not_plain_are_refused():
    model = nn.Linear(128, 128)
    model.weight = nn.Parameter(torch.zeros(128, 128, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="Parameter of torch.int8: only plain floating-point weights"):
        quantize_(model, halo_config())
    with pytest.raises(ValueError, match="converts the weight of nn.Linear"):
        torchao.quantization.quantize_(nn.Embedding(128, 128), halo_config(), filter_fn=lambda *_: True)


def test_one_warning_names_the_layers_left_unrotated():
    model = nn.ModuleDict({"odd": nn.Linear(136, 128), "even": nn.Linear(128, 128), "strange": nn.Linear(200, 128)})
    with pytest.warns(UserWarning, match=r"left un-rotated.*odd \(in_features 136\), strange \(in_features 200\)") as caught:
        quantize_(model, halo_config(1, "int8"), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    assert len([w for w in caught if "un-rotated" in str(w.message)]) == 1
    y = model["odd"](torch.randn(4, 136))
    assert y.isfinite().all()


@pytest.mark.parametrize("config", ["int8", None, halo_config], ids=["string", "none", "function"])
def test_what_is_no_config(config):
    with pytest.raises(TypeError, match=r"a config is what halo_config\(level=1, dtype='int8'\) makes"):
        quantize_(nn.Sequential(nn.Linear(128, 128)), config)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"quantize_ converts an nn.Module, quantize_\(model, config\); got a HaloConfig"):
        quantize_(halo_config(), nn.Linear(128, 128))


def test_converted_in_inference_mode_and_trained_after_it():
    model, x = nn.Sequential(nn.Linear(128, 128)), torch.randn(16, 128)
    with torch.inference_mode():
        quantize_(model, halo_config(1, "int8"))
        balance_(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(x)
    before.square().sum().backward()
    optimizer.step()
    assert model[0].weight.grad is not None and not torch.equal(model(x), before)


def test_configs_of_no_layer():
    with pytest.raises(ValueError, match="these LayerConfigs name no layer"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(128, 128)), LayerConfigs({}))
    with pytest.raises(ValueError, match="(?s)no layer of this Sequential was converted.*filter_fn or the config says so"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(128, 128)), FqnToConfig({"1": halo_config()}))
