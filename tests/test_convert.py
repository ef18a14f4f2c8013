import copy
import logging

import pytest
import torch
import torchao.quantization
from torch import nn
from torchao.quantization import FqnToConfig

from halo_tensor import HaloWeight, balance_, dequantize_, halo_config, layer_filter, quantize_, recipe_config


class Model(nn.Module):
    """Two blocks, an embedding, and an output layer that may be tied to it."""

    def __init__(self, tied: bool = True, width: int = 128):
        super().__init__()
        self.embed = nn.Embedding(512, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(width, 256), "down": nn.Linear(256, width)}) for _ in "ab")
        self.router = nn.Linear(width, 8)
        self.head = nn.Linear(width, 512, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(x) + self.router(x).sum()


BLOCKS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_default_filter(tied, caplog):
    model = Model(tied)
    with caplog.at_level(logging.INFO, "halo_tensor"):
        report = quantize_(model, halo_config(1, "int8"))
    assert report.converted == BLOCKS
    assert report.skipped == {
        "router": "fewer than min_features=128 features on a side",
        "head": "its weight is tied to another layer's" if tied else "it is the output embedding",
    }
    assert [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), HaloWeight)] == BLOCKS
    assert ("4 of 6 layers" in str(report) and "tied" in str(report)) or not tied
    assert str(report) in caplog.text
    assert (model.head.weight is model.embed.weight) == tied


class Scaled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T / 2


class Borrowed(nn.Linear):
    """As some adapters of PEFT, whose weight is that of the layer they wrap."""

    def __init__(self, base):
        nn.Module.__init__(self)
        self.base = base
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, None

    weight = property(lambda self: self.base.weight)


def test_layers_of_another_kind_are_left_alone_and_named():
    model = nn.ModuleDict({"own": Scaled(128, 128), "wrapper": Borrowed(nn.Linear(128, 128)), "plain": nn.Linear(128, 128)})
    model.experts = nn.Parameter(torch.randn(4, 128, 256))
    model.kernel = nn.Parameter(torch.randn(128, 128, 3))
    with pytest.warns(UserWarning, match=r"(?s)only 18 % of the parameters.*experts: a stack .* \(73 % of the parameters\)"):
        report = quantize_(model, halo_config(1, "int8"))
    assert report.converted == ["wrapper.base", "plain"] and report.share == pytest.approx(2 / 11)
    assert report.skipped == {
        "own": "it is a Scaled, whose forward may be its own",
        "wrapper": "its weight is another module's",
        "experts": "a stack of matrices, as of experts, which is not called through F.linear",
    }
    with pytest.warns(UserWarning, match="only 9 %"):
        quantize_(model, halo_config(1, "int8"), filter_fn=lambda module, name: name == "own")
    with pytest.warns(UserWarning, match="runs in high precision"):
        model["own"](torch.randn(2, 128))


def test_a_layer_as_wide_as_the_vocabulary_is_no_head():
    """tests/layers/test_kinds.py has more of this."""
    model = nn.ModuleDict({"embed": nn.Embedding(512, 128), "up": nn.Linear(128, 512), "head": nn.Linear(128, 512)})
    report = quantize_(copy.deepcopy(model), halo_config(1, "int8"))
    assert report.converted == ["up"] and report.skipped == {"head": "it is the output embedding"}
    model.get_output_embeddings = lambda: model["up"]
    assert quantize_(model, halo_config(1, "int8")).converted == ["head"]


def test_skip_is_a_regular_expression():
    assert quantize_(Model(), halo_config(skip=r"blocks\.1\.|router")).converted == BLOCKS[:2]


def test_widths_that_units_cannot_address_are_left_alone():
    model = nn.ModuleList([nn.Linear(128, 136), nn.Linear(128, 128)])
    with pytest.warns(UserWarning, match=r"0: a width that is no multiple of 16 \(52 % of the parameters\)"):
        report = quantize_(model, halo_config())
    assert report.converted == ["1"] and "multiple of 16" in report.skipped["0"]


def test_attention_that_bypasses_f_linear_is_left_alone():
    model = nn.ModuleList([nn.MultiheadAttention(128, 2), nn.Linear(128, 128)])
    with pytest.warns(UserWarning, match=r"0.in_proj_weight: a matrix of a MultiheadAttention, which is no layer \(60 %"):
        report = quantize_(model, halo_config())
    assert report.converted == ["1"] and "F.linear" in report.skipped["0.out_proj"]


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


def test_the_output_embedding_is_the_largest_vocabulary():
    """Not any layer as wide as some table of positions."""
    model = nn.ModuleDict({"tokens": nn.Embedding(512, 128), "positions": nn.Embedding(256, 128), "up": nn.Linear(128, 256)})
    assert quantize_(model, halo_config()).converted == ["up"]


@pytest.mark.parametrize("config", ["int8", None, halo_config], ids=["string", "none", "function"])
def test_what_is_no_config(config):
    with pytest.raises(TypeError, match=r"a config is what halo_config\(level=1, dtype='int8'\) makes"):
        quantize_(nn.Sequential(nn.Linear(128, 128)), config)


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
